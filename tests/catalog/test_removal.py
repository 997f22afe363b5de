"""rm: a run goes whole, whatever interrupts it, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.catalog.wreckage import (
    Crash,
    add_finding,
    begin_capture,
    collect,
    crash_after,
    names,
    second_snapshot,
)

from layerlake.catalog import removal, reservation
from layerlake.catalog.collection import collect_lake
from layerlake.catalog.errors import CaptureInProgress, RunNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.layout import log_path, run_path
from layerlake.catalog.references import named_objects
from layerlake.catalog.removal import plan_removal, remove_run
from layerlake.catalog.reservation import (
    REMOVING,
    UNREADABLE,
    new_remover,
    release_run,
    remover,
    reservation_path,
    reserve_run,
    reserved_by,
    take_over_run,
)
from layerlake.catalog.run import Run
from layerlake.catalog.stores import Store
from layerlake.catalog.verify import verify_lake

MakeRun = Callable[..., Run]


# -- reservation ----------------------------------------------------------------------------------


def test_of_many_one_holds_a_run(run: Run) -> None:
    store, run_id = run.store, run.run_id
    assert reserved_by(store, run_id) is None
    assert reserve_run(store, run_id, "a") == "a"
    assert reserve_run(store, run_id, "b") == "a"
    take_over_run(store, run_id, "b")
    assert reserved_by(store, run_id) == "b"
    store.write(reservation_path(run_id), b"{}")
    assert reserve_run(store, run_id, "c") == UNREADABLE


def test_a_run_that_is_let_go_meanwhile_is_reserved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve_run(run.store, run.run_id, "a")

    def let_go(store: Store, run_id: str) -> str | None:
        monkeypatch.undo()
        store.delete(reservation_path(run_id))
        return None

    monkeypatch.setattr(reservation, "reserved_by", let_go)
    assert reserve_run(run.store, run.run_id, "b") == "b"


# -- rm -------------------------------------------------------------------------------------------


def test_a_removed_run_leaves_nothing_but_its_model(any_run: Run, make_run: MakeRun) -> None:
    store = any_run.store
    other = make_run(store.url, name="other")
    kept = add_finding(other)
    before = names(store)
    found = add_finding(any_run)
    planned = plan_removal(store, any_run.run_id)
    assert {stored.name for stored in planned.findings} == found
    assert planned.nbytes == sum(n for name, n in store.walk() if any_run.run_id in name or name in found)
    assert names(store) == before | found
    assert remove_run(store, any_run.run_id) == planned
    assert names(store) == {name for name in before if not name.startswith(run_path(any_run.run_id))}
    assert kept <= names(store)
    assert Lake(store.url).run_ids == [other.run_id]
    verify_lake(store)
    with pytest.raises(RunNotFound):
        remove_run(store, any_run.run_id)


def test_a_removal_may_be_interrupted_anywhere_and_repeated(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_objects = 1
    while True:
        url = f"memory://{tmp_path}/{n_objects}"
        run = make_run(url, lengths=(5, 9), sites=("resid", "attn_band"))
        second_snapshot(run)
        store, found = run.store, add_finding(run)
        try:
            with monkeypatch.context() as patch:
                crash_after(patch, n_objects)
                remove_run(store, run.run_id)
            break
        except Crash:
            pass
        # a reader sees a snapshot whole, or none; nobody captures; a repetition, or gc, ends it
        left = Lake(url).run_ids
        if left:
            manifest = Lake(url).run().manifest
            assert manifest.number == 2 - n_objects
            assert named_objects(manifest) <= names(store)
        assert remover(reserve_run(store, run.run_id, "abc")) == REMOVING
        verify_lake(store)
        assert not any("wip/abc" in name for name in names(store))
        if n_objects % 2:
            remove_run(store, run.run_id)
        else:
            assert collect_lake(store, older_than_s=3600.0).waste == ()  # it may be at work
            assert collect(store, 0.0).waste[0].kind == "interrupted removal"
        assert not {name for name in names(store) if name.startswith("runs/")} | (found & names(store))
        n_objects += 1
    assert n_objects > 10


def test_a_run_with_an_open_capture_is_removed_only_by_force(run: Run) -> None:
    begin_capture(run)
    assert plan_removal(run.store, run.run_id).held_by == "abc"
    before = names(run.store)
    with pytest.raises(CaptureInProgress, match=r"held by abc") as caught:
        remove_run(run.store, run.run_id)
    assert "--force" in caught.value.hint
    assert names(run.store) == before
    remove_run(run.store, run.run_id, force=True)
    assert not run.store.list("runs")


def test_a_capture_that_was_committed_and_not_cleaned_up_is_no_hindrance(run: Run) -> None:
    (entry,) = run.manifest.captures
    reserve_run(run.store, run.run_id, entry["capture_id"])
    remove_run(run.store, run.run_id)
    assert not run.store.list("runs")


def test_what_a_writer_stores_during_a_removal_goes_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_held = removal.delete_held
    late = [f"{run_path(run.run_id)}/activations.zarr/resid/c/0/8/0", f"{run_path(run.run_id)}/tokens/late"]

    def with_a_late_writer(store: Store, *given: Any) -> int:
        n_deleted = delete_held(store, *given)
        if late:
            store.write(late.pop(), b"late")
        return n_deleted

    monkeypatch.setattr(removal, "delete_held", with_a_late_writer)
    remove_run(run.store, run.run_id)
    assert not late
    assert not run.store.list("runs")


def test_a_removal_that_is_taken_over_stops_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it lets nobody else's reservation go."""
    store, run_id = run.store, run.run_id
    second_snapshot(run)
    delete_all = Store.delete_all

    def another_comes(self: Store, given: Any, **options: Any) -> int:
        monkeypatch.undo()
        n_gone = delete_all(self, given, **options)
        take_over_run(store, run_id, "abc")
        return n_gone

    monkeypatch.setattr(Store, "delete_all", another_comes)
    with pytest.raises(CaptureInProgress, match="taken over"):
        remove_run(store, run_id)
    assert store.list(f"{run_path(run_id)}/log") == ["00000001.json"]
    assert reserved_by(store, run_id) == "abc"


