"""Saved directions, and what is projected on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from layerlake import open_lake
from layerlake.catalog.errors import AnalysisError, LayerLakeError, QueryError, SiteNotFound
from layerlake.catalog.run import Run
from layerlake.catalog.verify import verify_lake
from layerlake.sql import connect, format_result

MakeRun = Callable[..., Run]
VECTOR = np.array([1, -2, 3, 0, 0.5, 6, 7, 8])


def test_a_projection_is_the_dot_product_with_what_is_stored(make_run: MakeRun) -> None:
    run = make_run()
    lake = open_lake(run.store.url)
    lake.save_direction("as it is", VECTOR, site="resid", layer=1)
    lake.save_direction("it's a unit", VECTOR, normalise=True)
    text = "SELECT project(vec, 'as it is'), project(vec, 'it''s a unit') FROM resid WHERE boundary = 1 ORDER BY row"
    values = np.concatenate([run.read("resid", 1, part) for part in run.manifest.partitions]) @ VECTOR
    expected = np.stack([values, values / np.linalg.norm(VECTOR)], axis=1)
    np.testing.assert_allclose(np.array(lake.sql(text).fetchall()), expected, rtol=1e-4, atol=1e-4)


def test_directions_are_a_relation_and_a_finding(make_run: MakeRun) -> None:
    run = make_run()
    lake = open_lake(run.store.url)
    assert lake.sql("FROM directions").fetchall() == []
    lake.save_direction("probe", VECTOR, site="attn_out", layer=1)
    row = (run.run_id, "probe", run.manifest.model_id, "attn_out", 1, VECTOR.tolist())
    assert lake.sql("FROM directions").fetchall() == [row]
    assert connect(lake).execute("FROM directions").fetchall() == [row]
    assert lake.sql("SELECT analysis, view, n_rows FROM findings").fetchall() == [
        ("directions", "directions", 1)
    ]
    assert verify_lake(lake.store).problems == ()


def test_a_direction_serves_all_runs_of_its_model_and_no_other(make_run: MakeRun) -> None:
    first = make_run()
    make_run(dtype="float16")  # of the same model
    make_run(name="other")
    lake = open_lake(first.store.url)
    lake.save_direction("d", VECTOR, run=first.run_id)
    for run_id in lake.run_ids:
        counted = lake.sql("SELECT count(project(vec, 'd')) FROM resid", run=run_id)
        if run_id.startswith("other"):
            with pytest.raises(QueryError, match=r"The model of other.* has no direction 'd'"):
                format_result(counted)
        else:
            assert counted.fetchall() == [(36 * 3,)]


def test_names_in_the_query_do_not_get_in_the_way(make_run: MakeRun) -> None:
    lake = open_lake(make_run().store.url)
    lake.save_direction("a", VECTOR)
    lake.save_direction("b", -VECTOR)
    text = (
        "SELECT name, round(sum(project(resid.vec, name)), 2) FROM resid, directions WHERE boundary = 0 GROUP BY name "
        "ORDER BY name"
    )
    (_, of_a), (_, of_b) = lake.sql(text).fetchall()
    assert of_a == pytest.approx(-of_b)
    assert of_a != 0


def test_saving_again(make_run: MakeRun) -> None:
    run = make_run()
    lake = open_lake(run.store.url)
    lake.save_direction("d", VECTOR)
    lake.save_direction("d", VECTOR)
    with pytest.raises(AnalysisError, match="has another direction 'd'"):
        lake.save_direction("d", 2 * VECTOR)
    lake.save_direction("d", 2 * VECTOR, replace=True)
    assert lake.sql("SELECT vec FROM directions").fetchall() == [((2 * VECTOR).tolist(),)]
    twin = make_run(dtype="float16")
    with pytest.raises(
        AnalysisError, match="saved with run"
    ):  # two of one name, and nobody knew which is meant
        lake.save_direction("d", VECTOR, run=twin.run_id, replace=True)


@pytest.mark.parametrize(
    ("vector", "place", "error", "message"),
    [
        (np.zeros(8), {}, AnalysisError, "is no direction"),
        (np.full(8, np.nan), {}, AnalysisError, "0 of its 8 numbers are finite"),
        (np.ones((8, 2)), {}, AnalysisError, r"shape \(8, 2\)"),
        (np.ones(7), {"site": "resid", "layer": 0}, AnalysisError, "has 7 numbers, vectors there 8"),
        (np.ones(8), {"site": "mlp_post"}, AnalysisError, "vectors there 16"),
        (np.ones(8), {"site": "rsid"}, SiteNotFound, "'rsid'.*resid"),
        (np.ones(8), {"site": "pattern"}, SiteNotFound, "no vectors of 'pattern'"),
        (np.ones(8), {"site": "resid", "layer": 3}, SiteNotFound, "no boundary 3"),
    ],
)
def test_what_is_no_direction(
    make_run: MakeRun, vector: np.ndarray[tuple[int, ...], np.dtype[np.float64]], place: dict[str, object],
    error: type[LayerLakeError], message: str,
) -> None:  # fmt: skip
    lake = open_lake(make_run().store.url)
    with pytest.raises(error, match=message):
        lake.save_direction("d", vector, **place)  # type: ignore[arg-type]
    assert lake.sql("FROM directions").fetchall() == []


def test_rows_may_be_ordered_by_a_projection(make_run: MakeRun) -> None:
    lake = open_lake(make_run().store.url)
    lake.save_direction("d", VECTOR)
    ranked = lake.sql(
        "SELECT project(vec, 'd') AS p, row_number() OVER (ORDER BY project(vec, 'd')) AS place FROM resid"
    )
    rows = sorted(ranked.fetchall(), key=lambda row: row[1])
    assert [p for p, _ in rows] == sorted(p for p, _ in rows)
    assert lake.sql("SELECT project(NULL, 'd'), project(vec, NULL) FROM resid LIMIT 1").fetchall() == [
        (None, None)
    ]


def test_projecting_what_does_not_fit(make_run: MakeRun) -> None:
    lake = open_lake(make_run().store.url)
    lake.save_direction("d", VECTOR)
    with pytest.raises(QueryError, match="'d' is of 8 numbers, this vector of 16"):
        format_result(lake.sql("SELECT project(vec, 'd') FROM mlp_post"))
    with pytest.raises(QueryError, match=r"no direction 'e'.* FROM directions has them"):
        format_result(lake.sql("SELECT project(vec, 'e') FROM resid"))
