"""Ask a lake in SQL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import click

from .. import console
from ..lake import open_lake
from .options import lake_argument

__all__ = ["sql"]


@click.command()
@lake_argument
@click.argument("query", required=False)
@click.option(
    "-f", "--file", type=click.File(encoding="utf-8"), help="Read statements from a file; - is stdin."
)
@click.option(
    "--format", "kind", type=click.Choice(["table", "csv", "json", "parquet", "markdown"]), default="table",
    show_default=True, help="How to write the result.",
)  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the result to a file, which is replaced when all is written.",
)
@click.option("--run", help="The run whose relations need no schema in front.")
@click.option(
    "--explain",
    is_flag=True,
    help="Run the query, and print what it read of the sites in place of its rows: chunks and bytes.",
)
@click.option(
    "--memory-limit", metavar="SIZE", help="What DuckDB may take before it spills to disk, such as 8GB."
)
@click.option(
    "--unsafe",
    is_flag=True,
    help="Let the query read files and URLs and load extensions, with your rights. Only for SQL that you trust.",
)
def sql(
    *,
    lake: str,
    query: str | None,
    file: IO[str] | None,
    kind: Literal["table", "csv", "json", "parquet", "markdown"],
    output: Path | None,
    run: str | None,
    explain: bool,
    memory_limit: str | None,
    unsafe: bool,
) -> None:
    """Ask a lake in SQL, read-only. ``SHOW ALL TABLES`` lists the relations, in a lake of many runs those of --run.

    Without QUERY and file, what is typed is answered, statement by statement; elsewhere than at a terminal, what is
    piped in.
    """
    from .. import sql as asking

    if query is not None and file is not None:
        raise click.UsageError("Give the query, or the file that it is in: -f query.sql")
    if kind == "parquet" and output is None and not explain and sys.stdout.isatty():
        raise click.UsageError("Parquet is not for a terminal: --output FILE, or a pipe.")
    opened = open_lake(lake)
    if query is None and file is None and not explain and sys.stdin.isatty():
        if output is not None:
            raise click.UsageError("--output is for one query.")
        session = asking.Session(opened, run=run, memory_limit=memory_limit, unsafe=unsafe)
        asking.read_and_answer(session, kind, sys.stdout, tell=console.note)
        return
    text = query if query is not None else (file or sys.stdin).read()
    if explain:
        told = asking.explain(opened, text, run=run, memory_limit=memory_limit, unsafe=unsafe)
        sys.stdout.write(f"{told}\n")
        return
    session = asking.Session(opened, run=run, memory_limit=memory_limit, unsafe=unsafe)
    several = asking.statements(session, text)
    if len(several) > 1 and (output is not None or kind == "parquet"):
        raise click.UsageError(f"One file holds one result, and these are {len(several)} statements.")
    with _open(output, is_binary=kind == "parquet") as stream:
        for statement in several or [text]:
            asking.answer(session, statement, kind, stream)


@contextmanager
def _open(path: Path | None, *, is_binary: bool) -> Iterator[IO[Any]]:
    """Open where a result goes: stdout, or a file that takes its name when all is written."""
    if path is None:
        yield sys.stdout.buffer if is_binary else sys.stdout
        return
    is_device = path.exists() and not path.is_file()  # a pipe, /dev/stdout: nothing may take its place
    whole = path if is_device else path.resolve()
    part = whole if is_device else whole.with_name(f"{whole.name}.part")
    try:
        with part.open("wb") if is_binary else part.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        if not is_device:
            part.replace(whole)
    except BaseException:
        if not is_device:
            part.unlink(missing_ok=True)
        raise
