"""gc: what nothing needs goes, and nothing that a snapshot names or an open capture has written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.catalog.wreckage import (
    DAY_S,
    Crash,
    add_finding,
    age,
    begin_capture,
    collect,
    crash_after,
    names,
    second_snapshot,
)

from layerlake.catalog.collection import Collection, collect_lake
from layerlake.catalog.errors import StoreError
from layerlake.catalog.files import delete_files
from layerlake.catalog.lake import Lake
from layerlake.catalog.layout import log_path, model_path, part_path, run_path, wip_path
from layerlake.catalog.removal import remove_run
from layerlake.catalog.reservation import (
    COLLECTING,
    REMOVING,
    new_remover,
    remover,
    reservation_path,
    reserve_run,
    reserved_by,
    take_over_run,
)
from layerlake.catalog.run import Run
from layerlake.catalog.stores import Store, Stored
from layerlake.catalog.verify import verify_lake

MakeRun = Callable[..., Run]


def test_a_lake_without_waste_stays_as_it_is(any_run: Run) -> None:
    add_finding(any_run)
    before = names(any_run.store)
    assert collect(any_run.store) == Collection((), ())
    assert collect(any_run.store, 0.0) == Collection((), ())
    assert names(any_run.store) == before


def test_an_abandoned_capture_goes_and_the_run_stays(run: Run) -> None:
    store, before = run.store, names(run.store)
    added = begin_capture(run)
    done = collect(store)
    assert done.waste == ()
    assert "abc" in done.notes[0]
    age(store, added - {f"{wip_path(run.run_id, 'abc')}/attempts/00000009-0.json"})
    assert collect(store).waste == ()  # it has begun another attempt since
    age(store, added)
    (waste,) = collect(store).waste
    assert (waste.kind, waste.where) == ("abandoned capture", run.run_id)
    assert {stored.name for stored in waste.objects} == added
    assert waste.nbytes > 0
    assert names(store) == before
    assert reserve_run(store, run.run_id, "next") == "next"


def test_of_an_abandoned_first_capture_nothing_is_left(run: Run) -> None:
    added = begin_capture(run, number=0)
    run.store.delete(log_path(run.run_id, 1))
    for part in run.manifest.parts["objects"]:
        run.store.delete(part_path(run.run_id, "objects", part))
    assert added <= names(run.store)
    done = collect(run.store, 0.0)
    assert [waste.kind for waste in done.waste] == ["abandoned capture", "unused model"]
    assert names(run.store) == {"layerlake.json"}


def test_an_abandoned_capture_may_be_collected_in_several_attempts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops: a ledger never outlives an object that it records."""
    n_objects = 0
    while True:
        url = f"memory://{tmp_path}/{n_objects}"
        run = make_run(url, lengths=(5, 9), sites=("resid", "attn_band"))
        before = names(run.store)
        added = begin_capture(run)
        try:
            with monkeypatch.context() as patch:
                crash_after(patch, n_objects)
                collect_lake(run.store, older_than_s=0.0)
            break
        except Crash:
            pass
        left = names(run.store)
        assert before <= left
        if any("/ledgers/" in name for name in left):
            assert {name for name in added if "/wip/" not in name} <= left
        verify_lake(run.store)
        collect(run.store, 0.0)
        assert names(run.store) == before
        n_objects += 1
    assert n_objects == len(added)


def test_a_capture_that_goes_on_is_given_its_run_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    added = begin_capture(run)
    age(run.store, added)

    reservation = run.store.read(reservation_path(run.run_id))

    def take_over(store: Store, run_id: str, holder: str, **options: Any) -> bool:
        monkeypatch.undo()
        store.write_json(f"{wip_path(run_id, 'abc')}/attempts/00000009-1.json", {})
        return take_over_run(store, run_id, holder, **options)

    monkeypatch.setattr("layerlake.catalog.collection.take_over_run", take_over)
    assert collect_lake(run.store, older_than_s=DAY_S).waste == ()
    assert run.store.read(reservation_path(run.run_id)) == reservation
    assert added <= names(run.store)


