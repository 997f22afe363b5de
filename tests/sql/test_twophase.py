"""Shapes of joins and subqueries: which keys are found, and which rows matter that no key names."""

# ruff: noqa: S608, ISC004  # queries over data of our own, in lists

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import duckdb
import pytest

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.sql import Session, format_result, twophase

if TYPE_CHECKING:
    from collections.abc import Callable

    from layerlake.catalog.run import Run

    from .conftest import World


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("SELECT vec FROM resid WHERE boundary = 1 AND row IN (SELECT row FROM tokens WHERE position = 8)", (13, 27)),
        ("SELECT vec FROM resid WHERE boundary = 1 AND document IN (SELECT max(document) - 2 FROM documents)",
         (16, 17, 18)),
        ("SELECT vec FROM resid JOIN tokens USING (row) WHERE boundary = 1 AND tokens.position = 8", (13, 27)),
        ("SELECT vec FROM tokens t, resid r WHERE r.row = t.row - 1 AND t.position = 8 AND boundary = 1", (12, 26)),
        ("SELECT vec FROM resid NATURAL JOIN tokens WHERE boundary = 1 AND position = 8", (13,)),
        ("SELECT r.vec FROM documents d JOIN resid r USING (document) WHERE n_tokens = 3 AND boundary = 1",
         (16, 17, 18)),
        ("SELECT vec FROM tokens t LEFT JOIN resid r ON r.row = t.row AND boundary = 1 WHERE t.position = 8", (13, 27)),
        ("SELECT vec FROM resid r RIGHT JOIN (SELECT row FROM tokens WHERE position = 8) t ON r.row = t.row AND "
         "boundary = 1", (13, 27)),
        ("WITH k AS (FROM tokens WHERE position = 8) SELECT vec FROM resid SEMI JOIN k USING (row) WHERE boundary = 1",
         (13, 27)),
        ("WITH RECURSIVE k(i) AS (SELECT 13 UNION ALL SELECT i + 14 FROM k WHERE i < 20) "
         "SELECT vec FROM resid WHERE boundary = 1 AND row IN (FROM k)", (13, 27)),
        ("SELECT vec FROM resid WHERE boundary = (SELECT 1) AND (document, position) IN (VALUES (1, 8), (3, 8))",
         (13, 27)),
        ("SELECT vec FROM (SELECT * FROM resid r JOIN tokens t USING (row) WHERE t.position = 8) WHERE boundary = 1",
         (13, 27)),
        ("SELECT vec FROM resid r WHERE boundary = 1 AND position = 8 AND length(text) < 9", (13,)),
        ("SELECT max(unit(vec, 0)) OVER () FROM resid WHERE boundary = 1 AND "
         "row IN (SELECT row FROM mlp_post WHERE layer = 0 AND position = 8 AND norm(vec) > 0)", (13, 27)),
        ("SELECT a.vec, b.vec FROM resid a JOIN resid b ON a.row = b.row AND a.boundary = 1 AND b.boundary = 1 "
         "WHERE b.position = 8", (13, 27)),
        ("/* é */ SELECT 'é', vec FROM \"resid\" AS \"é\" WHERE boundary = 1 AND \"é\".row IN "
         "(SELECT row FROM tokens WHERE position = 8)", (13, 27)),
        ("SELECT vec FROM resid WHERE boundary = 1 AND row IN (SELECT row FROM tokens WHERE position = 8) "
         "AND row IN (SELECT row FROM tokens WHERE document = 1)", (13,)),
    ],
)  # fmt: skip
def test_shapes_of_which_the_keys_are_found(world: World, text: str, rows: tuple[int, ...]) -> None:
    assert world.ask(text)
    read = {chunk for chunk in world.chunks if chunk[0] == "resid"}
    assert read == {("resid", 1, row // 2) for row in rows}


@pytest.mark.parametrize(
    "text",
    [
        "SELECT count(*) FROM tokens t LEFT JOIN resid r ON r.row = t.row AND r.boundary = 1 AND t.position = 3 "
        "WHERE r.vec IS NULL",
        "SELECT r.vec FROM resid r LEFT JOIN tokens t ON r.row = t.row AND t.position = 3 AND unit(r.vec, 0) > 0 "
        "WHERE t.row IS NULL",
        "SELECT r.vec FROM resid r FULL JOIN tokens t ON r.row = t.row AND t.position = 3 AND r.boundary = 1",
        "SELECT t.row FROM tokens t ANTI JOIN resid r ON r.row = t.row AND r.boundary = 1 AND norm(r.vec) > 3",
        "SELECT t.row, r.vec FROM tokens t ASOF JOIN (SELECT * FROM resid WHERE boundary = 1) r ON t.row >= r.row "
        "WHERE r.row IN (SELECT row FROM tokens WHERE position = 0)",
        "SELECT count(vec) FROM resid WHERE row NOT IN (SELECT NULL UNION ALL SELECT row FROM tokens WHERE row < 3)",
        "SELECT vec FROM resid WHERE row IN (SELECT row FROM tokens WHERE row < 3) OR boundary = 2",
        "WITH RECURSIVE k(i) AS (SELECT 0::BIGINT UNION SELECT r.row + 9 FROM k JOIN resid r ON r.row = k.i "
        "AND r.boundary = 0 AND norm(r.vec) >= 0) FROM k",
        "SELECT (SELECT max(unit(r.vec, 0)) FROM resid r WHERE r.row = t.row AND length(t.text) > 2) FROM tokens t",
        "WITH resid AS (SELECT * FROM resid WHERE row IN (SELECT row FROM tokens WHERE position = 3)) "
        "SELECT vec FROM resid JOIN tokens USING (row)",
        "WITH tokens AS (SELECT row FROM resid WHERE boundary = 0 AND row > 30) "
        "SELECT vec FROM (WITH tokens AS (FROM tokens WHERE row < 35) "
        "SELECT r.vec FROM resid r JOIN tokens USING (row))",
        "SELECT r.row AS position, r.vec FROM resid r WHERE length(r.text) = 2 ORDER BY position",
        "SELECT row % 7 AS r7, vec FROM resid WHERE r7 = 3 AND row IN (SELECT row FROM tokens WHERE position = 3)",
        "SELECT vec FROM resid r(b, i) JOIN tokens t ON t.row = i AND t.position = 3",
        "SELECT t.row, r.row FROM tokens t ASOF JOIN resid r ON t.position % 3 = r.boundary AND t.row >= r.row "
        "WHERE norm(r.vec) > 6",
        "SELECT p.layer, p.key, r.row FROM pattern p JOIN resid r ON r.document = p.document AND r.position = p.key "
        "WHERE norm(vec) > 6 AND p.head = 0",
    ],
)
def test_shapes_in_which_a_row_matters_that_no_key_names(world: World, text: str) -> None:
    assert world.ask(text)


def test_rows_joined_by_their_place_are_all_read(world: World) -> None:
    text = "SELECT t.row, r.row, r.boundary FROM tokens t POSITIONAL JOIN resid r WHERE norm(r.vec){} > 6"
    found = world.session.sql(text.format("")).fetchall()
    assert found == world.session.sql(text.format(" + 0")).fetchall()
    assert found


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("sum(row)", "HUGEINT"), ("max(row)::UHUGEINT", "UHUGEINT"), ("1::BIGNUM", "BIGNUM"), ("'101'::BIT", "BIT"),
        ("md5(max(text))::UUID", "UUID"), ("to_json(max(text))", "JSON"), ("INTERVAL 1 DAY", "INTERVAL"),
        ("'a'::ENUM('b', 'a')", "ENUM('b', 'a')"), ("1.5::DECIMAL(5, 2)", "DECIMAL(5,2)"), ("NULL", '"NULL"'),
        ("TIMESTAMP_S '2020-01-01'", "TIMESTAMP_S"), ("'12:00:00+01'::TIMETZ", "TIME WITH TIME ZONE"),
    ],
)  # fmt: skip
def test_what_is_kept_has_its_type(world: World, value: str, kind: str) -> None:
    one = f"SELECT {value} AS v FROM tokens WHERE row = 0"
    for few in (one, f"SELECT v FROM ({one} LIMIT 1)"):
        found = world.ask(f"SELECT row FROM resid WHERE boundary = 1 AND typeof(({few})) = ?", [kind])
        assert len(found) == world.run.n_tokens


