"""A DuckDB connection that sees a lake and nothing else, and the questions asked through it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from ..catalog.lake import Lake
from .dataset import LazyDataset
from .guard import require_read
from .reads import ReadLog
from .relations import run_relations
from .translation import translated
from .views import main_relations

__all__ = ["connect", "query", "quoted"]


def connect(lake: Lake, *, run: str | None = None, log: ReadLog | None = None) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB connection in memory that has the lake's relations as views.

    The main schema has ``runs``, ``models``, ``sites``, ``findings`` and a view of every analysis that was
    done; each run is a schema, named by its id (:func:`run_relations`). ``unit(vec, i)`` and ``norm(vec)``
    are macros. The connection shows the lake as it is now: runs and findings written later are not in it.

    It may do what DuckDB does in memory: create tables and views, register Python objects. Nothing of that
    reaches the lake, and files, extensions and the network are out of its reach: external access is off and
    the configuration is locked, but for the search path. Python variables are not tables here; ``register``
    them.

    Costs about 30 ms and a read of each run's manifest, each model's card and each finding's footer.

    Parameters
    ----------
    lake : Lake
        The lake.
    run : str, optional
        The run, by id or unique prefix, whose schema is on the search path. None: the lake's only run; with
        several, none is.
    log : ReadLog, optional
        Is told of every read of a site's values.

    Raises
    ------
    RunNotFound, AmbiguousRun
        ``run`` is the beginning of no run's id, or of several.
    """
    chosen = None if run is None else lake.run(run).run_id
    runs = lake.runs()
    if len(runs) == 1:
        chosen = runs[0].run_id
    # Where intermediate results are spilled: DuckDB makes the folder if need be (by default .tmp in the working
    # directory), and removes it when it closes.
    spill = Path(tempfile.gettempdir()) / f"layerlake-duckdb-{uuid.uuid4().hex}"
    connection = duckdb.connect(config={"temp_directory": str(spill), "python_enable_replacements": False})
    connection.execute(Path(__file__).with_name("macros.sql").read_text(encoding="utf-8"))
    for opened in runs:
        connection.execute(f"CREATE SCHEMA {quoted(opened.run_id)}")
        _create_views(connection, opened.run_id, run_relations(opened, log))
    _create_views(connection, "main", main_relations(lake, runs))
    _search(connection, ["main", chosen] if chosen else ["main"])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def query(
    lake: Lake,
    text: str,
    *,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    run: str | None = None,
    log: ReadLog | None = None,
) -> duckdb.DuckDBPyRelation:
    """Ask one question in SQL, read-only, on a connection of its own.

    Parameters
    ----------
    lake : Lake
        The lake.
    text : str
        One SELECT, EXPLAIN, DESCRIBE or SHOW.
    params : sequence or mapping, optional
        Values of the query's ``?``, or of its ``$name``.
    run, log
        As for :func:`connect`.

    Returns
    -------
    duckdb.DuckDBPyRelation
        Lazy: it is bound now and reads when it is fetched, each time anew. It keeps its connection open.

    Raises
    ------
    QueryError
        The query does not read, is wrong, or names what is not there. What goes wrong later, as rows are
        fetched, is a ``duckdb.Error``.
    RunNotFound, AmbiguousRun
        ``run`` is the beginning of no run's id, or of several.
    """
    connection = connect(lake, run=run, log=log)
    given = list(params) if isinstance(params, Sequence) else None if params is None else dict(params)
    with translated(connection, lake):
        require_read(connection, text)
        return connection.sql(text, params=given)


def quoted(name: str) -> str:
    """Return a name as an SQL identifier.

    Examples
    --------
    >>> quoted('a"b-7f3a')
    '"a""b-7f3a"'
    """
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _create_views(
    connection: duckdb.DuckDBPyConnection, schema: str, relations: Mapping[str, LazyDataset | pa.Table]
) -> None:
    """Create views over Python objects, which they own, in a schema."""
    _search(connection, [schema])  # create_view makes its view in the first schema of the path
    for name, relation in relations.items():
        connection.from_arrow(relation).create_view(name)


def _search(connection: duckdb.DuckDBPyConnection, schemas: Sequence[str]) -> None:
    path = ",".join(quoted(schema) for schema in schemas).replace("'", "''")
    connection.execute(f"SET search_path = '{path}'")
