"""A sealed object tells of any change to itself, and is still what it was to everybody who reads it."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from layerlake.catalog.errors import CorruptRun
from layerlake.catalog.seal import SEAL_FIELD, UNSEALED, is_intact, seal, seal_json
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import to_parquet

VALUES = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=5)


@given(VALUES, st.data())
def test_a_sealed_json_object_tells_of_any_changed_byte(
    value: dict[str, int | str], data: st.DataObject
) -> None:
    content = seal_json(value)
    assert is_intact(content)
    assert json.loads(content) == value | {SEAL_FIELD: json.loads(content)[SEAL_FIELD]}
    place = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.integers(1, 255))
    assert not is_intact(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])


def test_text_that_looks_like_a_seal_does_no_harm() -> None:
    content = seal_json({"a": "crc32:deadbeef", "z": "crc32:0123abcd"})
    assert is_intact(content)
    like_its_own = {
        "a": UNSEALED,
        "z": UNSEALED,
        "nested": [{SEAL_FIELD: UNSEALED}, f'"{SEAL_FIELD}": "{UNSEALED}'],
    }
    sealed = json.loads(seal_json(like_its_own))
    assert sealed.pop(SEAL_FIELD) != UNSEALED
    assert sealed == like_its_own
    table = pa.table({"text": [UNSEALED, "crc32:deadbeef"] * 50})
    assert is_intact(to_parquet(table))
    assert pq.read_table(io.BytesIO(to_parquet(table))) == table


def test_what_has_no_seal_is_not_intact() -> None:
    assert not is_intact(b"{}")
    with pytest.raises(ValueError, match="not found"):
        seal(b"{}")


def test_a_sealed_parquet_file_carries_no_trace_into_the_table() -> None:
    table = pa.table({"a": [1, 2, 3]})
    content = to_parquet(table)
    assert pq.read_table(io.BytesIO(content)).schema.equals(table.schema, check_metadata=True)
    for place in range(len(content)):
        assert not is_intact(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]), place


def test_zarr_reads_a_sealed_node() -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"a": 1}}
    content = seal_json(group)
    assert is_intact(content)
    store = zarr.storage.MemoryStore({"zarr.json": zarr.core.buffer.cpu.Buffer.from_bytes(content)})
    assert zarr.open_group(store, mode="r").attrs["a"] == 1


def test_a_store_reads_json_without_its_seal_and_refuses_what_was_changed() -> None:
    store = Store("memory://sealed")
    store.write_json("a.json", {"n": 1})
    assert store.read_json("a.json") == {"n": 1}
    store.write("a.json", store.read("a.json").replace(b"1", b"2", 1))
    with pytest.raises(CorruptRun, match=r"a\.json"):
        store.read_json("a.json")
