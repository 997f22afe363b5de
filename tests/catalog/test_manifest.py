"""The manifest log: whole snapshots, created only if absent, the last one the truth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from layerlake.catalog.errors import CorruptRun, FormatError
from layerlake.catalog.layout import FORMAT_VERSION, log_path
from layerlake.catalog.manifest import Manifest, commit_manifest, read_log, read_manifest
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.stores import Store


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def test_a_snapshot_survives_json(run: Run) -> None:
    manifest = run.manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.number == 1
    assert manifest.captures[0]["sites"] == sorted(manifest.sites)


def test_the_newest_snapshot_is_read_and_the_older_stay(run: Run) -> None:
    last = run.manifest
    for number in range(10):
        last = commit_manifest(run.store, dataclasses.replace(last, dataset=str(number)))
    assert last.number == 11
    assert read_manifest(run.store, run.run_id) == last
    names = run.store.list(f"runs/{run.run_id}/log")
    assert names[0] == "00000001.json"
    assert len(names) == 11


def test_no_run_no_manifest(run: Run) -> None:
    assert read_manifest(run.store, "nothing-00000000") is None


def test_the_second_to_commit_is_told(run: Run) -> None:
    commit_manifest(run.store, run.manifest)
    before = run.store.read(f"runs/{run.run_id}/log/00000002.json")
    with pytest.raises(FileExistsError):
        commit_manifest(run.store, dataclasses.replace(run.manifest, dataset="late"))
    assert run.store.read(f"runs/{run.run_id}/log/00000002.json") == before


@pytest.mark.parametrize("url", ["folder", "memory://manifest-race"])
def test_of_many_that_commit_at_once_one_wins(run: Run, tmp_path: Path, url: str) -> None:
    store = Store(url if "://" in url else tmp_path / url)
    barrier = Barrier(8)

    def commit(i: int) -> bool:
        barrier.wait()
        try:
            commit_manifest(store, dataclasses.replace(run.manifest, dataset=str(i)))
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(commit, range(8)))
    found = read_manifest(store, run.run_id)
    assert won.count(True) == 1
    assert found is not None
    assert found.dataset == str(won.index(True))
    store.delete("")


@pytest.mark.parametrize(
    ("version", "mend"),
    [
        (FORMAT_VERSION + 1, "Upgrade"),
        (None, "Upgrade"),
        ("1", "Upgrade"),
        (FORMAT_VERSION - 1, "capture it again"),
    ],
)
def test_another_format_is_refused(run: Run, version: object, mend: str) -> None:
    value = run.manifest.to_json() | {"format_version": version}
    with pytest.raises(FormatError, match=str(version)) as caught:
        Manifest.from_json(value)
    assert mend in caught.value.hint


@pytest.mark.parametrize("value", [[], 3, None, "manifest"])
def test_what_is_no_manifest_is_a_damage(run: Run, value: object) -> None:
    run.store.write(log_path(run.run_id, 1), json.dumps(value).encode())
    with pytest.raises(CorruptRun, match=r"log/00000001\.json"):
        read_manifest(run.store, run.run_id)
    with pytest.raises(CorruptRun, match=r"log/00000001\.json"):
        read_log(run.store, run.run_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": {}},
        {"shape": 3},
        {"geometry": []},
        {"geometry": {"context": 3}},
        {"partitions": 3},
        {"partitions": [{"index": 0}]},
        {"sites": []},
        {"sites": {"resid": 3}},
        {"parts": None},
        {"captures": ["abc"]},
    ],
)
def test_a_field_of_another_kind_is_a_damage(run: Run, fields: dict[str, object]) -> None:
    with pytest.raises(CorruptRun, match="manifest"):
        Manifest.from_json(run.manifest.to_json() | fields)


def test_a_missing_field_is_named(run: Run) -> None:
    value = run.manifest.to_json()
    del value["geometry"]
    with pytest.raises(CorruptRun, match="geometry"):
        Manifest.from_json(value)


def test_what_a_later_version_adds_to_a_shape_is_ignored(run: Run) -> None:
    assert ModelShape.from_json(run.shape.to_json() | {"n_experts": 8}) == run.shape
