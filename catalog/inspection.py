"""An inspection reads objects of a lake, one after the other, and gathers what is wrong with them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any, TypeVar

import pyarrow.parquet as pq

from .errors import DECODING_ERRORS, CorruptRun, FormatError, LayerLakeError, StoreError
from .problem import Deviation, Problem
from .seal import is_intact
from .stores import Store

__all__ = ["Inspection", "open_sealed_parquet", "read_sealed_json"]

T = TypeVar("T")

_N_THREADS = 4
"""Objects that are read at once: hides the way to a remote store. As many of them are in memory."""


class Inspection:
    """What has been read so far, and what was wrong with it.

    Attributes
    ----------
    problems : list of Problem
        One for each object that is damaged or missing.
    notes : list of str
        What is worth saying and no damage.
    n_objects, nbytes : int
        Objects read, and their bytes.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.n_objects = 0
        self.nbytes = 0
        self._counting = threading.Lock()

    def examine(self, name: str, read: Callable[[bytes], T], *, is_optional: bool = False) -> T | None:
        """Read an object, and return what ``read`` makes of it; None where it is damaged or missing.

        Parameters
        ----------
        name : str
            The object.
        read : callable
            Takes its bytes; raises Deviation, or anything that its bytes make a reader raise.
        is_optional : bool
            Its absence is no problem: it was listed, and may have gone since.
        """
        try:
            content = self.store.read(name)
        except (FileNotFoundError, IsADirectoryError):
            if not is_optional:
                self.miss(name)
            return None
        except (CorruptRun, StoreError) as error:  # its name leads out of the lake, or it cannot be read
            self.report(name, Deviation("object", "readable", error))
            return None
        with self._counting:
            self.n_objects += 1
            self.nbytes += len(content)
        try:
            return read(content)
        except Deviation as deviation:
            self.report(name, deviation)
        except FormatError:  # not damaged: newer than this reader
            raise
        except (LayerLakeError, *DECODING_ERRORS) as error:
            self.report(
                name, Deviation("content", "what layerlake writes", f"{type(error).__name__}: {error}")
            )
        return None

    def examine_all(self, objects: Iterable[tuple[str, Callable[[bytes], T]]]) -> list[T | None]:
        """Examine many objects, some at once; each is let go as soon as it is read."""
        with ThreadPoolExecutor(_N_THREADS) as pool:
            return list(pool.map(lambda item: self.examine(*item), objects))

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Report what deviates inside the block as a problem of an object that was read before."""
        try:
            yield
        except Deviation as deviation:
            self.report(name, deviation)

    def report(self, name: str, deviation: Deviation) -> None:
        """Note that an object deviates."""
        self.problems.append(Problem(name, deviation.what, deviation.expected, deviation.found))

    def miss(self, name: str, what: str = "object") -> None:
        """Note that an object is missing."""
        self.report(name, Deviation(what, "there", "missing"))


def read_sealed_json(content: bytes) -> dict[str, Any]:
    """Return a JSON object, seal included.

    Raises
    ------
    Deviation
        The seal is broken.
    """
    _require_seal(content)
    value = json.loads(content)
    if not isinstance(value, dict):
        raise Deviation("JSON", "an object", value)
    return value


def open_sealed_parquet(content: bytes) -> pq.ParquetFile:
    """Open the bytes of a Parquet file.

    Raises
    ------
    Deviation
        The seal is broken.
    """
    _require_seal(content)
    return pq.ParquetFile(BytesIO(content))


def _require_seal(content: bytes) -> None:
    if not is_intact(content):
        raise Deviation("seal", "whole", "broken")