@pytest.mark.parametrize(
    "text",
    [
        "SELECT row FROM resid WHERE boundary = 1 AND text = (SELECT 'T3' COLLATE NOCASE)",
        "SELECT row FROM resid WHERE boundary = 1 AND text IN (SELECT upper(text) COLLATE NOCASE FROM tokens)",
        "SELECT row FROM resid, (SELECT 'T3' COLLATE NOCASE AS t LIMIT 1) WHERE boundary = 1 AND text = t",
        "WITH k AS (SELECT 'T3' COLLATE NOCASE AS t LIMIT 1) SELECT row FROM resid, k WHERE boundary = 1 AND text = t",
    ],
)
def test_what_is_kept_has_its_collation(world: World, text: str) -> None:
    assert world.ask(text)


def test_a_first_phase_that_fails_leaves_the_others(world: World) -> None:
    text = (
        "SELECT row FROM mlp_post WHERE unit(vec, 0) > 1e9 AND text::INTEGER = 3 UNION ALL "
        "SELECT row FROM resid WHERE unit(vec, 0) < 1e9 AND row IN (SELECT row FROM tokens WHERE position = 8)"
    )
    assert len(world.ask(text)) == 6
    assert {chunk for site, _, chunk in world.chunks if site == "resid"} == {6, 13}
    assert [found.relation for found in world.session.restrictions] == ["resid"]