def test_a_removal_ends_what_another_has_begun_and_not_what_has_come_since(run: Run) -> None:
    store, run_id = run.store, run.run_id
    take_over_run(store, run_id, "rm-0123")
    take_over_run(store, run_id, "abc")
    with pytest.raises(CaptureInProgress):
        remove_run(store, run_id, held_by="rm-0123")
    release_run(store, run_id, "abc")
    before = names(store)
    with pytest.raises(CaptureInProgress):
        remove_run(store, run_id, held_by="rm-0123")
    assert names(store) == before
    take_over_run(store, run_id, "rm-0123")
    remove_run(store, run_id)
    assert not store.list("runs")


def test_a_run_is_let_go_by_its_holder_only(run: Run) -> None:
    store, run_id = run.store, run.run_id
    reserve_run(store, run_id, "a")
    assert not take_over_run(store, run_id, "b", held_by="c")
    release_run(store, run_id, "b")
    assert reserved_by(store, run_id) == "a"
    assert take_over_run(store, run_id, "b", held_by="a")
    release_run(store, run_id, "b")
    assert reserved_by(store, run_id) is None
    assert remover("gc-0123") == "gc"
    assert (remover("0123"), remover(None), remover(UNREADABLE)) == (None, None, None)
    assert new_remover(REMOVING) != new_remover(REMOVING)


def test_a_damaged_run_can_be_removed(run: Run) -> None:
    add_finding(run)
    run.store.write(log_path(run.run_id, 1), b"{")
    run.store.write("findings/lens/0123/part-00000.parquet", b"neither")
    remove_run(run.store, run.run_id)
    assert not run.store.list("runs")
    assert run.store.list("findings/lens") == ["0123"]
