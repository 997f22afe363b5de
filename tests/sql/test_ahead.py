"""Reading ahead: in order, at most so much, and nothing that nobody has asked for."""

from __future__ import annotations

import threading
import time

import pytest

from layerlake.sql.ahead import read_ahead


def one(_: int) -> int:
    return 1


def test_results_come_in_the_order_of_the_items() -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (item * 7 % 3))
        return -item

    found = read_ahead(read, iter(range(1, 60)), size=one, most=100, at_once=8)
    assert list(found) == [-item for item in range(1, 60)]
    assert list(read_ahead(read, iter([]), size=one, most=100, at_once=8)) == []


def test_who_stops_early_has_begun_little() -> None:
    begun: list[int] = []
    found = read_ahead(begun.append, iter(range(1, 60)), size=one, most=100, at_once=8)
    for taken in range(1, 4):
        next(found)
        assert len(begun) <= 2 * taken - 1
    n_begun = len(begun)
    found.close()  # type: ignore[attr-defined]  # a generator
    time.sleep(0.05)
    assert len(begun) <= max(n_begun, 5)


@pytest.mark.parametrize(("most", "at_once", "bound"), [(100, 3, 3), (25, 8, 3), (1, 8, 1)])
def test_so_much_is_under_way_and_no_more(most: int, at_once: int, bound: int) -> None:
    busy, peak, lock = 0, 0, threading.Lock()

    def read(item: int) -> int:
        nonlocal busy, peak
        with lock:
            busy += 1
            peak = max(peak, busy)
        time.sleep(0.01)
        with lock:
            busy -= 1
        return item

    found = read_ahead(read, iter(range(1, 30)), size=lambda _: 10, most=most, at_once=at_once)
    assert list(found) == list(range(1, 30))
    assert peak == bound


def test_an_error_comes_in_its_turn() -> None:
    def read(item: int) -> int:
        if item == 3:
            raise ValueError("no three")
        return item

    found = read_ahead(read, iter(range(1, 9)), size=one, most=100, at_once=8)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="no three"):
        next(found)


def test_an_error_does_not_wait_for_the_others() -> None:
    release = threading.Event()
    finished: list[int] = []

    def read(item: int) -> int:
        if item == 2:
            raise ValueError("no two")
        if item > 2:
            release.wait(20)
            finished.append(item)
        return item

    found = read_ahead(read, iter(range(1, 9)), size=one, most=100, at_once=8)
    assert next(found) == 1
    with pytest.raises(ValueError, match="no two"):
        next(found)
    assert not finished
    release.set()
