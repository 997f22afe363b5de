"""The guard: lets a statement through only if it reads, by what DuckDB's own parser says it is."""

from __future__ import annotations

import duckdb

from ..catalog.errors import QueryError
from .syntax import Node, parse, walk

__all__ = ["require_read", "split_explain"]

_READS = "SQL only reads a lake: SELECT, EXPLAIN, DESCRIBE, SHOW and SUMMARIZE."
_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}


def require_read(connection: duckdb.DuckDBPyConnection, text: str) -> Node:
    """Raise unless a text is one statement that reads, and return its tree. Runs and binds nothing of it.

    DESCRIBE, SHOW, SUMMARIZE, FROM, VALUES and TABLE are SELECTs to the parser. A SELECT may still write in
    a common table expression (``WITH x AS (INSERT …)``), and an EXPLAIN may hold anything (EXPLAIN ANALYZE
    runs it), so both are looked into; what is returned of an EXPLAIN is the tree of what it explains. This is
    the door; behind it, the connection has no way to a file.

    Raises
    ------
    QueryError
        It is not one statement, or it does something else than read.
    duckdb.Error
        It is not SQL.
    """
    statements = connection.extract_statements(text)
    if len(statements) != 1:
        what = f"{len(statements)} statements" if statements else "no statement"
        raise QueryError(f"The query holds {what}; exactly one is answered.", hint=_READS)
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        return require_read(connection, _explained(connection, statements[0].query))
    if kind == duckdb.StatementType.MULTI:
        raise QueryError(
            "PIVOT without its values is several statements, one of which creates a type.",
            hint="Name the values: PIVOT … ON column IN (…) USING …",
        )
    if kind != duckdb.StatementType.SELECT:
        raise QueryError(f"{_verb(statements[0].query, kind)} is not a read.", hint=_READS)
    tree = parse(connection, text)
    for node in walk(tree):
        type_ = str(node.get("type"))
        if type_.endswith("_NODE") and type_ not in _READING_NODES:
            raise QueryError(f"{type_.partition('_')[0]} inside a SELECT is not a read.", hint=_READS)
    return tree


def split_explain(connection: duckdb.DuckDBPyConnection, text: str) -> tuple[str, str]:
    """Return a text in two: ``EXPLAIN [ANALYZE] [(options)]`` or nothing, and what is to run."""
    statements = connection.extract_statements(text)
    if [statement.type for statement in statements] != [duckdb.StatementType.EXPLAIN]:
        return "", text
    asked = _explained(connection, statements[0].query)
    return statements[0].query.removesuffix(asked), asked


def _explained(connection: duckdb.DuckDBPyConnection, text: str) -> str:
    """Return the statement inside ``EXPLAIN [ANALYZE] [(options)] statement``.

    Cut in the wrong place, the rest would not parse: what is returned has to pass as one reading statement.
    """
    content = text.encode()  # the tokenizer counts bytes
    starts = [start for start, _ in duckdb.tokenize(text)]
    tokens = [
        (start, content[start:stop].decode().strip().upper())
        for (start, kind), stop in zip(duckdb.tokenize(text), [*starts[1:], None], strict=True)
        if kind != duckdb.token_type.comment
    ]
    first = 2 if tokens[1][1] == "ANALYZE" else 1
    rest = content[tokens[first][0] :].decode()
    if rest.startswith("("):
        try:
            connection.extract_statements(rest)  # EXPLAIN (SELECT …)
        except duckdb.ParserException:
            closing = next(i for i, (_, word) in enumerate(tokens) if word == ")")
            rest = content[tokens[closing + 1][0] :].decode()
    return rest


def _verb(text: str, kind: duckdb.StatementType) -> str:
    """Return the word that a statement begins with, or the parser's name for it."""
    word = text.split(maxsplit=1)[0].strip("();").upper() if text.split() else ""
    return word if word.isalpha() else kind.name
