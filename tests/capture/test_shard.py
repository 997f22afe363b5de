"""Shards are written by hand and read by Zarr."""

from __future__ import annotations

import zlib
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from layerlake.capture.shard import checksum, crc32_of, encode_shard


def joined(pieces: list[memoryview]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(pieces), dtype=np.uint8)


def read_back(
    shard: np.ndarray[Any, np.dtype[np.uint8]], values: np.ndarray[Any, Any], chunk_rows: int
) -> Any:
    """Put the bytes where Zarr looks for the shard of ``[series, row, value]``, and read the array."""
    objects: dict[str, Any] = {}
    store = MemoryStore(objects)
    array = zarr.create_array(
        store,
        shape=values.shape,
        shards=values.shape,
        chunks=(1, chunk_rows, values.shape[2]),
        dtype=values.dtype,
        compressors=(Crc32cCodec(),),
        fill_value=0,
    )
    objects["c/0/0/0"] = zarr.core.buffer.cpu.Buffer.from_bytes(shard.tobytes())
    return np.asarray(array[...])


@given(
    n_series=st.integers(1, 3),
    n_chunks=st.integers(1, 4),
    chunk_rows=st.integers(1, 5),
    width=st.integers(1, 3),
    dtype=st.sampled_from(["float16", "uint16", "float32"]),
    data=st.data(),
)
def test_zarr_reads_what_was_encoded(
    *, n_series: int, n_chunks: int, chunk_rows: int, width: int, dtype: str, data: st.DataObject
) -> None:
    n_rows = n_chunks * chunk_rows
    n_used = data.draw(st.integers(1, n_rows))
    values = np.arange(n_series * n_rows * width).reshape(n_series, n_rows, width).astype(dtype)
    values[:, n_used:] = 0
    shard = joined(encode_shard(values, chunk_rows=chunk_rows, n_used=n_used))
    np.testing.assert_array_equal(read_back(shard, values, chunk_rows), values)
    written = -(-n_used // chunk_rows) * n_series
    assert len(shard) == written * (values[0, :chunk_rows].nbytes + 4) + n_series * n_chunks * 16 + 4


def test_a_flipped_byte_of_a_chunk_or_of_the_index_is_noticed_by_zarr() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 6, 2)
    shard = joined(encode_shard(values, chunk_rows=3, n_used=6))
    for at in (0, 5, len(shard) - 10):
        flipped = shard.copy()
        flipped[at] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            read_back(flipped, values, 3)


def test_the_checksum_is_crc32c() -> None:
    assert checksum(np.frombuffer(b"123456789", dtype=np.uint8)) == 0xE3069283
    assert google_crc32c.value(b"123456789") == 0xE3069283


def test_the_checksum_of_pieces_is_that_of_the_whole() -> None:
    assert crc32_of([b"123", memoryview(b""), b"456789"]) == zlib.crc32(b"123456789") == 0xCBF43926


def test_without_a_codec_a_shard_is_views_of_the_values() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 6, 2)
    first = encode_shard(values, chunk_rows=3, n_used=6)[0]
    assert np.shares_memory(np.frombuffer(first, dtype=np.uint8), values)
