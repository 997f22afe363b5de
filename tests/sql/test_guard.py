"""Only reads get through, files are out of reach, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.sql import connect, format_result, query

WRITES = [
    "CREATE TABLE x (i INTEGER)",
    "CREATE TABLE x AS SELECT 1",
    "CREATE VIEW x AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "CREATE SCHEMA s",
    "CREATE SECRET s (TYPE s3)",
    "INSERT INTO runs VALUES (1)",
    "UPDATE runs SET run = 'x'",
    "DELETE FROM runs",
    "MERGE INTO runs USING models ON true WHEN MATCHED THEN DELETE",
    "DROP VIEW runs",
    "ALTER VIEW runs RENAME TO x",
    "COMMENT ON VIEW runs IS 'x'",
    "TRUNCATE runs",
    "WITH x AS (INSERT INTO runs VALUES (1) RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x UNION SELECT * FROM runs",
    "SELECT * FROM (WITH x AS (UPDATE runs SET run = 'x' RETURNING *) SELECT * FROM x)",
    "SELECT (WITH x AS (DELETE FROM runs RETURNING run) SELECT max(run) FROM x)",
    "EXPLAIN CREATE TABLE x (i INTEGER)",
    "EXPLAIN ANALYZE CREATE TABLE x (i INTEGER)",
    "EXPLAIN (ANALYZE) CREATE TABLE x (i INTEGER)",
    "EXPLAIN (ANALYZE, FORMAT JSON) DROP VIEW runs",
    "explain/* ( */analyze -- )\n/* select 1 */create table x (i integer)",
    "EXPLAIN ANALYZE WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO 'stolen'",
    "COPY (SELECT 1) TO 'stolen'",
    "COPY (SELECT 1) TO 'stolen' (FORMAT PARQUET)",
    "COPY runs FROM 'secret.csv'",
    "EXPORT DATABASE 'stolen'",
    "IMPORT DATABASE 'stolen'",
    "ATTACH 'stolen'",
    "ATTACH ':memory:' AS other",
    "DETACH memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET threads = 1",
    "SET search_path = 'main'",
    "SET VARIABLE x = 1",
    "RESET threads",
    "USE main",
    "PRAGMA version",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "CALL enable_logging(storage = 'file', storage_config = {'path': 'stolen'})",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DEALLOCATE p",
    "BEGIN",
    "COMMIT",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW runs",
    "DROP VIEW runs; SELECT 1",
    "PIVOT runs ON run USING count(*)",
    "EXPLAIN PIVOT runs ON run USING count(*)",
    "",
    " ; -- nothing",
    "SELECT",
    "EXPLAIN",
    "EXPLAIN ANALYZE",
    "no such language",
]
FILES = [
    "FROM 'secret.csv'",
    "SELECT * FROM read_csv('secret.csv')",
    "SELECT * FROM read_text('secret.csv')",
    "SELECT * FROM read_blob('secret.csv')",
    "SELECT * FROM read_parquet('secret.csv')",
    "SELECT * FROM read_json('secret.csv')",
    "SELECT * FROM sniff_csv('secret.csv')",
    "SELECT * FROM glob('*')",
    "SELECT * FROM query('FROM ''secret.csv''')",
    "SELECT * FROM query_table('secret.csv')",
    "SELECT * FROM 'https://example.com/x.csv'",
    "SELECT * FROM enable_logging('QueryLog', storage = 'file', storage_config = {'path': 'stolen'})",
    "SELECT * FROM enable_profiling(format = 'json', save_location = 'stolen')",
    "SELECT * FROM query('COPY (SELECT 1) TO ''stolen''')",
    "SELECT getenv('HOME')",
    "EXPLAIN ANALYZE SELECT * FROM read_text('secret.csv')",
]
READS = [
    "SELECT 1",
    "select 1;",
    "-- a comment\nSELECT 1",
    "FROM runs",
    "TABLE runs",
    "VALUES (1)",
    "(SELECT 1)",
    "WITH x AS (SELECT 1) SELECT * FROM x",
    "WITH RECURSIVE x(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM x WHERE i < 3) FROM x",
    "WITH x AS MATERIALIZED (FROM runs) FROM x UNION FROM x",
    "SELECT 'CREATE TABLE x' AS \"DROP VIEW runs\"",
    "SELECT {'type': 'INSERT_NODE'}",
    "SELECT list_transform([1, 2], lambda x: x + 1), CASE WHEN true THEN 1 END, row_number() OVER ()",
    "SELECT run FROM runs QUALIFY row_number() OVER (ORDER BY run) = 1",
    "PIVOT runs ON dtype IN ('float16') USING count(*)",
    "UNPIVOT (SELECT 1 AS a, 2 AS b) ON a, b",
    "DESCRIBE runs",
    "DESCRIBE SELECT 1",
    "SHOW TABLES",
    "SHOW ALL TABLES",
    "SUMMARIZE runs",
    "SELECT * FROM (DESCRIBE runs)",
    "SELECT * FROM range(3)",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT 'é'",
    "EXPLAIN (FORMAT JSON) SELECT 1",
    "EXPLAIN (ANALYZE) (SELECT 1)",
    "EXPLAIN (SELECT ')' AS a)",
    "EXPLAIN /* é ( */ ANALYZE (SELECT 1) UNION (SELECT 2)",
    "EXPLAIN DESCRIBE runs",
]


@pytest.fixture
def lake(tiny_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """A lake, seen from a working directory with one file in it."""
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "secret.csv").write_text("password\n1234\n")
    monkeypatch.chdir(directory)
    return tiny_lake


def everything_under(*roots: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}


def test_what_does_not_read_is_refused(lake: Lake) -> None:
    before = everything_under(Path(lake.url), Path.cwd())
    for text in [*WRITES, *FILES]:
        with pytest.raises(QueryError) as caught:
            format_result(query(lake, text))
        assert "Traceback" not in str(caught.value), text
        assert "password" not in str(caught.value), text
    assert everything_under(Path(lake.url), Path.cwd()) == before


def test_what_reads_is_answered(lake: Lake) -> None:
    for text in READS:
        assert query(lake, text).fetchall(), text


def test_refusal_says_what_is_let_through(lake: Lake) -> None:
    with pytest.raises(QueryError, match="CREATE is not a read") as caught:
        query(lake, "EXPLAIN ANALYZE CREATE TABLE x (i INTEGER)")
    assert "SELECT, EXPLAIN, DESCRIBE, SHOW" in caught.value.hint
    with pytest.raises(QueryError, match="2 statements"):
        query(lake, "SELECT 1; SELECT 2")
    with pytest.raises(QueryError, match="DELETE inside a SELECT"):
        query(lake, "WITH x AS (DELETE FROM runs RETURNING *) FROM x")
    with pytest.raises(QueryError) as caught:
        query(lake, "FROM 'secret.csv'")
    assert "out of reach" in caught.value.hint


def test_connection_is_without_files_and_locked(lake: Lake) -> None:
    with connect(lake) as connection:
        connection.execute(
            "CREATE TABLE mine AS SELECT run FROM runs"
        )  # in memory: allowed, and gone with it
        for text in ["COPY runs TO 'stolen'", "ATTACH 'stolen'", "FROM 'secret.csv'", "SET threads = 1"]:
            with pytest.raises(duckdb.Error):
                connection.execute(text).fetchall()
        with pytest.raises(duckdb.Error):
            connection.sql("FROM runs").write_csv("stolen")
    assert [path.name for path in Path.cwd().iterdir()] == ["secret.csv"]


def test_python_variables_are_not_tables(lake: Lake) -> None:
    models = sites = local = [(1,)]  # noqa: F841  # what a replacement scan would find
    with pytest.raises(QueryError, match="local does not exist"):
        query(lake, "FROM local")
    assert query(lake, "SELECT count(*) FROM sites").fetchall() == [(6,)]


def test_unsafe_reads_files_and_writes_none(lake: Lake) -> None:
    text = "SELECT password FROM 'secret.csv' JOIN runs ON true"
    assert query(lake, text, unsafe=True).fetchall() == [(1234,)]
    for write in ["COPY (SELECT 1) TO 'stolen'", "ATTACH 'stolen'", "INSTALL httpfs", "SELECT 1; SELECT 2"]:
        with pytest.raises(QueryError):
            query(lake, write, unsafe=True)
    assert [path.name for path in Path.cwd().iterdir()] == ["secret.csv"]
