"""Names: the schemas, the search path, and errors that say what there is."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pytest

from layerlake.catalog.errors import AmbiguousRun, QueryError, RunNotFound
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.run import Run
from layerlake.sql import Session, connect, query

if TYPE_CHECKING:
    from tests.file_systems import CountingFileSystem

MakeRun = Callable[..., Run]


@pytest.fixture
def two_runs(make_run: MakeRun) -> Lake:
    """A lake of two runs: one of five documents, one of two and without a pattern."""
    make_run(name="first")
    run = make_run(name="second", lengths=(4, 6), sites=("resid", "mlp_post"))
    return Lake(run.store.url)


def test_only_run_needs_no_schema(tiny_lake: Lake) -> None:
    (run,) = tiny_lake.run_ids
    assert query(tiny_lake, "SELECT count(*) FROM tokens").fetchall() == [(36,)]
    assert query(tiny_lake, f'FROM "{run}".tokens SELECT count(*)').fetchall() == [(36,)]


def test_run_on_the_search_path_is_chosen(two_runs: Lake) -> None:
    assert query(two_runs, "SELECT count(*) FROM tokens", run="first").fetchall() == [(36,)]
    assert query(two_runs, "SELECT count(*) FROM tokens", run="second").fetchall() == [(10,)]


def test_runs_are_joined_by_their_schemas(two_runs: Lake) -> None:
    first, second = two_runs.run_ids
    text = f'FROM "{first}".documents JOIN "{second}".documents USING (document) SELECT count(*)'
    assert query(two_runs, text).fetchall() == [(2,)]


def test_bare_name_among_several_runs_is_refused(two_runs: Lake) -> None:
    for name in ("resid", "tokens", "pattern"):
        with pytest.raises(QueryError, match=f"{name} does not exist") as caught:
            query(two_runs, f"FROM {name}")
        assert "--run" in caught.value.hint
        assert all(run in caught.value.hint for run in two_runs.run_ids)


def test_unknown_and_ambiguous_runs(two_runs: Lake, make_run: MakeRun) -> None:
    with pytest.raises(RunNotFound, match="third"):
        query(two_runs, "SELECT 1", run="third")
    make_run(name="first", seed=1)
    with pytest.raises(AmbiguousRun, match="2 runs"):
        query(two_runs, "SELECT 1", run="first")


def test_missing_site_says_how_to_capture_it(two_runs: Lake) -> None:
    with pytest.raises(QueryError, match="attn_out does not exist") as caught:
        query(two_runs, "FROM attn_out", run="second")
    assert "holds resid, mlp_post" in caught.value.hint
    assert "--sites attn_out" in caught.value.hint
    with pytest.raises(QueryError) as caught:
        query(two_runs, "FROM resid_mid", run="second")
    assert "--sites attn_out" in caught.value.hint


def test_misspelt_relation_lists_the_relations(tiny_lake: Lake) -> None:
    with pytest.raises(QueryError, match='Did you mean "resid"') as caught:
        query(tiny_lake, "FROM residd")
    assert "mlp_post" in caught.value.hint
    assert "runs" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["SELECT vce FROM resid", "SELECT r.vce FROM resid r", "SELECT vec FROM resid JOIN tokens USING (rwo)"],
)
def test_misspelt_column_says_where_columns_are_listed(tiny_lake: Lake, text: str) -> None:
    with pytest.raises(QueryError) as caught:
        query(tiny_lake, text)
    assert caught.value.hint.startswith("DESCRIBE RELATION")
    assert "mlp_post" in caught.value.hint


def test_misspelt_schema_lists_the_runs(tiny_lake: Lake) -> None:
    with pytest.raises(QueryError) as caught:
        query(tiny_lake, "FROM tinny.resid")
    assert tiny_lake.run_ids[0] in caught.value.hint


def test_analysis_that_was_not_done_says_how_to_do_it(tiny_lake: Lake) -> None:
    for view, analysis in [("lens", "lens"), ("neuron_counts", "neurons")]:
        with pytest.raises(QueryError, match=f"{view} does not exist") as caught:
            query(tiny_lake, f"FROM {view}")
        assert f"layerlake analyze {tiny_lake.url} {analysis}" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SELECT nosuch FROM resid", 'column "nosuch" not found'),
        ("SELECT boundary FROM resid WHERE", "syntax error"),
        ("SELECT nosuch(1)", "nosuch does not exist"),
        ("SELECT vec + 'a' FROM resid", "No function matches"),
        ("SELECT ?", "parameter"),
    ],
)
def test_wrong_query_is_a_query_error(tiny_lake: Lake, text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message) as caught:
        query(tiny_lake, text)
    assert caught.value.__cause__ is not None


def test_lake_without_runs(tmp_path: Path) -> None:
    create_lake(tmp_path / "empty")
    lake = Lake(tmp_path / "empty")
    assert query(lake, "FROM runs").fetchall() == []
    with pytest.raises(QueryError) as caught:
        query(lake, "FROM resid")
    assert "no runs" in caught.value.hint


def test_odd_names_are_quoted(make_run: MakeRun) -> None:
    make_run(name="plain")
    run = make_run(name='it\'s "odd", 50% --x')
    lake = Lake(run.store.url)
    assert query(lake, "SELECT count(*) FROM tokens", run="it's").fetchall() == [(36,)]
    with pytest.raises(QueryError, match="nosuch"):
        query(lake, "FROM nosuch", run="it's")


def test_params(tiny_lake: Lake) -> None:
    assert query(tiny_lake, "SELECT count(*) FROM tokens WHERE row < ?", params=[3]).fetchall() == [(3,)]
    assert query(tiny_lake, "SELECT $b - $a", params={"a": 1, "b": 3}).fetchall() == [(2,)]


def test_macros_count_units_from_zero(make_run: MakeRun) -> None:
    run = make_run()
    rows = query(
        Lake(run.store.url), "SELECT unit(vec, 0), unit(vec, 15), norm(vec) FROM mlp_post WHERE layer = 1"
    ).fetchall()
    values = np.concatenate([run.read("mlp_post", 1, p) for p in run.manifest.partitions])
    expected = np.stack([values[:, 0], values[:, 15], np.linalg.norm(values, axis=1)], axis=1)
    np.testing.assert_allclose(np.array(rows), expected, rtol=1e-6)


def test_relation_outlives_its_connection_and_reads_again(tiny_lake: Lake) -> None:
    relation = query(tiny_lake, "SELECT boundary, count(vec) AS n FROM resid GROUP BY ALL ORDER BY ALL")
    gc.collect()
    expected = [(0, 36), (1, 36), (2, 36)]
    assert relation.fetchall() == expected
    assert relation.filter("boundary = 1").fetchall() == expected[1:2]
    assert relation.to_arrow_table()["n"].to_pylist() == [36, 36, 36]
    assert relation.pl()["n"].to_list() == [36, 36, 36]


def test_lake_in_memory(make_run: MakeRun) -> None:
    run = make_run(url=f"memory://{uuid.uuid4().hex}/lake", dtype="bfloat16")
    rows = query(Lake(run.store.url), "SELECT vec FROM resid WHERE boundary = 2").fetchall()
    expected = np.concatenate([run.read("resid", 2, p) for p in run.manifest.partitions])
    np.testing.assert_array_equal(np.array([row[0] for row in rows], dtype=np.float32), expected)


def test_connection_shows_the_lake_as_it_was(make_run: MakeRun) -> None:
    run = make_run(name="first")
    with connect(Lake(run.store.url)) as connection:
        make_run(name="second")
        assert connection.execute("SELECT count(*) FROM runs").fetchall() == [(1,)]


def schemas(session: Session) -> set[str]:
    rows = session.connection.execute("SELECT DISTINCT schema_name FROM duckdb_views() WHERE NOT internal")
    return {name for (name,) in rows.fetchall()}


def with_many_runs(run: Run, n: int) -> Lake:
    """Give a run's lake other runs, of which there is a manifest and nothing else."""
    for number in range(n):
        other = dataclasses.replace(run.manifest, run_id=f"other-{number:04d}", number=0)
        commit_manifest(run.store, other)
    return Lake(run.store.url)


