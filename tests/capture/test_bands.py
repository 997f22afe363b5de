"""Band sums on the device equal those of packed triangles on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlake.analyze.attention import AttentionOptions, AttentionStatistic
from layerlake.analyze.reduce import compute_tables
from layerlake.capture.bands import band_sums
from layerlake.catalog import bands
from layerlake.catalog.run import Run
from layerlake.catalog.tables import attn_band_sums

if TYPE_CHECKING:
    from .conftest import Captured

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def random_pattern(lengths: list[int], n_heads: int, *, padding: float, longest: int = 0) -> torch.Tensor:
    """Causal patterns ``[batch, head, query, key]``; beyond each document everything is ``padding``."""
    room = max(*lengths, longest)
    logits = torch.randn(len(lengths), n_heads, room, room)
    causal = torch.ones(room, room).tril().bool()
    pattern = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    for document, n in enumerate(lengths):
        pattern[document, :, n:] = padding
        pattern[document, :, :, n:] = padding
    return pattern


def on_host(pattern: torch.Tensor, lengths: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The same from packed triangles, in float64: ``[document, head, query set, sum]``."""
    found = []
    for document, n in enumerate(lengths):
        packed = pattern[document, :, :n, :n].double().numpy()[:, *np.tril_indices(n)]
        found.append(bands.band_sums(packed, np.array([n]), np.array([0])))
    return np.concatenate(found)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 45), min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([1, 16, 17, 50])
)
def test_sums_equal_those_of_packed_triangles(lengths: list[int], n_heads: int, longest: int) -> None:
    pattern = random_pattern(lengths, n_heads, padding=torch.nan, longest=longest)
    sums = band_sums(pattern, lengths)
    assert (sums.dtype, sums.shape) == (torch.float32, (len(lengths), n_heads, 2, 18))
    np.testing.assert_allclose(sums.numpy(), on_host(pattern, lengths), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_float32_whatever_the_weights_are(device: str, dtype: torch.dtype) -> None:
    """In float16 the sum of 512 weights of 1 would already be off; 4096 of them in bfloat16 are lost entirely."""
    lengths = [700, 300]
    pattern = random_pattern(lengths, 2, padding=0).to(device, dtype)
    pattern[0, 0] = torch.eye(700, dtype=dtype, device=device)
    sums = band_sums(pattern, lengths)
    assert sums.device.type == device
    assert sums[0, 0, :, 0].tolist() == [700, 683]
    np.testing.assert_allclose(sums.cpu().numpy(), on_host(pattern.cpu(), lengths), atol=1e-4)


def test_a_view_that_is_not_contiguous_is_read_right() -> None:
    """As after a transposition, or with room for more keys than queries."""
    lengths = [20, 33]
    pattern = random_pattern(lengths, 3, padding=0)
    swapped = pattern.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.nn.functional.pad(pattern, (0, 5))[..., :33]
    assert not swapped.is_contiguous()
    for view in (swapped, wider):
        np.testing.assert_allclose(band_sums(view, lengths).numpy(), on_host(pattern, lengths), atol=1e-5)


def test_a_weight_that_is_not_finite_shows() -> None:
    """Capture counts such values: padding may hide none of a document's own."""
    pattern = random_pattern([20, 30], 1, padding=torch.nan)
    pattern[1, 0, 25, 20] = torch.nan
    finite = torch.isfinite(band_sums(pattern, [20, 30]))
    assert finite[0].all()
    assert (~finite[1, 0]).nonzero().tolist() == [[0, 5], [1, 5]]


def test_a_captured_run_has_the_sums_of_hugging_face_s_patterns(captured: Captured) -> None:
    run = captured.run
    lengths = run.stored_documents["n_tokens"].to_numpy().astype(np.int64)
    pairs = lengths * (lengths + 1) // 2
    found = attn_band_sums(run.attn_band, run.shape.n_layers, run.shape.n_heads)
    assert len(found) == len(lengths)
    assert max(lengths) > 17
    for layer, packed in enumerate(captured.expected["pattern"]):
        expected = bands.band_sums(packed, lengths, np.cumsum(pairs) - pairs)
        np.testing.assert_allclose(found[:, layer], expected, atol=1e-5)


def test_a_captured_run_is_as_local_by_its_sums_as_by_its_pattern(captured: Captured) -> None:
    held = {site: where for site, where in captured.run.manifest.sites.items() if site != "attn_band"}
    without = Run(captured.run.store, replace(captured.run.manifest, sites=held))
    by_sums, by_pattern = (
        compute_tables(AttentionStatistic.open, run, AttentionOptions(), scheduler="synchronous")[
            "attention_locality"
        ]
        for run in (captured.run, without)
    )
    assert {*by_sums["source"].to_pylist(), *by_pattern["source"].to_pylist()} == {"attn_band", "pattern"}
    for name in ("mean_weight", "cumulative_weight", "bos_weight", "mean_weight_lo", "uniform_weight"):
        found, expected = by_sums[name].to_numpy(), by_pattern[name].to_numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=name)
