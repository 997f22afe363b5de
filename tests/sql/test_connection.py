"""Names: the schemas, the search path, and errors that say what there is."""

from __future__ import annotations

import gc
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from layerlake.catalog.errors import AmbiguousRun, QueryError, RunNotFound
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.run import Run
from layerlake.sql import connect, query

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


def test_importing_sql_does_not_import_duckdb() -> None:
    asked = "print('duckdb' in sys.modules)"
    code = f"import sys, layerlake.sql; {asked}; layerlake.sql.connect; {asked}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]