def test_only_what_is_named_is_registered(two_runs: Lake) -> None:
    first, second = two_runs.run_ids
    session = Session(two_runs)
    assert session.sql("SELECT count(*) FROM runs").fetchall() == [(2,)]
    assert schemas(session) == {"main"}
    assert session.sql(f'SELECT count(*) FROM "{first.upper()}".tokens').fetchall() == [(36,)]  # noqa: S608
    assert schemas(session) == {"main", first}
    session.sql(f'SELECT 1 WHERE 1 IN (SELECT row FROM "{second}".resid)').fetchall()  # noqa: S608
    assert schemas(session) >= {"main", first, second}
    assert len(session.sql("SHOW ALL TABLES").filter("schema <> '_layerlake'").fetchall()) > 20


def test_what_there_is_is_listed(two_runs: Lake) -> None:
    for text in [
        "SELECT name FROM (SHOW ALL TABLES) WHERE schema <> 'main'",
        "SELECT table_name FROM information_schema.tables WHERE table_schema <> 'main'",
        "SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name <> 'main'",
    ]:
        names = [name for (name,) in query(two_runs, text).fetchall()]
        assert names.count("tokens") == 2, text
        assert names.count("attn_out") == 1, text


def test_of_many_runs_the_chosen_one_is_listed(make_run: MakeRun) -> None:
    lake = with_many_runs(make_run(name="tiny"), 70)
    found = query(lake, "SELECT DISTINCT schema FROM (SHOW ALL TABLES) ORDER BY ALL", run="tiny").fetchall()
    assert [name for (name,) in found] == ["main", lake.run("tiny").run_id]
    assert query(lake, "SELECT count(*) FROM runs").fetchall() == [(71,)]


