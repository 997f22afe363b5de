"""Queries in two phases: what joins and subqueries leave of a site's rows is found out first, without its values.

DuckDB hands a scan the comparisons of a column with constants, and no more: keys that come out of a join or a
subquery reach it when all has been read. So each SELECT that joins a site, or compares it with a subquery, is first
asked for the labels of the site's rows alone, with the site's values and all conditions on them left out. What comes
back (:class:`Keys`) is all that the whole query can need; then the whole query runs, over a relation that leaves the
other rows out. The answer is the same by construction: only rows that would be dropped are missing.

Never is a query changed but for the names of tables, and where it is not certain that a row would be dropped (outer
joins on their other side, random(), LIMIT, samples, recursion), or the first phase fails for whatever reason, the
query runs as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import pyarrow as pa

from ..catalog.errors import LayerLakeError
from .dataset import LazyDataset
from .keys import Keys, Restriction, key_columns, labels_of
from .scopes import Scopes
from .syntax import (
    Node,
    alias_of,
    aliases_of,
    all_of,
    conjuncts,
    floor_of,
    is_pushed,
    joins_of,
    leaves_of,
    names_in,
    needs,
    parse,
    path_of,
    plain,
    quoted,
    region_of,
    varies,
    walk,
)

if TYPE_CHECKING:
    import pyarrow.compute as pc

    from .connection import Session
    from .scan import SiteScan

__all__ = ["MAX_KEYS", "Planned", "in_two_phases"]

MAX_KEYS = 1 << 20
"""The most keys that are looked for, and the most rows of a subquery that are kept; more would say too little."""

_SCHEMA = "_layerlake"
_NESTED = {"array", "list", "struct", "map", "union"}


class Planned(NamedTuple):
    """A query that is about to run."""

    text: str
    params: list[Any] | dict[str, Any] | None
    relation: duckdb.DuckDBPyRelation
    """The text, bound."""


def in_two_phases(session: Session, query: Planned) -> Planned:
    """Return a query with what its first phase has found built in.

    Parameters
    ----------
    session : Session
        Where it runs; what it names is registered.
    query : Planned
        The query as it is; returned where nothing can be won.
    """
    n_known = len(session.restrictions)
    try:
        found = _Query(session, query.text, query.params).plan()
        if found is not None:
            relation = session.connection.sql(found[0], params=found[1])
            if (relation.columns, relation.types) == (query.relation.columns, query.relation.types):
                return Planned(*found, relation)
    except (duckdb.Error, LayerLakeError) as error:
        _raise_if_interrupted(error)  # else the query says what is wrong, if anything is
    del session.restrictions[n_known:]
    return query


class _Query:
    """A query on its way to its second phase: its tree, and what is replaced in its text."""

    def __init__(self, session: Session, text: str, params: list[Any] | dict[str, Any] | None) -> None:
        self.session = session
        self.connection = session.connection
        self.text = text
        self.content = text.encode()  # the tree counts bytes
        self.tree: Node = parse(self.connection, text)["node"]
        listed = {str(place): value for place, value in enumerate(params, start=1)} if params else {}
        self.params: Mapping[str, Any] = params if isinstance(params, dict) else listed
        self.scopes = Scopes(self.connection, self.tree)
        self.splices: dict[int, tuple[int, str]] = {}

    def plan(self) -> tuple[str, dict[str, Any] | None] | None:
        """Return the query's text and parameters with all that was found out; None if that is nothing."""
        self._restrict_all(self.tree)
        if not self.splices:
            return None
        for node in walk(self.tree):
            if node.get("class") == "PARAMETER":  # `?` counts from the left, where some may be missing now
                self._splice(node, f"${node['identifier']}")
        pieces, at = [], 0
        for start, (stop, replacement) in sorted(self.splices.items()):
            if start >= at:  # else it is inside of what was replaced as a whole
                pieces += [self.content[at:start], replacement.encode()]
                at = stop
        text = b"".join([*pieces, self.content[at:]]).decode()
        if plain(parse(self.connection, text)["node"]) != plain(self.tree):
            return None  # the places were not what they seemed
        return text, self._params_of(self.tree)

    def _splice(self, node: Node, replacement: str) -> None:
        start = node["query_location"]
        self.splices[start] = (start + node["query_location_length"], replacement)

    def _params_of(self, tree: Node) -> dict[str, Any] | None:
        """Return the parameters that are left in a tree: DuckDB refuses others."""
        names = {node["identifier"] for node in walk(tree) if node.get("class") == "PARAMETER"}
        return {name: value for name, value in self.params.items() if name in names} or None

    def _site(self, leaf: Node) -> SiteScan | None:
        return (
            self.session.site(path_of(leaf)) if leaf["type"] == "BASE_TABLE" and "_cte" not in leaf else None
        )

    # -- SELECT by SELECT -------------------------------------------------------------------------

    def _restrict_all(self, tree: Any) -> None:
        """Restrict the sites of every SELECT, from the outermost on; a recursive one sees other rows each time."""
        if isinstance(tree, list):
            for item in tree:
                self._restrict_all(item)
        elif isinstance(tree, dict) and tree.get("type") not in ("RECURSIVE_CTE_NODE", "SHOW_REF"):
            if tree.get("type") == "SELECT_NODE":
                self._restrict(tree)
            for item in tree.values():
                self._restrict_all(item)

    def _restrict(self, select: Node) -> None:
        """Restrict the sites in a SELECT's FROM, if anything but constants tells which of their rows it needs."""
        source, conditions = select["from_table"], conjuncts(select["where_clause"])
        leaves = leaves_of(source)
        sites = [(leaf, scan) for leaf in leaves if (scan := self._site(leaf)) is not None]
        if not sites or select["sample"] or (len(leaves) == 1 and all(map(is_pushed, conditions))):
            return  # a sample is drawn before WHERE
        given = [join["condition"] for join in joins_of(source) if join["condition"]]
        for part in [source, *conditions]:
            self._keep_ctes(part)
        for condition in [*given, *conditions]:
            self._keep_subqueries(condition)
        for leaf in leaves:
            self._keep_leaf(leaf)
        # all first phases come first: a site that is restricted has another name
        found = [
            (leaf, scan, self._keys(select, leaf, scan), self._min_norm(select, leaf, scan))
            for leaf, scan in sites
        ]
        for leaf, scan, keys, min_norm in found:
            if keys is not None or min_norm is not None:
                self._narrow(leaf, scan, keys, min_norm)

    def _narrow(self, leaf: Node, scan: SiteScan, keys: Keys | None, min_norm: float | None) -> None:
        """Put a relation that has nothing but what a SELECT can need in a site's place."""

        def batches(columns: Sequence[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
            return scan.batches(columns, where, keys, min_norm)

        name = self._add(LazyDataset(scan.schema, batches))
        self._rename(leaf, name)
        given = Restriction(scan.run.run_id, scan.relation.name, min_norm=min_norm)
        if keys is not None:
            given = replace(given, columns=keys.names, n_keys=keys.n_keys)
        self.session.restrictions.append(given)

    def _add(self, relation: LazyDataset) -> str:
        name = self.session.new_name()
        self.session.add(_SCHEMA, {name: relation})
        return name

    def _rename(self, leaf: Node, name: str) -> None:
        """Name another table in the place of one, by whose name it goes on."""
        alias, columns = alias_of(leaf), ", ".join(map(quoted, leaf["column_name_alias"]))
        named = f"{quoted(alias)}({columns})" if columns else quoted(alias)
        self._splice(leaf, f"{quoted(_SCHEMA)}.{quoted(name)} AS {named}")
        self._replace(leaf, name, alias)

    def _replace(self, leaf: Node, name: str, alias: str) -> None:
        place = {field: leaf[field] for field in ("query_location", "query_location_length")}
        columns = {"column_name_alias": leaf["column_name_alias"]}
        leaf.clear()
        leaf |= _table(self.connection, name, alias) | place | columns

    # -- what is kept, so that both phases see the same -------------------------------------------

    def _keep_subqueries(self, condition: Node) -> None:
        """Run the subqueries of a condition that stand by themselves, once, and put their rows in their place."""
        for node in walk(condition):
            if node.get("class") == "SUBQUERY" and (name := self._keep(node["subquery"]["node"])):
                table = f"FROM {quoted(_SCHEMA)}.{quoted(name)}"
                is_exists = node["subquery_type"] == "EXISTS"
                self._splice(node, f"EXISTS ({table})" if is_exists else f"({table})")
                node["subquery"] = parse(self.connection, table)

    def _keep_leaf(self, leaf: Node) -> None:
        """Do the same to a subquery or a function in FROM that may give other rows each time."""
        if self.scopes.is_repeatable(leaf):
            return
        if leaf["type"] == "SUBQUERY" and (name := self._keep(leaf["subquery"]["node"])):
            self._splice(leaf, f"{quoted(_SCHEMA)}.{quoted(name)}")
            self._replace(leaf, name, leaf["alias"])
        if leaf["type"] == "TABLE_FUNCTION" and (name := self._keep(self._everything_of(leaf))):
            self._rename(leaf, name)

    def _keep_ctes(self, part: Node) -> None:
        """Run the common table expressions of a part that may give other rows each time, for all places at once."""
        for number in sorted(self.scopes.ctes_of(part)):
            if self.scopes.is_repeatable(self.scopes.definition(number)):
                continue
            places = [node for node in walk(self.tree) if node.get("_cte") == number]
            if name := self._keep(self._everything_of(places[0]), shares=False):
                for place in places:
                    self._rename(place, name)

    def _everything_of(self, leaf: Node) -> Node:
        query: Node = parse(self.connection, "FROM t")["node"]
        query["from_table"] = {**leaf, "alias": "", "column_name_alias": []}
        return query

    def _keep(self, query: Node, *, shares: bool = True) -> str | None:
        """Keep a query's rows in a table, and return its name; None if it cannot run alone, or is too large.

        The table is DuckDB's own: on the way through Arrow, some types change and collations are lost. There is none
        where it ``shares`` a common table expression with others, and its rows might be others then.
        """
        text = self.scopes.standalone(query)
        shared = map(self.scopes.definition, self.scopes.outer_ctes(query) if shares else ())
        if text is None or not all(map(self.scopes.is_repeatable, shared)):
            return None
        name = self.session.new_name()
        table = f"{quoted(_SCHEMA)}.{quoted(name)}"
        try:
            text, params, bound = self.session.plan(text, self._params_of(query))
            names = [column.casefold() for column in bound.columns]
            if len(set(names)) < len(names) or any(kind.id in _NESTED for kind in bound.types):
                return None
            self.connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(_SCHEMA)}")
            limited = f"FROM ({text}) LIMIT {MAX_KEYS + 1}"
            # not bound.create(), which no signal interrupts
            ((n_rows,),) = self.connection.execute(f"CREATE TABLE {table} AS {limited}", params).fetchall()
        except (duckdb.Error, LayerLakeError) as error:
            _raise_if_interrupted(error)
            return None  # it refers to the query around it, as often as not
        if n_rows <= MAX_KEYS:
            return name
        self.connection.execute(f"DROP TABLE {table}")
        return None

    # -- the first phase --------------------------------------------------------------------------

    def _keys(self, select: Node, leaf: Node, scan: SiteScan) -> Keys | None:
        """Return the rows of a site that can be part of what a SELECT selects from, by their labels."""
        source, tables = region_of(select["from_table"], leaf)
        names = aliases_of(select["from_table"])
        if source is None or leaf["column_name_alias"] or len(set(names)) < len(names):
            return None
        source = copy.deepcopy(source)
        leaves, joins = leaves_of(source), joins_of(source)
        sites = {alias_of(other): found for other in leaves if (found := self._site(other)) is not None}
        where = [
            each
            for each in conjuncts(select["where_clause"])
            if self._is_certain(each, sites)
            and (tables is None or all(len(name) > 1 and name[0] in tables for name in names_in(each)))
        ]
        if not self._are_sets(joins, sites) or not all(
            self._is_certain(each, sites, has_values=True) for each in leaves
        ):
            return None
        needed = {name for part in [source, *where] for each in names_in(part) for name in each}
        if any(join["ref_type"] == "NATURAL" for join in joins):
            needed.add("*")
        columns = key_columns(scan, set(scan.schema.names) if "*" in needed else needed)
        if not columns and not where:
            return None
        columns = columns or list(scan.dimensions[:1])  # conditions that are true of all rows, or of none
        for other in leaves:
            if (found := sites.get(alias_of(other))) is not None:
                self._replace(other, self._add(labels_of(found)), alias_of(other))
        named = ", ".join(f"{quoted(alias_of(leaf))}.{name}" for name in columns)
        query = parse(self.connection, f"SELECT DISTINCT {named}")["node"]
        query["from_table"], query["where_clause"] = source, all_of(self.connection, where)
        rows = self._answer(query)
        return Keys(rows.rename_columns(columns)) if rows is not None and rows.num_rows <= MAX_KEYS else None

    def _min_norm(self, select: Node, leaf: Node, scan: SiteScan) -> float | None:
        """Return what norm a site's vectors have to reach, lest WHERE or the ON of an inner join drop their rows."""
        source, tables = region_of(select["from_table"], leaf)
        if source is None or tables is not None or scan.is_pairs or leaf["column_name_alias"] or varies(leaf):
            return None
        names = aliases_of(select["from_table"])
        alias, known = alias_of(leaf).casefold(), []
        given = [
            join["condition"]
            for join in joins_of(source)
            if join["join_type"] == "INNER" and any(each is leaf for each in leaves_of(join))
        ]
        for condition in [each for part in [select["where_clause"], *given] for each in conjuncts(part)]:
            value, bound = floor_of(condition, "norm") or ({}, {})
            (named,) = tuple(names_in(value)) if value.get("class") == "COLUMN_REF" else ((),)
            if named == ("vec",) or (named == (alias, "vec") and names.count(alias) == 1):
                known.append(self._constant(bound))
        return max((number for number in known if number is not None), default=None)

    def _constant(self, part: Node) -> float | None:
        """Return the number that a part of the query stands for; None if it depends on rows or on chance."""
        if next(names_in(part), None) is not None or not self.scopes.is_repeatable(part):
            return None
        query = parse(self.connection, "SELECT CAST(1 AS DOUBLE)")["node"]
        query["select_list"][0]["child"] = part
        answer = self._answer(query)
        number: float | None = None if answer is None else answer[0][0].as_py()
        return number

    def _answer(self, query: Node) -> pa.Table | None:
        """Return the rows of a query that is made of parts of this one, to one above the most; None if it fails."""
        text = self.scopes.standalone(query)
        if text is None:
            return None
        try:
            rows = self.connection.sql(text, params=self._params_of(query)).limit(MAX_KEYS + 1)
            return rows.to_arrow_table()
        except duckdb.Error as error:
            _raise_if_interrupted(error)
            return None

    def _are_sets(self, joins: Sequence[Node], sites: Mapping[str, SiteScan]) -> bool:
        """Tell whether joins have the same rows, as a set, without the sites' values; leave out conditions on these.

        To leave one out lets more pass, unless an outer join or an anti-join asks for what does not.
        """
        is_inner = all(join["join_type"] == "INNER" for join in joins)
        for join in joins:
            given = conjuncts(join["condition"])
            kept = [each for each in given if self._is_certain(each, sites)]
            if len(kept) < len(given):
                if not is_inner:
                    return False
                join["condition"] = all_of(self.connection, kept)
        kinds = {"NATURAL", "REGULAR", "CROSS"} if is_inner else {"REGULAR", "CROSS"}
        return all(join["ref_type"] in kinds for join in joins)

    def _is_certain(self, part: Node, sites: Mapping[str, SiteScan], *, has_values: bool = False) -> bool:
        """Tell whether a part of the query has one meaning, and has it without the values of the sites around it."""
        values = set() if has_values else {scan.schema.names[-1] for scan in sites.values()}
        return self.scopes.is_repeatable(part) and not needs(
            part, values, {name.casefold() for name in sites}
        )


def _table(connection: duckdb.DuckDBPyConnection, name: str, alias: str) -> Node:
    named = f" AS {quoted(alias)}" if alias else ""
    node: Node = parse(connection, f"FROM {quoted(_SCHEMA)}.{quoted(name)}{named}")["node"]["from_table"]
    return node


def _raise_if_interrupted(error: Exception) -> None:
    if isinstance(error, duckdb.InterruptException) or isinstance(error.__cause__, duckdb.InterruptException):
        raise error
