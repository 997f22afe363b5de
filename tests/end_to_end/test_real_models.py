"""Trained models that this project did not make: the identities hold at the precision in which values are stored.

The models and texts lie beside the repository and are not part of it; where they are not, these tests are skipped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from layerlake import SITES, CaptureSpec, Run, capture_run, open_lake
from layerlake.analyze.attention import AttentionOptions, AttentionStatistic
from layerlake.analyze.reduce import compute_tables

Array = np.ndarray[Any, np.dtype[Any]]

DATA = Path(os.environ.get("LAYERLAKE_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
TEXT_OF = {
    "tinytalk-neo-3m-chat": "tinystories_niklas6.txt",
    "stories260k-llama": "tinystories_niklas6.txt",
    "stdlib-neox-3m": "pile_excerpts_val200tok.jsonl",
    "tinygpt-shakespeare-gpt2": "tinyshakespeare_val10pct.txt",
}

pytestmark = pytest.mark.skipif(
    not (DATA / "models").is_dir(),
    reason="the real models are not here: put them into ../shared/data, or say where with LAYERLAKE_SHARED_DATA",
)


@dataclass(frozen=True)
class Real:
    """A run of a real model at float16, and Hugging Face's states and loss on the same tokens."""

    name: str
    lake: Path
    run: Run
    states: Array
    """``[boundary, token, d_model]``; the last is after the final norm."""
    last: Array
    """``[token, d_model]``: what the final norm is given."""
    loss_nats: float
    """The model's mean loss over the evaluation mask."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other longer than these models compute, where other processes take the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(TEXT_OF))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Capture 3000 tokens, and run the model on each document by itself."""
    name: str = request.param
    lake = tmp_path_factory.mktemp("real") / name
    model_path = DATA / "models" / name
    spec = CaptureSpec(
        model=model_path, dataset=DATA / "text" / TEXT_OF[name], max_tokens="3k", partition_tokens=1024
    )
    run = capture_run(lake, spec)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager").eval()
    norms: list[torch.Tensor] = []
    body = model.base_model
    final = next(getattr(body, n) for n in ("ln_f", "final_layer_norm", "norm") if hasattr(body, n))
    final.register_forward_pre_hook(lambda _module, given: norms.append(given[0][0]))
    states, losses = [], []
    tokens = run.tokens
    for document in run.stored_documents["document"].to_pylist():
        ids = tokens["token_id"].to_numpy()[tokens["document"].to_numpy() == document]
        padded = torch.from_numpy(ids.copy()).long()[None]
        with torch.inference_mode():
            out = model(padded, output_hidden_states=True, use_cache=False)
            loss = torch.nn.functional.cross_entropy(out.logits[0, 1:-1], padded[0, 2:], reduction="none")
        states.append(torch.cat(out.hidden_states).numpy())
        losses.append(loss.numpy())
    return Real(
        name,
        lake,
        run,
        np.concatenate(states, axis=1),
        torch.cat(norms).numpy(),
        float(np.concatenate(losses).mean()),
    )


def rounding(values: Array) -> Array:
    """The most by which float16 rounds each value: half a unit in the last of 11 bits."""
    most: Array = np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)
    return most


def test_the_capture_is_what_was_asked_for(real: Real) -> None:
    manifest = real.run.manifest
    assert 2500 < manifest.n_tokens <= 3000
    assert manifest.dtype == "float16"
    assert len(manifest.partitions) >= 3
    assert real.run.sites == tuple(SITES)
    has_no_bos = real.name == "tinygpt-shakespeare-gpt2"
    assert (manifest.bos_token_id is None) == has_no_bos
    assert max(manifest.captures[0]["self_check"].values()) < 1e-4