def test_a_capture_that_comes_in_between_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = f"{run_path(run.run_id)}/activations.zarr/resid/c/0/9/0"
    run.store.write(orphan, b"orphan")

    def reserve(store: Store, run_id: str, holder: str) -> str:
        take_over_run(store, run_id, "abc")
        return reserve_run(store, run_id, holder)

    monkeypatch.setattr("layerlake.catalog.collection.reserve_run", reserve)
    assert collect_lake(run.store, older_than_s=0.0).waste == ()
    assert reserved_by(run.store, run.run_id) == "abc"
    assert orphan in names(run.store)


def test_objects_that_no_snapshot_names_go_and_those_of_older_ones_stay(any_run: Run) -> None:
    store, folder = any_run.store, run_path(any_run.run_id)
    second_snapshot(any_run)
    before = names(store)
    orphans = {
        f"{folder}/activations.zarr/resid/c/0/9/0",
        f"{folder}/activations.zarr/resid_mid/zarr.json",
        f"{folder}/attn_band/part-00000009.parquet",
        f"{folder}/tokens/part-lost.parquet",
        f"{folder}/wip/gone/plan.json",
    }
    for name in orphans:
        store.write(name, b"orphan")
    store.write(f"{folder}/notes.txt", b"somebody's own")
    (waste,) = collect(store).waste
    assert (waste.kind, {stored.name for stored in waste.objects}) == ("unnamed objects", orphans)
    assert waste.nbytes == 6 * len(orphans)
    assert names(store) == before | {f"{folder}/notes.txt"}
    assert reserved_by(store, any_run.run_id) is None


@pytest.mark.parametrize("holder", [COLLECTING, REMOVING, "committed"])
def test_who_had_only_to_clear_up_is_taken_for_interrupted_after_ten_minutes(run: Run, holder: str) -> None:
    store, run_id = run.store, run.run_id
    (entry,) = run.manifest.captures
    take_over_run(store, run_id, entry["capture_id"] if holder == "committed" else new_remover(holder))
    assert collect(store).waste == ()
    assert reserved_by(store, run_id) is not None
    age(store, [reservation_path(run_id)], 601)
    kinds = [waste.kind for waste in collect_lake(store, older_than_s=DAY_S).waste]
    assert kinds == (["interrupted removal"] if holder == REMOVING else [])
    assert reserved_by(store, run_id) is None


