"""Neurons: golden moments, and planted classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.analyze.charts import Series, neurons_chart
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic, moments_of_sums, power_sums
from layerlake.analyze.reduce import compute_tables
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]


def moments(values: Array) -> Array:
    z = (values - values.mean()) / values.std()
    return np.array([values.mean(), values.var(), (z**3).mean(), (z**4).mean()])


def one_shot(run: Run, columns: str) -> Array:
    """Moments [layer, unit, moment] by the recipe of docs/analyses.md in float64."""
    W_U = run.weight("W_U").astype(np.float64) * run.weight("ln_final.w")[:, None]
    W_out = run.weight("W_out").astype(np.float64)
    if run.shape.norm == "layernorm":
        W_U -= W_U.mean(axis=0)
        W_out -= W_out.mean(axis=2, keepdims=True)
    W_U -= W_U.mean(axis=1, keepdims=True)
    if columns == "real":
        W_U = W_U[:, run.vocab["token_id"].to_numpy()]
    W_U /= np.linalg.norm(W_U, axis=0)
    return np.array([[moments(w / np.linalg.norm(w) @ W_U) for w in layer] for layer in W_out])


def test_golden_moments() -> None:
    found = moments_of_sums(power_sums(np.array([[0, 1, 2, 3, 10.0]])), 5)
    np.testing.assert_allclose(found, [[3.2, 12.56, 1.20990, 2.87600]], atol=1e-5)


def test_moments_do_not_depend_on_the_shift() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(3, 500))
    expected = [moments(row) for row in values]
    for shift in (0.0, values.mean(axis=1), 1.5):
        moved = values - np.reshape(shift, (-1, 1))
        np.testing.assert_allclose(moments_of_sums(power_sums(moved), 500, shift), expected, rtol=1e-9)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("columns", ["real", "all"])
def test_neurons_equal_one_shot_numpy(
    make_run: Callable[..., Run],
    shape: ModelShape,
    norm: Literal["layernorm", "rmsnorm"],
    columns: Literal["real", "all"],
) -> None:
    """Several units a layer, several blocks of the vocabulary, and a padded one."""
    wide = replace(shape, norm=norm, d_mlp=300, n_vocab=2100)
    run = make_run(shape=wide, vocab=[f"t{i}" for i in range(2050)], token_ids=np.arange(36))
    table = compute_tables(NeuronStatistic.open, run, NeuronOptions(columns=columns))["neurons"].to_pandas()
    expected = one_shot(run, columns)
    assert table[["layer", "unit"]].to_numpy().tolist() == [[i, j] for i in range(2) for j in range(300)]
    names = ["mean", "variance", "skew", "kurtosis"]
    np.testing.assert_allclose(table[names], expected.reshape(-1, 4), atol=2e-6, rtol=1e-5)
    assert (table["n_columns"] == (2050 if columns == "real" else 2100)).all()
    assert (table["variant"] == ("default" if columns == "real" else "authors")).all()
    assert table[["folded", "vocab_centred"]].all(axis=None)
    assert (table["centred"] == (norm == "layernorm")).all()
    assert table["reason"].isna().all()


def planted(
    shape: ModelShape, rng: np.random.Generator
) -> tuple[dict[str, Array], dict[tuple[int, int], str]]:
    """Weights in which some neurons write straight at, or away from, a few tokens, and which ones."""
    W_U = rng.standard_normal((shape.d_model, shape.n_vocab))
    W_out = rng.standard_normal((shape.n_layers, shape.d_mlp, shape.d_model))
    W_U[:, :6] = 40 * rng.standard_normal((shape.d_model, 1)) + rng.standard_normal((shape.d_model, 6))
    towards = W_U[:, 0] / 40
    classes = {(0, 3): "prediction", (1, 3): "suppression", (1, 7): "prediction", (1, 300): "suppression"}
    for (layer, unit), name in classes.items():
        W_out[layer, unit] = towards if name == "prediction" else -towards
    weights = {"W_U": W_U, "W_out": W_out, "ln_final.w": np.ones(shape.d_model)}
    return {name: value.astype(np.float32) for name, value in weights.items()}, classes


def test_planted_neurons_are_counted_exactly(make_run: Callable[..., Run], shape: ModelShape) -> None:
    wide = replace(shape, d_model=64, d_mlp=320, n_vocab=1500)
    weights, classes = planted(wide, np.random.default_rng(0))
    tables = compute_tables(NeuronStatistic.open, make_run(shape=wide, weights=weights), NeuronOptions())
    found = {
        (row["layer"], row["unit"]): row["class"]
        for row in tables["neurons"].to_pylist()
        if row["class"] != "other"
    }
    assert found == classes
    rows = [row for row in tables["neuron_counts"].to_pylist() if row["min_kurtosis"] == row["threshold"]]
    counts = {(row["layer"], row["class"]): row for row in rows}
    assert {key: row["n_units"] for key, row in counts.items()} == {
        (0, "prediction"): 1, (0, "suppression"): 0, (0, "other"): 319,
        (1, "prediction"): 1, (1, "suppression"): 2, (1, "other"): 317,
    }  # fmt: skip
    assert counts[1, "suppression"]["density_percent"] == 100 * 2 / 320
    assert counts[1, "suppression"]["density"] == 2 / 320


def test_gaussian_weights_have_neither_kind(make_run: Callable[..., Run], shape: ModelShape) -> None:
    wide = replace(shape, d_model=256, n_vocab=4000, d_mlp=64)
    tables = compute_tables(
        NeuronStatistic.open,
        make_run(shape=wide, weights={"ln_final.w": np.ones(256, dtype=np.float32)}),
        NeuronOptions(),
    )
    kurtosis = tables["neurons"]["kurtosis"].to_numpy()
    assert abs(kurtosis.mean() - 3) < 0.05
    assert set(tables["neurons"]["class"].to_pylist()) == {"other"}


def test_the_threshold_decides(make_run: Callable[..., Run]) -> None:
    run = make_run()
    kurtosis = compute_tables(NeuronStatistic.open, run, NeuronOptions())["neurons"]["kurtosis"].to_numpy()
    table = compute_tables(NeuronStatistic.open, run, NeuronOptions(threshold=2.5))["neurons"].to_pandas()
    assert ((table["class"] != "other") == (kurtosis > 2.5)).all()
    assert (table[table["class"] == "prediction"]["skew"] > 0).all()
    assert (table[table["class"] == "suppression"]["skew"] < 0).all()


@pytest.mark.parametrize(("threshold", "expected"), [(10.0, [8, 10, 12]), (2.5, [2.5, 8, 10, 12])])
def test_counts_say_how_much_hangs_on_the_threshold(
    make_run: Callable[..., Run], shape: ModelShape, threshold: float, expected: list[float]
) -> None:
    """Some neurons have kurtoses between the thresholds: a few tokens stand out less and less."""
    wide = replace(shape, d_model=64, d_mlp=400, n_vocab=1500)
    weights, _ = planted(wide, np.random.default_rng(0))
    blend = np.linspace(0, 1, 200)[:, None]
    towards, noise = weights["W_out"][1, 7], weights["W_out"][0, 100:300]
    weights["W_out"][0, 100:300] = (1 - blend) * noise + blend * towards
    run = make_run(shape=wide, weights=weights)
    tables = compute_tables(NeuronStatistic.open, run, NeuronOptions(threshold=threshold))
    neurons, counts = (tables[view].to_pandas() for view in ("neurons", "neuron_counts"))
    assert counts["min_kurtosis"].unique().tolist() == expected
    assert (counts["threshold"] == threshold).all()
    assert not counts.duplicated(["layer", "class", "min_kurtosis"]).any()
    totals = []
    for row in counts.to_dict("records"):
        heavy = (neurons["layer"] == row["layer"]) & (neurons["kurtosis"] > row["min_kurtosis"])
        of_class = {"prediction": heavy & (neurons["skew"] > 0), "suppression": heavy & (neurons["skew"] < 0)}
        of_class["other"] = (neurons["layer"] == row["layer"]) & ~(
            of_class["prediction"] | of_class["suppression"]
        )
        assert row["n_units"] == of_class[row["class"]].sum()
        totals += [row["n_units"]] * ((row["layer"], row["class"]) == (0, "prediction"))
    assert len(set(totals)) == len(expected)  # each threshold counts others
    series = [Series(run.run_id, "a model", wide.n_layers, "gpt2")]
    drawn = str(neurons_chart(tables["neuron_counts"], series).to_dict())
    assert [f"'prediction_n': {n}," in drawn for n in totals] == [least == threshold for least in expected]


def test_a_neuron_that_writes_nothing_is_null(make_run: Callable[..., Run], shape: ModelShape) -> None:
    W_out = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    W_out[1, 5] = 0.0
    row = compute_tables(
        NeuronStatistic.open, make_run(shape=shape, weights={"W_out": W_out}), NeuronOptions()
    )["neurons"].to_pylist()[21]
    assert (row["layer"], row["unit"], row["class"]) == (1, 5, "other")
    assert row["mean"] is row["kurtosis"] is None
    assert row["reason"] == "no moments: the neuron writes nothing"
