"""Shards that Zarr itself has written are read by hand, to the last value, and nothing less is taken for whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from layerlake.catalog.arrays import verify_shard
from layerlake.catalog.problem import Deviation
from layerlake.catalog.shards import ShardCut

CHUNK_ROWS, N_CHUNKS, WIDTH = 4, 3, 5
BITS = {"float16": "uint16", "bfloat16": "uint16", "float32": "uint32"}


def encode(values: npt.NDArray[Any], codec: str) -> bytes:
    """Return the bytes of a shard ``[series, row, width]``, through Zarr; it leaves out chunks of zeros."""
    blosc = [] if codec == "none" else [BloscCodec(cname=codec, shuffle="bitshuffle")]  # type: ignore[arg-type]
    store = MemoryStore()
    array = zarr.create_array(
        store,
        shape=values.shape,
        chunks=(1, CHUNK_ROWS, values.shape[2]),
        shards=values.shape,
        dtype=values.dtype,
        compressors=[*blosc, Crc32cCodec()],
        fill_value=0,
    )
    array[...] = values
    return bytes(store._store_dict["c/0/0/0"].to_bytes())  # noqa: SLF001  # the shortest way to an object's bytes


def shard(dtype: str, n_used: int, n_series: int, n_nonfinite: int = 0) -> npt.NDArray[Any]:
    """Return random bits of finite numbers, none of them zero, and so many that are not finite."""
    rng = np.random.default_rng(n_used)
    numbers = rng.uniform(1, 2, (n_series, CHUNK_ROWS * N_CHUNKS, WIDTH)).astype(np.float32)
    used = numbers[:, :n_used].reshape(-1)
    used[:n_nonfinite] = rng.choice([np.inf, -np.inf, np.nan], n_nonfinite)
    numbers[:, :n_used] = used.reshape(n_series, n_used, WIDTH)
    numbers[:, n_used:] = 0
    return (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.astype(dtype)


def cut(dtype: str, codec: str, n_used: int, n_series: int) -> ShardCut:
    return ShardCut(n_series, N_CHUNKS, CHUNK_ROWS, WIDTH, n_used, dtype, codec)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(BITS)), st.sampled_from(["none", "lz4", "zstd"]), st.integers(1, CHUNK_ROWS * N_CHUNKS),
    st.integers(1, 3), st.integers(0, 4),
)  # fmt: skip
def test_what_zarr_writes_is_whole(
    dtype: str, codec: str, n_used: int, n_series: int, n_nonfinite: int
) -> None:
    content = encode(shard(dtype, n_used, n_series, n_nonfinite), codec)
    assert verify_shard(content, cut(dtype, codec, n_used, n_series)) == n_nonfinite


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_a_shard_that_is_cut_otherwise_is_refused(codec: str) -> None:
    values = shard("float32", 7, 2)
    right = cut("float32", codec, 7, 2)
    assert verify_shard(encode(values, codec), right) == 0
    missing, extra, one_too_many = values.copy(), values.copy(), values.copy()
    missing[1, CHUNK_ROWS:] = 0
    extra[0, 2 * CHUNK_ROWS] = 1
    one_too_many[0, 7, 0] = 1
    for wrong, words in (
        (missing, "chunks of each series"),
        (extra, "chunks of each series"),
        (one_too_many, "after"),
    ):
        with pytest.raises(Deviation, match=words):
            verify_shard(encode(wrong, codec), right)
    both = values.copy()
    both[:, 2 * CHUNK_ROWS :] = 1
    for other in (right, replace(right, n_rows=11), replace(right, n_rows=1)):
        with pytest.raises(Deviation):
            verify_shard(encode(both, codec), other)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_every_byte_of_a_shard_is_under_a_checksum(codec: str) -> None:
    content = encode(shard("float16", 9, 1), codec)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        with pytest.raises(Deviation):
            verify_shard(bytes(changed), cut("float16", codec, 9, 1))
    for length in (0, 3, len(content) - 1):
        with pytest.raises(Deviation):
            verify_shard(content[:length], cut("float16", codec, 9, 1))
