"""What the command line prints: tables, progress, errors. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["CaptureProgress", "note", "print_json", "print_table", "show_capture"]

_STDERR = Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    _STDERR.print(text, markup=False)


def print_json(value: Any) -> None:
    """Print one JSON value, alone on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None, limit: int = 40) -> None:
    """Print rows of equal keys as a table; numbers are right-aligned, floats have four significant digits."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        is_number = all(isinstance(row[name], (int, float, type(None))) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(_cell(value) for value in row.values()))
    # A pipe has no width of its own: give it room, so that no cell is folded that a terminal would show.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
    if len(rows) > limit:
        note(f"… {len(rows) - limit} more rows")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


class CaptureProgress(Protocol):
    """Is told how far a capture has come."""

    def __call__(self, phase: str, done: int, total: int, *, nbytes: int = 0, queued: int = 0) -> None:
        """Take a phase's name, tokens done and in all, bytes stored, and objects waiting to be stored."""


def silent(phase: str, done: int, total: int, *, nbytes: int = 0, queued: int = 0) -> None:
    """Show no progress."""


@contextmanager
def show_capture(label: str) -> Iterator[CaptureProgress]:
    """Show a capture's progress: a bar on a terminal, elsewhere a line for each tenth of the way."""
    if not _STDERR.is_terminal:
        yield _line_log(label)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_STDERR) as bar:
        task = bar.add_task(label, total=1, figures="")
        rates = _Rates()

        def update(phase: str, done: int, total: int, *, nbytes: int = 0, queued: int = 0) -> None:
            figures = rates.figures(done, nbytes, queued) if total else phase
            bar.update(task, completed=done, total=max(1, total), figures=figures)

        yield update


class _Rates:
    """Tokens and bytes a second since the first token of this process: what an earlier one did is not counted."""

    def __init__(self) -> None:
        self._began = 0.0
        self._done_before: int | None = None

    def figures(self, done: int, nbytes: int, queued: int) -> str:
        if self._done_before is None:
            self._began, self._done_before = time.monotonic(), done
        seconds = max(1e-9, time.monotonic() - self._began)
        tokens = done - self._done_before
        stored = f", {nbytes / seconds / 1e6:,.0f} MB/s, {queued} queued" if nbytes or queued else ""
        return f"{tokens / seconds:,.0f} tok/s{stored}"

    def remaining_s(self, done: int, total: int) -> float | None:
        """Return the seconds left at the rate so far; None before the first token."""
        tokens = done - (self._done_before or 0)
        return (time.monotonic() - self._began) * (total - done) / tokens if tokens > 0 else None


def _line_log(label: str) -> CaptureProgress:
    shown, rates = -1, _Rates()

    def update(phase: str, done: int, total: int, *, nbytes: int = 0, queued: int = 0) -> None:
        nonlocal shown
        if not total:
            note(f"{label}: {phase}")
            return
        figures = rates.figures(done, nbytes, queued)
        if (tenth := 10 * done // total) > shown:
            shown = tenth
            left = rates.remaining_s(done, total)
            eta = f", {left:,.0f} s left" if left is not None and done < total else ""
            note(f"{label}: {done:,}/{total:,} tokens, {figures}{eta}")

    return update
