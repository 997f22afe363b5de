"""Attention locality against dense patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.analyze.attention import AttentionOptions, AttentionStatistic
from layerlake.analyze.reduce import compute_tables
from layerlake.catalog.bands import MAX_DISTANCE
from layerlake.catalog.errors import AnalysisError, CorruptRun, SiteNotFound
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]


def uniform_pattern(n: int) -> Array:
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


def by_dense(pattern: Array, first: int) -> tuple[Array, Array]:
    """Sums and counts over queries t ≥ max(first, k) of one [query, key] pattern; BOS last."""
    n = len(pattern)
    sums, counts = np.zeros(MAX_DISTANCE + 2), np.zeros(MAX_DISTANCE + 2)
    for k in range(MAX_DISTANCE + 1):
        queries = range(max(first, k), n)
        sums[k], counts[k] = sum(pattern[t, t - k] for t in queries), len(queries)
    queries = range(max(first, 1), n)
    sums[-1], counts[-1] = sum(pattern[t, 0] for t in queries), len(queries)
    return sums, counts


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_locality_equals_one_shot_numpy(make_run: Callable[..., Run], shape: ModelShape, dtype: str) -> None:
    lengths = (20, 5, 31, 18, 17, 40)
    run = make_run(
        shape=shape, dtype=dtype, lengths=lengths, context=40, partition_tokens=64, sites=["pattern"]
    )
    assert len(run.manifest.partitions) > 2
    rows = compute_tables(AttentionStatistic.open, run, AttentionOptions())["attention_locality"].to_pylist()
    assert len(rows) == 2 * (MAX_DISTANCE + 1)
    for layer in range(2):
        patterns = [run.attention(document, layer).to_numpy().astype(np.float64) for document in range(6)]
        sums, counts = map(np.array, zip(*(by_dense(p.mean(axis=0), 17) for p in patterns), strict=True))
        mean = sums.sum(axis=0) / counts.sum(axis=0)
        cumulative = np.concatenate([[0], np.cumsum(mean[1:-1])])
        used = counts[:, 0] > 0
        drawn = np.random.default_rng(0).integers(0, used.sum(), (1000, used.sum()))
        replicates = sums[used][drawn].sum(axis=1) / counts[used][drawn].sum(axis=1)
        lo, hi = np.percentile(replicates, [2.5, 97.5], axis=0)
        uniform = np.mean([1 / (t + 1) for n in lengths for t in range(17, n)])
        for row in (row for row in rows if row["layer"] == layer):
            k = row["distance"]
            assert row["mean_weight"] == pytest.approx(mean[k], abs=1e-12)
            assert row["cumulative_weight"] == pytest.approx(cumulative[k], abs=1e-12)
            assert row["bos_weight"] == pytest.approx(mean[-1], abs=1e-12)
            assert [row["mean_weight_lo"], row["mean_weight_hi"]] == pytest.approx([lo[k], hi[k]], abs=1e-12)
            assert row["bos_weight_lo"] == pytest.approx(lo[-1], abs=1e-12)
            assert row["uniform_mean_weight"] == pytest.approx(uniform, abs=1e-12)
            assert row["uniform_weight"] == pytest.approx(k * uniform, abs=1e-12)
            assert (row["n_queries"], row["n_documents"]) == (sum(counts[:, 0]), 4)
            assert row["reason"] is None
            per_distance = cumulative[k] / k if k else mean[0]
            assert row["per_distance_weight"] == pytest.approx(per_distance, abs=1e-12)


def test_authors_pool_within_documents_and_weigh_them_equally(
    make_run: Callable[..., Run], shape: ModelShape
) -> None:
    lengths = (20, 7, 31, 24)
    run = make_run(shape=shape, lengths=lengths, context=32, partition_tokens=64, sites=["pattern"])
    rows = compute_tables(AttentionStatistic.open, run, AttentionOptions(variant="authors"))[
        "attention_locality"
    ].to_pylist()
    patterns = [run.attention(document, 1).to_numpy().astype(np.float64) for document in range(4)]
    pooled = [
        np.mean([p[h, t, t - k] for k in range(1, 6) for t in range(k, p.shape[1]) for h in range(2)])
        for p in patterns
    ]
    row = next(row for row in rows if row["layer"] == 1 and row["distance"] == 5)
    assert row["per_distance_weight"] == pytest.approx(np.mean(pooled), abs=1e-12)
    assert row["n_queries"] == sum(n - 5 for n in lengths)
    assert row["variant"] == "authors"
    own = next(row for row in rows if row["layer"] == 1 and row["distance"] == 0)
    expected = np.mean([np.diagonal(p, axis1=1, axis2=2).mean() for p in patterns])
    assert own["per_distance_weight"] == pytest.approx(expected, abs=1e-12)


def test_authors_count_the_documents_of_each_distance(
    make_run: Callable[..., Run], shape: ModelShape
) -> None:
    """Few documents are long; draws without any of them say nothing about what only they have."""
    lengths = (24,) * 3 + (5,) * 20
    run = make_run(shape=shape, lengths=lengths, context=32, partition_tokens=64, sites=["pattern"])
    rows = compute_tables(AttentionStatistic.open, run, AttentionOptions(variant="authors"))[
        "attention_locality"
    ].to_pylist()
    patterns = [run.attention(document, 0).to_numpy().astype(np.float64) for document in range(23)]
    sums, counts = map(np.array, zip(*(by_dense(p.mean(axis=0), 0) for p in patterns), strict=True))
    drawn = np.random.default_rng(0).integers(0, 23, (1000, 23))
    for k in (4, 5, 10):
        row = rows[k]
        assert (row["distance"], row["n_documents"], row["reason"]) == (k, 23 if k < 5 else 3, None)
        weight, count = sums[drawn, k].sum(axis=1), counts[drawn, k].sum(axis=1)
        assert (count == 0).any() == (k >= 5)
        expected = np.percentile(weight[count > 0] / count[count > 0], [2.5, 97.5])
        assert [row["mean_weight_lo"], row["mean_weight_hi"]] == pytest.approx(expected, abs=1e-12)
        for name in ("cumulative_weight", "per_distance_weight", "bos_weight"):
            assert row[f"{name}_lo"] < row[name] < row[f"{name}_hi"]


def test_uniform_attention_is_the_baseline(make_run: Callable[..., Run], shape: ModelShape) -> None:
    lengths = (20, 30)
    packed = np.concatenate([uniform_pattern(n)[np.tril_indices(n)] for n in lengths])
    values = np.broadcast_to(packed, (2, 2, len(packed))).astype(np.float32)
    run = make_run(shape=shape, lengths=lengths, context=32, partition_tokens=64, values={"pattern": values})
    for row in compute_tables(AttentionStatistic.open, run, AttentionOptions())[
        "attention_locality"
    ].to_pylist():
        assert row["cumulative_weight"] == pytest.approx(row["uniform_weight"], abs=1e-6)
        assert row["mean_weight"] == pytest.approx(row["uniform_mean_weight"], abs=1e-7)


def test_short_documents_are_null_and_say_why(make_run: Callable[..., Run]) -> None:
    rows = compute_tables(AttentionStatistic.open, make_run(), AttentionOptions())[
        "attention_locality"
    ].to_pylist()
    assert len(rows) == 2 * 17
    for row in rows:
        assert (
            row["mean_weight"]
            is row["cumulative_weight"]
            is row["bos_weight_lo"]
            is row["uniform_weight"]
            is None
        )
        assert row["n_queries"] == row["n_documents"] == 0
        assert row["reason"] == "no document has a query that counts: the longest has 12 tokens"


def test_one_document_that_is_long_enough(make_run: Callable[..., Run]) -> None:
    run = make_run(lengths=(5, 20), context=24, partition_tokens=24)
    row = compute_tables(AttentionStatistic.open, run, AttentionOptions())["attention_locality"].to_pylist()[
        3
    ]
    assert row["mean_weight"] is not None
    assert row["mean_weight_lo"] is None
    assert row["reason"] == "no interval: only one document has a query that counts"


def columns_of(run: Run, variant: Literal["default", "authors"] = "default") -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = compute_tables(
        AttentionStatistic.open, run, AttentionOptions(variant=variant)
    )["attention_locality"].to_pydict()
    return columns


def without(run: Run, site: str) -> Run:
    """The run as it would be if a site had not been captured."""
    sites = {name: held for name, held in run.manifest.sites.items() if name != site}
    return Run(run.store, replace(run.manifest, sites=sites))


@pytest.mark.parametrize("variant", ["default", "authors"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_the_sums_and_the_pattern_give_the_same_numbers(
    make_run: Callable[..., Run], shape: ModelShape, dtype: str, tolerance: float, variant: Any
) -> None:
    """The sums are float32 whatever the pattern is stored as; documents of all lengths, in several partitions."""
    run = make_run(
        shape=shape, dtype=dtype, lengths=(20, 5, 31, 18, 17, 40), context=40, partition_tokens=64,
        sites=["pattern", "attn_band"],
    )  # fmt: skip
    assert len(run.manifest.partitions) > 2
    from_sums, from_pattern = columns_of(run, variant), columns_of(without(run, "attn_band"), variant)
    assert {*from_sums.pop("source")} == {"attn_band"}
    assert {*from_pattern.pop("source")} == {"pattern"}
    assert from_sums.keys() == from_pattern.keys()
    for name, expected in from_pattern.items():
        if any(isinstance(value, float) for value in expected):
            found, wanted = (np.array(values, dtype=float) for values in (from_sums[name], expected))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=name)
        else:
            assert from_sums[name] == expected
    assert columns_of(without(run, "pattern"), variant)["mean_weight"] == from_sums["mean_weight"]


def test_without_either_the_sums_are_what_to_capture(make_run: Callable[..., Run]) -> None:
    with pytest.raises(SiteNotFound, match="'attn_band' not at all") as caught:
        columns_of(make_run(sites=["resid"]))
    assert "--sites attn_band" in caught.value.hint


def test_a_pattern_that_is_whole_is_read_rather_than_sums_in_part(make_run: Callable[..., Run]) -> None:
    run = make_run(sites=["pattern", "attn_band"])
    held = run.manifest.sites | {"attn_band": run.manifest.sites["attn_band"][1:]}
    assert {*columns_of(Run(run.store, replace(run.manifest, sites=held)))["source"]} == {"pattern"}


def test_sums_of_other_documents_are_refused(make_run: Callable[..., Run]) -> None:
    run = make_run(sites=["attn_band"])
    folder = f"runs/{run.run_id}/attn_band"
    run.store.write(f"{folder}/part-00000001.parquet", run.store.read(f"{folder}/part-00000000.parquet"))
    with pytest.raises(CorruptRun, match="Partition 1 of attn_band") as caught:
        columns_of(run)
    assert "layerlake verify" in caught.value.hint


def test_sums_that_are_not_finite_are_an_error(make_run: Callable[..., Run]) -> None:
    values = np.full((2, 2, 5 * 6 // 2 + 20 * 21 // 2), 0.5, dtype=np.float32)
    values[1, 0, -1] = np.nan
    run = make_run(
        lengths=(5, 20), context=24, values={"pattern": values}, sites=["attn_band"], partition_tokens=32
    )
    with pytest.raises(AnalysisError, match="site 'attn_band', layer 1"):
        columns_of(run)
