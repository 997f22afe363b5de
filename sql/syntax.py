"""SQL as DuckDB's own syntax trees: parsed, walked through, and written out again if nothing is lost by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import duckdb

__all__ = [
    "Node",
    "alias_of",
    "aliases_of",
    "all_of",
    "conjuncts",
    "floor_of",
    "is_pushed",
    "joins_of",
    "leaves_of",
    "name_of",
    "names_in",
    "needs",
    "parse",
    "path_of",
    "plain",
    "quoted",
    "region_of",
    "render",
    "varies",
    "walk",
]

Node = dict[str, Any]
"""A node of a tree, as ``json_serialize_sql`` has it."""

_EXACT_AGGREGATES = {"count", "count_star", "min", "max", "bool_and", "bool_or"}
"""Those that give the same value in whichever order the rows come, as a sum of floats does not."""
_ROW_SOURCES = {"range", "generate_series", "unnest"}
_NEAREST = ("ASOF", "POSITIONAL")
"""The joins in which what a row is joined with depends on which other rows there are."""
_PLACES = {"query_location", "query_location_length", "named_param_map"}


def parse(connection: duckdb.DuckDBPyConnection, text: str) -> Node:
    """Return the tree of a SELECT: ``node``, and the places in the text (in bytes) of what is in it.

    Raises
    ------
    duckdb.Error
        DuckDB has no tree of this text.
    """
    ((serialised,),) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchall()
    tree = json.loads(serialised)
    if tree["error"]:
        raise duckdb.ParserException(tree.get("error_message", "no syntax tree"))
    (statement,) = tree["statements"]
    return dict(statement)


def render(connection: duckdb.DuckDBPyConnection, node: Node) -> str | None:
    """Return the text of a query's tree; None unless that text has this very tree again."""
    statement = {"node": node, "named_param_map": _parameters(node)}
    serialised = json.dumps({"error": False, "statements": [statement]})
    ((text,),) = connection.execute("SELECT json_deserialize_sql(?::JSON)", [serialised]).fetchall()
    try:
        again = parse(connection, text)["node"]
    except duckdb.Error:
        return None
    return text if plain(again) == plain(node) else None