def test_nothing_is_said_of_a_first_phase_that_the_query_does_not_use(world: World) -> None:
    world.session.restrictions.clear()
    table = f'"{world.run.run_id}".resid'
    text = f"SELECT {table}.row FROM {table} WHERE norm(vec) > 0 AND length(text) = 2"
    assert world.session.sql(text).fetchall()
    assert not world.session.restrictions


def test_sites_of_one_name_are_not_taken_for_each_other(make_run: Callable[..., Run]) -> None:
    first = make_run(name="first", lengths=(5, 9, 3), vocab=[f"t{i}" for i in range(20)])
    other = make_run(name="other", lengths=(4,), seed=1, vocab=[f"t{i}" for i in range(20)])
    session = Session(Lake(first.store.url))
    tables = [f'"{run.run_id}".resid' for run in (first, other)]
    for left, right in (tables, reversed(tables)):
        texts = {text for (text,) in session.sql(f"SELECT text FROM {right}").fetchall()}
        rows = session.sql(f"SELECT row, text FROM {left} WHERE boundary = 1").fetchall()
        found = session.sql(
            f"SELECT row FROM {left} SEMI JOIN {right} USING (text) WHERE boundary = 1"
        ).fetchall()
        assert sorted(found) == sorted((row,) for row, text in rows if text in texts - {None})


@pytest.mark.parametrize("explain", ["EXPLAIN ANALYZE", "-- é\nexplain (ANALYZE, FORMAT json)"])
def test_what_is_explained_is_what_runs(world: World, explain: str) -> None:
    text = f"{explain} SELECT vec FROM resid WHERE boundary = 1 AND row IN (SELECT row FROM tokens WHERE position = ?)"
    world.log.reads.clear()
    assert world.session.sql(text, [8]).fetchall()
    assert world.chunks == {("resid", 1, 6), ("resid", 1, 13)}


def test_pattern_is_read_where_its_keys_are(world: World) -> None:
    text = (
        "SELECT p.layer, p.head, p.query, p.key, p.value FROM pattern p "
        "JOIN tokens t ON t.document = p.document AND t.position = p.key WHERE t.row = 34 AND p.head = 1"
    )
    assert len(world.ask(text)) == 2 * 5  # two layers; position 2 is the key of queries 2 to 6
    assert {(read.layer, read.head, read.partition) for read in world.log.reads} == {(0, 1, 2), (1, 1, 2)}
    rows = world.run.manifest.geometry.chunk_rows["pattern"]
    start = 2 * world.run.manifest.geometry.partition_pairs
    pairs = [start + query * (query + 1) // 2 + 2 for query in range(2, 7)]
    assert {chunk for _, _, chunk in world.chunks} == {pair // rows for pair in pairs}


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("SELECT vec FROM resid WHERE boundary = ? AND row IN (SELECT row FROM tokens WHERE position = ?)", [1, 8]),
        ("SELECT vec, ? FROM resid WHERE row IN (SELECT row FROM tokens WHERE position = ?) AND boundary = ?",
         [0, 8, 1]),
        ("SELECT vec FROM resid WHERE row IN (SELECT row FROM tokens WHERE position = $p) AND boundary = $b",
         {"b": 1, "p": 8}),
        ("SELECT $b, vec FROM resid JOIN tokens t USING (row) WHERE t.position = $p AND boundary = $b",
         {"b": 1, "p": 8}),
        ("SELECT vec FROM resid JOIN (SELECT row FROM tokens WHERE position = ? ORDER BY row LIMIT ?) USING (row) "
         "WHERE boundary = ?", [8, 2, 1]),
    ],
)  # fmt: skip
def test_parameters_stay_with_their_places(world: World, text: str, params: Any) -> None:
    assert len(world.ask(text, params)) == 2
    assert {chunk for chunk in world.chunks if chunk[0] == "resid"} == {("resid", 1, 6), ("resid", 1, 13)}


