"""WiC probes: planted answers, scikit-learn's own grid search, and what a run has to hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import binomtest  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupShuffleSplit, PredefinedSplit
from tests.conftest import TINY, build_run

from layerlake.analyze.analyses import run_all, run_analysis
from layerlake.analyze.reduce import compute_tables
from layerlake.analyze.wic import C_GRID, FEATURES, WicOptions, WicStatistic, pair_features
from layerlake.analyze.wic_items import choose_items
from layerlake.capture.placement import Prompt
from layerlake.catalog.errors import AnalysisError, SiteNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run

Array = npt.NDArray[Any]

N_TRAIN, N_DEV, N_WORDS = 300, 140, 30
N = N_TRAIN + N_DEV
LENGTH, SPAN = 4, (1, 3)
"""Tokens of each sentence, and the positions of the word in it."""

rng = np.random.default_rng(0)
SENSES = rng.integers(0, 2, (N, 2))
LABELS = (SENSES[:, 0] == SENSES[:, 1]).astype(int)
STATES = rng.standard_normal((3, N, 2, LENGTH, TINY.d_model)).astype(np.float32)
"""Boundary 0 knows nothing; the word's last token tells its sense badly at boundary 1, and well at 2."""
for boundary, strength in ((1, 1.0), (2, 8.0)):
    STATES[boundary, :, :, SPAN[1] - 1, 0] += strength * (2 * SENSES - 1)


def prompts_of(labels: Array = LABELS, splits: Any = None, words: Any = None) -> list[Prompt]:
    """Two sentences an item, those of train first."""
    splits = ["train"] * N_TRAIN + ["dev"] * N_DEV if splits is None else splits
    words = [f"word{i % N_WORDS}" for i in range(N)] if words is None else words
    return [
        Prompt("wic", split, item, f"sentence{number}", label, word, SPAN, 4)
        for item, (split, label, word) in enumerate(zip(splits, labels, words, strict=True))
        for number in (1, 2)
    ]


