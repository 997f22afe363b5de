"""Reads that are under way while their forerunners are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, repeat
from typing import TypeVar

__all__ = ["read_ahead"]


T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    read: Callable[[T], R], items: Iterator[T], *, size: Callable[[T], int], most: int, at_once: int
) -> Iterator[R]:
    """Yield ``read(item)`` for each item, in their order, while threads do the reads that come next.

    The first read is alone, and with each result that is taken one more is under way: who stops early, as a
    query with a LIMIT does, has caused at most as many reads again as it took. ``items`` advances in the caller's
    thread, when a read begins.

    Parameters
    ----------
    read : callable
        Is called in threads, for several items at a time. What it raises is raised here, in its turn.
    items : iterator
        What to read; None ends it.
    size : callable
        Bytes that an item and its result take.
    most : int
        No further read begins while the results that are under way, or wait to be taken, come to this.
    at_once : int
        So many reads are under way, at most.

    Examples
    --------
    >>> list(read_ahead(str, iter([3, 1, 2]), size=lambda _: 1, most=2, at_once=8))
    ['3', '1', '2']
    """
    pending: deque[tuple[Future[R], int]] = deque()
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="layerlake-read")
    try:
        for allowed in chain(range(1, at_once), repeat(at_once)):
            while len(pending) < allowed and sum(held for _, held in pending) < most:
                if (item := next(items, None)) is None:
                    break
                pending.append((pool.submit(read, item), size(item)))
            if not pending:
                return
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(
            wait=False, cancel_futures=True
        )  # an interrupted query does not wait for what it no longer needs
