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

__all__ = ["checksum", "encode_shard"]

_ABSENT = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not in the shard."""


def checksum(content: npt.NDArray[np.uint8]) -> int:
    """Return the CRC-32C of some bytes."""
    return int(google_crc32c.value(content))


def encode_shard(values: npt.NDArray[Any], *, chunk_rows: int, n_used: int) -> npt.NDArray[np.uint8]:
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

    Notes
    -----
    Layout: the Zarr v3 specification, *sharding codec*: inner codecs bytes (little-endian) and crc32c,
    index at the end, uint64 (offset, length) for each chunk in C order, followed by a crc32c.
    """
    n_series, n_rows, _ = values.shape
    n_chunks = -(-n_used // chunk_rows)
    chunk_nbytes = values[0, :chunk_rows].nbytes
    stride = chunk_nbytes + 4
    index = np.full((n_series, n_rows // chunk_rows, 2), _ABSENT, dtype="<u8")
    shard = np.empty(n_series * n_chunks * stride + index.nbytes + 4, dtype=np.uint8)
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(n_series, -1)
    for series in range(n_series):
        for chunk in range(n_chunks):
            start = (series * n_chunks + chunk) * stride
            content = shard[start : start + chunk_nbytes]
            content[...] = raw[series, chunk * chunk_nbytes : (chunk + 1) * chunk_nbytes]
            _seal(shard, start, start + chunk_nbytes)
            index[series, chunk] = start, stride
    shard[-index.nbytes - 4 : -4] = index.reshape(-1).view(np.uint8)
    _seal(shard, len(shard) - index.nbytes - 4, len(shard) - 4)
    return shard


def _seal(shard: npt.NDArray[np.uint8], start: int, stop: int) -> None:
    """Write the checksum of a stretch right behind it."""
    shard[stop : stop + 4] = np.array([checksum(shard[start:stop])], dtype="<u4").view(np.uint8)
