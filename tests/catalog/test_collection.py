"""gc: what nothing needs goes, and nothing that a snapshot names or an open capture has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
from layerlake.catalog.layout import log_path, model_path, part_path, run_path, wip_path
from layerlake.catalog.removal import remove_run
from layerlake.catalog.reservation import COLLECTING, reserve_run, reserved_by, take_over_run
from layerlake.catalog.run import Run
from layerlake.catalog.stores import Store
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

    def take_over(store: Store, run_id: str, holder: str) -> None:
        monkeypatch.undo()
        store.write_json(f"{wip_path(run_id, 'abc')}/attempts/00000009-1.json", {})
        take_over_run(store, run_id, holder)

    monkeypatch.setattr("layerlake.catalog.collection.take_over_run", take_over)
    assert collect_lake(run.store, older_than_s=DAY_S).waste == ()
    assert reserved_by(run.store, run.run_id) == "abc"
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


@pytest.mark.parametrize("holder", [COLLECTING, "committed"])
def test_a_run_that_nobody_holds_any_more_is_let_go(run: Run, holder: str) -> None:
    take_over_run(
        run.store, run.run_id, run.manifest.captures[0]["capture_id"] if holder == "committed" else holder
    )
    collect(run.store)
    assert reserved_by(run.store, run.run_id) is None


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
    assert collect(store).waste == ()
    assert store.exists(f"{model_path(other.manifest.model_id)}/model.json")


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