def test_the_residual_is_hugging_face_s_and_the_last_is_before_the_final_norm(real: Real) -> None:
    resid = real.run.resid.to_numpy().astype(np.float64)
    for boundary in range(real.run.shape.n_layers):
        error = np.abs(resid[boundary] - real.states[boundary])
        slack = 1e-5 * np.abs(real.states[boundary]).max()
        assert (error <= rounding(real.states[boundary]) + slack).all(), boundary
    slack = 1e-5 * np.abs(real.last).max()
    assert (np.abs(resid[-1] - real.last) <= rounding(real.last) + slack).all()
    assert np.abs(resid[-1] - real.states[-1]).max() > 0.5


def test_the_residual_adds_up_within_the_stored_precision(real: Real) -> None:
    run = real.run
    resid, attn, mlp = (
        getattr(run, site).to_numpy().astype(np.float64) for site in ("resid", "attn_out", "mlp_out")
    )
    error = np.abs(resid[1:] - resid[:-1] - attn - mlp)
    allowed = sum(rounding(values) for values in (resid[1:], resid[:-1], attn, mlp))
    assert (error <= 1.01 * allowed + 1e-5 * np.abs(resid).max()).all()


def test_the_neurons_make_the_mlp_s_output(real: Real) -> None:
    run = real.run
    post, weight = run.mlp_post.to_numpy().astype(np.float64), run.weight("W_out").astype(np.float64)
    rebuilt = post @ weight + run.weight("b_out")[:, None]
    out = run.mlp_out.to_numpy().astype(np.float64)
    allowed = rounding(post) @ np.abs(weight) + rounding(out) + 1e-5 * np.abs(out).max()
    assert (np.abs(rebuilt - out) <= allowed).all()


def test_pattern_rows_sum_to_1(real: Real) -> None:
    run = real.run
    for document in run.stored_documents["document"].to_pylist()[:6]:
        for layer in range(run.shape.n_layers):
            weights = run.attention(document, layer).to_numpy()
            allowed = rounding(weights).sum(axis=-1) + 1e-5
            assert (np.abs(weights.sum(axis=-1) - 1) <= allowed).all()
            assert weights.min() >= 0


def test_attention_is_as_local_by_its_sums_as_by_its_pattern(real: Real) -> None:
    """The sums are those of the device's float32, the pattern is float16."""
    run = real.run
    held = {site: partitions for site, partitions in run.manifest.sites.items() if site != "attn_band"}
    without = Run(run.store, dataclasses.replace(run.manifest, sites=held))
    by_sums, by_pattern = (
        compute_tables(AttentionStatistic.open, each, AttentionOptions(), scheduler="synchronous")[
            "attention_locality"
        ].to_pandas()
        for each in (run, without)
    )
    assert {*by_sums.source} == {"attn_band"}
    assert {*by_pattern.source} == {"pattern"}
    assert by_sums.columns.tolist() == by_pattern.columns.tolist()
    numbers = by_sums.select_dtypes("number").columns
    assert by_sums.mean_weight.notna().all()
    np.testing.assert_allclose(by_sums[numbers], by_pattern[numbers], rtol=0, atol=1e-3)


def test_the_lens_at_the_last_boundary_gives_the_model_s_own_loss(real: Real) -> None:
    lake = open_lake(real.lake)
    rows = lake.analyze("lens", scheduler="synchronous").table.to_pylist()
    last = [row for row in rows if row["boundary"] == real.run.shape.n_layers]
    assert last
    for row in last:
        assert row["n_tokens"] == real.run.masked_tokens.num_rows
        assert row["loss_nats"] == pytest.approx(real.loss_nats, abs=1e-3)
    (own,) = [row["loss_nats"] for row in rows if row["boundary"] == 0 and row["scale"] == "own"]
    assert own > real.loss_nats + 0.5


def test_the_loss_is_that_of_a_trained_model(real: Real) -> None:
    """``shared/data/README.md`` says what each is known to reach on its text, the NeoX apart."""
    known = {"tinytalk-neo-3m-chat": 3.1, "stories260k-llama": 1.9, "tinygpt-shakespeare-gpt2": 1.96}
    if real.name in known:
        assert real.loss_nats == pytest.approx(known[real.name], abs=1)
