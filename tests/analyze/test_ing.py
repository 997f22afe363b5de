"""The -ing neurons and their probes: planted answers, numpy and scikit-learn in one shot, what a run has to hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from layerlake.analyze.analyses import run_all, run_analysis
from layerlake.analyze.ing import IngOptions, compute_ing
from layerlake.analyze.ing_examples import MIN_EXAMPLES, N_FOLDS, IngTokens, find_examples
from layerlake.analyze.ing_probes import best_threshold
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic
from layerlake.catalog.errors import AnalysisError, SiteNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]

N_DOCUMENTS, LENGTH = 80, 60
N_ING, N_PLAIN, N_VOCAB = 12, 88, 600
PLANTED = {(0, 3): "promotes", (1, 5): "promotes", (1, 9): "suppresses", (1, 30): "promotes"}
"""Neurons that write towards or away from the tokens in -ing, and fire before them, or everywhere else."""

OPTIONS = IngOptions(min_variance=1.0, top=4)


def vocabulary(n: int) -> list[str]:
    """BOS, then tokens in -ing, then others; every second one has a leading blank."""
    words = [f"w{i}ing" if i <= N_ING else f"w{i}" for i in range(n)]
    return ["<s>", *(f" {word}" if i % 2 else word for i, word in enumerate(words[1:]))]


def planted_run(url: Path, shape: ModelShape, build_run: Callable[..., Run], **options: Any) -> Run:
    """Every token is about as frequent as every other, and nothing but the planted neurons foretells it."""
    rng = np.random.default_rng(0)
    wide = replace(shape, d_model=64, d_mlp=40, n_vocab=N_VOCAB, n_ctx=64)
    ids = rng.integers(1, 1 + N_ING + N_PLAIN, N_DOCUMENTS * LENGTH)
    ids[::LENGTH] = 0
    is_ing = (ids > 0) & (ids <= N_ING)
    before_ing = np.append(is_ing[1:], False)
    W_U = rng.standard_normal((wide.d_model, N_VOCAB))
    direction = rng.standard_normal(wide.d_model)
    W_U[:, 1 : N_ING + 1] += 6 * direction[:, None]
    W_out = rng.standard_normal((2, wide.d_mlp, wide.d_model))
    mlp_post = rng.standard_normal((2, len(ids), wide.d_mlp))
    resid = rng.standard_normal((3, len(ids), wide.d_model))
    resid[-1] += (rng.random((len(ids), 1)) < 0.5) * W_U[
        :, np.roll(ids, -1)
    ].T  # the model knows half of them
    for (layer, unit), effect in PLANTED.items():
        sign = 1 if effect == "promotes" else -1
        W_out[layer, unit] = sign * (direction + 0.05 * rng.standard_normal(wide.d_model))
        mlp_post[layer, :, unit] += 6 * (before_ing == (sign > 0))
    weights = {"W_U": W_U, "W_out": W_out, "ln_final.w": np.full(wide.d_model, 0.1)}
    weights |= {"ln_final.b": np.zeros(wide.d_model), "b_U": np.zeros(N_VOCAB)}
    given: dict[str, Any] = {
        "shape": wide,
        "lengths": [LENGTH] * N_DOCUMENTS,
        "context": 64,
        "partition_tokens": 256,
        "sites": ("resid", "mlp_post"),
        "values": {"resid": resid.astype(np.float32), "mlp_post": mlp_post.astype(np.float32)},
        "weights": {name: value.astype(np.float32) for name, value in weights.items()},
        "token_ids": ids,
        "vocab": vocabulary(N_VOCAB),
        "name": "planted",
    }
    given["values"] |= options.pop("values", {})
    return build_run(url, **{**given, **options})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with planted neurons."""
    from tests.conftest import TINY, build_run

    return planted_run(tmp_path_factory.mktemp("planted"), TINY, build_run)