def test_a_thousand_runs_answer_at_once(make_run: MakeRun) -> None:
    lake = with_many_runs(make_run(name="tiny"), 1000)
    run_id = lake.run("tiny").run_id
    for text, run, expected in [
        ("SELECT count(*) FROM tokens", "tiny", 36),
        (f'SELECT count(vec) FROM "{run_id}".resid WHERE boundary = 1', None, 36),  # noqa: S608
        ("SELECT count(*) FROM runs JOIN sites USING (run) WHERE site = 'resid'", None, 1001),
    ]:
        started = time.perf_counter()
        assert query(Lake(lake.url), text, run=run).fetchall() == [(expected,)]
        assert time.perf_counter() - started < 2


def test_no_run_but_the_named_one_is_opened(counting: type[CountingFileSystem], make_run: MakeRun) -> None:
    run = make_run(name="tiny", url="counting://lake")
    lake = with_many_runs(run, 50)
    counting.calls.clear()
    assert query(lake, "SELECT count(*) FROM tokens", run="tiny").fetchall() == [(36,)]
    assert counting.calls.total() < 20


def test_connection_has_the_runs_that_it_is_given(two_runs: Lake, make_run: MakeRun) -> None:
    make_run(name="third")
    with connect(two_runs, run=["first", "second"]) as connection:
        views = "SELECT DISTINCT schema_name FROM duckdb_views() WHERE NOT internal AND schema_name <> 'main'"
        found = {name.rpartition("-")[0] for (name,) in connection.execute(views).fetchall()}
        assert found == {"first", "second"}
        with pytest.raises(duckdb.CatalogException):
            connection.execute("FROM tokens")
    with connect(two_runs, run="first") as connection:
        assert connection.execute("SELECT count(*) FROM tokens").fetchall() == [(36,)]


def test_what_duckdb_may_take_is_limited(tiny_lake: Lake) -> None:
    (limit,) = query(tiny_lake, "SELECT current_setting('memory_limit')", memory_limit="64MiB").fetchall()
    assert limit == ("64.0 MiB",)
    with pytest.raises(QueryError, match="'much' is no memory limit") as caught:
        query(tiny_lake, "SELECT 1", memory_limit="much")
    assert "8GB" in caught.value.hint


def test_importing_sql_does_not_import_duckdb() -> None:
    asked = "print('duckdb' in sys.modules)"
    code = f"import sys, layerlake.sql; {asked}; layerlake.sql.connect; {asked}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]
