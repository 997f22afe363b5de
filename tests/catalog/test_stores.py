"""One store, wherever it lies: every write is whole or absent, and of many creators one wins."""

from __future__ import annotations

import errno
import io
import os
import pickle
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as known_protocols

from layerlake.catalog.errors import CorruptRun, LakeNotFound, MissingExtra, StoreError
from layerlake.catalog.lake import create_lake
from layerlake.catalog.stores import Store


@pytest.fixture(params=["folder", "memory", "flaky", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind; what is promised of one is promised of all."""
    if request.param == "folder":
        url = str(tmp_path / "store")
    elif request.param == "s3":
        url = request.getfixturevalue("s3_url") + "/some/lake"
    else:
        if request.param == "flaky":
            request.getfixturevalue("flaky")
        url = f"{request.param}://{uuid4().hex}/lake"
    store = Store(url)
    yield store
    store.delete("")
    assert list(store.walk()) == []


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    assert store.read("a/b") == b"two"
    with store.open("a/b") as file:
        assert file.read(2) == b"tw"
    store.write_json("a/c.json", {"b": 1, "a": "ü"})
    assert store.read_json("a/c.json") == {"a": "ü", "b": 1}
    assert store.read("a/c.json").index(b'"a"') < store.read("a/c.json").index(b'"b"')


def test_parts_of_an_object_are_read(store: Store) -> None:
    store.write("a/b", b"0123456789")
    assert [store.read_tail("a/b", n) for n in (1, 4, 10, 11)] == [
        b"9",
        b"6789",
        b"0123456789",
        b"0123456789",
    ]
    assert store.read_ranges("a/b", [(7, 9), (0, 2), (2, 4), (8, 20), (10, 12), (20, 22)]) == [
        b"78", b"01", b"23", b"89", b"", b""
    ]  # fmt: skip
    assert store.read_ranges("a/b", []) == []
    store.write("empty", b"")
    assert store.read_tail("empty", 4) == b""
    assert store.read_ranges("empty", [(0, 4)]) == [b""]
    for read in (lambda: store.read_tail("nothing", 1), lambda: store.read_ranges("nothing", [(0, 1)])):
        with pytest.raises(FileNotFoundError):
            read()


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


def test_zarr_reads_from_the_store(store: Store) -> None:
    made = zarr.storage.MemoryStore()
    zarr.create_group(made, zarr_format=3)
    zarr.create_array(made, name="a", data=np.arange(600), chunks=(50,), shards=(200,), fill_value=0)
    for name, content in made._store_dict.items():  # noqa: SLF001
        store.write(f"z/{name}", content.to_bytes())
    for opened in (store.zarr_store("z"), pickle.loads(pickle.dumps(store.zarr_store("z")))):  # noqa: S301
        array = zarr.open_array(opened, path="a", mode="r")
        np.testing.assert_array_equal(np.asarray(array[...]), np.arange(600))
        np.testing.assert_array_equal(np.asarray(array[130:290]), np.arange(130, 290))
        assert list(zarr.open_group(opened, mode="r", zarr_format=3)) == ["a"]
    with pytest.raises(ValueError, match=r"read-only|read only"):
        zarr.create_array(store.zarr_store("z"), name="b", data=np.arange(6))


def test_an_opened_object_is_a_file(store: Store) -> None:
    table = pa.table({"x": np.arange(50_000), "y": np.random.default_rng(0).random(50_000)})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=10_000)
    store.write("part.parquet", sink.getvalue())
    with store.open("part.parquet") as file:
        assert pq.read_metadata(file).num_row_groups == 5
        assert pq.ParquetFile(file).read_row_group(3) == table.slice(30_000, 10_000)
        assert pq.read_table(file) == table
    with store.open("part.parquet") as file:
        assert file.read() == sink.getvalue()
        assert file.read(1) == b""
        assert file.seek(-4, os.SEEK_END) == len(sink.getvalue()) - 4
        assert file.read(100) == b"PAR1"
    with pytest.raises(FileNotFoundError):
        store.open("nothing")


def test_delete_all_takes_what_is_there(store: Store) -> None:
    names = [f"a/{i % 7}/{i}" for i in range(30)]
    for name in (*names, "a/0/kept", "b/*", "b/kept"):
        store.write(name, b"")
    store.delete_all([*names, "a/never/was", "b/*"])
    assert [name for name, _ in store.walk()] == ["a/0/kept", "b/kept"]
    assert store.list("a") == ["0"]
    store.delete_all([])


def test_delete_all_stops_when_it_is_told_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerlake.catalog.stores._BULK", 4)
    names = [f"a/{i:02d}" for i in range(11)]
    for name in names:
        store.write(name, b"")
    answers = iter([True, True, False])
    assert store.delete_all(names, go_on=lambda: next(answers, False)) == 8
    assert [name for name, _ in store.walk()] == names[8:]
    assert store.delete_all([*names, names[0]]) == 11
    assert list(store.walk()) == []


@pytest.mark.parametrize("is_mine", [True, False], ids=["still mine", "somebody else's by now"])
def test_what_a_bulk_deletion_has_left_is_deleted_again(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, *, is_mine: bool
) -> None:
    store = Store(f"{s3_url}/lake")
    for name in ("a/1", "a/2", "b/3"):
        store.write(name, b"")
    delete, n_deletions = store._fs.rm, 0  # noqa: SLF001

    def forgetful(paths: list[str]) -> Any:
        nonlocal n_deletions
        n_deletions += 1
        return delete(paths[1:] if n_deletions == 1 else paths)

    monkeypatch.setattr(store._fs, "rm", forgetful)  # noqa: SLF001
    assert store.delete_all(["a/1", "a/2", "b/3"], go_on=lambda: is_mine or n_deletions == 0) == 2 + is_mine
    assert [name for name, _ in store.walk()] == [] if is_mine else ["a/1"]


def test_scan_says_when_an_object_was_written(store: Store) -> None:
    before = time.time()
    store.write("a/b", b"xyz")
    (found,) = store.scan("a")
    assert (found.name, found.nbytes) == ("a/b", 3)
    assert before - 2 < found.modified < time.time() + 2  # S3 counts in seconds


def test_who_deletes_and_lists_at_the_same_time_does_no_harm(store: Store) -> None:
    names = [f"run/{i % 3}/{i}" for i in range(24)]
    for name in names:
        store.write(name, b"x")

    def act(i: int) -> list[str]:
        if i % 2:
            return [name for name, _ in store.walk("run")]
        store.delete("run") if i % 4 else store.delete_all(names)
        return []

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(act, range(8)))
    assert {name for found in seen for name in found} <= set(names)
    assert list(store.walk("run")) == []


def test_others_are_seen_at_once(store: Store) -> None:
    """A file system that remembers listings would answer from them."""
    other = Store(store.url)
    assert other.list("log") == []
    assert not other.exists("log/1")
    store.write("log/1", b"x")
    assert other.list("log") == ["1"]
    assert other.exists("log/1")
    store.delete("log/1")
    assert not other.exists("log/1")
    assert list(other.walk("log")) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("a", b"before")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((Path, "replace"), (os, "link"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            action = store.create if name == "link" else store.write
            with pytest.raises(StoreError, match=r"/[ab] could not be written: the disk is full") as caught:
                action("b" if name == "link" else "a", b"after")
            assert "Make room" in caught.value.hint
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


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://bucket/lake", "s3fs", "s3"),
        ("gs://bucket/lake", "gcsfs", "gs"),
        ("gcs://bucket/lake", "gcsfs", "gs"),
        ("az://container/lake", "adlfs", "az"),
        ("abfs://container/lake", "adlfs", "az"),
    ],
)
def test_a_protocol_without_its_package(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(known_protocols, url.partition("://")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as caught:
        Store(url)
    assert f'pip install "layerlake[{extra}]"' in caught.value.hint


def test_a_protocol_without_meaning() -> None:
    with pytest.raises(LakeNotFound, match="nonsense"):
        Store("nonsense://lake")


@pytest.mark.parametrize("url", ["", "s3://", "s3:///lake", "gs://", "memory://", "memory:///", "file://"])
def test_a_url_without_a_place(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable in a script; none of them is the root folder, or a folder named s3:."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LakeNotFound, match="names no place"):
        Store(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["/", "file:///"])
def test_the_root_folder(url: str) -> None:
    assert Store(url).local_path == Path("/")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//x", "a/./x", "a/..", "x/"])
def test_no_name_leads_out_of_a_store(store: Store, name: str) -> None:
    """Names are made of what manifests and reservations say."""
    store.write("x", b"kept")
    inner = Store(f"{store.url}/a")
    inner.write("b", b"kept")
    for act in (
        inner.read,
        inner.open,
        inner.read_json,
        inner.exists,
        inner.list,
        inner.delete,
        inner.zarr_store,
        lambda name: inner.delete_all([name]),
        lambda name: inner.write(name, b""),
        lambda name: inner.create(name, b""),
        lambda name: list(inner.walk(name)),
        lambda name: list(inner.scan(name)),
    ):
        with pytest.raises(CorruptRun, match="no name of an object"):
            act(name)
    assert [found for found, _ in store.walk()] == ["a/b", "x"]


def test_a_damaged_zarr_node_is_corrupt(store: Store) -> None:
    store.write_json("zarr.json", {"node_type": "array", "shape": [4], "attributes": {}})
    assert store.read_json("zarr.json") == {"node_type": "array", "shape": [4], "attributes": {}}
    store.write("zarr.json", store.read("zarr.json").replace(b"4", b"5", 1))
    with pytest.raises(CorruptRun, match="checksum does not fit"):
        store.read_json("zarr.json")


@pytest.mark.parametrize("is_link", [True, False], ids=["dangling link", "file"])
@pytest.mark.parametrize("below", ["", "/lake"])
def test_a_lake_inside_what_is_no_folder(tmp_path: Path, below: str, *, is_link: bool) -> None:
    place = tmp_path / "place"
    place.symlink_to(tmp_path / "nothing") if is_link else place.write_bytes(b"mine")
    store = Store(f"{place}{below}")
    for act in (
        store.check_creatable,
        lambda: store.write("a/b", b""),
        lambda: store.create("layerlake.json", b""),
    ):
        with pytest.raises(StoreError, match=f"'{place}' is a {'link to nothing' if is_link else 'file'}"):
            act()
    with pytest.raises((StoreError, LakeNotFound), match=str(place)):
        create_lake(store.url)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / "new" / "lake").check_creatable()
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(StoreError, match=f"no access to '{tmp_path}'"):
        Store(tmp_path / "new" / "lake").check_creatable()
