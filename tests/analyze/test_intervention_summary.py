"""The summary of interventions against pandas over all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.analyze.intervention_rows import every_position, floor, planned, write_rows

from layerlake.analyze.analyses import run_all, run_analysis
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.findings import newest_findings
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run

MEANS = {
    "kl_nats": "kl_nats",
    "agreement": "agree",
    "accuracy": "correct",
    "loss_nats": "loss_nats",
    "delta_loss_nats": "delta_loss_nats",
    "entropy_bits": "entropy_bits",
    "delta_entropy_bits": "delta_entropy_bits",
}

Row = dict[str, Any]


def summary(run: Run) -> list[Row]:
    rows: list[Row] = run_analysis(
        Lake(run.store.url), "intervention_summary", runs=[run.run_id]
    ).table.to_pylist()
    return rows


def only(rows: list[Row], **equal: Any) -> Row:
    (row,) = (row for row in rows if all(row[name] == value for name, value in equal.items()))
    return row


def resampled(sums: pd.DataFrame, top: str, bottom: str) -> Any:
    """Return the interval of a ratio of sums over documents, drawn all at once."""
    n = len(sums)
    drawn = np.random.default_rng(0).integers(0, n, (1000, n))
    replicates = sums[top].to_numpy()[drawn].sum(axis=1) / sums[bottom].to_numpy()[drawn].sum(axis=1)
    return pytest.approx(np.percentile(replicates, [2.5, 97.5]), rel=1e-6)


def test_the_summary_equals_pandas_over_all_rows(make_run: Callable[..., Run]) -> None:
    run = make_run(lengths=(9, 12, 7, 11, 5, 8))
    at = every_position(run)
    both = planned(2, drop="all", swap="all", ablate_mlp="1")
    first, second = ({d: p for d, p in at.items() if (d < 3) is here} for here in (True, False))
    parts = [
        write_rows(run, both, first, seed=1),
        write_rows(run, both, second, seed=2),
        write_rows(run, planned(2, repeat="1")[1:], at, seed=3),
    ]
    base = parts[0][parts[0].kind == "none"], parts[1][parts[1].kind == "none"]
    base_right = pd.concat(base).groupby("document").correct.sum()
    whole = pd.concat(parts)
    rows = summary(run)
    assert len(rows) == 1 + 2 + 1 + 1 + 2
    assert [row["kind"] for row in rows] == ["none", *["drop"] * 2, "swap", *["repeat"] * 2, "ablate_mlp"]
    for row in rows:
        own = whole[(whole.kind == row["kind"]) & (whole.schedule == row["schedule"])]
        sums = own.groupby("document")[list(MEANS.values())].sum().astype(float)
        sums["n"], sums["base"] = own.groupby("document").size(), base_right
        for name, column in MEANS.items():
            assert row[name] == pytest.approx(own[column].mean(), rel=1e-6)
            assert [row[f"{name}_lo"], row[f"{name}_hi"]] == resampled(sums, column, "n")
        assert row["relative_accuracy"] == pytest.approx(own.correct.mean() / pd.concat(base).correct.mean())
        assert [row["relative_accuracy_lo"], row["relative_accuracy_hi"]] == resampled(
            sums, "correct", "base"
        )
        assert (row["n_tokens"], row["n_documents"]) == (len(own), 6)
        assert (row["layer"], row["span"], row["resumes_at"]) == (
            None if pd.isna(own.layer.iloc[0]) else own.layer.iloc[0],
            None if pd.isna(own.span.iloc[0]) else own.span.iloc[0],
            own.resumes_at.iloc[0],
        )
        assert (row["positions"], row["is_resumed"], row["variant"], row["note"]) == (
            None,
            True,
            "default",
            None,
        )
        assert row["kl_noop_nats"] is None
        assert row["reason"].startswith("no floor: ")


def test_a_part_that_is_added_is_another_finding(make_run: Callable[..., Run]) -> None:
    run = make_run()
    lake = Lake(run.store.url)
    at = every_position(run)
    write_rows(run, planned(2, drop="0"), at)
    before = run_analysis(lake, "intervention_summary")
    assert run_analysis(lake, "intervention_summary").keys == before.keys
    write_rows(run, planned(2, drop="1")[1:], at, seed=1)
    after = run_analysis(lake, "intervention_summary")
    assert after.keys != before.keys
    assert len(after.table) == len(before.table) + 1
    (shown,) = newest_findings(lake.findings("intervention_summary"))
    assert shown.finding == after.keys[0].digest


def test_several_runs_are_one_table(make_run: Callable[..., Run]) -> None:
    runs = [make_run(name=name) for name in ("first", "second")]
    lake = Lake(runs[0].store.url)
    write_rows(runs[0], planned(2, drop="all"), every_position(runs[0]))
    with pytest.raises(AnalysisError, match=r"Run second-.* has no rows of interventions") as error:
        run_analysis(lake, "intervention_summary")
    assert error.value.hint.endswith(f"layerlake intervene LAKE --run {runs[1].run_id} --drop all --swap all")
    assert {skip.run for skip in run_all(lake)[1] if skip.analysis == "intervention_summary"} == {
        runs[1].run_id
    }
    write_rows(runs[1], planned(2, swap="all"), every_position(runs[1]))
    found = run_analysis(lake, "intervention_summary")
    assert [(row["run"], row["kind"]) for row in found.table.to_pylist()] == [
        (runs[0].run_id, "none"), (runs[0].run_id, "drop"), (runs[0].run_id, "drop"),
        (runs[1].run_id, "none"), (runs[1].run_id, "swap"),
    ]  # fmt: skip


def test_the_floor_stands_beside_what_resumes_there(make_run: Callable[..., Run]) -> None:
    """Its rows are of other tokens than the base's, and it is named where it is no smaller than the effect."""
    run = make_run(dtype="float16", lengths=(9, 12))
    at = every_position(run)
    effects = {"none": 0.0, "drop": 0.5, "ablate_mlp": 0.02, "ablate_attn": 0.002}
    write_rows(
        run,
        planned(2, drop="all", ablate_mlp="1", ablate_attn="1"),
        at,
        kl_nats=lambda i, *_: effects[i.kind],
    )
    write_rows(run, floor(2, 1), {0: [1, 2], 1: [1, 2]}, kl_nats=lambda i, d, p: [0.002, 0.006][d])  # noqa: ARG005
    rows = summary(run)
    noop, dropped = only(rows, kind="noop"), only(rows, kind="drop", layer=1)
    assert (noop["kl_nats"], noop["n_tokens"], noop["note"]) == (pytest.approx(0.004), 4, None)
    assert (noop["relative_accuracy"], noop["relative_accuracy_lo"]) == (None, None)
    assert noop["reason"] == "no relative accuracy: the unmodified model was looked at at other tokens"
    assert (dropped["kl_noop_nats"], dropped["note"], dropped["reason"]) == (pytest.approx(0.004), None, None)
    assert [noop["kl_nats_lo"], noop["kl_nats_hi"]] == pytest.approx([0.002, 0.006])
    first = only(rows, kind="drop", layer=0)
    assert (first["kl_noop_nats"], first["reason"]) == (None, "no floor: it was not measured at boundary 0")
    assert only(rows, kind="ablate_mlp")["note"] == (
        "the floor of a float16 lake, 0.004 nats, is not well below the effect"
    )
    assert (
        only(rows, kind="ablate_attn")["note"]
        == "the floor of a float16 lake, 0.004 nats, is above the effect"
    )


