"""What the command line prints: tables, progress, errors. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["note", "print_json", "print_table", "show_capture"]

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


@contextmanager
def show_capture(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a capture's progress: a bar on a terminal, elsewhere a line for each tenth of the way."""
    if not _STDERR.is_terminal:
        yield _line_log(label)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_STDERR) as bar:
        task = bar.add_task(label, total=1, rate="")
        began = time.monotonic()

        def update(phase: str, done: int, total: int) -> None:
            rate = f"{done / max(1e-9, time.monotonic() - began):,.0f} tok/s" if done else phase
            bar.update(task, completed=done, total=max(1, total), rate=rate)

        yield update


def _line_log(label: str) -> Callable[[str, int, int], None]:
    began, shown = time.monotonic(), -1

    def update(phase: str, done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // total if total else -1
        if tenth > shown:
            shown = tenth
            seconds = time.monotonic() - began
            note(f"{label}: {done:,}/{total:,} tokens, {seconds:.0f} s" if total else f"{label}: {phase}")

    return update
