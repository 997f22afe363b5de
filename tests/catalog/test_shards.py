"""Rows read directly from shards that Zarr itself has written: the values that Zarr reads, and never others."""

from __future__ import annotations

from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlake.catalog.errors import CorruptRun
from layerlake.catalog.shards import ascending, read_index, read_shard
from layerlake.catalog.stores import Store

from .test_arrays import BITS, CHUNK_ROWS, N_CHUNKS, cut, encode, shard

URL = "memory://test-shards"


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(list(BITS)), st.sampled_from(["none", "lz4", "zstd"]))
def test_rows_are_what_was_written(data: st.DataObject, dtype: str, codec: str) -> None:
    n_used, n_series = data.draw(st.integers(1, CHUNK_ROWS * N_CHUNKS)), data.draw(st.integers(1, 3))
    rows = np.array(sorted(data.draw(st.lists(st.integers(0, n_used - 1), min_size=1, max_size=12))))
    series = data.draw(st.lists(st.sampled_from(range(n_series)), min_size=1, unique=True))
    values, store = shard(dtype, n_used, n_series), Store(URL)
    store.write("shard", encode(values, codec))
    found = read_shard(store, "shard", cut(dtype, codec, n_used, n_series), ascending(rows), series=series)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[series][:, rows])


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("rows", [[0], [5, 6], [0, 4, 8], range(9)])
def test_what_is_read_is_under_a_checksum(codec: str, rows: list[int]) -> None:
    store, right, wanted = Store(URL), cut("float16", codec, 9, 1), np.array(rows)
    values = shard("float16", 9, 1)
    content = encode(values, codec)
    store.write("shard", content)
    lengths = read_index(store, "shard", right)[0, :, 1]
    n_refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        store.write("shard", bytes(changed))
        try:
            np.testing.assert_array_equal(read_shard(store, "shard", right, wanted), values[:, wanted])
        except CorruptRun:
            n_refused += 1
    # the index, and the chunks that hold a row; the others nobody has looked at
    assert n_refused == right.index_nbytes + sum(lengths[np.unique(wanted // CHUNK_ROWS)])
    for length in (0, 3, len(content) - 1):
        store.write("shard", content[:length])
        with pytest.raises(CorruptRun, match=f"{URL}/shard"):
            read_shard(store, "shard", right, wanted)
    store.delete("shard")
    with pytest.raises(CorruptRun, match="is missing"):
        read_shard(store, "shard", right, wanted)


def test_a_chunk_that_must_be_there_is_no_chunk_of_zeros() -> None:
    values = shard("float32", 12, 1)
    values[:, CHUNK_ROWS : 2 * CHUNK_ROWS] = 0  # which Zarr leaves out
    store, whole = Store(URL), cut("float32", "none", 12, 1)
    store.write("shard", encode(values, "none"))
    np.testing.assert_array_equal(read_shard(store, "shard", whole, np.arange(4)), values[:, :4])
    for rows in ([1, 5], range(12)):
        with pytest.raises(CorruptRun, match="chunks of used rows that are absent: 1 instead of 0"):
            read_shard(store, "shard", whole, np.array(rows))


def test_only_used_rows_and_series_are_read() -> None:
    store, right = Store(URL), cut("float32", "none", 9, 2)
    store.write("shard", encode(shard("float32", 9, 2), "none"))
    for rows, series in (([9], [0]), ([-1, 3], [0]), ([3], [2]), ([3], [-1])):
        with pytest.raises(IndexError):
            read_shard(store, "shard", right, np.array(rows), series=series)
    with pytest.raises(CorruptRun):
        read_shard(store, "shard", replace(right, n_chunks=2), np.array([0]))


@pytest.mark.parametrize("span", [(0, 2**40), (2**63, 8), (0, 2**64 - 1), (5, 84)])
@pytest.mark.parametrize("rows", [[0], range(9)])
def test_an_index_that_leads_astray_is_damage(rows: list[int], span: tuple[int, int]) -> None:
    content = encode(shard("float32", 9, 1), "none")
    right = cut("float32", "none", 9, 1)
    index = np.frombuffer(content[-right.index_nbytes : -4], np.uint64).copy()
    index[:2] = span
    forged = index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    store = Store(URL)
    store.write("shard", content[: -right.index_nbytes] + forged)
    with pytest.raises(CorruptRun, match="is not what was written"):
        read_shard(store, "shard", right, np.array(rows))