def test_requests_are_not_mixed(make_run: Callable[..., Run]) -> None:
    """Rows of drawn positions, and of schedules that were run from the embedding, have a base of their own."""
    run = make_run()
    at = every_position(run)
    asked = planned(2, drop="1")
    few = {document: places[:2] for document, places in at.items()}
    write_rows(run, asked, at, correct=lambda i, *_: i.kind == "none")
    write_rows(run, asked, few, seed=1, positions=2, correct=True)
    write_rows(run, asked, at, seed=2, is_resumed=False, correct=lambda i, d, p: p % 2 == 0)  # noqa: ARG005
    rows = summary(run)
    assert [(row["positions"], row["is_resumed"]) for row in rows[::2]] == [
        (None, True),
        (None, False),
        (2, True),
    ]
    whole, rerun, drawn = (row for row in rows if row["kind"] == "drop")
    assert [row["relative_accuracy"] for row in (whole, rerun, drawn)] == [0, 1, 1]
    assert (drawn["n_tokens"], whole["n_tokens"]) == (sum(map(len, few.values())), sum(map(len, at.values())))
    assert (rerun["resumes_at"], whole["resumes_at"]) == (0, 1)
    assert rerun["reason"] == "no floor: all blocks were run, none of them behind a stored boundary"


def test_rows_that_two_processes_have_stored_count_once(make_run: Callable[..., Run]) -> None:
    run = make_run()
    at = every_position(run)
    asked = planned(2, drop="all")
    write_rows(run, asked, at, kl_nats=0.5)
    expected = summary(run)
    write_rows(run, asked, dict(list(at.items())[:2]), kl_nats=0.5)
    for row, before in zip(summary(run), expected, strict=True):
        assert (row["n_tokens"], row["kl_nats"]) == (before["n_tokens"], before["kl_nats"])


def test_stale_keys_and_values_are_the_authors(make_run: Callable[..., Run]) -> None:
    run = make_run()
    write_rows(run, planned(2, repeat="2", stale_kv=True), every_position(run))
    assert [row["variant"] for row in summary(run)] == ["default", "authors"]


def test_what_cannot_be_said_is_said(make_run: Callable[..., Run]) -> None:
    run = make_run(lengths=(9,))
    write_rows(run, planned(2, drop="1"), every_position(run), correct=False)
    for row in summary(run):
        assert (row["kl_nats_lo"], row["kl_nats_hi"], row["relative_accuracy"]) == (None, None, None)
        assert row["reason"].startswith(
            "no intervals: the tokens are all of one document; "
            "no relative accuracy: the unmodified model is right at no token; no floor"
        )


def test_values_that_are_not_finite_are_not_averaged(make_run: Callable[..., Run]) -> None:
    run = make_run()
    write_rows(run, planned(2, drop="1"), {1: [1, 2]}, kl_nats=np.nan)
    write_rows(run, planned(2, drop="1"), {3: [1, 2]})
    with pytest.raises(AnalysisError, match="rows of none 0-1 that are not finite"):
        summary(run)


def test_documents_that_hold_infinities_are_left_out(make_run: Callable[..., Run]) -> None:
    lengths = (9, 12, 7)
    resid = np.random.default_rng(0).normal(size=(3, sum(lengths), 8)).astype(np.float32)
    resid[1, 12, 3] = np.inf  # of document 1
    run = make_run(lengths=lengths, values={"resid": resid})
    at = every_position(run)
    write_rows(run, planned(2, drop="all"), at, kl_nats=lambda i, d, p: float(d))  # noqa: ARG005
    lake = Lake(run.store.url)
    found = run_analysis(lake, "intervention_summary", exclude_nonfinite=True)
    assert found.keys[0].extents["interventions"]["excluded"] == [1]
    for row in found.table.to_pylist():
        assert (row["n_documents"], row["n_excluded"], row["n_tokens"]) == (2, 1, 7 + 5)
        assert row["kl_nats"] == pytest.approx(2 * 5 / 12)
    assert {row["n_documents"] for row in summary(run)} == {3}
