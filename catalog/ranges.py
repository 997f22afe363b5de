"""Objects of which only some byte ranges are read, by many at a time or as a file."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.utils import merge_offset_ranges

from .retries import http_status

__all__ = ["Ranges", "fetch_pieces", "fetch_tail", "read_merged"]

Pieces = Sequence[tuple[int, int]]
"""Byte ranges, each from a first to before a last."""


def read_merged(ranges: Pieces, read: Callable[[Pieces], Sequence[bytes]]) -> list[memoryview]:
    """Return the bytes of ranges, of which those that touch are read as one.

    Examples
    --------
    >>> read = lambda ranges: print(ranges) or [b"abcdefgh"[start:stop] for start, stop in ranges]
    >>> [bytes(piece) for piece in read_merged([(6, 8), (1, 3), (3, 4)], read)]
    [(1, 4), (6, 8)]
    [b'gh', b'bc', b'd']
    """
    if not ranges:
        return []
    _, starts, stops = merge_offset_ranges([""] * len(ranges), *map(list, zip(*ranges, strict=True)))
    wholes = [memoryview(content) for content in read(list(zip(starts, stops, strict=True)))]
    found = []
    for start, stop in ranges:
        i = bisect_right(starts, start) - 1
        found.append(wholes[i][start - starts[i] : stop - starts[i]])
    return found


def fetch_tail(files: AbstractFileSystem, path: str, nbytes: int) -> bytes:
    """Return the last bytes of a remote object, or all if it has fewer."""
    protocols = {files.protocol} if isinstance(files.protocol, str) else {*files.protocol}
    try:
        if not protocols.isdisjoint(_BY_SUFFIX):
            return bytes(files.cat_file(path, start=-nbytes))
        end = int(files.info(path)["size"])
        return bytes(files.cat_file(path, start=max(0, end - nbytes), end=end)) if end else b""
    except Exception as error:  # noqa: BLE001  # each client has its own; all but one go on
        return _nothing_for(error)


def fetch_pieces(files: AbstractFileSystem, path: str, ranges: Pieces) -> list[bytes]:
    """Return ranges of a remote object's bytes, which are fetched at the same time."""
    found = files.cat_ranges([path] * len(ranges), *map(list, zip(*ranges, strict=True)))
    return [_nothing_for(each) if isinstance(each, BaseException) else each for each in found]


def _nothing_for(error: BaseException) -> bytes:
    """Return what lies in a range beyond an object's end, if that is the error, which HTTP makes of it."""
    if http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return b""
    raise error


_BY_SUFFIX = {"s3", "gs", "memory"}
"""Stores that can be asked for the end of an object of unknown length; Azure cannot."""


class Ranges(io.RawIOBase):
    """A remote object as a file: what is read is fetched, range by range.

    Parameters
    ----------
    fetch : callable
        Returns the bytes from a first to before a last one.
    nbytes : int
        The object's length.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], nbytes: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._nbytes = nbytes
        self._at = 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        content = self._next(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:  # noqa: D102
        return self._next(self._nbytes)  # at once; the inherited one reads by buffers

    def _next(self, nbytes: int) -> bytes:
        first, self._at = self._at, min(self._at + nbytes, self._nbytes)
        return self._fetch(first, self._at) if first < self._at else b""
