"""A DuckDB connection that sees a lake and nothing else, and the questions asked through it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from ..catalog.errors import QueryError
from ..catalog.lake import Lake
from ..catalog.manifest import read_manifest
from ..catalog.run import Run
from ..catalog.stores import Store
from .dataset import LazyDataset
from .functions import RUN_FUNCTIONS, add_functions
from .guard import require_read, split_explain
from .keys import Restriction
from .reads import ReadLog
from .relations import RUN_RELATIONS, run_relations, site_scans
from .scan import SiteScan
from .syntax import Node, quoted, walk
from .translation import translated
from .twophase import Planned, in_two_phases
from .views import finding_views, main_relations

__all__ = ["Session", "connect", "query"]

LISTED_RUNS = 64
"""``SHOW ALL TABLES`` lists the relations of this many runs; of more, those of the chosen run alone.

A run takes 15 ms to register. Those that are not listed are in ``runs`` and ``sites``, and answer to their names.
"""

_AT_ONCE = 16
"""Manifests that are read at a time: a remote store answers one in some 30 ms."""

Params = Sequence[Any] | Mapping[str, Any] | None


def connect(
    lake: Lake,
    *,
    run: str | Sequence[str] | None = None,
    log: ReadLog | None = None,
    memory_limit: str | None = None,
    unsafe: bool = False,
) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB connection in memory that has the lake's relations as views.

    The main schema has ``runs``, ``models``, ``sites``, ``findings`` and a view of every analysis that was
    done; each run is a schema, named by its id (:func:`run_relations`). ``unit(vec, i)`` and ``norm(vec)``
    are macros. The connection shows the lake as it is now: runs and findings written later are not in it.

    It may do what DuckDB does in memory: create tables and views, register Python objects. Nothing of that
    reaches the lake, and files, extensions and the network are out of its reach: external access is off and
    the configuration is locked, but for the search path. Python variables are not tables here; ``register``
    them.

    Predicates and projections reach the lake; what a join or a subquery would spare does not, as it does in
    :func:`query`, for DuckDB alone plans here.

    Costs about 30 ms, 6 ms for each run, and a read of each run's manifest and each finding's footer: in a lake of
    many runs, name those that matter.

    Parameters
    ----------
    lake : Lake
        The lake.
    run : str or sequence of str, optional
        The runs, by id or unique prefix, that are registered; a single one is on the search path. None: all of
        them, and the lake's only run is on the search path.
    log : ReadLog, optional
        Is told of every read of a site's values.
    memory_limit, unsafe
        As for :class:`Session`.

    Raises
    ------
    RunNotFound, AmbiguousRun
        ``run`` is the beginning of no run's id, or of several.
    QueryError
        DuckDB takes ``memory_limit`` for no size.
    """
    prefixes = () if run is None else (run,) if isinstance(run, str) else tuple(run)
    chosen = prefixes[0] if len(prefixes) == 1 else None
    session = Session(lake, run=chosen, log=log, memory_limit=memory_limit, unsafe=unsafe)
    session.register_main()
    for run_id in map(lake.match, prefixes) if prefixes else [each.run_id for each in session.runs()]:
        session.register_run(run_id)
    return session.connection


def query(
    lake: Lake,
    text: str,
    *,
    params: Params = None,
    run: str | None = None,
    log: ReadLog | None = None,
    memory_limit: str | None = None,
    unsafe: bool = False,
) -> duckdb.DuckDBPyRelation:
    """Ask one question in SQL, read-only, on a connection of its own (:meth:`Session.sql`).

    Parameters
    ----------
    lake : Lake
        The lake.
    text, params
        As for :meth:`Session.sql`, and so are the errors.
    run, log, memory_limit, unsafe
        As for :class:`Session`.

    Examples
    --------
    >>> from layerlake.catalog.lake import create_lake
    >>> lake = Lake(create_lake("memory://an-example").url)
    >>> query(lake, "SELECT unit([1.5, 2.5]::FLOAT[2], 0), unit([1.5, 2.5]::FLOAT[2], 2)").fetchall()
    [(1.5, None)]
    >>> query(lake, "SELECT norm([3.0, 4.0]::FLOAT[2])").fetchall()
    [(5.0,)]
    """
    return Session(lake, run=run, log=log, memory_limit=memory_limit, unsafe=unsafe).sql(text, params)


