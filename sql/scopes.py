"""What the names in a query's FROM mean: which are common table expressions, and what stands by itself with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from .syntax import Node, name_of, path_of, render, varies, walk

__all__ = ["Scopes"]


class Scopes:
    """The common table expressions of a query.

    Parameters
    ----------
    connection : DuckDBPyConnection
        Writes trees out.
    tree : Node
        The query. Its tables that are common table expressions are marked (``_cte``) with the number of that.

    Attributes
    ----------
    ctes : list of Node
        Their entries in the tree.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, tree: Node) -> None:
        self._connection = connection
        self.ctes: list[Node] = []
        self._resolve(tree, {})

    def _resolve(self, tree: Any, scope: Mapping[str, int]) -> None:
        """Mark every table's name that is a common table expression's with the number of that (``_cte``)."""
        if isinstance(tree, list):
            for item in tree:
                self._resolve(item, scope)
        if not isinstance(tree, dict):
            return
        for entry in tree.get("cte_map", {}).get("map", []):
            definition, number = entry["value"]["query_node"], len(self.ctes)
            self.ctes.append(entry)
            entry["_number"] = number
            after = {**scope, entry["key"].casefold(): number}
            self._resolve(definition, after if definition["type"] == "RECURSIVE_CTE_NODE" else scope)
            scope = after
        if tree.get("type") == "BASE_TABLE" and len(path_of(tree)) == 1 and name_of(tree) in scope:
            tree["_cte"] = scope[name_of(tree)]
        for field, item in tree.items():
            if field != "cte_map":
                self._resolve(item, scope)

    def definition(self, number: int) -> Node:
        """Return the query of a common table expression."""
        node: Node = self.ctes[number]["value"]["query_node"]
        return node

    def ctes_of(self, tree: Node) -> set[int]:
        """Return the common table expressions that a tree needs, those that these need included."""
        needed: set[int] = set()
        pending = [tree]
        while pending:
            new = {node["_cte"] for node in walk(pending.pop()) if "_cte" in node} - needed
            needed |= new
            pending += map(self.definition, new)
        return needed

    def outer_ctes(self, query: Node) -> list[int]:
        """Return those of them that are defined around it, in their order."""
        inside = {node["_number"] for node in walk(query) if "_number" in node}
        return sorted(self.ctes_of(query).difference(inside))

    def standalone(self, query: Node) -> str | None:
        """Return the text of a part of the query that can run by itself; None if it has none that is certain."""
        needed = self.outer_ctes(query)
        names = [self.ctes[number]["key"].casefold() for number in needed]
        others = {
            name_of(node)
            for part in [query, *map(self.definition, needed)]
            for node in walk(part)
            if node.get("type") == "BASE_TABLE" and node.get("_cte") not in needed
        }
        if len(set(names)) < len(names) or others.intersection(names):
            return None  # in one WITH, they would not mean the same
        whole = [*(self.ctes[number] for number in needed), *query["cte_map"]["map"]]
        return render(self._connection, {**query, "cte_map": {"map": whole}})

    def is_repeatable(self, tree: Node) -> bool:
        """Tell whether a part of the query gives the same, as a set of rows or as a truth, whenever it is asked."""
        parts = [tree, *map(self.definition, self.ctes_of(tree))]
        return not any(varies(node) for part in parts for node in walk(part))
