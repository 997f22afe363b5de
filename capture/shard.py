"""One shard as bytes: Zarr v3's ``sharding_indexed``, written directly.

Every shard is written once, whole and by one writer, and which of its rows are used is known. Zarr's own way
(read the object, merge, look for chunks of zeros, copy) is seven times slower than laying chunks and index end
to end. The arrays stay ordinary Zarr arrays: Zarr reads what is written here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import reduce
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

__all__ = ["CODECS", "checksum", "crc32_of", "encode_shard", "seal"]

CODECS = {"none": 0, "lz4": 5, "zstd": 3}
"""Blosc's compressor → its level; bits are shuffled first, because floats share exponents and not bytes."""

_ABSENT = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not in the shard."""


def checksum(content: npt.NDArray[np.uint8]) -> int:
    """Return the CRC-32C of some bytes."""
    return int(google_crc32c.value(content))


def crc32_of(pieces: Iterable[bytes | memoryview]) -> int:
    """Return the CRC-32 of pieces laid end to end."""
    return reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces, 0)


def encode_shard(
    values: npt.NDArray[Any], *, chunk_rows: int, n_used: int, codec: str = "none"
) -> list[memoryview]:
    """Return the pieces of a shard, to be laid end to end: its used chunks, then the index, each before its CRC-32C.

    Without a codec the chunks are views of the values: nothing is copied.

    Parameters
    ----------
    values : ndarray
        The whole shard, ``[series, row, value]``, C-contiguous: one series of tokens, or one of pairs a head
        (with one value each).
    chunk_rows : int
        Rows of a chunk.
    n_used : int
        Rows that are used, from the first on; chunks after them are left out.
    codec : str
        One of :data:`CODECS`.

    Notes
    -----
    Layout: the Zarr v3 specification, *sharding codec*: inner codecs bytes (little-endian), blosc if any, and
    crc32c, index at the end, uint64 (offset, length) for each chunk in C order, followed by a crc32c.
    """
    n_series, n_rows, _ = values.shape
    n_chunks = -(-n_used // chunk_rows)
    raw = np.ascontiguousarray(values).reshape(n_series, -1)
    chunk_values = chunk_rows * values.shape[2]
    index = np.full((n_series, n_rows // chunk_rows, 2), _ABSENT, dtype="<u8")
    pieces, start = [], 0
    for series in range(n_series):
        for chunk in range(n_chunks):
            content = raw[series, chunk * chunk_values : (chunk + 1) * chunk_values]
            sealed = seal(_compress(content, codec))
            nbytes = sum(map(len, sealed))
            index[series, chunk] = start, nbytes
            start += nbytes
            pieces += sealed
    return pieces + seal(index.reshape(-1).view(np.uint8))


def _compress(chunk: npt.NDArray[Any], codec: str) -> npt.NDArray[np.uint8]:
    """Return a chunk's bytes, compressed if there is a codec; without one they are not copied."""
    if codec == "none":
        return chunk.view(np.uint8)
    level, name = CODECS[codec], codec.encode()
    compressed = blosc.compress(chunk, name, level, blosc.BITSHUFFLE)
    return np.frombuffer(compressed, dtype=np.uint8)


def seal(content: npt.NDArray[np.uint8]) -> list[memoryview]:
    """Return some bytes and, as another piece, their checksum."""
    return [content.data, memoryview(checksum(content).to_bytes(4, "little"))]
