"""The report of interventions and stages: which figures there are, what has to be computed again, what is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.analyze.intervention_rows import every_position, planned, write_rows
from tests.analyze.test_report import FIGURES, LENGTHS, MADE, Page
from tests.conftest import TINY

from layerlake.analyze.analyses import run_all, run_analysis
from layerlake.analyze.demands import DEMANDS
from layerlake.analyze.report import build_report
from layerlake.capture.placement import Prompt
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    """A run of which all is analysed but interventions, for there are none yet."""
    run = make_run(name="first", lengths=LENGTHS, context=32, partition_tokens=64)
    run_all(Lake(run.store.url), scheduler="synchronous")
    return run


@pytest.fixture
def lake(run: Run) -> Lake:
    return Lake(run.store.url)


def test_interventions_have_figures_of_their_kinds_and_their_numbers(lake: Lake, run: Run) -> None:
    write_rows(run, planned(TINY.n_layers, drop="all", swap="all"), every_position(run))
    run_analysis(lake, "intervention_summary", scheduler="synchronous")
    page = Page(build_report(Lake(lake.url), made=MADE))
    assert len(page.specs) == FIGURES + 2  # neither ablations nor repeats
    assert "A layer dropped, two layers swapped." in page.words
    assert "Blocks of layers repeated." not in page.words
    assert "layers 0 and 1 swapped" in page.words  # above a column of numbers
    assert f"layerlake analyze {lake.url} intervention_summary" in page.commands
    # the stages were told without these
    assert f"layerlake analyze {lake.url} stages --run {run.run_id}" in page.commands
    assert page.words.count("first has grown since this was computed.") == 1


def test_a_summary_of_interventions_to_which_some_were_added_says_so(lake: Lake, run: Run) -> None:
    write_rows(run, planned(TINY.n_layers, drop="all"), every_position(run))
    run_analysis(lake, "stages", scheduler="synchronous")
    assert "has grown" not in Page(build_report(Lake(lake.url), made=MADE)).words
    write_rows(run, planned(TINY.n_layers, swap="all"), every_position(run), seed=1)
    page = Page(build_report(Lake(lake.url), made=MADE))
    assert page.words.count("first has grown since this was computed.") == 1
    assert f"layerlake analyze {lake.url} intervention_summary --run {run.run_id}" in page.commands


def test_verdicts_are_printed_with_their_words(lake: Lake) -> None:
    page = Page(build_report(lake, made=MADE))
    found = run_analysis(lake, "stages", scheduler="synchronous")  # which it has found before
    for row in found.table.to_pylist():
        assert row["statement"] in page.words
    assert len(page.of("figure")) == len(page.specs) + 1  # the verdicts are a table


def test_answers_of_a_task_are_no_text_to_draw(make_run: MakeRun) -> None:
    prompts = [
        Prompt("lambada", None, i, "continuation", None, None, (n - 2, n), 1) for i, n in enumerate(LENGTHS)
    ]
    run = make_run(lengths=LENGTHS, context=32, partition_tokens=64, prompts=prompts)
    lake = Lake(run.store.url)
    answers = {i: [n - 3, n - 2] for i, n in enumerate(LENGTHS)}
    write_rows(run, planned(TINY.n_layers, drop="all"), answers)
    for name in ("intervention_summary", "benchmarks"):
        run_analysis(lake, name, scheduler="synchronous")
    page = Page(build_report(lake, made=MADE))
    assert len(page.specs) == 1
    assert "Accuracy under interventions." in page.words
    for name in ("intervention_summary", "stages"):
        assert f"Left out, with {DEMANDS[name].lack}" in page.words
