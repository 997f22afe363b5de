"""How much a store is asked: a request costs money, and some 30 ms."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from tests.conftest import build_run

from layerlake.catalog.findings import Finding, FindingKey, write_finding
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.run import Run
from layerlake.catalog.stores import Store


def test_each_operation_asks_once(counting: type[Any]) -> None:
    store = Store("counting://lake")
    store.write("a", b"x")
    store.create("b", b"y")
    store.read("a")
    store.exists("a")
    store.list("")
    list(store.walk())
    assert counting.calls == {"pipe_file": 2, "cat_file": 1, "info": 1, "ls": 1, "find": 1}


def test_deleting_many_lists_once(counting: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerlake.catalog.stores._BULK", 10)
    store = Store("counting://lake")
    names = [f"a/{i}" for i in range(100)]
    for name in names:
        store.write(name, b"")
    counting.calls.clear()
    store.delete_all(names, go_on=lambda: True)
    assert counting.calls == {"rm_file": 100, "find": 1}


def test_an_object_whose_length_is_known_is_not_looked_up(counting: type[Any]) -> None:
    store = Store("counting://lake")
    store.write("a", b"0123456789")
    counting.calls.clear()
    with store.open("a", nbytes=10) as file:
        assert (file.read(), counting.calls) == (b"0123456789", {"cat_file": 1})
    with store.open("b", nbytes=10) as file, pytest.raises(FileNotFoundError):
        file.read()


def test_what_a_lake_holds_is_asked_once_each(counting: type[Any]) -> None:
    lake, n = Lake(create_lake("counting://lake").url), 7
    for i in range(n):
        run = build_run("counting://lake", name=f"run{i}", lengths=(3,), sites=("resid",))
        write_finding(run.store, finding(run))
    counting.calls.clear()
    assert len(lake.runs()) == n
    assert counting.calls == {"ls": 1 + 2 * n, "cat_file": n}
    counting.calls.clear()
    assert len(lake.findings()) == n
    assert counting.calls == {"find": 1, "cat_file": n}


def finding(run: Run) -> Finding:
    key = FindingKey("norms", 1, run.run_id, {}, {"resid": run.extent("resid")})
    return Finding("norms", {"norms": pa.table({"run": [run.run_id]})}, (key,))