class Session:
    """A lake in SQL: a connection in memory that gets to know what its queries name.

    Parameters
    ----------
    lake : Lake
        The lake.
    run : str, optional
        The run, by id or unique prefix, whose relations need no schema in front. None: the lake's only run; with
        several, none does.
    log : ReadLog, optional
        Is told of every read of a site's values.
    memory_limit : str, optional
        What DuckDB may take before it spills to the temporary directory, such as ``8GB``; by default four fifths
        of the memory. The chunks that a scan holds, one layer of one partition, come on top.
    unsafe : bool
        Let queries read files and URLs, and load extensions (``read_csv``, ``read_parquet``, ``httpfs``), with
        the rights of this process; a query that does not read is refused all the same. Only for text that you trust.

    Attributes
    ----------
    connection : DuckDBPyConnection
        What the queries run on.
    restrictions : list of Restriction
        What the first phase of each query has found out, in order.

    Raises
    ------
    RunNotFound, AmbiguousRun
        ``run`` is the beginning of no run's id, or of several.
    QueryError
        DuckDB takes ``memory_limit`` for no size.
    """

    def __init__(
        self,
        lake: Lake,
        *,
        run: str | None = None,
        log: ReadLog | None = None,
        memory_limit: str | None = None,
        unsafe: bool = False,
    ) -> None:
        self.lake = lake
        self.log = log
        self._folders = lake.store.list("runs")
        # The lake's runs, as they were when first asked for. No method: what the connection owns must not own it.
        self.runs = cache(partial(_open_runs, lake.store, self._folders))
        self.restrictions: list[Restriction] = []
        self.chosen = _only_run(lake) if run is None else lake.match(run)
        self._opened: dict[str, tuple[Run, dict[str, SiteScan]]] = {}
        self._registered: set[str] = set()
        self._n_unnamed = 0
        self.connection = _connection(memory_limit)
        self.add("main", main_relations(lake, self.runs))
        if not unsafe:
            self.connection.execute("SET enable_external_access = false")
            self.connection.execute("SET lock_configuration = true")

    def sql(self, text: str, params: Params = None) -> duckdb.DuckDBPyRelation:
        """Ask one question in SQL, read-only.

        What joins and subqueries say of the rows of a site is found out here and now, without a value of it
        (:mod:`layerlake.sql.twophase`).

        Parameters
        ----------
        text : str
            One SELECT, EXPLAIN, DESCRIBE or SHOW.
        params : sequence or mapping, optional
            Values of the query's ``?``, or of its ``$name``.

        Returns
        -------
        duckdb.DuckDBPyRelation
            Lazy: it is bound now and reads when it is fetched, each time anew. It keeps its connection open.

        Raises
        ------
        QueryError
            The query does not read, is wrong, or names what is not there. What goes wrong later, as rows are
            fetched, is a ``duckdb.Error``.
        """
        with translated(self.connection, self.lake, self.chosen):
            explain, asked = split_explain(self.connection, text)
            planned = self.plan(asked, params)
            if not explain:
                return planned.relation
            return self.connection.sql(explain + planned.text, params=planned.params)

    def plan(self, text: str, params: Params = None) -> Planned:
        """Bind a query, in two phases if that spares reads (:mod:`layerlake.sql.twophase`); its errors are DuckDB's."""
        given: Any = (
            list(params) if isinstance(params, Sequence) else None if params is None else dict(params)
        )
        tree = require_read(self.connection, text)
        self._register_named(tree)
        try:
            relation = self.connection.sql(text, params=given)
        except duckdb.CatalogException:
            self.register_main()  # for DuckDB to suggest what was meant
            if self.chosen is not None:
                self.register_run(self.chosen)
            relation = self.connection.sql(text, params=given)
        return in_two_phases(self, Planned(text, given, relation))

    def site(self, path: Sequence[str]) -> SiteScan | None:
        """Return what a table's name stands for, if that is a site relation of a run that is registered."""
        run_id, name = self._named(path)
        return self._opened[run_id][1].get(name) if run_id in self._opened else None

    def stored_sites(self, path: Sequence[str]) -> tuple[Run, tuple[str, ...]] | None:
        """Return the run and the stored sites that a table's name stands for, if it does."""
        run_id, name = self._named(path)
        if run_id not in self._opened:
            return None
        run, scans = self._opened[run_id]
        if name in scans:
            return run, scans[name].relation.sites
        return (run, (name,)) if name == "attn_band" and name in run.sites else None

    def _named(self, path: Sequence[str]) -> tuple[str, str]:
        """Return the run and the relation of a table's name, without case."""
        *schema, name = (part.casefold() for part in path)
        return (schema[-1] if schema else (self.chosen or "").casefold()), name

    # -- what is registered -----------------------------------------------------------------------

    def add(self, schema: str, relations: Mapping[str, LazyDataset | pa.Table]) -> None:
        """Create views over Python objects, which they own, in a schema."""
        self.connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
        self._search([schema])  # create_view makes its view in the first schema of the path
        for name, relation in relations.items():
            self.connection.from_arrow(relation).create_view(name)
        self._search(["main", self.chosen] if self.chosen in self._registered else ["main"])

    def new_name(self) -> str:
        """Return the name of no relation that there is."""
        self._n_unnamed += 1
        return f"relation_{self._n_unnamed}"

    def register_run(self, run_id: str) -> None:
        """Register a run's schema, by its whole id."""
        if run_id in self._registered:
            return
        manifest = read_manifest(self.lake.store, run_id)
        if manifest is None:
            return
        opened = Run(self.lake.store, manifest)
        scans = site_scans(opened, self.log)
        self._opened[run_id.casefold()] = opened, scans
        self._registered.add(run_id)
        self.add(run_id, run_relations(opened, scans, self.log))
        add_functions(self.connection, opened, self.log)

    def register_main(self) -> None:
        """Register all views of findings, and read the runs: what is written later does not show."""
        self.runs()
        views = finding_views(self.lake)
        self.add("main", {name: view for name, view in views.items() if self._is_new(name)})

    def _register_named(self, tree: Node) -> None:
        """Register what a query names; for one that asks what there is, all of it, if the runs are not too many."""
        if any(_asks_what_there_is(node) for node in walk(tree)):
            self.register_main()
            runs = [run.run_id for run in self.runs()]
            for run_id in runs if len(runs) <= LISTED_RUNS else filter(None, [self.chosen]):
                self.register_run(run_id)
        paths = [node["qualified_name"]["path"] for node in walk(tree) if node.get("type") == "BASE_TABLE"]
        bare = {path[-1].casefold() for path in paths if len(path) == 1 or path[-2].casefold() == "main"}
        called = [node["qualified_name"]["path"] for node in walk(tree) if node.get("type") == "FUNCTION"]
        schemas = {path[-2].casefold() for path in paths + called if len(path) > 1}
        of_run = bare.intersection(RUN_RELATIONS) | {path[-1].casefold() for path in called} & set(
            RUN_FUNCTIONS
        )
        if self.chosen is not None and of_run:
            schemas.add(self.chosen.casefold())
        if schemas - {"main"}:
            for run_id in self._folders:
                if run_id.casefold() in schemas:
                    self.register_run(run_id)
        views = {name for name in bare - _ALWAYS if f"main.{name}" not in self._registered}
        views = views.intersection(self.lake.store.list("findings")) if views else views
        if views:
            found = finding_views(self.lake, views)
            self.add("main", {name: view for name, view in found.items() if self._is_new(name)})

    def _is_new(self, view: str) -> bool:
        """Tell whether a view of findings is not registered yet, and note that it will be."""
        name = f"main.{view}"
        is_new = name not in self._registered and view not in _ALWAYS
        self._registered.add(name)
        return is_new

    def _search(self, schemas: Sequence[str | None]) -> None:
        path = ",".join(quoted(schema) for schema in schemas if schema).replace("'", "''")
        self.connection.execute(f"SET search_path = '{path}'")


