"""Parquet parts: equal tables give equal bytes, and parts are read in the order given."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerlake.catalog.bands import band_counts
from layerlake.catalog.errors import CorruptRun
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import (
    ATTN_BAND,
    DOCUMENTS,
    OBJECTS,
    TOKENS,
    VOCAB,
    attn_band_sums,
    attn_band_table,
    read_parts,
    to_parquet,
)


def _tokens(*rows: int) -> pa.Table:
    return pa.table([rows, rows, [0] * len(rows), [5] * len(rows)], schema=TOKENS)


def test_equal_tables_give_equal_bytes() -> None:
    assert to_parquet(_tokens(1, 2)) == to_parquet(_tokens(1, 2))
    assert to_parquet(_tokens(1, 2)) != to_parquet(_tokens(1, 3))


def test_parts_are_read_in_the_order_given(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a", to_parquet(_tokens(0, 1)))
    store.write("b", to_parquet(_tokens(2)))
    assert read_parts(store, ["b", "a"])["row"].to_pylist() == [2, 0, 1]
    assert read_parts(store, ["a", "b"], TOKENS).schema == TOKENS


@pytest.mark.parametrize("content", [None, b"", b"not Parquet", 10, 60, -20])
def test_a_part_that_is_gone_or_damaged_is_named(tmp_path: Path, content: bytes | int | None) -> None:
    store, whole = Store(tmp_path), to_parquet(_tokens(0, 1))
    if isinstance(content, int):
        store.write("a/part", whole[:content] + bytes([whole[content] ^ 255]) + whole[content:][1:])
    elif content is not None:
        store.write("a/part", content)
    with pytest.raises(CorruptRun, match="a/part") as caught:
        read_parts(store, ["a/part"])
    assert "layerlake verify" in caught.value.hint


@pytest.mark.parametrize("schema", [DOCUMENTS, TOKENS, VOCAB, OBJECTS, ATTN_BAND])
def test_no_parts_give_an_empty_table_of_the_schema(tmp_path: Path, schema: pa.Schema) -> None:
    table = read_parts(Store(tmp_path), [], schema)
    assert table.num_rows == 0
    assert table.schema == schema


def test_band_sums_are_rows_by_document_layer_head_and_queries() -> None:
    sums = np.random.default_rng(0).random((3, 2, 4, 2, 18), dtype=np.float32)
    documents, lengths = np.array([4, 7, 8]), np.array([30, 1, 17])
    table = attn_band_table(documents, lengths, sums)
    assert table.schema == ATTN_BAND
    rows = iter(table.to_pylist())
    for i, document in enumerate(documents):
        counts = band_counts(lengths[i : i + 1])[0]
        for layer in range(2):
            for head in range(4):
                for query_set, queries in enumerate(("all", "late")):
                    assert next(rows) == {
                        "document": document,
                        "layer": layer,
                        "head": head,
                        "queries": queries,
                        "distance_sums": sums[i, layer, head, query_set, :17].tolist(),
                        "distance_counts": counts[query_set, :17].tolist(),
                        "bos_sum": sums[i, layer, head, query_set, 17].item(),
                        "bos_count": counts[query_set, 17],
                    }
    assert next(rows, None) is None
    np.testing.assert_array_equal(attn_band_sums(table, n_layers=2, n_heads=4), sums)


def test_band_sums_come_back_from_parquet_as_they_were() -> None:
    """In several row groups, and cut out of a larger table."""
    sums = np.random.default_rng(0).random((300, 4, 30, 2, 18), dtype=np.float32)
    table = attn_band_table(np.arange(300), np.full(300, 40), sums)
    assert table.num_rows > 1 << 16
    read = pq.read_table(io.BytesIO(to_parquet(table)))
    assert read == table
    np.testing.assert_array_equal(attn_band_sums(read, 4, 30), sums)
    np.testing.assert_array_equal(attn_band_sums(read.slice(5 * 4 * 30 * 2, 4 * 30 * 2), 4, 30), sums[5:6])


def test_measured_numbers_are_not_looked_up_in_a_dictionary() -> None:
    """They would take half as much again; what repeats is in one."""
    sums = np.random.default_rng(0).random((4, 3, 5, 2, 18), dtype=np.float32)
    table = attn_band_table(np.arange(4), np.full(4, 40), sums)
    group = pq.read_metadata(io.BytesIO(to_parquet(table))).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    plain = {column.path_in_schema for column in columns if "RLE_DICTIONARY" not in column.encodings}
    assert plain == {"distance_sums.list.element", "bos_sum"}
