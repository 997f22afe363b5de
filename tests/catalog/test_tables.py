"""Parquet parts: equal tables give equal bytes, and parts are read in the order given."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from layerlake.catalog.stores import Store
from layerlake.catalog.tables import DOCUMENTS, OBJECTS, TOKENS, VOCAB, read_parts, to_parquet


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


@pytest.mark.parametrize("schema", [DOCUMENTS, TOKENS, VOCAB, OBJECTS])
def test_no_parts_give_an_empty_table_of_the_schema(tmp_path: Path, schema: pa.Schema) -> None:
    table = read_parts(Store(tmp_path), [], schema)
    assert table.num_rows == 0
    assert table.schema == schema