def _only_run(lake: Lake) -> str | None:
    first = list(islice(lake.iter_run_ids(), 2))
    return first[0] if len(first) == 1 else None


def _open_runs(store: Store, folders: Sequence[str]) -> list[Run]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        manifests = list(pool.map(lambda run_id: read_manifest(store, run_id), folders))
    return [Run(store, manifest) for manifest in manifests if manifest is not None]


_MAIN = ("runs", "models", "sites", "findings", "directions")
_ALWAYS = {*_MAIN, *RUN_RELATIONS}
"""Names that are no view of a finding."""

_CATALOGS = ("information_schema", "pg_catalog")
_LISTINGS = ("duckdb_", "pragma_", "sqlite_", "pg_", "query")


def _asks_what_there_is(node: Node) -> bool:
    """Tell whether a node lists relations, or takes their names from elsewhere."""
    if node.get("type") == "SHOW_REF":
        return str(node["show_type"]) == "SHOW_SPECIAL"
    if node.get("type") == "BASE_TABLE":
        *schema, name = [part.casefold() for part in node["qualified_name"]["path"]]
        return any(part in _CATALOGS for part in schema) or name.startswith(_LISTINGS)
    return node.get("type") == "TABLE_FUNCTION" and str(node["function"]["function_name"]).startswith(
        _LISTINGS
    )


def _connection(memory_limit: str | None) -> duckdb.DuckDBPyConnection:
    """Return a connection in memory with the macros; where it may write is decided."""
    # Where intermediate results are spilled: DuckDB makes the folder if need be (by default .tmp in the working
    # directory), and removes it when it closes.
    spill = Path(tempfile.gettempdir()) / f"layerlake-duckdb-{uuid.uuid4().hex}"
    connection = duckdb.connect(config={"temp_directory": str(spill), "python_enable_replacements": False})
    connection.execute(Path(__file__).with_name("macros.sql").read_text(encoding="utf-8"))
    if memory_limit is not None:
        try:
            connection.execute("SET memory_limit = ?", [memory_limit])
        except duckdb.Error as error:
            raise QueryError(
                f"'{memory_limit}' is no memory limit: {error}", hint="Say it as 8GB or 512MiB."
            ) from error
    return connection
