"""The logit lens against one-shot numpy."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from layerlake.analyze.lens import LensOptions, LensStatistic
from layerlake.analyze.readout import MEASURES
from layerlake.analyze.reduce import compute_tables, reduce_statistic
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]
Stored = Callable[[Run, str], Array]
LENGTHS = (5, 9, 3, 12, 7, 2, 30)


def one_shot(run: Run, resid: Array, scale: str) -> dict[str, Array]:
    """All measures at all boundaries and masked tokens, [boundary, token], in float64."""
    table = run.tokens
    positions, documents = table["position"].to_numpy(), table["document"].to_numpy()
    lengths = np.bincount(documents)
    mask = np.flatnonzero((positions >= 1) & (positions <= lengths[documents] - 2))
    following = table["token_id"].to_numpy()[mask + 1]
    x = resid[:, mask]
    gamma, beta, W_U, b_U = (
        run.weight(n).astype(np.float64) for n in ("ln_final.w", "ln_final.b", "W_U", "b_U")
    )
    if run.shape.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((x**2).mean(axis=-1, keepdims=True) + run.shape.norm_eps)

    def log_probs(divisor: Array, biased: bool) -> Array:
        logits = (x / divisor * gamma + biased * beta) @ W_U + biased * b_U
        logits -= logits.max(axis=-1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))

    final = log_probs(sigma, True)[-1]
    lens = log_probs(sigma if scale == "own" else sigma[-1:], scale != "authors")
    p = np.exp(lens)
    clamped = np.maximum(p, 1e-9) if scale == "authors" else p
    true = np.take_along_axis(lens, following[None, :, None], axis=2)
    return {
        "row": table["row"].to_numpy()[mask],
        "document": documents[mask],
        "entropy_bits": -(clamped * np.log2(clamped)).sum(axis=-1),
        "kl_final_lens_nats": (np.exp(final) * (final - lens)).sum(axis=-1),
        "kl_lens_final_nats": (p * (lens - final)).sum(axis=-1),
        "loss_nats": -true[..., 0],
        "rank": (lens > true).sum(axis=-1),
        "top1_token": lens.argmax(axis=-1),
        "top1_agreement": (lens.argmax(axis=-1) == final.argmax(axis=-1)).astype(float),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("scale", ["own", "final", "authors"])
def test_lens_equals_one_shot_numpy(
    make_run: Callable[..., Run],
    shape: ModelShape,
    stored: Stored,
    *,
    dtype: str,
    norm: Literal["layernorm", "rmsnorm"],
    scale: Literal["own", "final", "authors"],
) -> None:
    run = make_run(
        shape=replace(shape, norm=norm), dtype=dtype, lengths=LENGTHS, context=32, partition_tokens=32
    )
    assert len(run.manifest.partitions) > 2
    expected = one_shot(run, stored(run, "resid"), scale)
    tables = compute_tables(LensStatistic.open, run, LensOptions(scale=scale))
    n_boundaries = run.shape.n_layers + 1

    tokens = tables["lens_tokens"].to_pandas()
    for boundary, part in tokens.groupby("boundary"):
        np.testing.assert_array_equal(part["row"], expected["row"])
        for name in ("entropy_bits", "kl_final_lens_nats", "loss_nats", "rank", "top1_token"):
            np.testing.assert_allclose(
                part[name], expected[name][boundary], atol=2e-5, rtol=2e-5, err_msg=name
            )

    lens = tables["lens"].to_pandas()
    assert lens["boundary"].tolist() == list(range(n_boundaries))
    assert (lens["n_tokens"] == len(expected["row"])).all()
    for name in ("entropy_bits", "kl_final_lens_nats", "kl_lens_final_nats", "loss_nats", "top1_agreement"):
        np.testing.assert_allclose(
            lens[name], expected[name].mean(axis=1), atol=1e-5, rtol=2e-5, err_msg=name
        )
        assert (lens[f"{name}_lo"] <= lens[name] + 1e-9).all()
        assert (lens[name] <= lens[f"{name}_hi"] + 1e-9).all()
    np.testing.assert_allclose(lens["entropy_nats"], lens["entropy_bits"] * math.log(2))

    # the interval is the bootstrap of the ratio of document sums
    sums = np.stack([np.bincount(expected["document"], row, 7) for row in expected["loss_nats"]])
    counts = np.bincount(expected["document"], minlength=7)
    kept = counts > 0
    drawn = np.random.default_rng(0).integers(0, kept.sum(), (1000, kept.sum()))
    replicates = sums[:, kept][:, drawn].sum(axis=-1) / counts[kept][drawn].sum(axis=-1)
    lo, hi = np.percentile(replicates, [2.5, 97.5], axis=1)
    np.testing.assert_allclose(lens["loss_nats_lo"], lo, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(lens["loss_nats_hi"], hi, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scale", ["own", "final"])
def test_at_the_last_boundary_the_lens_is_the_model(
    make_run: Callable[..., Run], scale: Literal["own", "final"]
) -> None:
    last = compute_tables(LensStatistic.open, make_run(), LensOptions(scale=scale))["lens"].to_pylist()[-1]
    assert last["kl_final_lens_nats"] == last["kl_lens_final_nats"] == 0
    assert last["top1_agreement"] == last["top1_agreement_lo"] == 1


def test_columns_and_parameters(make_run: Callable[..., Run]) -> None:
    run = make_run()
    tables = compute_tables(LensStatistic.open, run, LensOptions(scale="authors", tokens="10", seed=3))
    schema = tables["lens"].schema
    assert schema.names[:4] == ["run", "boundary", "scale", "n_tokens"]
    assert schema.field("boundary").type == pa.int32()
    row = tables["lens"].to_pylist()[0]
    shown = {name: row[name] for name in ("run", "scale", "tokens", "seed", "variant", "n_tokens")}
    assert shown == {
        "run": run.run_id, "scale": "authors", "tokens": "10", "seed": 3, "variant": "authors", "n_tokens": 10,
    }  # fmt: skip
    assert tables["lens_tokens"].num_rows == 10 * (run.shape.n_layers + 1)
    assert tables["lens_tokens"].column_names[:8] == [
        "run", "boundary", "scale", "row", "entropy_bits", "kl_final_lens_nats", "kl_lens_final_nats", "loss_nats",
    ]  # fmt: skip
    assert LensOptions(tokens="20000") == LensOptions()


def test_one_document_has_means_without_intervals(make_run: Callable[..., Run]) -> None:
    for row in compute_tables(LensStatistic.open, make_run(lengths=(9,)), LensOptions())["lens"].to_pylist():
        assert row["loss_nats"] is not None
        assert row["loss_nats_lo"] is row["loss_nats_hi"] is None
        assert row["reason"] == "no intervals: the tokens are all of one document"


def test_padded_columns_are_in_the_softmax(make_run: Callable[..., Run], shape: ModelShape) -> None:
    """The model's own logits have them, so its loss has too."""
    run = make_run(shape=shape, vocab=[f"t{i}" for i in range(20)], token_ids=np.arange(36) % 20)
    entropy = compute_tables(LensStatistic.open, run, LensOptions())["lens"]["entropy_bits"].to_pylist()
    weights = {"W_U": run.weight("W_U"), "b_U": run.weight("b_U")}
    weights["b_U"][20:] = -1e4
    masked = make_run(
        url=run.store.url + "-masked", shape=shape, weights=weights, token_ids=np.arange(36) % 20
    )
    assert (
        compute_tables(LensStatistic.open, masked, LensOptions())["lens"]["entropy_bits"].to_pylist()
        != entropy
    )


@pytest.mark.parametrize(("n_documents", "n_vocab"), [(16, 4096), (64, 4096), (16, 16384), (64, 16384)])
def test_memory_is_that_of_one_unit_and_of_the_state(
    make_run: Callable[..., Run], shape: ModelShape, n_documents: int, n_vocab: int
) -> None:
    """Neither logits of all tokens nor of all columns are ever held: the largest case has 134 MB of them a boundary."""
    run = make_run(
        shape=replace(shape, n_vocab=n_vocab), lengths=(34,) * n_documents, context=34, partition_tokens=512,
        sites=("resid",),
    )  # fmt: skip
    statistic = LensStatistic.open(run, LensOptions(tokens="all"))
    n_tokens, n_boundaries = len(statistic.tokens), run.shape.n_layers + 1
    assert n_tokens == 32 * n_documents
    n_state = n_tokens * n_boundaries * len(MEASURES) * 8  # bytes
    reduce_statistic(statistic, run, scheduler="synchronous")  # imports what it needs
    tracemalloc.start()
    reduce_statistic(statistic, run, scheduler="synchronous")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = (n_boundaries + 2) * 256 * 512 * 4
    assert blocks < peak < blocks + 2**20 + 3 * n_state
