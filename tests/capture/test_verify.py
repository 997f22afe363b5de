"""What real captures leave, whole or interrupted, as verify, rm and gc see it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from layerlake.capture import ledgers, worker
from layerlake.capture.execute import capture_run
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.collection import collect_lake
from layerlake.catalog.errors import CaptureInProgress, DamagedLake
from layerlake.catalog.lake import Lake
from layerlake.catalog.removal import remove_run
from layerlake.catalog.stores import Store
from layerlake.catalog.verify import verify_lake
from layerlake.lake import open_lake

MakeSpec = Callable[..., CaptureSpec]


class Crash(BaseException):
    """Nothing may catch it."""


@pytest.fixture(scope="module")
def captured_twice(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with a run that two captures have made, of compressed and plain objects of all kinds, and findings."""
    lake = tmp_path_factory.mktemp("twice") / "lake"
    capture_run(lake, make_spec("llama", max_tokens=150, sites="resid", codec="zstd"))
    capture_run(lake, make_spec("llama", max_tokens=250, sites="resid,pattern,attn_band", codec="zstd"))
    open_lake(lake).analyze("lens", scheduler="synchronous")
    return lake


@pytest.fixture
def lake(captured_twice: Path, tmp_path: Path) -> Path:
    """A copy of that lake, free to be damaged."""
    shutil.copytree(captured_twice, tmp_path / "lake")
    return tmp_path / "lake"


def objects(lake: Path) -> list[str]:
    return sorted(path.relative_to(lake).as_posix() for path in lake.rglob("*") if path.is_file())


def damaged(lake: Path) -> set[str]:
    """The objects that verify names."""
    try:
        verify_lake(Store(lake))
    except DamagedLake as error:
        return {problem.object for problem in error.verification.problems}
    return set()


def test_after_each_capture_the_lake_is_whole(lake: Path) -> None:
    found = verify_lake(Store(lake))
    assert found.notes == ()
    assert found.n_objects == len(objects(lake))
    assert found.nbytes == sum(path.stat().st_size for path in lake.rglob("*") if path.is_file())
    assert len(list(lake.glob("runs/*/log/*"))) == 2


def test_one_changed_byte_anywhere_is_red_and_names_its_object(lake: Path) -> None:
    chance = np.random.default_rng(0)
    for name in objects(lake):
        path = lake / name
        content = path.read_bytes()
        for place in {0, len(content) - 1, int(chance.integers(len(content)))}:
            changed = bytearray(content)
            changed[place] ^= 1 << int(chance.integers(8))
            path.write_bytes(changed)
            assert damaged(lake) == {name}, (name, place)
        path.write_bytes(content)
    assert damaged(lake) == set()


def test_one_missing_object_is_red_and_is_named(lake: Path) -> None:
    nobody_names = {name for name in objects(lake) if name.startswith("findings/lens/")}
    assert nobody_names
    for name in objects(lake):
        content = (lake / name).read_bytes()
        (lake / name).unlink()
        assert damaged(lake) == ({name} - nobody_names), name
        (lake / name).write_bytes(content)


def test_a_removed_run_can_be_captured_again(lake: Path, make_spec: MakeSpec) -> None:
    (run_id,) = Lake(lake).run_ids
    n_tokens = Lake(lake).run().n_tokens
    remove_run(Store(lake), run_id)
    assert Lake(lake).run_ids == []
    assert not [name for name in objects(lake) if name.startswith(("runs", "findings"))]
    run = capture_run(lake, make_spec("llama", max_tokens=250, sites="resid,pattern,attn_band", codec="zstd"))
    assert (run.run_id, run.n_tokens) == (run_id, n_tokens)
    assert damaged(lake) == set()


def interrupt(monkeypatch: pytest.MonkeyPatch, n_ledgers: int, then: Callable[[], object]) -> None:
    """Do something once a capture has written so many ledgers."""
    write_ledger = ledgers.write_ledger
    written = 0

    def counted(*given: object, **options: object) -> None:
        nonlocal written
        write_ledger(*given, **options)  # type: ignore[arg-type]
        written += 1
        if written == n_ledgers:
            then()

    monkeypatch.setattr(worker, "write_ledger", counted)


def die() -> None:
    raise Crash


def test_an_abandoned_extension_is_collected_and_the_run_stays_as_it_was(
    lake: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = objects(lake)
    spec = make_spec("llama", sites="all", codec="zstd")
    with monkeypatch.context() as patch:
        interrupt(patch, 2, die)
        with pytest.raises(Crash):
            capture_run(lake, spec)
    assert damaged(lake) == set()
    assert collect_lake(Store(lake), older_than_s=3600.0).waste == ()
    (waste,) = collect_lake(Store(lake), older_than_s=0.0).waste
    assert waste.kind == "abandoned capture"
    assert objects(lake) == before
    assert damaged(lake) == set()
    run = capture_run(lake, spec)
    assert run.has_site("mlp_post")
    assert damaged(lake) == set()
    assert collect_lake(Store(lake), older_than_s=0.0).waste == ()


def test_of_an_abandoned_first_capture_nothing_is_left(
    tmp_path: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 1, die)
        with pytest.raises(Crash):
            capture_run(tmp_path / "lake", make_spec())
    assert damaged(tmp_path / "lake") == set()
    kinds = [waste.kind for waste in collect_lake(Store(tmp_path / "lake"), older_than_s=0.0).waste]
    assert kinds == ["abandoned capture", "unused model"]
    assert objects(tmp_path / "lake") == ["layerlake.json"]


@pytest.mark.parametrize("how", ["gc", "rm"])
def test_a_capture_whose_run_is_taken_from_it_stops_and_harms_nothing(
    lake: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = Store(lake)
    (run_id,) = Lake(lake).run_ids

    def take() -> None:
        if how == "gc":
            collect_lake(store, older_than_s=-1.0)
        else:
            remove_run(store, run_id, force=True)

    interrupt(monkeypatch, 2, take)
    with pytest.raises(CaptureInProgress):
        capture_run(lake, make_spec("llama", sites="all", codec="zstd"))
    assert Lake(lake).run_ids == ([run_id] if how == "gc" else [])
    collect_lake(store, older_than_s=-1.0)
    assert damaged(lake) == set()