@pytest.mark.parametrize("holder", [COLLECTING, "committed"])
def test_what_another_writes_in_between_is_left_alone(
    run: Run, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder lets go, and a capture begins, at the worst moment that there is."""
    store, run_id = run.store, run.run_id
    (entry,) = run.manifest.captures
    take_over_run(store, run_id, entry["capture_id"] if holder == "committed" else new_remover(holder))
    age(store, [reservation_path(run_id)])
    added: set[str] = set()

    def write_json(self: Store, name: str, value: Any, **options: Any) -> None:
        monkeypatch.undo()
        store.delete(reservation_path(run_id))
        added.update(begin_capture(run, "def"))
        self.write_json(name, value, **options)

    monkeypatch.setattr(Store, "write_json", write_json)
    assert collect_lake(store, older_than_s=DAY_S).waste == ()
    assert added - {reservation_path(run_id)} <= names(store)


def test_of_two_collections_the_first_stops_and_does_not_release(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = run.store, run.run_id
    added = begin_capture(run)
    age(store, added)
    monkeypatch.setattr("layerlake.catalog.stores._BULK", 1)
    deleted = []

    def second_comes(paths: Iterable[Path], *, below: Path) -> None:
        delete_files(paths, below=below)
        deleted.append(paths)
        if len(deleted) == 3:
            take_over_run(store, run_id, "gc-of-another")

    monkeypatch.setattr("layerlake.catalog.stores.delete_files", second_comes)
    done = collect_lake(store, older_than_s=DAY_S)
    assert [len(waste.objects) for waste in done.waste] == [3]  # no more than what went
    assert len(added & names(store)) == len(added) - 3
    assert "taken over" in done.notes[0]
    assert reserved_by(store, run_id) == "gc-of-another"


@pytest.mark.parametrize("error", [KeyboardInterrupt, StoreError])
def test_a_collection_that_fails_gives_the_run_back_unless_something_is_gone(
    run: Run, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = run.store, run.run_id
    added = begin_capture(run)
    age(store, added)
    reservation = store.read(reservation_path(run_id))
    n_scans = 0
    scan = Store.scan

    def fail_once_it_is_taken(self: Store, name: str = "") -> Iterator[Stored]:
        nonlocal n_scans
        n_scans += name == run_path(run_id)
        if n_scans == 2:
            raise error("no")
        return scan(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "scan", fail_once_it_is_taken)
        with pytest.raises(error):
            collect_lake(store, older_than_s=DAY_S)
    assert store.read(reservation_path(run_id)) == reservation
    assert added <= names(store)
    age(store, [reservation_path(run_id)])
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            collect_lake(store, older_than_s=DAY_S)
    assert remover(reserved_by(store, run_id)) == COLLECTING


def test_a_damaged_run_is_left_alone(run: Run) -> None:
    orphan = f"{run_path(run.run_id)}/activations.zarr/resid/c/0/9/0"
    run.store.write(orphan, b"orphan")
    before = names(run.store)
    for damaged in (b"{", None):
        run.store.delete(log_path(run.run_id, 1))
        if damaged is not None:
            run.store.write(log_path(run.run_id, 1), damaged)
        done = collect_lake(run.store, older_than_s=0.0)
        assert "left alone" in done.notes[0]
        assert before <= names(run.store) | {log_path(run.run_id, 1)}


def test_a_model_goes_once_no_run_names_it_and_it_is_old(run: Run, make_run: MakeRun) -> None:
    store = run.store
    other = make_run(name="other")
    remove_run(store, other.run_id)
    folder = f"{model_path(other.manifest.model_id)}/"
    models = {name for name in names(store) if name.startswith(folder)}
    assert models
    assert collect(store).waste == ()
    age(store, models)
    (waste,) = collect(store).waste
    assert (waste.kind, {stored.name for stored in waste.objects}) == ("unused model", models)
    assert store.exists(f"{model_path(run.manifest.model_id)}/model.json")


def test_the_model_of_an_open_capture_stays(run: Run, make_run: MakeRun) -> None:
    other = make_run(name="other")
    store, capture_id = run.store, "abc"
    remove_run(store, other.run_id)
    age(store, [name for name in names(store) if name.startswith("models/")])
    reserve_run(store, "new-01234567", capture_id)
    assert "is not known" in " ".join(collect(store).notes)
    plan = {"manifest": other.manifest.to_json() | {"number": 0}, "work": []}
    store.write_json(f"{wip_path('new-01234567', capture_id)}/plan.json", plan)
    done = collect(store)
    assert done.waste == ()
    assert "is not known" not in " ".join(done.notes)
    assert store.exists(f"{model_path(other.manifest.model_id)}/model.json")


def begin_elsewhere(store: Store, other: Run) -> None:
    """Reserve the run and freeze its plan, which names its model."""
    reserve_run(store, other.run_id, "abc")
    plan = {"manifest": other.manifest.to_json() | {"number": 0}, "work": []}
    store.write_json(f"{wip_path(other.run_id, 'abc')}/plan.json", plan)


@pytest.mark.parametrize("moment", ["before the card goes", "after", "after it was looked for"])
def test_a_model_stays_whole_for_a_capture_that_begins_meanwhile(
    run: Run, make_run: MakeRun, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = run.store, make_run(name="other")
    folder = f"{model_path(other.manifest.model_id)}/"
    remove_run(store, other.run_id)
    models = {name: store.read(name) for name in names(store) if name.startswith(folder)}
    age(store, [name for name in names(store) if name.startswith("models/")])
    delete_all, scan = Store.delete_all, Store.scan

    def delete(self: Store, given: Iterable[str], **options: Any) -> int:
        chosen = list(given)
        is_card = chosen == [f"{folder}model.json"]
        if is_card and moment == "before the card goes":
            begin_elsewhere(store, other)
        n_gone = delete_all(self, chosen, **options)
        if is_card and moment == "after":
            begin_elsewhere(store, other)
        if is_card and moment == "after it was looked for":  # and all is written anew
            monkeypatch.setattr(Store, "scan", write_anew)
        return n_gone

    def write_anew(self: Store, name: str = "") -> Iterator[Stored]:
        if name == folder.rstrip("/"):
            begin_elsewhere(store, other)
            for path, content in models.items():
                store.write(path, content)
        return scan(self, name)

    monkeypatch.setattr(Store, "delete_all", delete)
    collect_lake(store, older_than_s=DAY_S)
    assert {name: store.read(name) for name in names(store) if name.startswith(folder)} == models


@pytest.mark.parametrize("newer", [2, 1])
def test_a_half_written_finding_supersedes_nothing(
    run: Run, newer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run.store
    old = add_finding(run, n_tokens=7)

    def die(self: Store, name: str, content: bytes, write: Callable[..., None] = Store.write) -> None:
        if name.startswith("findings/lens/"):
            raise Crash
        write(self, name, content)

    before = names(store)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", die)
        with pytest.raises(Crash):
            add_finding(run, version=newer)
    half = names(store) - before
    assert len(half) == 1
    assert {table.path for table in Lake(store.url).findings()} == old
    assert collect(store).waste == ()
    age(store, half)
    (waste,) = collect(store).waste
    assert (waste.kind, {stored.name for stored in waste.objects}) == ("unfinished findings", half)
    assert old <= names(store)


def test_a_superseded_finding_loses_its_main_table_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be damaged, if that were all that went."""
    old, new = add_finding(run), add_finding(run, version=2)
    with monkeypatch.context() as patch:
        crash_after(patch, 1)
        with pytest.raises(Crash):
            collect_lake(run.store, older_than_s=DAY_S)
    assert len(old & names(run.store)) == 1
    verify_lake(run.store)
    assert {table.path for table in Lake(run.store.url).findings()} == new


def test_superseded_findings_go(run: Run, make_run: MakeRun) -> None:
    store, other = run.store, make_run(name="other")
    smaller, older = add_finding(run, version=2, n_tokens=7), add_finding(run)
    newest, of_other = add_finding(run, version=2), add_finding(other)
    (waste,) = collect(store).waste
    assert waste.kind == "superseded findings"
    assert {stored.name for stored in waste.objects} == smaller | older
    assert newest | of_other <= names(store)
    # written when the removal was over
    remove_run(store, other.run_id)
    late = add_finding(other)
    assert {stored.name for waste in collect(store).waste for stored in waste.objects} == late


def test_files_that_were_not_written_to_their_end_go_when_they_are_old(run: Run) -> None:
    store, before = run.store, names(run.store)
    folders = [f"{run_path(run.run_id)}/wip", f"{run_path(run.run_id)}/log", "models/x", "findings/lens/0123"]
    partial = {f"{folder}/.an-object.0123.partial" for folder in folders}
    for name in partial:
        (store.local_path / name).parent.mkdir(parents=True, exist_ok=True)
        (store.local_path / name).write_bytes(b"half")
    assert collect(store).waste == ()
    age(store, partial)
    collect(store)
    assert names(store) == before
