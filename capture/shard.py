"""One shard as bytes: Zarr v3's ``sharding_indexed``, written directly.

Every shard is written once, whole and by one writer, and which of its rows are used is known. Zarr's own way
(read the object, merge, look for chunks of zeros, copy) is seven times slower than laying chunks and index end
to end. The arrays stay ordinary Zarr arrays: Zarr reads what is written here.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

__all__ = ["CODECS", "checksum", "encode_shard", "seal"]

CODECS = {"none": 0, "lz4": 5, "zstd": 3}
"""Blosc's compressor → its level; bits are shuffled first, because floats share exponents and not bytes."""

_ABSENT = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not in the shard."""


def checksum(content: npt.NDArray[np.uint8]) -> int:
    """Return the CRC-32C of some bytes."""
    return int(google_crc32c.value(content))


def encode_shard(
    values: npt.NDArray[Any], *, chunk_rows: int, n_used: int, codec: str = "none"
) -> npt.NDArray[np.uint8]:
    """Return the bytes of a shard: its used chunks, each with its CRC-32C, then the index with its own.

    Copies the used values once.

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
    chunks = [
        _compress(raw[series, chunk * chunk_values : (chunk + 1) * chunk_values], codec)
        for series in range(n_series)
        for chunk in range(n_chunks)
    ]
    index = np.full((n_series, n_rows // chunk_rows, 2), _ABSENT, dtype="<u8")
    shard = np.empty(sum(len(chunk) + 4 for chunk in chunks) + index.nbytes + 4, dtype=np.uint8)
    start = 0
    for number, chunk in enumerate(chunks):
        stop = start + len(chunk)
        shard[start:stop] = chunk
        seal(shard, start, stop)
        index[divmod(number, n_chunks)] = start, stop + 4 - start
        start = stop + 4
    shard[-index.nbytes - 4 : -4] = index.reshape(-1).view(np.uint8)
    seal(shard, len(shard) - index.nbytes - 4, len(shard) - 4)
    return shard


def _compress(chunk: npt.NDArray[Any], codec: str) -> npt.NDArray[np.uint8]:
    """Return a chunk's bytes, compressed if there is a codec; without one they are not copied."""
    if codec == "none":
        return chunk.view(np.uint8)
    level, name = CODECS[codec], codec.encode()
    compressed = blosc.compress(chunk, name, level, blosc.BITSHUFFLE)
    return np.frombuffer(compressed, dtype=np.uint8)


def seal(shard: npt.NDArray[np.uint8], start: int, stop: int) -> None:
    """Write the checksum of a stretch right behind it."""
    shard[stop : stop + 4] = np.array([checksum(shard[start:stop])], dtype="<u4").view(np.uint8)
