"""Any join and subquery: the same answer as over tables in memory, and no chunk read that holds nothing of it."""

# ruff: noqa: S608  # queries over data of our own

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlake.catalog.errors import QueryError

if TYPE_CHECKING:
    from .conftest import World

AXES = {"resid": "boundary", "mlp_post": "layer"}
TOKEN_KEYS = ("row", "document", "position", "token_id", "text", "chunk")
ON_TOKENS = (
    "t.text = 't3'", "t.text LIKE '%1'", "t.position = 2", "t.row % 5 = 1", "t.document IN (1, 3)", "t.text IS NULL",
    "t.token_id > 12", "t.row < 0", "true",
)  # fmt: skip


@st.composite
def small_sides(draw: st.DrawFn, column: str) -> str:
    """Draw a query of one column, which may hold NULLs or nothing."""
    source = "resid" if column == "chunk" else "tokens"
    of = f"FROM {source} t WHERE {draw(st.sampled_from(ON_TOKENS))}"
    shapes = [
        f"SELECT t.{column} {of}",
        f"SELECT DISTINCT {column} {of}",
        f"SELECT max({column}) {of}",
        f"SELECT {column} {of} GROUP BY ALL HAVING count(*) > 1",
        f"SELECT {column} {of} ORDER BY row, {column} LIMIT 4",
        f"SELECT {column} {of} UNION ALL SELECT NULL",
        f"WITH t AS (SELECT * {of}) SELECT {column} FROM t",
        f"SELECT {column} FROM mlp_post t WHERE layer = 1 AND unit(vec, 3) > 0.5",
        f"SELECT {column} FROM mlp_post t WHERE row IN (SELECT row {of})",
    ]
    if column not in ("text", "chunk"):
        shapes += [f"SELECT {column} + 1 {of}", "VALUES (1), (3), (NULL)", "SELECT ?::INTEGER"]
    return draw(st.sampled_from(shapes))


@st.composite
def conditions(draw: st.DrawFn, site: str, depth: int = 2, *, on_values: bool = True) -> str:
    """Draw a condition on a site that goes by ``s``."""
    if depth and draw(st.booleans()):
        left, right = (draw(conditions(site, depth - 1, on_values=on_values)) for _ in range(2))
        return draw(st.sampled_from([f"({left} AND {right})", f"({left} OR {right})", f"(NOT {left})", left]))
    axis, where = AXES[site], draw(st.sampled_from(ON_TOKENS))
    column = draw(st.sampled_from(TOKEN_KEYS))
    small = draw(small_sides(column))
    late = [
        "unit(s.vec, 0) > 0.3", "norm(s.vec) > s.position", "hash(s) % 2 = 0", "norm(s.vec) > 6", "4.5 <= norm(s.vec)",
        "norm(s.vec) BETWEEN 5 AND 6",
    ] if on_values else []  # fmt: skip
    return draw(
        st.sampled_from(
            [
                *late,
                f"s.{column} IN ({small})",
                f"s.{column} IN ({small})",
                f"s.{column} NOT IN ({small})",
                f"s.{column} = (SELECT max(c) FROM ({small}) x(c))",
                f"EXISTS ({small})",
                f"EXISTS (SELECT * FROM tokens t WHERE t.row = s.row - 1 AND {where})",
                f"NOT EXISTS (SELECT 1 FROM tokens t WHERE t.row = s.row AND {where})",
                f"(s.document, s.position) IN (SELECT document, position FROM tokens t WHERE {where})",
                f"s.{axis} IN (SELECT t.position FROM tokens t WHERE {where})",
                f"s.{axis} = 1",
                "length(s.text) = 2",
                "s.row = s.document + 8",
            ]
        )
    )


