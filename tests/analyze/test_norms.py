"""Norms against one-shot numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.analyze.norms import COMPONENTS, NormsOptions, NormsStatistic
from layerlake.analyze.reduce import compute_tables
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]
Stored = Callable[[Run, str], Array]


def masked(run: Run) -> Array:
    position, document = run.tokens["position"].to_numpy(), run.tokens["document"].to_numpy()
    return np.flatnonzero((position >= 1) & (position <= np.bincount(document)[document] - 2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_equal_one_shot_numpy(
    make_run: Callable[..., Run],
    shape: ModelShape,
    stored: Stored,
    dtype: str,
    norm: Literal["layernorm", "rmsnorm"],
) -> None:
    run = make_run(shape=replace(shape, norm=norm), dtype=dtype)
    assert len(run.manifest.partitions) > 2
    mask = masked(run)
    vectors = np.stack([stored(run, "attn_out"), stored(run, "mlp_out"), stored(run, "resid")[:-1]], axis=1)
    if norm == "layernorm":
        vectors -= vectors.mean(axis=-1, keepdims=True)
    norms = np.linalg.norm(vectors, axis=-1)[:, :, mask]  # [layer, component, token]
    tables = compute_tables(NormsStatistic.open, run, NormsOptions())
    document = run.tokens["document"].to_numpy()[mask]
    sums = np.stack([norms[:, :, document == d].sum(axis=-1) for d in np.unique(document)])
    counts = np.unique(document, return_counts=True)[1]
    drawn = np.random.default_rng(0).integers(0, len(counts), (1000, len(counts)))
    replicates = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)[:, None, None]

    def interval(values: Array) -> Any:
        return pytest.approx(np.percentile(values, [2.5, 97.5]), rel=1e-6)

    rows = tables["norms"].to_pylist()
    assert [(row["layer"], row["component"]) for row in rows] == [
        (i, c) for i in range(2) for c in COMPONENTS
    ]
    for row in rows:
        layer, component = row["layer"], COMPONENTS.index(row["component"])
        own, resid = norms[layer, component], norms[layer, 2]
        assert row["mean_norm"] == pytest.approx(own.mean(), rel=1e-6)
        assert row["relative_norm"] == pytest.approx(own.mean() / resid.mean(), rel=1e-6)
        assert row["median_norm"] == pytest.approx(np.median(own), rel=1e-6)
        assert [row["p10"], row["p90"]] == pytest.approx(np.quantile(own, [0.1, 0.9]), rel=1e-6)
        assert [row["mean_norm_lo"], row["mean_norm_hi"]] == interval(replicates[:, layer, component])
        relative = replicates[:, layer, component] / replicates[:, layer, 2]
        assert [row["relative_norm_lo"], row["relative_norm_hi"]] == interval(relative)
        assert (row["n_tokens"], row["n_documents"], row["centred"]) == (len(mask), 5, norm == "layernorm")
        assert row["reason"] is None
        attn, mlp = norms[layer, 0], norms[layer, 1]
        assert row["attn_mlp_ratio"] == pytest.approx(attn.mean() / mlp.mean(), rel=1e-6)
        assert row["median_attn_mlp_ratio"] == pytest.approx(np.median(attn / mlp), rel=1e-6)

    tokens = tables["norm_tokens"].to_pandas()
    assert len(tokens) == 2 * 3 * len(mask)
    for (layer, name), part in tokens.groupby(["layer", "component"]):
        np.testing.assert_array_equal(part["row"], run.tokens["row"].to_numpy()[mask])
        np.testing.assert_allclose(part["norm"], norms[layer, COMPONENTS.index(name)], rtol=1e-6)


def test_norm_tokens_is_a_sample_and_norms_is_not(make_run: Callable[..., Run]) -> None:
    run = make_run()
    some, all_of_them = (
        compute_tables(NormsStatistic.open, run, NormsOptions(tokens=tokens)) for tokens in ("7", "all")
    )
    assert some["norm_tokens"].num_rows == 7 * 6
    assert all_of_them["norm_tokens"].num_rows == 26 * 6
    assert some["norms"].drop_columns("tokens").equals(all_of_them["norms"].drop_columns("tokens"))


def test_components_that_write_nothing_have_no_ratio(make_run: Callable[..., Run], shape: ModelShape) -> None:
    """The same number in every dimension is nothing to LayerNorm."""
    ones = np.ones((3, 36, shape.d_model), dtype=np.float32)
    run = make_run(shape=shape, values={"mlp_out": ones[:2], "resid": ones})
    attn, mlp, residual = compute_tables(NormsStatistic.open, run, NormsOptions())["norms"].to_pylist()[:3]
    assert attn["mean_norm"] > 0
    assert mlp["mean_norm"] == residual["mean_norm"] == 0
    for row in (attn, mlp, residual):
        assert row["attn_mlp_ratio"] is row["median_attn_mlp_ratio"] is row["relative_norm"] is None
        assert row["reason"] == (
            "no relative norm: resid_pre is 0 at every token; "
            "no ratio of attn_out to mlp_out: the latter is 0 at every token"
        )


def test_one_document_has_no_intervals_and_says_why(make_run: Callable[..., Run]) -> None:
    for row in compute_tables(NormsStatistic.open, make_run(lengths=(9,)), NormsOptions())[
        "norms"
    ].to_pylist():
        assert row["attn_mlp_ratio"] is not None
        assert row["mean_norm_lo"] is row["relative_norm_hi"] is row["attn_mlp_ratio_lo"] is None
        assert row["reason"] == "no intervals: the tokens are all of one document"
