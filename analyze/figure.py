"""Figure: what the report shows of a view: a chart, a small table, or both, and what it says about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .series import Series

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Figure", "Numbers", "count_text", "remarks"]

_N_REMARKS = 4
_COUNTS = ("n_samples", "n_tokens", "n_queries", "n_prompts", "n_examples", "n_items")


@dataclass(frozen=True, slots=True)
class Numbers:
    """A small table that the report prints below a chart."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the report: what it shows of one view, and its caption."""

    analysis: str
    view: str
    title: str
    draw: Callable[..., Any] | None
    """``draw(table, series)``, for a chart by depth with ``axis``; None if it is a table only."""
    shows: str
    computed: str
    """May name parameters of the finding in braces."""
    reading: str
    source: str
    """Which figure of the paper shows the like."""
    is_by_depth: bool = True
    """Whether the chart takes ``axis``."""
    choices: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    """For parameters whose values need words: parameter → value → what it means."""
    kinds: tuple[str, ...] = ()
    """Of a view with a column ``kind``: those that it shows; without a row of them there is no figure."""
    tabulate: Callable[[pa.Table, Sequence[Series]], Numbers] | None = None
    """Returns the numbers to print."""
    remarks_from: tuple[str, ...] = ("reason", "note")
    """The columns that say why values are missing, or what is wrong with them."""

    def select(self, table: pa.Table) -> pa.Table:
        """Return the rows of the view that it shows."""
        return table.filter(np.isin(table["kind"].to_pylist(), self.kinds)) if self.kinds else table

    def say_computed(self, params: Mapping[str, Any]) -> str:
        """Return how it is computed with these parameters."""
        words = {
            name: self.choices.get(name, {}).get(
                value, f"{value:g}" if isinstance(value, float) else str(value)
            )
            for name, value in params.items()
        }
        return self.computed.format_map(defaultdict(str, words))


def count_text(table: pa.Table, series: Sequence[Series]) -> str:
    """Say how many tokens, samples or documents of each run the numbers are means over."""
    column = next((name for name in _COUNTS if name in table.column_names), None)
    if column is None:
        return ""
    largest: dict[str, int] = {}
    for run, n in zip(table["run"].to_pylist(), table[column].to_pylist(), strict=True):
        largest[run] = max(largest.get(run, 0), n or 0)
    unit = column.removeprefix("n_")
    if len(set(largest.values())) == 1 and len(largest) > 1:
        return f"{max(largest.values()):,} {unit} of each run"
    return ", ".join(
        f"{largest[item.run]:,} {unit} of {item.label}" for item in series if item.run in largest
    )


def remarks(
    table: pa.Table, series: Sequence[Series], columns: Sequence[str] = ("reason", "note")
) -> list[str]:
    """Say why values are missing, or what is wrong with them, in the table's own words."""
    labels = {item.run: item.label for item in series}
    runs_of: dict[str, dict[str, None]] = {}
    for name in columns:
        if name in table.column_names:
            for row in table.select(["run", name]).to_pylist():
                if row[name]:
                    runs_of.setdefault(row[name], {})[labels[row["run"]]] = None
    said_of = [f"{', '.join(of)}: {said}." for said, of in runs_of.items()]
    hidden = len(said_of) - _N_REMARKS
    return said_of if hidden <= 0 else [*said_of[:_N_REMARKS], f"The table has {hidden} more."]
