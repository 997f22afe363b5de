"""DuckDB's errors in the words of the lake: the one place where they become QueryErrors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from ..catalog.errors import CorruptRun, QueryError, StoreError
from ..catalog.lake import Lake
from ..catalog.sites import SITES
from .functions import RUN_FUNCTIONS
from .relations import RUN_RELATIONS
from .scan import SITE_RELATIONS
from .syntax import quoted
from .views import ANALYSIS_OF_VIEW

__all__ = ["translated"]

_MISSING = re.compile(r'(Table|Function) with name "?(?:.*\.)?([^".]+)"? does not exist')
_NO_COLUMN = re.compile(
    r'Referenced column "\S+" not found|does not have a column named|Column "\S+" (does not exist|in EXCLUDE list)'
)
_WIDTHS = re.compile(r"array of size \d+ to array of size \d+|must be of the same size")

_SHOWN = 20
"""The runs that a hint names."""

_INTERVENTIONS = {"interventions": "--drop all --swap all", "swap_cosine_documents": "--swap-cosines all"}
"""What fills the views that no analysis does."""

_TRACEBACK = re.compile(r"\s*Detail: Python exception: Traceback.*", re.DOTALL)
_CALLED = re.compile(r"Python exception occurred while executing the UDF: \w+: ")
_READING = {
    re.compile(rf"^{kind.__module__}.{kind.__name__}: (.*)$", re.MULTILINE): kind
    for kind in (CorruptRun, StoreError)
}
"""What a scan raises when the lake is at fault, and not the query; of it, DuckDB keeps the traceback's text."""


@contextmanager
def translated(
    connection: duckdb.DuckDBPyConnection | None = None,
    lake: Lake | None = None,
    run: str | None = None,
) -> Iterator[None]:
    """Raise DuckDB's errors as QueryError: its message, and a hint at what the lake has.

    Where the lake could not be read, that is what is raised: CorruptRun or StoreError.

    Parameters
    ----------
    connection : DuckDBPyConnection, optional
        Where the query ran. Without it there is no hint.
    lake : Lake, optional
        What it was about.
    run : str, optional
        The run whose relations need no schema.
    """
    try:
        yield
    except duckdb.Error as error:
        for pattern, kind in _READING.items():
            if raised := pattern.search(str(error)):
                mend = f"See what is damaged: layerlake verify {lake.url if lake else 'LAKE'}"
                raise kind(raised[1].strip(), hint=mend if kind is CorruptRun else "") from error
        message, hint = _CALLED.sub("", _TRACEBACK.sub("", str(error))), ""
        if isinstance(error, duckdb.PermissionException):
            hint = "SQL sees the lake and nothing else; files are out of reach."
        elif _WIDTHS.search(message):
            hint = "Vectors of different widths do not go together: see DESCRIBE of each relation, or width in sites."
        elif connection is not None and lake is not None and (missing := _MISSING.search(message)):
            is_ours = missing[1] == "Table" or missing[2] in RUN_FUNCTIONS
            hint = _missing_hint(missing[2], connection, lake, run) if is_ours else ""
        elif connection is not None and lake is not None and _NO_COLUMN.search(message):
            hint = f"DESCRIBE RELATION lists its columns. {_missing_hint('', connection, lake, run)}"
        raise QueryError(message, hint=hint) from error


def _missing_hint(name: str, connection: duckdb.DuckDBPyConnection, lake: Lake, run: str | None) -> str:
    """Say what brings a relation that is not there, or what there is instead."""
    rows = connection.execute(
        "SELECT schema_name, view_name FROM duckdb_views() WHERE NOT internal"
    ).fetchall()
    main, of_run = ({view for schema, view in rows if schema == wanted} for wanted in ("main", run))
    runs = lake.run_ids
    if not runs:
        return f"The lake has no runs. Capture one: layerlake capture {lake.url} …"
    known = ", ".join(runs[:_SHOWN]) + (f", … ({len(runs)})" if len(runs) > _SHOWN else "")
    if name not in main and (how := _view_hint(name, lake)):
        return how
    if name in {*RUN_RELATIONS, *RUN_FUNCTIONS} and run is None:
        return f"Say of which run: --run ID, or {quoted(runs[0])}.{name}. Runs are: {known}."
    if name == "zones" and run is not None and name not in of_run:
        return f"Not all chunks of run {run} have zones. Add them: layerlake index {lake.url} --run {run}"
    if name in {*SITE_RELATIONS, *SITES} and run is not None and name not in of_run:
        return _site_hint(name, run, lake)
    relations = sorted(main | (of_run or set(RUN_RELATIONS)))
    return f"Relations are: {', '.join(relations)}. Runs are: {known}."


def _view_hint(name: str, lake: Lake) -> str:
    """Say what fills a view of findings; nothing of another name."""
    if name in _INTERVENTIONS:
        return f"There are none yet: layerlake intervene {lake.url} {_INTERVENTIONS[name]}"
    if name in ANALYSIS_OF_VIEW:
        return f"No run has been analysed for it: layerlake analyze {lake.url} {ANALYSIS_OF_VIEW[name]}"
    return ""


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