@pytest.fixture
def planted_with(tmp_path: Path, shape: ModelShape, make_run: Callable[..., Run]) -> Callable[..., Run]:
    """Make such a run with something changed."""

    def make(*, norm: Literal["layernorm", "rmsnorm"] = "layernorm", **options: Any) -> Run:
        return planted_run(tmp_path / "lake", replace(shape, norm=norm), make_run, **options)

    return make


@pytest.fixture(scope="module")
def found(planted: Run) -> dict[str, pa.Table]:
    """What the analysis finds there."""
    return compute_ing(planted, OPTIONS, scheduler="synchronous")


def rows(found: dict[str, pa.Table], **where: Any) -> list[dict[str, Any]]:
    return [row for row in found["ing"].to_pylist() if all(row[key] == is_ for key, is_ in where.items())]


def test_planted_neurons_are_selected(found: dict[str, pa.Table]) -> None:
    selected = {(row["layer"], row["unit"]): row for row in found["ing_neurons"].to_pylist()}
    assert {place: row["effect"] for place, row in selected.items()} == PLANTED
    for row in selected.values():
        assert row["class"] == ("prediction" if row["effect"] == "promotes" else "suppression")
        assert (row["n_ing_tokens"], row["n_other_tokens"]) == (N_ING, N_VOCAB - N_ING)
        assert (row["difference"] > 0) == (row["effect"] == "promotes")
        assert row["difference"] == pytest.approx(row["mean_ing"] - row["mean_other"])


def test_planted_neurons_foretell_it_and_random_ones_do_not(found: dict[str, pa.Table]) -> None:
    singles = rows(found, probe="neuron", features="selected")
    assert {(row["layer"], row["unit"]) for row in singles} == set(PLANTED)
    assert min(row["accuracy"] for row in singles) > 0.98
    assert [row["accuracy"] > 0.99 for row in rows(found, probe="ensemble", features="selected")] == [
        True
    ] * 4
    assert rows(found, features="heavy_tailed")[0]["accuracy"] > 0.99
    assert rows(found, features="heavy_tailed")[0]["k"] == 4
    chance = [
        *rows(found, probe="neuron", features="random"),
        *rows(found, probe="ensemble", features="random"),
    ]
    assert len(chance) == 8
    assert {(row["layer"], row["unit"]) for row in chance}.isdisjoint(PLANTED)
    assert sorted(row["layer"] for row in chance[:4]) == sorted(layer for layer, _ in PLANTED)
    assert all(abs(row["accuracy"] - 0.5) < 0.08 for row in chance)
    assert all(row["accuracy_lo"] < row["accuracy"] < row["accuracy_hi"] for row in chance)


