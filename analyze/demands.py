"""Demands: what an analysis asks of a run's text, so that the report need not ask for what a text cannot give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
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


def _has_wic(run: Run) -> bool:
    return "wic" in run.documents["task"].unique().to_pylist()


def _has_words(run: Run) -> bool:
    return _is_allowed(lambda: SubjoinerStatistic.open(run, SubjoinerOptions()))


def _has_ing(run: Run) -> bool:
    given = IngOptions()
    return _is_allowed(
        lambda: find_examples(
            run, IngTokens.open(run), context=given.context, most=given.examples, seed=given.seed
        )
    )


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
}
"""By the name of the analysis; all others take any text."""
