"""One store, wherever it lies: every write is whole or absent, and of many creators one wins."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem

from layerlake.catalog.errors import CorruptRun, LakeNotFound, MissingExtra
from layerlake.catalog.stores import Store


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store" if request.param == "folder" else f"memory://{uuid4().hex}/lake")
    yield store
    store.delete("")


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    assert store.read("a/b") == b"two"
    with store.open("a/b") as file:
        assert file.read(2) == b"tw"
    store.write_json("a/c.json", {"b": 1, "a": "ü"})
    assert store.read_json("a/c.json") == {"a": "ü", "b": 1}
    assert store.read("a/c.json").index(b'"a"') < store.read("a/c.json").index(b'"b"')


def test_create_never_replaces(store: Store) -> None:
    store.create("x", b"first")
    with pytest.raises(FileExistsError):
        store.create("x", b"second")
    with pytest.raises(FileExistsError):
        store.write_json("x", {}, create=True)
    assert store.read("x") == b"first"


def test_of_many_creators_exactly_one_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    look = MemoryFileSystem.exists

    def look_and_dawdle(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        found = look(self, path, **options)
        time.sleep(0.001)  # the others look in the meantime
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", look_and_dawdle)
    with ThreadPoolExecutor(8) as pool:
        for name in map(str, range(10)):
            barrier = Barrier(8)

            def create(i: int, name: str = name, barrier: Barrier = barrier) -> bool:
                barrier.wait()
                try:
                    store.create(name, b"%d" % i)
                except FileExistsError:
                    return False
                return True

            won = list(pool.map(create, range(8)))
            assert won.count(True) == 1
            assert store.read(name) == b"%d" % won.index(True)


def test_list_and_walk(store: Store) -> None:
    assert store.list("") == store.list("nothing") == []
    assert list(store.walk()) == []
    for name in ("b", "a/2", "a/1", "a/deep/er"):
        store.write(name, name.encode())
    assert store.list("") == ["a", "b"]
    assert store.list("a") == ["1", "2", "deep"]
    assert store.list("b") in ([], ["b"])
    assert sorted(store.walk()) == [("a/1", 3), ("a/2", 3), ("a/deep/er", 9), ("b", 1)]
    assert sorted(store.walk("a/deep")) == [("a/deep/er", 9)]


def test_a_new_object_is_listed_at_once(store: Store) -> None:
    """Remote file systems cache listings."""
    assert store.list("log") == []
    store.create("log/1", b"")
    assert store.list("log") == ["1"]
    store.create("log/2", b"")
    assert store.list("log") == ["1", "2"]


def test_delete_takes_a_folder_an_object_or_nothing(store: Store) -> None:
    store.write("a/1", b"")
    store.write("a/2", b"")
    store.write("b", b"")
    store.delete("a/1")
    assert store.list("a") == ["2"]
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")
    assert store.exists("b")


def test_what_is_absent_is_said_to_be(store: Store) -> None:
    assert not store.exists("nothing")
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_what_is_not_json_is_corrupt(store: Store) -> None:
    store.write("x.json", b"{")
    with pytest.raises(CorruptRun, match=r"x\.json is not JSON"):
        store.read_json("x.json")


def test_zarr_lies_in_the_store(store: Store) -> None:
    group = zarr.open_group(store.zarr_store("z", read_only=False), mode="w")
    group.create_array("a", data=np.arange(6))
    assert store.exists("z/a/zarr.json")
    found = zarr.open_group(store.zarr_store("z"), mode="r")["a"]
    assert isinstance(found, zarr.Array)
    np.testing.assert_array_equal(np.asarray(found[...]), np.arange(6))
    with pytest.raises(ValueError, match=r"read-only|read only"):
        zarr.open_group(store.zarr_store("z"), mode="r+").create_array("b", data=np.arange(6))


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("a", b"before")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    for owner, name in ((Path, "replace"), (os, "link"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            action = store.create if name == "link" else store.write
            with pytest.raises(OSError, match="disk is full"):
                action("b" if name == "link" else "a", b"after")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    assert store.read("a") == b"before"


def test_half_written_objects_of_a_killed_writer_are_not_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("log/1.json", b"{}")
    (tmp_path / "log" / ".2.json.0123.partial").write_bytes(b"{")
    assert store.list("log") == ["1.json"]
    assert [name for name, _ in store.walk()] == ["log/1.json"]


def test_a_store_is_local_or_not(tmp_path: Path) -> None:
    assert Store(tmp_path).is_local
    assert Store(f"file://{tmp_path}").is_local
    assert Store(f"{tmp_path}/").url == str(tmp_path)
    assert Store(tmp_path).local_path == tmp_path
    assert not Store("memory://x").is_local


def test_a_protocol_without_its_package_or_without_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtra) as caught:
        Store("s3://bucket/lake")
    assert 'pip install "layerlake[s3]"' in caught.value.hint
    with pytest.raises(LakeNotFound, match="nonsense"):
        Store("nonsense://lake")