def test_a_fit_that_does_not_converge_is_noted(
    planted: Run, found: dict[str, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {row["note"] for row in found["ing"].to_pylist()} == {None}
    monkeypatch.setattr("layerlake.analyze.ing_probes._MAX_ITERATIONS", 2)
    with pytest.warns(match="failed to converge"):
        hasty = compute_ing(planted, OPTIONS, scheduler="synchronous")
    notes = {row["probe"]: row["note"] for row in hasty["ing"].to_pylist()}
    assert notes["ensemble"] == "a fit did not converge in 2 iterations"
    assert notes["model"] is None  # nothing is fitted


def test_moments_that_the_lake_holds_are_not_computed_again(
    planted_with: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planted_with()
    lake = Lake(run.store.url)
    expected = compute_ing(run, OPTIONS, scheduler="synchronous")
    run_analysis(lake, "neurons", options={"columns": "all"})
    opened: list[str] = []
    monkeypatch.setattr("layerlake.analyze.ing.NeuronStatistic", SimpleNamespace(open=measured(opened)))
    assert compute_ing(run, OPTIONS, scheduler="synchronous") == expected
    assert opened == ["real"]
    run_analysis(lake, "neurons", options={"threshold": 9.0})
    assert compute_ing(run, OPTIONS, scheduler="synchronous") == expected
    assert opened == ["real"]


def measured(opened: list[str]) -> Callable[[Run, NeuronOptions], NeuronStatistic]:
    """Open the statistic, and write down that somebody did."""

    def open_statistic(run: Run, options: NeuronOptions) -> NeuronStatistic:
        opened.append(options.columns)
        return NeuronStatistic.open(run, options)

    return open_statistic


def test_everything_is_at_chance_when_activations_know_nothing(planted_with: Callable[..., Run]) -> None:
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((2, N_DOCUMENTS * LENGTH, 40)).astype(np.float32)
    found = compute_ing(planted_with(values={"mlp_post": noise}), OPTIONS)
    probes = [row for row in found["ing"].to_pylist() if row["probe"] != "model"]
    assert all(0.42 < row["accuracy"] < 0.58 for row in probes)


def dense(run: Run, columns: str) -> tuple[Array, Array, Array]:
    """W_out·W_U ``[layer, unit, column]`` as docs/analyses.md says, which columns end in -ing, and which count."""
    W_U = run.weight("W_U").astype(np.float64) * run.weight("ln_final.w")[:, None]
    if run.shape.norm == "layernorm":
        W_U -= W_U.mean(axis=0)
    W_U -= W_U.mean(axis=1, keepdims=True)
    texts = run.vocab["text"].to_pylist()
    n = len(texts) if columns == "real" else W_U.shape[1]
    is_ing = np.array([i < len(texts) and texts[i].endswith("ing") for i in range(n)])
    return run.weight("W_out").astype(np.float64) @ W_U[:, :n], is_ing, W_U[:, :n]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("columns", ["real", "all"])
def test_selection_equals_one_shot_numpy(
    planted_with: Callable[..., Run],
    norm: Literal["layernorm", "rmsnorm"],
    columns: Literal["real", "all"],
) -> None:
    run = planted_with(norm=norm, vocab=vocabulary(590), weights={})
    options = IngOptions(columns=columns, min_kurtosis=3.0, min_variance=0.017, top=2, histograms=3)
    tables = compute_ing(run, options, scheduler="synchronous")
    scores, is_ing, W_U = dense(run, columns)
    unit = W_U / np.linalg.norm(W_U, axis=0)
    W_out = run.weight("W_out").astype(np.float64)
    if norm == "layernorm":
        W_out -= W_out.mean(axis=2, keepdims=True)
    cosines = W_out @ unit / np.linalg.norm(W_out, axis=2)[..., None]
    z = (cosines - cosines.mean(axis=2, keepdims=True)) / cosines.std(axis=2, keepdims=True)
    chosen = ((z**4).mean(axis=2) > 3.0) | (cosines.var(axis=2) > 0.017)
    assert 0 < chosen.sum() < chosen.size
    D = scores[..., is_ing].mean(axis=2) - scores[..., ~is_ing].mean(axis=2)
    order = sorted(zip(*np.nonzero(chosen), strict=True), key=lambda place: -abs(D[place]))
    table = tables["ing_neurons"].to_pandas()
    assert table["rank"].tolist() == list(range(1, len(order) + 1))
    assert list(zip(table["layer"], table["unit"], strict=True)) == order
    np.testing.assert_allclose(table["difference"], [D[place] for place in order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["variance"], [cosines.var(axis=2)[place] for place in order], rtol=1e-4)
    assert (table["variant"] == ("authors" if columns == "all" else "default")).all()
    assert all((each["centred"].to_numpy() == (norm == "layernorm")).all() for each in tables.values())
    histograms = tables["ing_histograms"].to_pandas()
    assert len(histograms) == 3 * 2 * 100
    for rank, place in enumerate(order[:3], 1):
        own = histograms[histograms["rank"] == rank]
        assert (own["layer"].iloc[0], own["unit"].iloc[0]) == place
        for name, which in (("ing", is_ing), ("other", ~is_ing)):
            part = own[own["tokens"] == name]
            edges = np.append(part["low"], part["high"].iloc[-1])
            assert edges[0] == pytest.approx(scores[place].min(), rel=1e-4)
            assert edges[-1] == pytest.approx(scores[place].max(), rel=1e-4)
            assert part["count"].sum() == which.sum()
            expected = np.histogram(scores[place][which], edges)[0]
            assert np.abs(part["count"] - expected).sum() <= 4  # float32 may carry a value over an edge


def test_accuracies_equal_scikit_learn_in_one_shot(
    planted: Run, found: dict[str, pa.Table], stored: Callable[[Run, str], Array]
) -> None:
    examples = find_examples(planted, IngTokens.open(planted), context=24, most=10_000, seed=0)
    place = np.searchsorted(planted.tokens["row"].to_numpy(), examples.rows)
    activations, last = stored(planted, "mlp_post")[:, place], stored(planted, "resid")[-1, place]
    folds, labels = examples.folds, examples.labels

    def tested(columns: Array) -> Array:
        hits = np.zeros(len(labels), dtype=bool)
        for fold in range(N_FOLDS):
            fit = (folds != fold) & (folds != (fold + 1) % N_FOLDS)
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            hits[folds == fold] = (probe.fit(columns[fit], labels[fit]).predict(columns) == labels)[
                folds == fold
            ]
        return hits

    for row in rows(found, probe="neuron"):
        hits = tested(activations[row["layer"]][:, [row["unit"]]])
        assert row["accuracy"] == pytest.approx(hits.mean(), abs=1e-9)
        assert row["n_examples"] == len(labels)
    every = np.stack([activations[layer][:, unit] for layer, unit in PLANTED], axis=1)
    four = rows(found, probe="ensemble", features="selected", k=4)[0]
    assert four["accuracy"] == pytest.approx(tested(every).mean(), abs=2 / len(labels))
    centred = last - last.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + planted.shape.norm_eps)
    normed = normed * planted.weight("ln_final.w") + planted.weight("ln_final.b")
    logits = normed @ planted.weight("W_U").astype(np.float64) + planted.weight("b_U")
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p_ing = p[:, 1 : N_ING + 1].sum(axis=1)
    top1 = logits.argmax(axis=1)
    expected = {
        "top1_is_ing": ((top1 >= 1) & (top1 <= N_ING)) == labels,
        "p_ing": (p_ing > 0.5) == labels,
        "top1_exact": top1 == examples.targets,
    }
    for name, hits in expected.items():
        assert rows(found, features=name)[0]["accuracy"] == pytest.approx(hits.mean(), abs=1e-9)
    tuned = np.zeros(len(labels), dtype=bool)
    for fold in range(N_FOLDS):
        validation = folds == (fold + 1) % N_FOLDS
        cut = best_threshold(p_ing[validation], labels[validation])
        tuned[folds == fold] = ((p_ing > cut) == labels)[folds == fold]
    accuracy = {name: rows(found, features=name)[0]["accuracy"] for name in ("p_ing_tuned", *expected)}
    assert accuracy["p_ing_tuned"] == pytest.approx(tuned.mean(), abs=2 / len(labels))
    assert 0.2 < accuracy["top1_exact"] < accuracy["top1_is_ing"] < 0.9


def test_the_table_is_tidy_and_the_same_again(planted: Run, found: dict[str, pa.Table]) -> None:
    again = compute_ing(planted, OPTIONS, scheduler="threads")
    assert again == found
    assert tuple(found) == ("ing", "ing_neurons", "ing_histograms")
    for table in found.values():
        assert table.column_names[0] == "run"
        assert {
            "columns",
            "min_kurtosis",
            "min_variance",
            "top",
            "context",
            "examples",
            "seed",
            "folded",
            "vocab_centred",
            "centred",
            "variant",
        } <= {*table.column_names}
    numbers = Counter((row["probe"], row["features"]) for row in found["ing"].to_pylist())
    assert numbers == {
        ("neuron", "selected"): 4, ("neuron", "random"): 4, ("ensemble", "selected"): 4, ("ensemble", "random"): 4,
        ("ensemble", "heavy_tailed"): 1, ("model", "top1_is_ing"): 1, ("model", "p_ing"): 1,
        ("model", "p_ing_tuned"): 1, ("model", "top1_exact"): 1,
    }  # fmt: skip
    other = compute_ing(planted, replace(OPTIONS, seed=1), scheduler="synchronous")
    assert other["ing_neurons"].drop_columns("seed") == found["ing_neurons"].drop_columns("seed")
    assert other["ing"]["accuracy"] != found["ing"]["accuracy"]


def test_folds_have_a_fifth_of_the_examples_each(planted: Run) -> None:
    examples = find_examples(planted, IngTokens.open(planted), context=24, most=10_000, seed=0)
    sizes = np.bincount(examples.folds, minlength=N_FOLDS)
    assert sizes.min() > 0.7 * sizes.mean()


# -- what a run has to hold ---------------------------------------------------------------------


def test_a_tokenizer_without_ing_is_refused(make_run: Callable[..., Run]) -> None:
    with pytest.raises(AnalysisError, match=r"no token that ends in '-ing', among 24\."):
        compute_ing(make_run(), IngOptions())


def test_too_few_examples_are_counted(planted: Run, make_run: Callable[..., Run], shape: ModelShape) -> None:
    ids = planted.tokens["token_id"].to_numpy()[: 12 * LENGTH]
    run = make_run(
        shape=replace(shape, n_vocab=N_VOCAB), lengths=[LENGTH] * 12, context=64, partition_tokens=256,
        token_ids=ids, vocab=vocabulary(N_VOCAB),
    )  # fmt: skip
    behind = ids.reshape(12, LENGTH)[:, 25:]
    n = ((behind > 0) & (behind <= N_ING)).sum()
    assert 0 < n < MIN_EXAMPLES
    with pytest.raises(
        AnalysisError, match=rf"few examples: {n} tokens .* in 12 documents, and \d+ of them"
    ) as error:
        compute_ing(run, IngOptions())
    assert "layerlake capture" in error.value.hint
    skipped = {skip.analysis: skip.reason for skip in run_all(Lake(run.store.url))[1]}
    assert f"few examples: {n} tokens" in skipped["ing"]


def test_a_missing_site_is_said_with_the_command(planted_with: Callable[..., Run]) -> None:
    run = planted_with(sites=("resid",))
    with pytest.raises(SiteNotFound, match="'mlp_post' not at all") as error:
        run_analysis(Lake(run.store.url), "ing")
    assert "layerlake capture LAKE … --sites mlp_post" in error.value.hint


def test_no_candidate_is_said_with_the_largest_values(planted: Run) -> None:
    with pytest.raises(
        AnalysisError, match=r"None of the 80 neurons .* above 1e\+06 \(the largest is \d"
    ) as error:
        compute_ing(planted, IngOptions(min_kurtosis=1e6, min_variance=1.0))
    assert "--min-kurtosis" in error.value.hint


def test_without_heavy_tails_there_is_no_row_for_them(planted: Run) -> None:
    found = compute_ing(planted, IngOptions(min_kurtosis=1e6, top=2), scheduler="synchronous")
    assert not rows(found, features="heavy_tailed")
    assert len(found["ing_neurons"]) == 80  # in 64 dimensions all variances are above 0.005
    assert {row["k"] for row in rows(found, probe="ensemble")} == {1, 2}


@pytest.mark.parametrize("option", [{"top": 0}, {"context": 0}, {"examples": 199}, {"histograms": -1}])
def test_options_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(AnalysisError, match=f"Option {next(iter(option))} of 'ing' is at least"):
        IngOptions(**cast(Any, option))


@pytest.mark.parametrize(("site", "layer"), [("mlp_post", 1), ("resid", 2)])
def test_values_that_are_not_finite_are_named(
    planted_with: Callable[..., Run], site: str, layer: int
) -> None:
    sites = {"mlp_post": (2, N_DOCUMENTS * LENGTH, 40), "resid": (3, N_DOCUMENTS * LENGTH, 64)}
    values = np.random.default_rng(0).standard_normal(sites[site]).astype(np.float32)
    values[layer, :, 3:9] = np.nan
    run = planted_with(values={site: values})
    with pytest.raises(AnalysisError, match=rf"not finite .* site '{site}', layer {layer}"):
        compute_ing(run, OPTIONS)
