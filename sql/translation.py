"""DuckDB's errors in the words of the lake: the one place where they become QueryErrors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from ..catalog.errors import CorruptRun, QueryError, StoreError
from ..catalog.lake import Lake
from ..catalog.sites import SITES
from .relations import RUN_RELATIONS
from .scan import SITE_RELATIONS
from .views import ANALYSIS_OF_VIEW

__all__ = ["translated"]

_MISSING = re.compile(r'Table with name "?(?:.*\.)?([^".]+)"? does not exist')
_TRACEBACK = re.compile(r"\s*Detail: Python exception: Traceback.*", re.DOTALL)
_READING = {
    re.compile(rf"^{kind.__module__}.{kind.__name__}: (.*)$", re.MULTILINE): kind
    for kind in (CorruptRun, StoreError)
}
"""What a scan raises when the lake is at fault, and not the query; of it, DuckDB keeps the traceback's text."""


@contextmanager
def translated(
    connection: duckdb.DuckDBPyConnection | None = None, lake: Lake | None = None
) -> Iterator[None]:
    """Raise DuckDB's errors as QueryError: its message, and a hint at what the lake has.

    Where the lake could not be read, that is what is raised: CorruptRun or StoreError.

    Parameters
    ----------
    connection : DuckDBPyConnection, optional
        Where the query ran. Without it there is no hint.
    lake : Lake, optional
        What it was about.
    """
    try:
        yield
    except duckdb.Error as error:
        for pattern, kind in _READING.items():
            if raised := pattern.search(str(error)):
                mend = f"See what is damaged: layerlake verify {lake.url if lake else 'LAKE'}"
                raise kind(raised[1].strip(), hint=mend if kind is CorruptRun else "") from error
        message, hint = _TRACEBACK.sub("", str(error)), ""
        if isinstance(error, duckdb.PermissionException):
            hint = "SQL sees the lake and nothing else; files are out of reach."
        elif connection is not None and lake is not None and (missing := _MISSING.search(message)):
            hint = _missing_hint(missing[1], connection, lake)
        raise QueryError(message, hint=hint) from error


def _missing_hint(name: str, connection: duckdb.DuckDBPyConnection, lake: Lake) -> str:
    """Say what brings a relation that is not there, or what there is instead."""
    rows = connection.execute(
        "SELECT schema_name, view_name FROM duckdb_views() WHERE NOT internal"
    ).fetchall()
    ((path,),) = connection.execute("SELECT current_schemas(false)").fetchall()
    held: dict[str, list[str]] = {}
    for schema, view in rows:
        held.setdefault(schema, []).append(view)
    main = held.pop("main")
    run = next((run for run in held if run in path), None)
    if not held:
        return f"The lake has no runs. Capture one: layerlake capture {lake.url} …"
    if name in ANALYSIS_OF_VIEW and name not in main:
        return f"No run has been analysed for it: layerlake analyze {lake.url} {ANALYSIS_OF_VIEW[name]}"
    if name in RUN_RELATIONS and run is None:
        first = next(iter(held)).replace('"', '""')
        return f'Say of which run: --run ID, or FROM "{first}".{name}. Runs are: {", ".join(held)}.'
    if name in {*SITE_RELATIONS, *SITES} and run is not None and name not in held[run]:
        return _site_hint(name, run, lake)
    relations = sorted({*main, *(view for schema in ([run] if run else held) for view in held[schema])})
    return f"Relations are: {', '.join(relations)}. Runs are: {', '.join(held)}."


def _site_hint(name: str, run_id: str, lake: Lake) -> str:
    """Say why a run lacks a site's relation, and what would bring it."""
    run = lake.run(run_id)
    if name == "resid_mid" and run.shape.block == "parallel":
        return (
            f"Run {run_id} has no resid_mid: in the parallel blocks of {run.shape.family}, attention and MLP "
            "read the same residual."
        )
    needed = SITE_RELATIONS[name].sites if name in SITE_RELATIONS else (name,)
    lacking = ",".join(site for site in needed if site not in run.sites)
    return (
        f"Run {run_id} holds {', '.join(run.sites)}. "
        f"Capture it: layerlake capture {lake.url} … --sites {lacking}"
    )