@st.composite
def queries(draw: st.DrawFn) -> str:
    """Draw a SELECT that names a site at least once, and tokens, documents or the like beside it."""
    site = draw(st.sampled_from(sorted(AXES)))
    other = draw(st.sampled_from(sorted(AXES)))
    on_token, condition = draw(st.sampled_from(ON_TOKENS)), draw(conditions(site))
    column = draw(st.sampled_from(["row", "document", "position", "token_id", "text"]))
    kind = draw(st.sampled_from(["JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", "SEMI JOIN", "ANTI JOIN"]))
    small = f"(SELECT t.row, t.text AS word, t.document AS d FROM tokens t WHERE {on_token} ORDER BY t.row LIMIT 9)"
    materialized = draw(st.sampled_from(["", "MATERIALIZED", "NOT MATERIALIZED"]))
    on = f"s.{column} = t.{column}"
    sources = [
        f"{site} s",
        f"{site} s {kind} tokens t ON {on} AND {on_token}",
        f"{site} s {kind} tokens t ON {on} AND {condition}",
        f"{site} s {kind} tokens t USING ({column})",
        f"tokens t {kind} {site} s ON {on} AND {on_token}",
        f"tokens t {kind} {site} s USING ({column}, document)",
        f"{site} s NATURAL {kind} tokens t",
        f"{site} s NATURAL JOIN {other} t",
        f"{site} s {kind} {small} t USING (row)",
        f"{small} t {kind} {site} s USING (row)",
        f"{site} s {kind} k t ON s.row = t.row",
        f"{site} s {kind} {other} t ON s.row = t.row AND s.{AXES[site]} = t.{AXES[other]} AND {on_token}",
        f"documents d JOIN tokens t USING (document) {kind} {site} s ON s.row = t.row AND d.n_tokens > 5",
        f"(tokens t LEFT JOIN documents d ON t.document = d.document + 1) JOIN {site} s ON s.row = t.row",
        f"tokens t LEFT JOIN ({site} s JOIN documents d ON s.document = d.document) ON t.row = s.row",
        f"{site} s, LATERAL (SELECT * FROM tokens t WHERE t.row = s.row - 1 AND {on_token}) t",
        f"{site} s, tokens t",
        f"tokens t ASOF JOIN {site} s ON t.document % 2 = s.{AXES[site]} AND t.row >= s.row",
    ]
    source = draw(st.sampled_from(sources))
    hides = {"SEMI JOIN", "ANTI JOIN"} & {f"{word} JOIN" for word in source.split()}
    shown = "t" if hides and source.startswith(("tokens", "(SELECT")) else "s"
    has_t = not hides and source != f"{site} s"
    where = []
    if shown == "s" and (not hides or "documents" not in source):
        where.append(draw(st.sampled_from([condition, "norm(s.vec) > 4.5"])))
    if has_t:
        where.append(draw(st.sampled_from([on_token, on, "true", "t.row IS NULL"])))
    if "s, tokens t" in source:
        where.append(on)
    if hides and "documents" in source:
        shown = "t"
    chosen = (
        f"{shown}.row"
        + (f", s.{AXES[site]}, unit(s.vec, 1)" if shown == "s" else "")
        + (", t.row" if has_t else "")
    )
    head = f"SELECT {chosen} "
    text = f"{head}FROM {source} WHERE {' AND '.join(where) or 'true'}"
    wrapped = draw(
        st.sampled_from(
            [
                text,
                text,
                f"SELECT count(*) FROM ({text})",
                f"SELECT row FROM resid WHERE boundary = 0 AND row IN (SELECT {shown}.row {text.removeprefix(head)})",
                f"{text} UNION ALL {text}",
                f"WITH j AS ({text}) FROM j UNION ALL FROM j",
            ]
        )
    )
    k = f"k AS {materialized} (SELECT t.row, t.text, t.document FROM tokens t WHERE {on_token} ORDER BY row LIMIT 20)"
    if wrapped.startswith("WITH "):
        return f"WITH {k}, {wrapped.removeprefix('WITH ')}"
    return f"WITH {k} {wrapped}"


@settings(deadline=None, max_examples=200)
@given(text=queries(), value=st.integers(0, 12))
def test_any_query_gives_what_it_gives_in_memory(world: World, text: str, value: int) -> None:
    try:
        world.by_memory(text, [value] * text.count("?"))
    except duckdb.ConversionException:
        return  # vectors of two widths are compared, unless it is found out first that there are none to compare
    except duckdb.Error:
        with pytest.raises((QueryError, duckdb.Error)):
            world.session.sql(text, [value] * text.count("?")).fetchall()
        return
    world.ask(text, [value] * text.count("?"))


@settings(deadline=None, max_examples=100)
@given(condition=conditions("resid", on_values=False), joined=st.booleans(), value=st.integers(0, 12))
def test_only_chunks_that_hold_matches_are_read(
    world: World, condition: str, joined: bool, value: int
) -> None:
    source = "resid s JOIN tokens t ON s.row = t.row AND t.position > s.boundary" if joined else "resid s"
    matching = f"FROM {source} WHERE {condition}"
    params = [value] * condition.count("?")
    try:
        held = world.by_memory(f"SELECT DISTINCT s.boundary, s.chunk {matching}", params)
    except duckdb.Error:
        return  # VALUES have no such column
    world.ask(f"SELECT s.boundary, s.row, s.vec {matching}", params)
    assert {chunk for chunk in world.chunks if chunk[0] == "resid"} == {("resid", *place) for place in held}