@pytest.mark.parametrize(
    "text",
    [
        "WITH k AS (SELECT row FROM tokens ORDER BY random() LIMIT 3) "
        "SELECT r.row, (SELECT list(row ORDER BY row) FROM k) AS drawn FROM resid r JOIN k USING (row) "
        "WHERE r.boundary = 1 AND norm(r.vec) >= 0 ORDER BY r.row",
        "SELECT r.row, (SELECT list(row ORDER BY row) FROM k) AS drawn FROM resid r, (SELECT 1) WHERE r.boundary = 1 "
        "AND norm(r.vec) >= 0 AND r.row IN (FROM k) ORDER BY r.row",
    ],
)
def test_what_is_drawn_by_chance_is_drawn_once(world: World, text: str) -> None:
    if not text.startswith("WITH"):
        text = f"WITH k AS (SELECT row FROM tokens USING SAMPLE 3) {text}"
    world.log.reads.clear()
    rows = world.session.sql(text).fetchall()
    assert [row for row, _ in rows] == rows[0][1]
    assert len(rows) == 3
    assert {chunk for chunk in world.chunks if chunk[0] == "resid"} == {
        ("resid", 1, row // 2) for row, _ in rows
    }


def test_what_is_drawn_row_by_row_is_left_to_the_query(world: World) -> None:
    found = world.session.sql(
        "SELECT row FROM resid r JOIN tokens t USING (row) WHERE random() < 0.5 AND boundary = 1"
    )
    rows = {row for (row,) in found.fetchall()} | {row for (row,) in found.fetchall()}
    assert len({*rows, *(row for _ in range(20) for (row,) in found.fetchall())}) == world.run.n_tokens


def test_more_keys_than_can_be_held_are_left_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twophase, "MAX_KEYS", 3)
    text = "SELECT vec FROM resid WHERE boundary = 1 AND row IN (SELECT row FROM tokens WHERE row < {})"
    assert len(world.ask(text.format(3))) == 3
    assert world.session.restrictions
    assert len(world.ask(text.format(4))) == 4
    assert not world.session.restrictions


@pytest.mark.parametrize(
    "text",
    [
        "SELECT vec FROM resid WHERE boundary = 1 AND text IN ('t1', 't2') AND row BETWEEN 3 AND 9",
        "SELECT norm(vec) FROM resid WHERE NOT (boundary = 1 OR position IS NULL)",
        "EXPLAIN SELECT vec FROM resid WHERE row = 3",
        "DESCRIBE SELECT vec FROM resid JOIN tokens USING (row)",
        "SELECT vec FROM resid r JOIN tokens t USING (row) USING SAMPLE 3",
    ],
)
def test_where_nothing_can_be_won_there_is_one_phase(world: World, text: str) -> None:
    world.session.restrictions.clear()
    assert world.session.sql(text).fetchall()
    assert not world.session.restrictions


def test_mistakes_are_those_of_the_query(world: World) -> None:
    for text, message in [
        ("SELECT vec FROM resid WHERE row IN (SELECT raw FROM tokens)", 'column "raw" not found'),
        ("SELECT vec FROM resid r JOIN tokens t USING (rwo)", "rwo"),
        ("SELECT vec FROM resid WHERE row IN (SELECT row, text FROM tokens)", "Subquery returns 2 columns"),
        ("SELECT vec FROM resid JOIN tokens ON row = row", "Ambiguous reference"),
        (
            "SELECT array_cosine_similarity(r.vec, m.vec) FROM resid r JOIN mlp_post m USING (row)",
            "same size",
        ),
    ]:
        with pytest.raises(QueryError, match=message):
            world.session.sql(text)
    with pytest.raises(QueryError, match="array of size 8 to array of size 16") as caught:
        format_result(world.session.sql("SELECT vec FROM resid UNION SELECT vec FROM mlp_post"))
    assert "different widths" in caught.value.hint
    late = "SELECT vec FROM resid WHERE boundary = 1 AND row = (SELECT row FROM tokens)"
    with pytest.raises(duckdb.Error, match="More than one row"):
        world.session.sql(late).fetchall()
