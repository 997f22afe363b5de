"""Site relations: equal to the arrays, and read no more than the query asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.catalog import layout
from layerlake.catalog.errors import CorruptRun, QueryError
from layerlake.catalog.lake import Lake
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.run import Run
from layerlake.catalog.shards import decode
from layerlake.sql import ReadLog, query
from layerlake.sql.translation import translated

Array = npt.NDArray[Any]
MakeRun = Callable[..., Run]


def opened(run: Run) -> Lake:
    return Lake(run.store.url)


def by_numpy(run: Run, site: str) -> Array:
    """The stored values of a token site, used rows only, through Zarr, in float32: [layer, token, width]."""
    spans = [slice(*run.span(site, partition)) for partition in run.manifest.partitions]
    stored = np.concatenate([run.array(site)[:, span] for span in spans], axis=1)
    return decode(stored, run.manifest.dtype).astype(np.float32)


def by_sql(run: Run, relation: str, axis: str = "layer") -> Array:
    """The same from SQL."""
    rows = query(opened(run), f"FROM {relation} SELECT vec ORDER BY {axis}, row").fetchall()
    n_tokens = run.n_tokens
    return np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, n_tokens, len(rows[0][0]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_vectors_equal_the_arrays(make_run: MakeRun, dtype: str) -> None:
    run = make_run(dtype=dtype)
    assert len(run.manifest.partitions) > 2
    resid = by_numpy(run, "resid")
    np.testing.assert_array_equal(by_sql(run, "resid", "boundary"), resid)
    np.testing.assert_array_equal(by_sql(run, "resid_pre"), resid[:-1])
    np.testing.assert_array_equal(by_sql(run, "resid_post"), resid[1:])
    np.testing.assert_array_equal(by_sql(run, "resid_mid"), resid[:-1] + by_numpy(run, "attn_out"))
    np.testing.assert_array_equal(by_sql(run, "resid_mid"), run.resid_mid.to_numpy())
    for site in ("attn_out", "mlp_out", "mlp_post"):
        np.testing.assert_array_equal(by_sql(run, site), by_numpy(run, site))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_some_rows_are_those_of_the_arrays(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(layout, "CHUNK_NBYTES", 64)
    run = make_run(dtype=dtype)
    lake, row = opened(run), run.tokens["row"].to_numpy()
    for rows in ([3], [0, 1, 2, 3], [1, 9, 10, 20], list(range(0, 40, 3))):
        listed = ", ".join(map(str, rows))
        text = f"SELECT vec FROM resid WHERE boundary = 1 AND row IN ({listed}) ORDER BY row"  # noqa: S608
        found = query(lake, text).fetchall()
        np.testing.assert_array_equal(
            [vec for (vec,) in found], by_numpy(run, "resid")[1][np.isin(row, rows)]
        )
    some = "layer = 1 AND head = 1 AND document = 3 AND key"
    values = query(lake, f"SELECT value FROM pattern WHERE {some} % 4 = 1 ORDER BY query, key").fetchall()  # noqa: S608
    dense = run.attention(3, 1).to_numpy()[1]
    expected = [dense[q, k] for q, k in np.argwhere(np.tri(len(dense))) if k % 4 == 1]
    np.testing.assert_array_equal([value for (value,) in values], expected)


def test_vectors_are_fixed_size_floats(make_run: MakeRun) -> None:
    lake = opened(make_run(dtype="float16"))
    types = dict(query(lake, "SELECT column_name, column_type FROM (DESCRIBE mlp_post)").fetchall())
    assert types == {
        "layer": "INTEGER",
        "row": "BIGINT",
        "document": "BIGINT",
        "position": "INTEGER",
        "token_id": "INTEGER",
        "text": "VARCHAR",
        "chunk": "INTEGER",
        "vec": "FLOAT[16]",
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pattern_equals_the_unpacked_attention(make_run: MakeRun, dtype: str) -> None:
    run = make_run(dtype=dtype)
    rows = query(opened(run), "SELECT layer, head, document, query, key, value FROM pattern").fetchall()
    found = {row[:5]: row[5] for row in rows}
    expected = {}
    for document in run.stored_documents["document"].to_pylist():
        for layer in range(run.shape.n_layers):
            dense = run.attention(document, layer).to_numpy()
            for head, q, k in np.ndindex(dense.shape):
                if k <= q:
                    expected[(layer, head, document, q, k)] = float(dense[head, q, k])
    assert found == expected
    assert len(rows) == len(expected)


def test_labels_equal_the_token_table(make_run: MakeRun) -> None:
    run = make_run()
    chunk = run.tokens["row"].to_numpy() // run.manifest.geometry.chunk_rows["attn_out"]
    text = [f"t{i}" for i in run.tokens["token_id"].to_pylist()]
    expected = [
        (*row.values(), t, c) for row, t, c in zip(run.tokens.to_pylist(), text, chunk.tolist(), strict=True)
    ]
    columns = "row, document, position, token_id, text, chunk"
    assert query(opened(run), f"FROM attn_out SELECT {columns} WHERE layer = 1").fetchall() == expected
    assert query(opened(run), "FROM tokens").fetchall() == [row[:-1] for row in expected]


def test_token_without_vocabulary_entry_has_no_text(make_run: MakeRun) -> None:
    run = make_run(vocab=["a", "b"], lengths=(4,), token_ids=np.array([0, 1, 23, 1]))
    lake = opened(run)
    assert query(lake, "SELECT text FROM tokens").fetchall() == [("a",), ("b",), (None,), ("b",)]
    assert query(lake, "SELECT row FROM resid WHERE boundary = 0 AND text IS NULL").fetchall() == [(2,)]
    assert query(lake, "SELECT row FROM resid WHERE boundary = 0 AND text <> 'b'").fetchall() == [(0,)]


def test_parallel_model_has_no_resid_mid(make_run: MakeRun) -> None:
    shape = dataclasses.replace(make_run().shape, block="parallel", family="gpt_neox")
    lake = opened(make_run(shape=shape, name="parallel"))
    with pytest.raises(QueryError, match="resid_mid does not exist") as caught:
        query(lake, "FROM resid_mid", run="parallel")
    assert "parallel blocks of gpt_neox" in caught.value.hint


def test_partly_captured_site_shows_the_partitions_it_has(make_run: MakeRun) -> None:
    run = make_run()
    sites = run.manifest.sites | {"attn_out": run.manifest.sites["attn_out"][1:]}
    commit_manifest(run.store, dataclasses.replace(run.manifest, sites=sites))
    first = run.manifest.partitions[0]
    for relation in ("attn_out", "resid_mid"):
        rows = query(opened(run), f"FROM {relation} SELECT count(*), min(row) WHERE layer = 0").fetchall()
        assert rows == [(run.n_tokens - first.n_rows, 16)]


# -- what is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicate", "boundaries"),
    [
        ("boundary = 1", {1}),
        ("boundary IN (0, 2)", {0, 2}),
        ("boundary - 1 = 0", {1}),
        ("boundary BETWEEN 1 AND 2", {1, 2}),
        ("boundary <> 1", {0, 2}),
        ("NOT (boundary = 0 OR boundary = 2)", {1}),
        ("boundary = 1 AND vec[1] > 0", {1}),
        ("(boundary = 1 AND row < 3) OR (boundary = 2 AND text = 't0')", {1, 2}),
        ("boundary = 7", set()),
        ("true", {0, 1, 2}),
    ],
)
def test_only_the_boundaries_asked_for_are_read(
    make_run: MakeRun, predicate: str, boundaries: set[int]
) -> None:
    log = ReadLog()
    query(opened(make_run()), f"FROM resid SELECT vec WHERE {predicate}", log=log).fetchall()
    assert log.layers("resid") == boundaries


@pytest.mark.parametrize(("relation", "boundary"), [("resid_pre", 1), ("resid_post", 2), ("resid_mid", 1)])
def test_derived_relations_read_the_boundary_they_stand_for(
    make_run: MakeRun, relation: str, boundary: int
) -> None:
    log = ReadLog()
    query(opened(make_run()), f"FROM {relation} SELECT norm(vec) WHERE layer = 1", log=log).fetchall()
    assert log.layers("resid") == {boundary}
    assert log.layers("attn_out") == ({1} if relation == "resid_mid" else set())


@pytest.mark.parametrize(
    "text",
    [
        "SELECT count(*) FROM resid",
        "SELECT boundary, row, text FROM resid WHERE boundary = 1 AND text = 't3'",
        "SELECT layer, head, query FROM pattern WHERE query = key",
        "FROM documents",
        "DESCRIBE resid",
        "EXPLAIN SELECT vec FROM resid",
    ],
)
def test_no_values_are_read_unless_asked_for(make_run: MakeRun, text: str) -> None:
    log = ReadLog()
    assert query(opened(make_run()), text, log=log).fetchall()
    assert log.reads == []


def test_labels_choose_the_chunks(make_run: MakeRun) -> None:
    # d_mlp is so wide that a chunk of mlp_post is one row, and a partition is several chunks
    shape = dataclasses.replace(make_run().shape, d_mlp=1 << 18)
    lengths = (5, 9, 3, 12)
    values = np.zeros((2, sum(lengths), shape.d_mlp), dtype=np.float32)
    values[:, :, 0] = np.arange(sum(lengths))
    run = make_run(
        name="wide", shape=shape, lengths=lengths, sites=("mlp_post",), values={"mlp_post": values}
    )
    assert run.manifest.geometry.chunk_rows["mlp_post"] == 1
    log = ReadLog()
    text = "SELECT row, vec[1] FROM mlp_post WHERE layer = 0 AND document IN (0, 3) AND position IN (1, 2, 4)"
    rows = query(opened(run), text, run="wide", log=log).fetchall()
    assert rows == [(1, 1.0), (2, 2.0), (4, 4.0), (20, 18.0), (21, 19.0), (23, 21.0)]
    assert [(read.layer, read.partition, read.chunks) for read in log.reads] == [
        (0, 0, (1, 2, 4)),
        (0, 1, (20, 21, 23)),
    ]


def test_pattern_reads_only_the_head_and_the_document(make_run: MakeRun) -> None:
    run = make_run()
    log = ReadLog()
    text = "SELECT value FROM pattern WHERE layer = 1 AND head = 0 AND document = 2 AND value < 2"
    assert len(query(opened(run), text, log=log).fetchall()) == 6
    assert [(read.layer, read.head, read.partition) for read in log.reads] == [(1, 0, 1)]


def test_limit_stops_the_reading(make_run: MakeRun) -> None:
    log = ReadLog()
    assert len(query(opened(make_run()), "SELECT vec FROM resid LIMIT 2", log=log).fetchall()) == 2
    assert len(log.reads) == 1


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "changed"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("activations.zarr/attn_out/c/1/0/0", "FROM attn_out SELECT vec"),
        ("activations.zarr/attn_out/c/1/0/0", "FROM resid_mid SELECT vec"),
        ("activations.zarr/pattern/c/1/0/0", "FROM pattern SELECT count(*) WHERE value > 0.5"),
        ("attn_band/part-00000000.parquet", "FROM attn_band"),
    ],
)
def test_damaged_values_are_the_lake_s_fault_and_not_the_query_s(
    make_run: MakeRun, name: str, text: str, is_gone: bool
) -> None:
    run = make_run()
    path = f"runs/{run.run_id}/{name}"
    content = run.store.read(path)
    if is_gone:
        run.store.delete(path)
    else:
        run.store.write(path, content[:40] + bytes([content[40] ^ 1]) + content[41:])
    lake = opened(run)
    with (
        pytest.raises(CorruptRun, match=name if is_gone else "not what was written") as caught,
        translated(lake=lake),
    ):
        query(lake, text).fetchall()
    assert "\n" not in str(caught.value)
    assert lake.url in caught.value.hint
