"""``zones`` in SQL, and the questions that they answer: equal to brute force, and with fewer chunks read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalog.wreckage import without_zones
from tests.conftest import build_run

import layerlake
from layerlake.catalog import layout
from layerlake.catalog.errors import QueryError, SiteNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.zones import read_zones
from layerlake.sql import ReadLog, bounds, explain, query
from layerlake.sql.labels import Labels
from layerlake.sql.scan import SITE_RELATIONS, SiteScan
from layerlake.sql.top_tokens import TOP_TOKENS, top_tokens
from layerlake.sql.zones import ZONE_ROWS

MakeRun = Callable[..., Run]
Array = npt.NDArray[Any]

LENGTHS = (12, 9, 3, 12, 7, 11, 12, 5, 10)
VECTORS = [name for name in SITE_RELATIONS if name != "pattern"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a partition."""
    monkeypatch.setattr(layout, "CHUNK_NBYTES", 128)


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    run = make_run(lengths=LENGTHS)
    assert run.manifest.geometry.chunk_rows["mlp_post"] == 2
    return run


def opened(run: Run) -> Lake:
    return Lake(run.store.url)


def vectors(run: Run, relation: str) -> tuple[Array, Array, Array]:
    """Layer, row and vector of every row of a relation, as SQL has them without any predicate."""
    axis = SITE_RELATIONS[relation].axis
    rows = query(opened(run), f"FROM {relation} SELECT {axis}, row, vec").fetchall()
    return tuple(np.array(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


# -- the relation -----------------------------------------------------------------------------------


def test_rows_are_the_chunks_and_their_units(run: Run) -> None:
    rows = query(opened(run), "FROM zones WHERE site = 'mlp_post' AND layer = 1").fetchall()
    layers, row, vec = vectors(run, "mlp_post")
    row, vec = row[layers == 1], vec[layers == 1]
    expected = []
    for chunk in np.unique(row // 2).tolist():
        values = vec[row // 2 == chunk]
        norms = np.linalg.norm(values, axis=1)
        place = ("mlp_post", 1, None, chunk)
        expected.append(
            (*place, None, *map(float, (values.min(), values.max(), norms.min(), norms.max())), 0)
        )
        expected += [
            (*place, unit, None, float(values[:, unit].max()), None, None, None)
            for unit in range(vec.shape[1])
        ]
    assert {row[:7] for row in rows} == {row[:7] for row in expected}
    assert len(rows) == len(expected)
    chunks, wanted = ([row for row in found if row[4] is None] for found in (rows, expected))
    np.testing.assert_allclose([row[7:] for row in chunks], [row[7:] for row in wanted], rtol=1e-5)
    assert {row[7:] for row in rows if row[4] is not None} == {(None, None, None)}


@pytest.mark.parametrize(
    "predicate",
    [
        "true",
        "unit IS NULL",
        "unit IS NOT NULL",
        "unit = 3",
        "unit IN (3, 15, 99) AND layer = 1",
        "site = 'resid' AND layer = 2",
        "site = 'pattern' AND head = 1",
        "layer = 1 AND chunk BETWEEN 3 AND 9 AND (unit < 2 OR unit IS NULL)",
        "max > 1.5 AND (unit = 2 OR site = 'attn_out')",
        "n_nonfinite = 0 AND norm_max > 3",
        "layer = 7",
        "site = 'attn_band'",
    ],
)
def test_predicates_are_those_of_a_table(run: Run, predicate: str) -> None:
    """What reaches the scan gives the rows that DuckDB finds by itself."""
    connection = layerlake.open_lake(run.store.url).connect()
    connection.execute("CREATE TABLE plain AS FROM zones")
    for columns in ("*", "chunk, max", "count(*)"):
        found, expected = (
            connection.execute(f"SELECT {columns} FROM {table} WHERE {predicate}").fetchall()  # noqa: S608
            for table in ("zones", "plain")
        )
        assert sorted(map(str, found)) == sorted(map(str, expected))


def test_types_are_the_documented_ones(run: Run) -> None:
    types = dict(query(opened(run), "SELECT column_name, column_type FROM (DESCRIBE zones)").fetchall())
    assert list(types) == ZONE_ROWS.names
    assert types == {
        "site": "VARCHAR", "layer": "INTEGER", "head": "INTEGER", "chunk": "INTEGER", "unit": "INTEGER",
        "min": "FLOAT", "max": "FLOAT", "norm_min": "FLOAT", "norm_max": "FLOAT", "n_nonfinite": "BIGINT",
    }  # fmt: skip


def test_no_values_are_read(run: Run) -> None:
    log = ReadLog()
    assert query(opened(run), "SELECT max(max) FROM zones", log=log).fetchall()
    assert log.reads == []


def test_a_run_without_zones_answers_all_but_questions_for_them(run: Run) -> None:
    expected = query(opened(run), "SELECT max(norm(vec)) FROM resid").fetchall()
    old = without_zones(run)
    assert query(opened(old), "SELECT max(norm(vec)) FROM resid").fetchall() == expected
    with pytest.raises(QueryError, match="zones does not exist") as caught:
        query(opened(old), "FROM zones")
    assert f"layerlake index {old.store.url} --run {old.run_id}" in caught.value.hint


def test_chunks_that_zones_name_are_the_only_ones_read(run: Run) -> None:
    """A list of literals reaches the reader."""
    chunks = [
        chunk
        for (chunk,) in query(
            opened(run),
            "SELECT chunk FROM zones WHERE site = 'mlp_post' AND layer = 1 AND unit = 3 AND max > 1.8",
        ).fetchall()
    ]
    layers, row, vec = vectors(run, "mlp_post")
    expected = set(row[(layers == 1) & (vec[:, 3] > 1.8)].tolist())
    assert 0 < len(chunks) < 10
    log = ReadLog()
    listed = ", ".join(map(str, chunks))
    text = f"SELECT row FROM mlp_post WHERE layer = 1 AND chunk IN ({listed}) AND vec[4] > 1.8"  # noqa: S608
    assert {r for (r,) in query(opened(run), text, log=log).fetchall()} == expected
    assert sorted(chunk for read in log.reads for chunk in read.chunks) == sorted(chunks)
    assert {read.layer for read in log.reads} == {1}


# -- the largest values of a unit -------------------------------------------------------------------


def by_brute_force(run: Run, relation: str, layer: int, unit: int, k: int) -> list[tuple[int, float]]:
    layers, row, vec = vectors(run, relation)
    kept = (layers == layer) & ~np.isnan(vec[:, unit])
    pairs = zip(row[kept].tolist(), vec[kept, unit].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]


def pairs_of(table: Any) -> list[tuple[int, float]]:
    return list(zip(table["row"].to_pylist(), table["value"].to_pylist(), strict=True))


@pytest.mark.parametrize("relation", VECTORS)
def test_top_tokens_are_the_largest(run: Run, relation: str) -> None:
    for layer, unit, k in ((0, 0, 1), (1, 5, 7), (1, 7, 1000)):
        found = top_tokens(run, relation, layer, unit, k)
        assert pairs_of(found) == by_brute_force(run, relation, layer, unit, k)
        assert found.schema == TOP_TOKENS
        labels = {
            row[0]: row
            for row in query(opened(run), "FROM tokens SELECT row, document, position, text").fetchall()
        }
        shown = found.drop_columns("value").to_pylist()
        assert [tuple(row.values()) for row in shown] == [labels[row["row"]] for row in shown]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["float16", "bfloat16", "float32"]), st.integers(1, 12), st.integers(0, 15), st.integers(0, 99)
)  # fmt: skip
def test_top_tokens_of_equal_and_of_odd_values(dtype: str, k: int, unit: int, seed: int) -> None:
    """Many are equal, some are not finite."""
    chance = np.random.default_rng(seed)
    odd = np.array([-1, 0, -0.0, 1, 2, 3, np.nan, np.inf, -np.inf], np.float32)
    values = chance.choice(odd, (2, sum(LENGTHS), 16), p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.04, 0.02, 0.02, 0.02])
    run = build_run(
        f"memory://top-{dtype}-{seed}", lengths=LENGTHS, dtype=dtype, sites=("mlp_post",), values={"mlp_post": values}
    )  # fmt: skip
    assert pairs_of(top_tokens(run, "mlp_post", 1, unit, k)) == by_brute_force(run, "mlp_post", 1, unit, k)


def test_top_tokens_read_the_chunks_that_may_hold_them(run: Run) -> None:
    log = ReadLog()
    found = top_tokens(run, "mlp_post", 1, 3, 2, log=log)
    layers, row, vec = vectors(run, "mlp_post")
    row, values = row[layers == 1], vec[layers == 1, 3]
    kth = found["value"][-1].as_py()
    expected = sorted(set((row[values >= kth] // 2).tolist()))
    assert sorted(chunk for read in log.reads for chunk in read.chunks) == expected
    assert len(expected) <= 2
    everything = ReadLog()
    assert top_tokens(without_zones(run), "mlp_post", 1, 3, 2, log=everything) == found
    assert everything.n_chunks == len(set((row // 2).tolist()))


def test_top_tokens_of_a_lake(run: Run, make_run: MakeRun) -> None:
    lake = layerlake.open_lake(run.store.url)
    assert lake.top_tokens("mlp_post", 1, 3, 2) == top_tokens(run, "mlp_post", 1, 3, 2)
    other = make_run(name="other", seed=1)
    assert lake.top_tokens("mlp_post", 1, 3, run="other") == top_tokens(other, "mlp_post", 1, 3, 10)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (("mlp_pots", 0, 0), SiteNotFound, "no vectors of 'mlp_pots'. Did you mean 'mlp_post'"),
        (("pattern", 0, 0), SiteNotFound, "no vectors of 'pattern'"),
        (("mlp_out", 0, 0), SiteNotFound, "site 'mlp_out' not at all"),
        (("mlp_post", 2, 0), QueryError, "no layer 2"),
        (("resid", 3, 0), QueryError, "no boundary 3"),
        (("mlp_post", 0, 16), QueryError, "no unit 16"),
        (("mlp_post", 0, -1), QueryError, "no unit -1"),
        (("mlp_post", 0, 0, 0), QueryError, "top 0 tokens"),
    ],
)
def test_what_there_is_not_is_said(
    make_run: MakeRun, asked: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    run = make_run(sites=("resid", "mlp_post", "pattern"))
    with pytest.raises(error, match=message):
        top_tokens(run, *asked)


# -- norms above a threshold ------------------------------------------------------------------------


def possible_chunks(run: Run, relation: str, layer: int, threshold: float) -> list[int]:
    """Return the chunks of a layer in which zones let a norm reach a threshold."""
    scan = SiteScan(run, SITE_RELATIONS[relation], Labels(run))
    found = [
        scan.chunks_with_norm_above(layer, partition, threshold) for partition in run.manifest.partitions
    ]
    chunks: list[int] = np.concatenate(found).tolist()
    return chunks


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("relation", VECTORS)
def test_chunks_with_norm_above_hold_every_such_row(make_run: MakeRun, relation: str, dtype: str) -> None:
    run = make_run(lengths=LENGTHS, dtype=dtype)
    axis, sites = SITE_RELATIONS[relation].axis, SITE_RELATIONS[relation].sites
    rows = query(opened(run), f"FROM {relation} SELECT row, norm(vec) WHERE {axis} = 1").fetchall()
    chunk_rows = run.manifest.geometry.chunk_rows[sites[0]]
    thresholds = sorted({norm for _, norm in rows})
    pruned = 0
    for threshold in thresholds[::7] + thresholds[-1:]:
        chunks = possible_chunks(run, relation, 1, threshold)
        assert chunks == sorted(set(chunks))
        assert {row // chunk_rows for row, norm in rows if norm > threshold} <= set(chunks)
        assert {row // chunk_rows for row, norm in rows if norm >= threshold} <= set(chunks)
        pruned += len({row // chunk_rows for row, _ in rows}) - len(chunks)
        if len(sites) == 1:  # no more than those, but for rounding
            near = {row // chunk_rows for row, norm in rows if norm >= threshold * 0.999}
            assert set(chunks) <= near
    assert pruned > 0


def test_chunks_of_unknown_norm_are_all_there(run: Run) -> None:
    values = np.random.default_rng(1).standard_normal((2, sum(LENGTHS), 16)).astype(np.float32)
    values[1, 40, 3] = np.nan
    odd = build_run(
        run.store.url, name="odd", lengths=LENGTHS, sites=("mlp_post",), values={"mlp_post": values}
    )
    (row,) = (
        r
        for r, n in query(
            opened(odd), "FROM mlp_post SELECT row, norm(vec) WHERE layer = 1", run="odd"
        ).fetchall()
        if np.isnan(n)
    )
    assert possible_chunks(odd, "mlp_post", 1, 1e9) == [row // 2]
    assert possible_chunks(odd, "mlp_post", 0, 1e9) == []
    chunks = sorted(set((run.tokens["row"].to_numpy() // 2).tolist()))
    assert possible_chunks(without_zones(run), "mlp_post", 1, 1e9) == chunks


ALL = "FROM resid SELECT row, norm(vec) AS norm WHERE boundary = 1"


@pytest.mark.parametrize(
    "text",
    [
        "SELECT row FROM resid WHERE boundary = 1 AND norm(vec) > $low",
        "SELECT row FROM resid WHERE norm(vec) >= $low AND boundary = 1",
        "SELECT row FROM resid AS r WHERE boundary = 1 AND $low < norm(r.vec)",
        "SELECT row FROM resid WHERE boundary = 1 AND main.norm(resid.vec) BETWEEN $low AND $low + 100",
        "SELECT row FROM resid WHERE boundary = 1 AND norm(vec) > (SELECT $low::DOUBLE)",
        "SELECT r.row FROM resid r JOIN tokens t USING (row) WHERE boundary = 1 AND norm(vec) > $low",
        "SELECT r.row FROM resid r JOIN tokens t ON r.row = t.row AND boundary = 1 AND norm(vec) > $low",
        "SELECT row FROM (SELECT 1) JOIN (resid r JOIN (SELECT 2) ON norm(r.vec) > $low) ON boundary = 1",
        "WITH r AS (FROM resid WHERE norm(vec) > $low) SELECT row FROM r WHERE boundary = 1",
        "SELECT row FROM tokens WHERE row IN (SELECT row FROM resid r WHERE boundary = 1 AND norm(r.vec) > $low)",
    ],
)
def test_a_norm_threshold_reads_what_zones_leave_in_question(run: Run, text: str) -> None:
    log = ReadLog()
    norms = dict(query(opened(run), ALL).fetchall())
    low = sorted(norms.values())[-3] * (1 - 1e-6)
    found = query(opened(run), text, params={"low": low}, log=log).fetchall()
    assert sorted(row for (row,) in found) == sorted(row for row, norm in norms.items() if norm > low)
    chunks = [chunk for read in log.reads for chunk in read.chunks if read.layer == 1]
    assert sorted(chunks) == possible_chunks(run, "resid", 1, low)
    assert len(set(chunks)) < len({row // run.manifest.geometry.chunk_rows["resid"] for row in norms})


@pytest.mark.parametrize(
    "text",
    [
        "SELECT row FROM resid WHERE boundary = 1 AND (norm(vec) > 1e9 OR row >= 0)",
        "SELECT row FROM resid WHERE boundary = 1 AND NOT norm(vec) > 1e9",
        "SELECT row FROM resid WHERE boundary = 1 AND norm(vec) < 1e9",
        "SELECT row FROM resid WHERE boundary = 1 AND norm(vec) > 1e9 - 1e9 * (row - row) - 1e9",
        "SELECT t.row FROM tokens t LEFT JOIN (FROM resid WHERE norm(vec) > 1e9) r USING (row)",
        "SELECT t.row FROM tokens t ANTI JOIN (FROM resid WHERE norm(vec) > 1e9) r USING (row)",
        "SELECT row FROM resid WHERE boundary = 1 AND norm([3.0, 4.0]::FLOAT[2]) > 4",
        "SELECT t.row FROM tokens t LEFT JOIN resid r ON r.row = t.row AND r.boundary = 1 AND norm(r.vec) > 1e9",
        "SELECT r.row FROM resid r LEFT JOIN tokens t ON t.row = r.row AND norm(r.vec) > 1e9 WHERE boundary = 1",
    ],
)
def test_other_conditions_on_norms_keep_their_rows(run: Run, text: str) -> None:
    assert len(query(opened(run), text).fetchall()) == run.n_tokens


def test_zones_are_read_once_however_often_a_query_scans_their_site(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def noted(run: Run, *place: Any, **options: Any) -> Any:
        asked.append(place)
        return read_zones(run, *place, **options)

    monkeypatch.setattr(bounds, "read_zones", noted)
    text = "SELECT a.row FROM resid a JOIN resid b USING (row, boundary) WHERE norm(a.vec) > 3 AND norm(b.vec) > 3"
    assert query(opened(run), text).fetchall()
    assert len(asked) == len(set(asked)) == 3 * len(run.manifest.partitions)


def test_the_explanation_says_what_norm_has_to_be_reached(run: Run) -> None:
    said = str(explain(opened(run), "SELECT row FROM resid WHERE norm(vec) > 1e300"))
    assert said.splitlines()[-1].startswith("read 0 of ")
    said = str(explain(opened(run), "SELECT row FROM resid WHERE norm(vec) > 1e6"))
    assert f"resid of {run.run_id}: zones tell where a norm can reach 1e+06" in said
    assert said.splitlines()[-1].startswith("read 0 of ")
