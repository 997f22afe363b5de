"""From filled partitions to stored ones, within a bound of memory: encoder threads behind the model.

A batch *reserves* the bytes of its values before its forward, and an object gives its bytes back once it is
stored. So a slow store slows the model down and never fills the memory, and while one partition is written
the next is filled, as far as the budget reaches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from ..catalog.errors import PlanError
from ..catalog.manifest import Manifest
from ..catalog.sizes import format_nbytes
from ..catalog.stores import Store
from .partition import PartitionBuffer
from .writer import object_keys, write_object

__all__ = ["Pipeline"]

_IN_FLIGHT = 2
"""Partitions that are not finished: one is filled while another is written. What a crash costs."""


class _Writing:
    """A partition whose objects are being written."""

    def __init__(self, buffer: PartitionBuffer, n_objects: int) -> None:
        self.buffer = buffer
        self.n_left = n_objects
        self.records: list[dict[str, Any]] = []
        self.is_abandoned = False


class Pipeline:
    """Writes partitions behind the model.

    Parameters
    ----------
    store : Store
        The lake.
    manifest : Manifest
        The run.
    budget_nbytes : int
        The values that may be in memory, of partitions being filled and being written together.
    n_threads : int
        Encoder threads.
    is_wanted : callable
        Asked before each object whether this writer may still write the partition of that index.
    finish : callable
        Called, in an encoder thread, with a partition whose objects are all stored, and their records.

    Notes
    -----
    What goes wrong in a thread is raised by the next call of :meth:`reserve` or :meth:`write`, or at the end of
    the ``with`` block.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        budget_nbytes: int,
        n_threads: int,
        is_wanted: Callable[[int], bool],
        finish: Callable[[PartitionBuffer, list[dict[str, Any]]], None],
    ) -> None:
        self.waited_s = 0.0
        """Seconds for which the model has waited for the store, the last writes included."""
        self.n_queued = 0
        """Objects that are filled and not stored yet."""
        self.nbytes_written = 0
        self._store, self._manifest = store, manifest
        self._is_wanted, self._finish = is_wanted, finish
        self._budget = budget_nbytes
        self._in_flight = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="encode")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What is complete is worth writing, even if the model has stumbled since; an interrupt is in a hurry.
        began = time.perf_counter()
        self._pool.shutdown(wait=True, cancel_futures=kind is KeyboardInterrupt)
        self.waited_s += time.perf_counter() - began
        if error is None:
            self._raise_failure()

    def begin(self) -> None:
        """Wait until another partition may be begun."""
        self._wait(lambda: self._in_flight < _IN_FLIGHT)
        with self._changed:
            self._in_flight += 1

    def skip(self) -> None:
        """Take back :meth:`begin`: the partition is not needed after all."""
        with self._changed:
            self._in_flight -= 1

    def reserve(self, nbytes: int) -> None:
        """Wait until values of this size may be made.

        Raises
        ------
        PlanError
            They never may: the partition that is being filled takes more than the whole budget.
        """
        self._wait(lambda: self._budget >= nbytes or self._in_flight <= 1)
        with self._changed:
            if self._budget < nbytes:
                raise PlanError(
                    f"A partition needs {format_nbytes(nbytes - self._budget)} more memory than was planned.",
                    hint="Take a larger --max-memory, or a smaller --partition-tokens.",
                )
            self._budget -= nbytes

    def write(self, buffer: PartitionBuffer) -> None:
        """Hand over a filled partition; its memory is given back object by object, as each is stored."""
        self._raise_failure()
        keys = object_keys(self._manifest, buffer.work.sites)
        writing = _Writing(buffer, len(keys))
        with self._changed:
            self.n_queued += len(keys)
        for site, layer in keys:
            self._pool.submit(self._write, writing, site, layer)

    def fail(self, error: BaseException) -> None:
        """Raise this in whoever waits here, now and from now on, and write nothing more."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: is_ready() or self._failure is not None)
        self.waited_s += time.perf_counter() - began
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write(self, writing: _Writing, site: str, layer: int | None) -> None:
        buffer = writing.buffer
        try:
            # another writer may have been given the same partition, and have been faster
            writing.is_abandoned = writing.is_abandoned or not self._is_wanted(buffer.work.index)
            if self._failure is None and not writing.is_abandoned:
                record = write_object(self._store, self._manifest, buffer, site, layer)
                with self._changed:
                    self.nbytes_written += record["nbytes"]
                    writing.records.append(record)
            freed = buffer.release(site, layer)
            with self._changed:
                writing.n_left -= 1
                is_last = not writing.n_left
            if is_last and self._failure is None and not writing.is_abandoned:
                order = {key: i for i, key in enumerate(object_keys(self._manifest, buffer.work.sites))}
                writing.records.sort(key=lambda record: order[record["site"], record["layer"]])
                self._finish(buffer, writing.records)
        except BaseException as error:  # noqa: BLE001  # raised where the model runs
            freed, is_last = 0, False
            self.fail(error)
        with self._changed:
            self.n_queued -= 1
            self._budget += freed
            self._in_flight -= is_last
            self._changed.notify_all()
