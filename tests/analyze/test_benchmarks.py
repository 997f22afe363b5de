"""Benchmarks against lm-evaluation-harness's scores, item by item."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from tests.analyze.intervention_rows import floor, planned, write_rows

from layerlake.analyze.analyses import run_all, run_analysis
from layerlake.analyze.benchmarks import score_benchmarks
from layerlake.analyze.inputs import Input, NoOptions
from layerlake.capture.placement import Prompt
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.findings import list_findings
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.schedules import Intervention

N_CONTEXT = 3
INTERVENTIONS = planned(2, drop="all", swap="all")

Row = dict[str, Any]
Item = tuple[str | None, int, int, Sequence[tuple[int, int]]]
"""Its split, its number, the number of the right choice, and the tokens and characters of each choice."""

ITEMS: list[Item] = [
    ("dev", 0, 1, [(1, 4), (2, 9), (3, 5)]),
    ("dev", 1, 3, [(2, 8), (2, 7), (1, 3), (4, 20)]),
    ("dev", 2, 0, [(1, 2), (1, 6), (2, 4)]),
    ("test", 0, 2, [(3, 12), (1, 1), (2, 8)]),
    ("test", 1, 0, [(2, 5), (2, 5)]),
]


def chosen(make_run: Callable[..., Run], task: str = "arc_easy", items: Sequence[Item] = ITEMS) -> Run:
    """Make a run of a task of choices."""
    prompts = [
        Prompt(task, split, item, f"choice{i}", label, None, (N_CONTEXT, N_CONTEXT + n), chars)
        for split, item, label, choices in items
        for i, (n, chars) in enumerate(choices)
    ]
    return make_run(name=task, lengths=[prompt.span[1] for prompt in prompts if prompt.span], prompts=prompts)


def continued(make_run: Callable[..., Run], lengths: Sequence[int] = (1, 3, 2, 1, 2)) -> Run:
    prompts = [
        Prompt("lambada", None, i, "continuation", None, None, (N_CONTEXT, N_CONTEXT + n), 4)
        for i, n in enumerate(lengths)
    ]
    return make_run(name="lambada", lengths=[N_CONTEXT + n for n in lengths], prompts=prompts)


def answers(run: Run, *, without: Sequence[int] = ()) -> dict[int, list[int]]:
    """Return the positions that predict the answer of each document."""
    table = run.documents.select(["document", "span_start", "span_end"]).to_pylist()
    return {
        row["document"]: list(range(row["span_start"] - 1, row["span_end"] - 1))
        for row in table
        if row["document"] not in without
    }


def scores(run: Run) -> list[Row]:
    rows: list[Row] = run_analysis(Lake(run.store.url), "benchmarks", runs=[run.run_id]).table.to_pylist()
    return rows


def mean_and_error(values: Sequence[float]) -> Any:
    return pytest.approx((statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))))


def test_choices_are_scored_as_lm_eval_scores_them(make_run: Callable[..., Run]) -> None:
    run = chosen(make_run)
    rows = scores_of_rows = write_rows(run, INTERVENTIONS, answers(run))
    documents = run.documents.to_pandas()
    found = scores(run)
    assert [(row["split"], row["kind"], row["layer"]) for row in found] == [
        (split, kind, layer)
        for split in ("dev", "test")
        for kind, layer in (("none", None), ("drop", 0), ("drop", 1), ("swap", 0))
    ]
    for row in found:
        own = scores_of_rows[(rows.kind == row["kind"]) & (rows.schedule == row["schedule"])]
        likelihood = -own.groupby("document").loss_nats.sum()
        acc, acc_norm = [], []
        for _, item in documents[documents.split == row["split"]].groupby("item"):
            summed = [likelihood[document] for document in item.document]
            per_char = [a / chars for a, chars in zip(summed, item.span_chars, strict=True)]
            acc.append(float(summed.index(max(summed)) == item.label.iloc[0]))
            acc_norm.append(float(per_char.index(max(per_char)) == item.label.iloc[0]))
        assert (row["acc"], row["acc_stderr"]) == mean_and_error(acc)
        assert (row["acc_norm"], row["acc_norm_stderr"]) == mean_and_error(acc_norm)
        assert (row["n_items"], row["n_left_out"], row["task"]) == (len(acc), 0, "arc_easy")
        assert (row["perplexity"], row["reason"]) == (None, "no loss and no perplexity: of choices")


def test_continuations_are_scored_as_lm_eval_scores_them(make_run: Callable[..., Run]) -> None:
    run = continued(make_run)
    rows = write_rows(run, INTERVENTIONS, answers(run))
    found = scores(run)
    assert len(found) == len(INTERVENTIONS)
    for row in found:
        items = rows[(rows.kind == row["kind"]) & (rows.schedule == row["schedule"])].groupby("document")
        assert (row["acc"], row["acc_stderr"]) == mean_and_error(items.correct.all().astype(float).tolist())
        losses = items.loss_nats.sum().tolist()
        assert (row["item_loss_nats"], row["item_loss_nats_stderr"]) == mean_and_error(losses)
        assert row["perplexity"] == pytest.approx(math.exp(statistics.fmean(losses)))
        assert (row["n_items"], row["n_left_out"], row["acc_norm"]) == (5, 0, None)
        assert row["reason"] == "no acc_norm: an item has but one continuation"


def test_planted_answers(make_run: Callable[..., Run]) -> None:
    """The right choice is twenty times as long as the other: likelier by character, if not as a whole."""
    run = chosen(make_run, "hellaswag", [(None, i, 1, [(2, 2), (2, 40)]) for i in range(4)])
    is_right: dict[int, bool] = {
        row["document"]: row["role"] == "choice1" for row in run.documents.to_pylist()
    }
    losses: dict[str, list[float]] = {"none": [1.0, 3.0], "drop": [3.0, 1.0], "swap": [1.0, 30.0]}

    def loss(intervention: Intervention, document: int, _: int) -> float:
        return losses[intervention.kind][is_right[document]]

    write_rows(run, planned(2, drop="1", swap="0"), answers(run), loss_nats=loss)
    found = {row["kind"]: (row["acc"], row["acc_norm"], row["acc_stderr"]) for row in scores(run)}
    assert found == {"none": (0, 1, 0), "drop": (1, 1, 0), "swap": (0, 0, 0)}


@pytest.mark.parametrize("how", ["refused", "not looked at", "looked at elsewhere"])
def test_an_item_counts_if_all_of_its_answers_were_looked_at(make_run: Callable[..., Run], how: str) -> None:
    run = chosen(make_run)
    third = 3  # the first document of dev's item 1
    at = answers(run, without=[third] if how != "looked at elsewhere" else [])
    if how == "looked at elsewhere":
        at[third] = at[third][:1]
    write_rows(run, INTERVENTIONS, at)
    if how == "refused":
        rows = run.documents.to_pylist()
        rows[third] |= {"status": "refused", "span_start": None, "span_end": None}
        run.documents = pa.Table.from_pylist(rows, run.documents.schema)
    keys = tuple(table.key for table in list_findings(run.store, "interventions"))
    inputs = {"interventions": Input(run.store, "interventions", keys)}
    found = score_benchmarks(run, NoOptions(), inputs)["benchmarks"].to_pandas()
    counts = found.groupby("split")[["n_items", "n_left_out"]].first()
    pd.testing.assert_frame_equal(
        counts,
        pd.DataFrame(
            {"n_items": [2, 2], "n_left_out": [1, 0]}, index=pd.Index(["dev", "test"], name="split")
        ),
    )


def test_the_floor_is_no_benchmark_and_one_item_has_no_error(make_run: Callable[..., Run]) -> None:
    run = continued(make_run, (2,))
    write_rows(run, planned(2, drop="1"), answers(run))
    write_rows(run, floor(2, 0), {0: [1]}, kl_nats=0.5)
    write_rows(run, floor(2, 1), {0: [1]}, kl_nats=0.25)
    found = scores(run)
    assert [(row["kind"], row["kl_noop_nats"]) for row in found] == [("none", None), ("drop", 0.25)]
    for row in found:
        assert (row["n_items"], row["acc_stderr"], row["item_loss_nats_stderr"]) == (1, None, None)
        assert (
            row["reason"]
            == "no acc_norm: an item has but one continuation; no standard errors: it is one item"
        )


def test_a_part_that_is_added_is_another_finding(make_run: Callable[..., Run]) -> None:
    run = continued(make_run)
    lake = Lake(run.store.url)
    write_rows(run, planned(2, drop="1"), answers(run, without=[4]))
    before = run_analysis(lake, "benchmarks")
    assert run_analysis(lake, "benchmarks").keys == before.keys
    assert set(before.table["n_left_out"].to_pylist()) == {1}
    write_rows(run, planned(2, drop="1"), {4: answers(run)[4]})
    after = run_analysis(lake, "benchmarks")
    assert after.keys != before.keys
    assert set(after.table["n_left_out"].to_pylist()) == {0}


def test_several_runs_are_one_table_and_other_runs_are_skipped(make_run: Callable[..., Run]) -> None:
    runs = [chosen(make_run), continued(make_run)]
    text = make_run(name="text")
    for run in runs:
        write_rows(run, planned(2, drop="1"), answers(run))
    lake = Lake(text.store.url)
    findings, skipped = run_all(lake)
    (found,) = (finding for finding in findings if finding.analysis == "benchmarks")
    assert {row["task"]: row["run"] for row in found.table.to_pylist()} == {
        run.manifest.model_name: run.run_id for run in runs
    }
    (reason,) = (skip.reason for skip in skipped if skip.analysis == "benchmarks")
    assert reason.startswith(f"Run {text.run_id} is of none of the tasks lambada, arc_easy, hellaswag")
    assert "--task lambada" in reason
    refused = {skip.run: skip.reason for skip in skipped if skip.analysis == "stages"}
    assert set(refused) == {run.run_id for run in runs}


def test_a_run_without_rows_is_told_the_command(make_run: Callable[..., Run]) -> None:
    run = continued(make_run)
    with pytest.raises(AnalysisError, match="has no rows of interventions") as error:
        scores(run)
    assert f"layerlake intervene LAKE --run {run.run_id}" in error.value.hint
    write_rows(run, planned(2, drop="1"), {1: [2]})
    with pytest.raises(AnalysisError, match="no item all of whose answers were looked at"):
        scores(run)
