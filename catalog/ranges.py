"""A remote object as a file, of which only what is read is fetched."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

__all__ = ["Ranges"]


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
