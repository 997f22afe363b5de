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

from layerlake.capture.description import describe_model
from layerlake.capture.execute import capture_run, execute_plan, numerics
from layerlake.capture.hooks import listen, pad, unpad
from layerlake.capture.model import OpenModel, open_model
from layerlake.capture.partition import PartitionBuffer, place_tokens, run_batch
from layerlake.capture.plan import plan_capture
from layerlake.capture.spec import CaptureSpec
from layerlake.capture.staging import Staging
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
        with listen(opened, {("attn_out", 0): lambda _: seen.append(1)}):
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
    documents = place_tokens(plan.documents, plan.tokens)
    with Staging(opened.device, slot_nbytes=0, n_slots=0) as staging:
        for work in plan.frozen.work:
            buffer = PartitionBuffer(plan.manifest, work, documents)
            for batch in work.batches:
                run_batch(opened, buffer, batch, staging)
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
    for site in (name for name, site in SITES.items() if site.is_array):
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
    message = r"Site mlp_out at layer 1 has \d+ values that float16 cannot hold \(documents \d"
    with pytest.raises(OverflowInCapture, match=message) as caught:
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


def test_what_does_not_fit_is_kept_and_counted_if_asked(
    large: Any,
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    spec = make_spec(model=large, tokenizer=tokenizer, dtype="float16", overflow="keep")
    outcome = execute_plan(plan_capture(spec, tmp_path / "lake"), tmp_path / "lake")
    assert outcome.run is not None
    # one dimension of every token: in what the MLP adds, and in the stream from there on
    expected = {"mlp_out": outcome.run.n_tokens, "resid": 2 * outcome.run.n_tokens}
    for site, n in expected.items():
        assert int(np.isinf(getattr(outcome.run, site).to_numpy()).sum()) == n
    assert outcome.nonfinite == expected
    assert outcome.run.manifest.captures[-1]["nonfinite"] == expected


def test_what_is_not_a_number_is_said_to_be_none(
    make_model: Callable[..., Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    """In a token that the self-check, which sees the beginnings of the first two documents, does not meet."""
    model = make_model("llama")
    spec = make_spec(model=model, tokenizer=tokenizer, sites="resid")
    plan = plan_capture(spec)
    assert plan.frozen is not None
    checked = plan.frozen.work[0].batches[0][:2]
    token_ids, documents = plan.tokens["token_id"].to_numpy(), plan.tokens["document"].to_numpy()
    unseen = np.setdiff1d(token_ids, token_ids[np.isin(documents, checked)])[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[unseen] = float("nan")
    with pytest.raises(
        OverflowInCapture, match=r"at boundary 0 has \d+ values that are not a number"
    ) as caught:
        capture_run(tmp_path / "lake", make_spec(model=model, tokenizer=tokenizer, sites="resid"))
    assert "weights" in caught.value.hint


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
        path = tmp_path / "lake" / "runs" / run.run_id / row["name"]
        assert path.stat().st_size == row["nbytes"]


def test_what_the_model_cannot_hold_is_told_from_what_the_store_cannot(
    large: Any,
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    """Run in float16 the value is infinite before it is stored: no stored dtype would mend that."""
    spec = make_spec(model=large, tokenizer=tokenizer, dtype="float32", compute_dtype="float16")
    with pytest.raises(
        OverflowInCapture, match=r"not finite, as computed in float16\. Nothing was written"
    ) as caught:
        capture_run(tmp_path / "lake", spec)
    assert "--compute-dtype float32" in caught.value.hint
    assert not (tmp_path / "lake").exists()


def test_a_capture_leaves_the_process_s_numerics_as_they_were(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path
) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with numerics(3):
            assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "highest")
        capture_run(tmp_path / "lake", make_spec(sites="resid"))
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (1, "high")
    finally:
        torch.set_float32_matmul_precision("highest")