def build(url: Any, *, states: Array = STATES, **options: Any) -> Run:
    values = {"resid": states.reshape(3, -1, TINY.d_model)}
    given: dict[str, Any] = {"prompts": prompts_of(), "lengths": [LENGTH] * (2 * N), "sites": ["resid"]}
    return build_run(url, partition_tokens=1024, values=values, **given | options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the task wic, in which the label is whether two senses are the same."""
    return build(tmp_path_factory.mktemp("wic") / "lake")


@pytest.fixture(scope="module")
def tables(run: Run) -> dict[str, pa.Table]:
    return compute_tables(WicStatistic.open, run, WicOptions())


def rows_of(table: pa.Table, **where: Any) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in where.items())]


def edited(run: Run, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Run:
    """The run with other rows in its documents table."""
    changed = Run(run.store, run.manifest)
    rows = [edit(row) for row in run.documents.to_pylist()]
    changed.__dict__["documents"] = pa.Table.from_pylist([row for row in rows if row], run.documents.schema)
    return changed


# -- the numbers --------------------------------------------------------------------------------


def test_a_probe_that_sees_no_interaction_cannot_tell_what_one_that_does_can(
    tables: dict[str, pa.Table],
) -> None:
    """Planted: the label is [sense of u = sense of v], the senses are linear in the last layer's states."""
    accuracy = {(row["layer"], row["features"]): row["accuracy"] for row in tables["wic_summary"].to_pylist()}
    assert accuracy[1, "interaction"] > 0.98
    assert accuracy[1, "concat_difference"] > 0.98
    assert accuracy[1, "concat"] == pytest.approx(0.5, abs=0.1)  # standard error 0.042
    assert 0.6 < accuracy[0, "interaction"] < 0.9
    for features in FEATURES:
        assert accuracy[-1, features] == pytest.approx(0.5, abs=0.1)


def test_layers_are_counted_from_the_embedding(tables: dict[str, pa.Table]) -> None:
    places = [(-1, 0), (0, 1), (1, 2)]
    for view, repeats in (("wic", 5), ("wic_summary", 1)):
        rows = tables[view].to_pylist()
        assert [(row["layer"], row["boundary"], row["features"]) for row in rows] == [
            (*place, features) for place in places for features in FEATURES for _ in range(repeats)
        ]
    assert [row["seed"] for row in tables["wic"].to_pylist()] == list(range(5)) * 12


@pytest.mark.parametrize(("pooling", "dtype"), [("last", "float32"), ("mean", "bfloat16")])
def test_probes_equal_a_grid_search(tmp_path: Any, pooling: Any, dtype: str) -> None:
    run = build(tmp_path, dtype=dtype)
    words = [f"word{i % N_WORDS}" for i in range(N_TRAIN)]
    start = SPAN[1] - 1 if pooling == "last" else SPAN[0]
    found = compute_tables(WicStatistic.open, run, WicOptions(pooling=pooling, seeds=2))["wic"]
    for boundary in range(3):
        stored = np.concatenate([run.read("resid", boundary, part) for part in run.manifest.partitions])
        vectors = stored.reshape(N, 2, LENGTH, -1)[:, :, start : SPAN[1]].astype(np.float64).mean(axis=2)
        train = vectors[:N_TRAIN].reshape(-1, TINY.d_model)
        u, v = np.moveaxis((vectors - train.mean(axis=0)) / train.std(axis=0), 1, 0)
        seen = {
            "interaction": [np.abs(u - v), u * v],
            "concat": [u, v],
            "concat_difference": [u, v, np.abs(u - v)],
            "cosine": [
                ((u * v).sum(axis=1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1))[:, None]
            ],
        }
        for features, parts in seen.items():
            x = np.concatenate(parts, axis=1)
            for seed in range(2):
                split = GroupShuffleSplit(1, test_size=0.1, random_state=seed)
                ((_, held),) = split.split(words, groups=words)
                fold = np.full(N_TRAIN, -1)
                fold[held] = 0
                search = GridSearchCV(
                    LogisticRegression(max_iter=1000), {"C": list(C_GRID)}, cv=PredefinedSplit(fold)
                )
                search.fit(x[:N_TRAIN], LABELS[:N_TRAIN])
                (row,) = rows_of(found, boundary=boundary, features=features, seed=seed)
                # float32 and the warm start may turn an item that lies on the border
                scores = dict(zip(C_GRID, search.cv_results_["mean_test_score"], strict=True))
                assert scores[row["C"]] == pytest.approx(search.best_score_, abs=1.5 / len(held))
                probe = LogisticRegression(C=row["C"], max_iter=1000).fit(x[:N_TRAIN], LABELS[:N_TRAIN])
                expected = probe.score(x[N_TRAIN:], LABELS[N_TRAIN:])
                assert row["accuracy"] == pytest.approx(expected, abs=1.5 / N_DEV)


def test_intervals_and_standard_errors(tables: dict[str, pa.Table]) -> None:
    for row in tables["wic"].to_pylist():
        p = row["accuracy"]
        wilson = binomtest(round(p * N_DEV), N_DEV).proportion_ci(method="wilson")
        assert [row["accuracy_lo"], row["accuracy_hi"]] == pytest.approx([wilson.low, wilson.high])
        assert row["stderr_dev"] == pytest.approx(np.sqrt(p * (1 - p) / N_DEV))
        assert (row["n_train"], row["n_dev"], row["n_left_out"]) == (N_TRAIN, N_DEV, 0)
        assert row["reason"] is row["note"] is None
        assert row["C"] in C_GRID
    for row in tables["wic_summary"].to_pylist():
        of_seeds = [
            single["accuracy"]
            for single in rows_of(tables["wic"], layer=row["layer"], features=row["features"])
        ]
        assert row["accuracy"] == pytest.approx(np.mean(of_seeds))
        assert row["stderr_seeds"] == pytest.approx(np.std(of_seeds, ddof=1) / np.sqrt(5))
        assert row["accuracy_lo"] <= row["accuracy"] <= row["accuracy_hi"]
        error = np.hypot(row["stderr_dev"], np.std(of_seeds) / np.sqrt(5))
        assert row["accuracy_hi"] - row["accuracy_lo"] == pytest.approx(2 * 1.96 * error, rel=0.25)
        assert (row["pooling"], row["seeds"], row["dev_split"], row["variant"]) == (
            "last",
            5,
            "dev",
            "default",
        )


def test_one_seed_has_no_spread(run: Run) -> None:
    summary = compute_tables(WicStatistic.open, run, WicOptions(seeds=1))["wic_summary"].to_pylist()
    assert all(row["stderr_seeds"] is None and row["accuracy_lo"] is not None for row in summary)
    assert {row["reason"] for row in summary} == {"no spread: only one seed"}


def test_measuring_leaves_what_was_read_as_it_is(run: Run) -> None:
    statistic = WicStatistic.open(run, WicOptions(seeds=1))
    block = statistic.read(run, statistic.units()[0])
    before = block.states.copy()
    statistic.measure(block)
    np.testing.assert_array_equal(block.states, before)


def test_equal_states_of_a_word_tell_nothing(tmp_path: Any) -> None:
    """As the embeddings of a word that is written alike twice, where positions are not embedded."""
    states = STATES.copy()
    states[0] = STATES[0, np.arange(N) % N_WORDS, :1, :1]
    summary = compute_tables(WicStatistic.open, build(tmp_path, states=states), WicOptions())["wic_summary"]
    for row in rows_of(summary, layer=-1):
        assert row["accuracy"] == pytest.approx(0.5, abs=0.13)
    (cosine,) = rows_of(summary, layer=-1, features="cosine")  # 1 for every item, so one answer for all
    assert min(cosine["accuracy"], 1 - cosine["accuracy"]) == pytest.approx(
        min(LABELS[N_TRAIN:].mean(), 1 - LABELS[N_TRAIN:].mean())
    )


def test_what_has_no_cosine_is_null_with_a_reason(tmp_path: Any) -> None:
    states = STATES.copy()
    states[1] = 0.3
    tables = compute_tables(WicStatistic.open, build(tmp_path, states=states), WicOptions(seeds=2))
    for view, n_rows in (("wic", 2), ("wic_summary", 1)):
        void = rows_of(tables[view], layer=0, features="cosine")
        assert len(void) == n_rows
        for row in void:
            assert row["accuracy"] is row["accuracy_lo"] is row["accuracy_hi"] is row["stderr_dev"] is None
            assert row.get("C") is row["note"] is None
            assert "no direction" in row["reason"]
        others = [row for row in tables[view].to_pylist() if row not in void]
        assert all(row["accuracy"] is not None and row["reason"] is None for row in others)
    for features in ("interaction", "concat"):  # one answer for all
        (row,) = rows_of(tables["wic_summary"], layer=0, features=features)
        assert abs(row["accuracy"] - 0.5) == pytest.approx(abs(LABELS[N_TRAIN:].mean() - 0.5))


def test_a_fit_that_does_not_converge_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerlake.analyze.wic._MAX_ITERATIONS", 1)
    with pytest.warns(match="failed to converge"):
        tables = compute_tables(WicStatistic.open, run, WicOptions(seeds=1), scheduler="synchronous")
    notes = {row["note"] for row in tables["wic"].to_pylist()}
    assert "a fit did not converge in 1 iterations" in notes


def test_features_of_a_pair() -> None:
    u, v = (np.array([row], dtype=np.float32) for row in ([3, 4], [4, -3]))
    assert pair_features("interaction", u, v).tolist() == [[1, 7, 12, -12]]
    assert pair_features("concat", u, v).tolist() == [[3, 4, 4, -3]]
    assert pair_features("concat_difference", u, v).tolist() == [[3, 4, 4, -3, 1, 7]]
    assert pair_features("cosine", u, u + v).tolist() == [[pytest.approx(np.sqrt(0.5))]]
    assert np.isnan(pair_features("cosine", u, 0 * v)).all()


# -- which items --------------------------------------------------------------------------------


def test_items_are_those_of_which_both_sentences_are_stored(run: Run) -> None:
    def edit(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["item"] == 7 and row["role"] == "sentence2":  # the second of the two was not captured
            return None
        if row["item"] == 9:
            return row | dict.fromkeys(("row_start", "span_start", "span_end"), None) | {"status": "refused"}
        return row | {"label": None} if row["item"] == N_TRAIN + 3 else row

    items = choose_items(edited(run, edit), "train", "auto", pooling="last")
    assert (len(items.labels), items.n_train, items.n_left_out) == (N - 3, N_TRAIN - 2, 3)
    kept = np.setdiff1d(np.arange(N), [7, 9, N_TRAIN + 3])
    np.testing.assert_array_equal(items.labels, LABELS[kept])
    assert items.words.tolist() == [f"word{i % N_WORDS}" for i in kept]


def test_items_do_not_depend_on_the_order_of_documents(run: Run) -> None:
    shuffled = Run(run.store, run.manifest)
    shuffled.__dict__["documents"] = run.documents.take(np.random.default_rng(1).permutation(2 * N))
    poolings: tuple[tuple[Literal["last", "mean"], int], ...] = (("last", 1), ("mean", 2))
    for pooling, length in poolings:
        ours, theirs = (choose_items(each, "train", "dev", pooling=pooling) for each in (run, shuffled))
        for name in ("labels", "words", "spans"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert set((ours.spans[..., 1] - ours.spans[..., 0]).ravel()) == {length}


@pytest.mark.parametrize("name", ["dev", "validation", "val"])
def test_the_other_split_is_found_by_its_usual_names(run: Run, name: str) -> None:
    renamed = edited(run, lambda row: row | {"split": row["split"].replace("dev", name)})
    assert choose_items(renamed, "train", "auto", pooling="last").dev_split == name
    found = compute_tables(WicStatistic.open, renamed, WicOptions(seeds=1))["wic"]
    assert set(found["dev_split"].to_pylist()) == {name}


def test_splits_may_be_named(run: Run) -> None:
    swapped = choose_items(run, "dev", "train", pooling="last")
    assert (swapped.n_train, swapped.dev_split) == (N_DEV, "train")
    with pytest.raises(AnalysisError, match="not to be tested on what it was fitted to, the split 'train'"):
        choose_items(run, "train", "train", pooling="last")


# -- what cannot be answered --------------------------------------------------------------------


def test_a_run_of_text_is_told_how_to_capture_wic(make_run: Callable[..., Run]) -> None:
    lake = Lake(make_run(lengths=(20, 30), context=32, partition_tokens=64).store.url)
    with pytest.raises(
        AnalysisError, match="no documents of the task wic, but those of 'synthetic'"
    ) as error:
        run_analysis(lake, "wic")
    assert "layerlake capture LAKE --model … --task wic --split train=FILE,dev=FILE" in error.value.hint
    _, skipped = run_all(lake)
    (reason,) = [skip.reason for skip in skipped if skip.analysis == "wic"]
    assert "--task wic" in reason


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train"] * N, "no wic items of a split 'dev' or 'validation' or 'val'; its splits are 'train'"),
        (["test"] * N, "no wic items of a split 'train'; its splits are 'test'"),
        ([None] * N, "no wic items of a split 'train'; its items are of no named split"),
    ],
)
def test_a_missing_split_is_named(run: Run, splits: list[str | None], message: str) -> None:
    with pytest.raises(AnalysisError, match=message) as error:
        choose_items(edited(run, lambda row: row | {"split": splits[0]}), "train", "auto", pooling="last")
    assert "--split train=FILE,dev=FILE" in error.value.hint
    assert ("--dev-split" in error.value.hint) == (splits[0] is not None)


def test_labels_of_one_class_are_refused(run: Run) -> None:
    with pytest.raises(AnalysisError, match=f"All {N_DEV} wic items of the split 'dev' .* have the label 1"):
        choose_items(
            edited(run, lambda row: row | {"label": 1} if row["split"] == "dev" else row),
            "train", "auto", pooling="last",
        )  # fmt: skip


def test_too_few_items_are_counted(run: Run) -> None:
    first = np.flatnonzero(LABELS[:N_TRAIN])[:19]

    def edit(row: dict[str, Any]) -> dict[str, Any] | None:
        return row if row["split"] == "dev" or row["item"] in first or not row["label"] else None

    n_other = N_TRAIN - LABELS[:N_TRAIN].sum()
    with pytest.raises(
        AnalysisError, match=f"'train' .* {19 + n_other} wic items .* 19 .* {n_other}"
    ) as error:
        choose_items(edited(run, edit), "train", "auto", pooling="last")
    assert "20 of each" in str(error.value)
    assert "--max-tokens" in error.value.hint


def test_items_of_one_word_are_refused(run: Run) -> None:
    with pytest.raises(AnalysisError, match=f"All {N_TRAIN} wic items .* are about the word 'spring'"):
        compute_tables(WicStatistic.open, edited(run, lambda row: row | {"word": "spring"}), WicOptions())


def test_words_that_leave_one_label_are_refused(run: Run) -> None:
    told = edited(run, lambda row: row | {"word": "even" if row["label"] else "odd"})
    with pytest.raises(AnalysisError, match=r"With seed 0, .* all have the label [01]"):
        compute_tables(WicStatistic.open, told, WicOptions())


def test_no_seed_is_refused() -> None:
    with pytest.raises(AnalysisError, match="At least one seed is needed, not 0"):
        WicOptions(seeds=0)


def test_a_run_without_the_residual_stream_is_refused(tmp_path: Any) -> None:
    run = build(tmp_path, sites=["mlp_out"])
    with pytest.raises(SiteNotFound, match="'resid'"):
        run_analysis(Lake(run.store.url), "wic")


def test_a_state_that_is_not_a_number_is_named(tmp_path: Any) -> None:
    states = STATES.copy()
    states[1, 5, 0, SPAN[1] - 1, 3] = np.nan
    with pytest.raises(AnalysisError, match=r"1 values that are not finite .* site 'resid', layer 1"):
        compute_tables(WicStatistic.open, build(tmp_path, states=states), WicOptions())


# -- as an analysis -----------------------------------------------------------------------------


def test_several_runs_are_one_finding_and_two_views(tmp_path: Any) -> None:
    for seed in (0, 1):
        build(tmp_path / "lake", name=f"run{seed}", seed=seed)
    lake = Lake(tmp_path / "lake")
    finding = run_analysis(lake, "wic", options={"seeds": 1})
    assert set(finding.table["run"].to_pylist()) == set(lake.run_ids)
    assert pc.count_distinct(finding.tables["wic_summary"]["run"]).as_py() == 2
    assert {table.view for table in lake.findings()} == {"wic", "wic_summary"}
