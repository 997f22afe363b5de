"""Demands: what an analysis asks of a run's text, so that the report need not ask for what a text cannot give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..catalog.errors import AnalysisError
from ..catalog.findings import list_findings
from ..catalog.run import Run
from .benchmarks import SCORED_TASKS
from .ing import IngOptions
from .ing_examples import IngTokens, find_examples
from .subjoiner import SubjoinerOptions, SubjoinerStatistic

__all__ = ["DEMANDS", "Demand"]


@dataclass(frozen=True, slots=True)
class Demand:
    """What an analysis asks of a text beyond its being one."""

    is_met: Callable[[Run], bool]
    """Reads the tables of a run alone: of a million tokens, a second or two."""
    lack: str
    """What a text has that does not meet it: "too few …"."""
    is_strict: bool = False
    """Whether a run that does not meet it is left out even if it was analysed."""


def _has_wic(run: Run) -> bool:
    return "wic" in _tasks(run)


def _has_words(run: Run) -> bool:
    return _is_allowed(lambda: SubjoinerStatistic.open(run, SubjoinerOptions()))


def _has_ing(run: Run) -> bool:
    given = IngOptions()
    return _is_own(run) and _is_allowed(
        lambda: find_examples(
            run, IngTokens.open(run), context=given.context, most=given.examples, seed=given.seed
        )
    )


def _is_own(run: Run) -> bool:
    """Whether layers were run in the model's own order: else its weights are not the layers'."""
    return run.manifest.baseline is None


def _tasks(run: Run) -> set[str]:
    return set(filter(None, run.documents["task"].unique().to_pylist()))


def _is_intervened_text(run: Run, view: str = "interventions") -> bool:
    """Whether layers were moved while a text was read; of a task, answers only were looked at."""
    return not _tasks(run) and _holds(run, view)


def _is_intervened_task(run: Run) -> bool:
    return bool(_tasks(run) & set(SCORED_TASKS)) and _holds(run, "interventions")


def _holds(run: Run, view: str) -> bool:
    return any(table.key.run == run.run_id for table in list_findings(run.store, view))


def _is_allowed(search: Callable[[], object]) -> bool:
    try:
        search()
    except AnalysisError:
        return False
    return True


DEMANDS = {
    "subjoiner": Demand(_has_words, "too few words of several tokens and of one"),
    "wic": Demand(_has_wic, "no items of the task wic"),
    "ing": Demand(_has_ing, "too few tokens that end in “-ing”"),
    "intervention_summary": Demand(
        _is_intervened_text, "no interventions in a text (layerlake intervene)", is_strict=True
    ),
    "swap_cosines": Demand(
        partial(_is_intervened_text, view="swap_cosine_documents"),
        "no cosines of swapped layers (layerlake intervene --swap-cosines)",
        is_strict=True,
    ),
    "benchmarks": Demand(
        _is_intervened_task, f"no interventions at answers of {', '.join(SCORED_TASKS)} (layerlake intervene)"
    ),
    "neurons": Demand(_is_own, "layers in another order, whose weights are the baseline's"),
    "stages": Demand(
        lambda run: _is_own(run) and not _tasks(run),
        "answers of a task, or layers in another order, in place of a text",
    ),
}
"""By the name of the analysis; all others take any text."""
