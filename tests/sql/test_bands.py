"""The relation ``attn_band``: equal to the table, and read by the partition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import duckdb
import numpy as np
import pytest

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.run import Run
from layerlake.sql import ReadLog, query

LENGTHS = (5, 19, 30, 12, 24, 3)


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run(lengths=LENGTHS, context=30, partition_tokens=32, sites=("pattern", "attn_band"))


@pytest.fixture
def lake(run: Run) -> Lake:
    return Lake(run.store.url)


def test_rows_are_those_of_the_table(run: Run, lake: Lake) -> None:
    assert len(run.manifest.partitions) > 2
    rows = query(lake, "FROM attn_band").to_arrow_table().to_pylist()
    assert rows == run.attn_band.to_pylist()
    described = query(lake, "DESCRIBE attn_band").fetchall()
    assert {(name, kind) for name, kind, *_ in described} == {
        ("document", "BIGINT"), ("layer", "INTEGER"), ("head", "INTEGER"), ("queries", "VARCHAR"),
        ("distance_sums", "FLOAT[17]"), ("distance_counts", "INTEGER[17]"),
        ("bos_sum", "FLOAT"), ("bos_count", "INTEGER"),
    }  # fmt: skip


def test_the_mean_weight_on_the_previous_token(run: Run, lake: Lake) -> None:
    """``[2]`` is distance 1: SQL counts from 1."""
    text = (
        "SELECT layer, sum(distance_sums[2]) / sum(distance_counts[2]) FROM attn_band "
        "WHERE queries = 'late' GROUP BY layer ORDER BY layer"
    )
    for layer, mean in query(lake, text).fetchall():
        weights = [np.diagonal(run.attention(d, layer), -1, 1, 2)[:, 16:] for d in range(len(LENGTHS))]
        assert mean == pytest.approx(np.concatenate(weights, axis=1).mean(), rel=1e-6)
    assert len(query(lake, text).fetchall()) == 2


@pytest.mark.parametrize(
    ("where", "partitions"),
    [
        ("document = 2", 1),
        ("document IN (0, 1)", 1),
        ("document > 2", 2),
        ("document = 99", 0),
        ("layer = 1 AND head = 0", None),
        ("queries = 'late' AND bos_count > 0", None),
        ("distance_sums[1] > 2 AND document <> 4", None),
        ("bos_sum IS NULL", None),
    ],
)
def test_a_filter_reads_the_partitions_that_it_names(
    run: Run, lake: Lake, where: str, partitions: int | None
) -> None:
    log = ReadLog()
    found = query(lake, f"FROM attn_band WHERE {where}", log=log).fetchall()
    assert found == duckdb.connect().from_arrow(run.attn_band).filter(where).fetchall()
    n_partitions = len(run.manifest.partitions)
    assert len({read.partition for read in log.reads}) == (n_partitions if partitions is None else partitions)
    assert {read.site for read in log.reads} <= {"attn_band"}


def test_columns_alone_and_rows_alone(lake: Lake) -> None:
    n_rows = len(LENGTHS) * 2 * 2 * 2
    assert query(lake, "SELECT count(*) FROM attn_band").fetchall() == [(n_rows,)]
    assert query(lake, "SELECT count(*) FROM attn_band WHERE queries = 'all'").fetchall() == [(n_rows // 2,)]
    joined = "SELECT count(*) FROM attn_band JOIN documents USING (document) WHERE n_tokens > 17"
    assert query(lake, joined).fetchall() == [(3 * 2 * 2 * 2,)]


def test_partitions_that_lack_the_site_have_no_rows(run: Run, lake: Lake) -> None:
    sites = run.manifest.sites | {"attn_band": run.manifest.sites["attn_band"][1:]}
    commit_manifest(run.store, dataclasses.replace(run.manifest, sites=sites))
    (lowest,) = query(lake, "SELECT min(document) FROM attn_band").fetchall()
    assert lowest == (2,)


def test_a_run_without_the_site_says_how_to_capture_it(make_run: Callable[..., Run]) -> None:
    other = make_run(sites=("resid",))
    with pytest.raises(QueryError, match="attn_band does not exist") as caught:
        query(Lake(other.store.url), "FROM attn_band")
    assert "--sites attn_band" in caught.value.hint