def plain(tree: Any) -> Any:
    """Return a tree without places and marks (``_…``): equal for texts that mean the same."""
    if isinstance(tree, list):
        return [plain(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {k: plain(v) for k, v in tree.items() if k not in _PLACES and not k.startswith("_")}
    if kept.get("function_name") == "count_star":  # how count(*) is parsed; it is written as count()
        kept |= {"function_name": "count", "qualified_name": {"path": ["count"]}}
    if kept.get("type") == "SUBQUERY" and kept.get("alias") == "valueslist":
        source: Node = kept["subquery"]["node"]["from_table"]  # VALUES is written as SELECT * FROM (VALUES …)
        return source
    return kept


def walk(tree: Any, *, into_queries: bool = True) -> Iterator[Node]:
    """Yield every node of a tree, from the root on; without those of the queries in it, if need be."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if not into_queries and str(node.get("type")).endswith("_NODE"):
                continue
            yield node
            pending.extend(reversed(node.values()))
        elif isinstance(node, list):
            pending.extend(reversed(node))


def conjuncts(expression: Node | None) -> list[Node]:
    """Return the conditions that a condition joins by AND."""
    if expression is None:
        return []
    if expression["type"] != "CONJUNCTION_AND":
        return [expression]
    return [inner for child in expression["children"] for inner in conjuncts(child)]


def quoted(name: str) -> str:
    """Return a name as an SQL identifier.

    Examples
    --------
    >>> quoted('a"b-7f3a')
    '"a""b-7f3a"'
    """
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _parameters(node: Node) -> list[dict[str, Any]]:
    names = dict.fromkeys(each["identifier"] for each in walk(node) if each.get("class") == "PARAMETER")
    return [{"key": name, "value": number} for number, name in enumerate(names, start=1)]


# -- what a tree says -----------------------------------------------------------------------------


def varies(node: Node) -> bool:
    """Tell whether a node may give something else when it is asked again, or with its rows in another order."""
    kind, name = node.get("type"), node.get("function_name")
    if kind == "TABLE_FUNCTION":
        return node["function"]["function_name"] not in _ROW_SOURCES
    if kind == "DISTINCT_MODIFIER":
        return bool(node["distinct_on_targets"])
    return (
        kind in ("LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "PIVOT", "SHOW_REF")
        or node.get("class") == "WINDOW"
        or node.get("sample") is not None
        or node.get("ref_type") in _NEAREST
        or (name is not None and name in varying_functions())
    )


@cache
def varying_functions() -> frozenset[str]:
    """Return the names of the functions that do not depend on their arguments alone, or on their rows' order."""
    with duckdb.connect() as connection:
        rows = connection.execute(
            "SELECT function_name FROM duckdb_functions() "
            "WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY') OR function_type = 'aggregate'"
        ).fetchall()
    return frozenset(name for (name,) in rows) - _EXACT_AGGREGATES


def is_pushed(condition: Node) -> bool:
    """Tell whether DuckDB hands a condition on one relation to its scan: comparisons of columns with constants."""
    for node in walk(condition):
        if node.get("class") in ("SUBQUERY", "FUNCTION", "CASE", "LAMBDA"):
            return False
        sides = [node.get(side) for side in ("left", "right")]
        if all(isinstance(side, dict) and side.get("class") == "COLUMN_REF" for side in sides):
            return False
    return True


def floor_of(condition: Node, function: str) -> tuple[Node, Node] | None:
    """Return x and the bound of ``function(x) > bound``, or of what says as much; None of another condition."""
    if condition["class"] == "BETWEEN":
        value, bound = condition["input"], condition["lower"]
    elif condition["type"] in ("COMPARE_GREATERTHAN", "COMPARE_GREATERTHANOREQUALTO"):
        value, bound = condition["left"], condition["right"]
    elif condition["type"] in ("COMPARE_LESSTHAN", "COMPARE_LESSTHANOREQUALTO"):
        bound, value = condition["left"], condition["right"]
    else:
        return None
    if value.get("function_name") != function or len(value["arguments"]) != 1:
        return None
    return value["arguments"][0]["expression"], bound


def needs(tree: Node, columns: set[str], tables: set[str]) -> bool:
    """Tell whether a part names one of some columns, or one of some tables as a whole."""
    names = list(names_in(tree))
    return ("*",) in names or any(
        not columns.isdisjoint(each) or (len(each) == 1 and each[0] in tables) for each in names
    )


def names_in(tree: Node) -> Iterator[tuple[str, ...]]:
    """Yield what may name a column of the tables around a part: its names, without case; ``*`` for all columns."""
    for node in walk(tree):
        if node.get("class") == "COLUMN_REF":
            yield tuple(map(str.casefold, node["column_names"]))
        elif node.get("type") == "JOIN":
            yield from ((name.casefold(),) for name in node["using_columns"])
    if any(node.get("class") == "STAR" for node in walk(tree, into_queries=False)):
        yield ("*",)


def joins_of(source: Node) -> list[Node]:
    """Return the joins of a FROM, from the last on."""
    return [source, *joins_of(source["left"]), *joins_of(source["right"])] if source["type"] == "JOIN" else []


def leaves_of(source: Node) -> list[Node]:
    """Return what a FROM joins."""
    return [*leaves_of(source["left"]), *leaves_of(source["right"])] if source["type"] == "JOIN" else [source]


def region_of(source: Node, leaf: Node) -> tuple[Node | None, list[str] | None]:
    """Return the part of a FROM that decides whether a row of a leaf matters, and what of WHERE does, too.

    Where an outer join keeps the other side's rows, a row of the leaf that matches one of them matters, whatever
    WHERE says of it: without it, there would be a row of NULLs. Of WHERE, only what it says of the other side
    counts then. A row that is joined by its place among others matters always: without it, another would take it.

    Returns
    -------
    dict or None
        A join, or the leaf; None where it is not certain.
    list of str or None
        The names of the tables that WHERE may be asked about; None for all.
    """
    region, tables, at = source, None, source
    while at is not leaf:
        if at["ref_type"] in _NEAREST:
            return None, None
        is_left = any(each is leaf for each in leaves_of(at["left"]))
        side, other = ("left", "right") if is_left else ("right", "left")
        kind = at["join_type"]
        if kind == other.upper():
            kept = aliases_of(at[other])
            region, tables = at, kept if tables is None else []
        elif kind not in ("INNER", side.upper()) and not (kind in ("SEMI", "ANTI") and is_left):
            return None, None
        at = at[side]
    return region, tables


def path_of(table: Node) -> list[str]:
    """Return a table's name with what stands in front of it."""
    path: list[str] = table["qualified_name"]["path"]
    return path


def name_of(table: Node) -> str:
    """Return a table's name, without case."""
    return str(path_of(table)[-1]).casefold()


def alias_of(leaf: Node) -> str:
    """Return the name that a part of FROM goes by; a subquery may have none."""
    function = leaf.get("function", {}).get("function_name", "")
    return str(leaf["alias"] or leaf.get("table_name", function))


def aliases_of(source: Node) -> list[str]:
    """Return the names that the parts of a FROM go by, without case."""
    return [alias_of(leaf).casefold() for leaf in leaves_of(source)]


def all_of(connection: duckdb.DuckDBPyConnection, conditions: list[Node]) -> Node:
    """Return the conjunction of some conditions."""
    if len(conditions) == 1:
        return conditions[0]
    both: Node = parse(connection, "SELECT 1 WHERE true AND true" if conditions else "SELECT 1 WHERE true")
    where: Node = both["node"]["where_clause"]
    return {**where, "children": conditions} if conditions else where
