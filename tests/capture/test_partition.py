"""From hook to buffer: packing, casting, and values that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from layerlake.capture import execute
from layerlake.capture.description import describe_model
from layerlake.capture.execute import capture_run
from layerlake.capture.hooks import listen, pad, unpad
from layerlake.capture.model import OpenModel, open_model
from layerlake.capture.partition import run_partition
from layerlake.capture.plan import CaptureSpec, plan_capture
from layerlake.catalog.errors import OverflowInCapture
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES

Array = np.ndarray[Any, np.dtype[Any]]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_unpad_keeps_documents_and_nothing_else(lengths: list[int]) -> None:
    batch = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    padded = pad(batch, device=torch.device("cpu"))
    assert padded.shape == (len(lengths), max(lengths))
    flat = unpad(padded[:, :, None].float(), lengths)[:, 0]
    assert flat.tolist() == [token for ids in batch for token in ids]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3))
def test_patterns_are_packed_query_by_query(lengths: list[int], n_heads: int) -> None:
    longest = max(lengths)
    value = torch.arange(len(lengths) * n_heads * longest**2).reshape(-1, n_heads, longest, longest)
    packed = unpad(value, lengths)
    start = 0
    for i, n in enumerate(lengths):
        for query in range(n):
            for key in range(query + 1):
                pair = start + query * (query + 1) // 2 + key
                assert packed[:, pair].tolist() == value[i, :, query, key].tolist()
        start += n * (n + 1) // 2
    assert packed.shape == (n_heads, start)


@pytest.fixture(scope="module")
def opened(model_path: Callable[[str], Path]) -> OpenModel:
    return open_model(describe_model(model_path("gpt2")), device="cpu")


def test_listening_ends_with_the_block_even_if_it_raises(opened: OpenModel) -> None:
    seen: list[int] = []
    ids = torch.ones((1, 3), dtype=torch.int64)

    def listen_and_stop() -> None:
        with listen(opened, {"blocks.0.hook_attn_out": lambda _: seen.append(1)}):
            opened.body(ids, use_cache=False)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        listen_and_stop()
    opened.body(ids, use_cache=False)
    assert seen == [1]


def test_the_lm_head_is_not_run(opened: OpenModel, make_spec: Callable[..., CaptureSpec]) -> None:
    calls: list[str] = []
    whole: Any = opened.bridge.original_model
    tap = whole.get_output_embeddings().register_forward_hook(lambda *_: calls.append("head"))
    plan = plan_capture(make_spec())
    assert plan.frozen is not None
    documents = execute._documents(plan, "unused")  # noqa: SLF001
    for work in plan.frozen.work:
        run_partition(opened, plan.manifest, work, documents)
    assert calls == []
    whole(torch.ones((1, 3), dtype=torch.int64))
    tap.remove()
    assert calls == ["head"]


def test_a_whole_capture_runs_the_head_for_the_self_check_only(
    make_model: Callable[..., Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    model, calls = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append("body"))
    capture_run(tmp_path / "lake", make_spec(model=model, tokenizer=tokenizer))
    assert calls.count("head") == 1
    assert calls.count("body") > 4


def _to_bfloat16(values: Array) -> Array:
    rounded: Array = torch.from_numpy(values).bfloat16().float().numpy()
    return rounded


@pytest.mark.parametrize(
    ("dtype", "cast"), [("float16", lambda values: values.astype(np.float16)), ("bfloat16", _to_bfloat16)]
)
def test_half_precision_is_the_nearest_number(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, dtype: str, cast: Callable[[Array], Array]
) -> None:
    exact = capture_run(tmp_path / "lake", make_spec())
    half = capture_run(tmp_path / "lake", make_spec(dtype=dtype))
    assert half.run_id != exact.run_id
    for site in SITES:
        np.testing.assert_array_equal(
            getattr(half, site).to_numpy(), cast(getattr(exact, site).to_numpy()), err_msg=site
        )
    assert half.array("resid").dtype == ("uint16" if dtype == "bfloat16" else dtype)
    assert half.array("resid").attrs["dtype"] == dtype


@pytest.fixture
def large(make_model: Callable[..., Any]) -> Any:
    """A model whose second MLP adds 70,000 to one dimension: more than fp16 holds."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[5] = 70_000
    return model


def test_a_value_that_does_not_fit_stops_the_capture_and_nothing_reads_as_whole(
    large: Any,
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"model": large, "tokenizer": tokenizer}
    with pytest.raises(OverflowInCapture, match=r"Site mlp_out at layer 1 reaches 7e\+04.*float16") as caught:
        capture_run(tmp_path / "lake", make_spec(**given, dtype="float16"))
    assert "bfloat16" in caught.value.hint
    with pytest.raises(OverflowInCapture, match="Site resid at boundary 2 "):
        capture_run(tmp_path / "other", make_spec(**given, dtype="float16", sites="resid"))
    for lake in ("lake", "other"):
        assert Lake(tmp_path / lake).run_ids == []
        assert Lake(tmp_path / lake).runs() == []

    run = capture_run(tmp_path / "lake", make_spec(**given, dtype="bfloat16"))
    assert Lake(tmp_path / "lake").run_ids == [run.run_id]
    assert float(run.mlp_out.max()) > 65_504


def test_the_largest_half_is_not_an_overflow(
    make_model: Callable[..., Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[5] = 65_000
    run = capture_run(tmp_path / "lake", make_spec(model=model, tokenizer=tokenizer, dtype="float16"))
    assert 64_900 < float(run.mlp_out.max()) <= 65_504


def test_a_layer_of_zeros_is_stored_like_any_other(
    make_model: Callable[..., Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    """Zarr leaves chunks of zeros unwritten; a missing shard would look like a lost one."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.zero_()
        model.transformer.h[1].attn.c_proj.bias.zero_()
    plan = plan_capture(make_spec(model=model, tokenizer=tokenizer))
    run: Run = capture_run(tmp_path / "lake", make_spec(model=model, tokenizer=tokenizer))
    assert not run.attn_out.to_numpy()[1].any()
    assert run.attn_out.to_numpy()[0].any()
    assert run.objects.num_rows == sum(cost.n_objects for cost in plan.costs)
    for row in run.objects.to_pylist():
        path = tmp_path / "lake" / "runs" / run.run_id / "activations.zarr" / row["name"]
        assert path.stat().st_size == row["nbytes"]
