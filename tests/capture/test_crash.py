"""A capture may die anywhere: nothing half-written reads as whole, and the same call again finishes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerlake.capture import execute, phases, pipeline, worker
from layerlake.capture.execute import capture_run, execute_plan
from layerlake.capture.frozen import FrozenPlan
from layerlake.capture.ledgers import begin_attempt
from layerlake.capture.phases import read_open_capture, release_committed
from layerlake.capture.plan import plan_capture
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import CaptureInProgress, LakeNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES
from layerlake.catalog.stores import Store

MakeSpec = Callable[..., CaptureSpec]
MakeRun = Callable[..., Run]


class Crash(BaseException):
    """Nothing may catch it."""


def contents(lake: Path) -> dict[str, bytes]:
    """Every object but the log, which says when a capture ended."""
    return {
        path.relative_to(lake).as_posix(): path.read_bytes()
        for path in lake.rglob("*")
        if path.is_file() and "/log/" not in path.as_posix()
    }


def run_ids(lake: Path) -> list[str]:
    try:
        return Lake(lake).run_ids
    except LakeNotFound:
        return []


@pytest.fixture(scope="session")
def uninterrupted(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = tmp_path_factory.mktemp("uninterrupted") / "lake"
    capture_run(lake, make_spec())
    return lake


def crash_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, *, after: bool) -> None:
    """Die at the given call of a function (counted from 1), before it or right after it."""
    function = getattr(owner, name)
    numbers = itertools.count(1)  # each call takes its own, whichever thread makes it

    def counted(*args: Any, **options: Any) -> Any:
        number = next(numbers)
        if number == call and not after:
            raise Crash
        result = function(*args, **options)
        if number == call:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (execute, "create_lake", 1),
        (execute, "write_model", 1),
        (execute, "init_capture", 1),
        (worker, "begin_attempt", 2),
        (worker, "run_batch", 2),
        (pipeline, "write_object", 20),
        (worker, "write_ledger", 2),
        (execute, "finalise_capture", 1),
        (phases, "commit_manifest", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_call_again_finishes_a_capture_that_died(
    *,
    make_spec: MakeSpec,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    call: int,
    after: bool,
) -> None:
    lake = tmp_path / "lake"
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, call, after=after)
        with pytest.raises(Crash):
            capture_run(lake, make_spec())
    is_committed = after and name in {"commit_manifest", "finalise_capture"}
    assert bool(run_ids(lake)) == is_committed

    run = capture_run(lake, make_spec())
    assert run_ids(lake) == [run.run_id]
    assert run.manifest.number == len(run.manifest.captures) == 1
    assert contents(lake) == contents(uninterrupted)


def test_partitions_that_have_their_ledger_are_not_run_again(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, worker, "write_ledger", 2, after=True)
        with pytest.raises(Crash):
            capture_run(tmp_path, make_spec())
    ran: list[int] = []

    def note(store: Store, plan: FrozenPlan, index: int) -> int:
        ran.append(index)
        return begin_attempt(store, plan, index)

    monkeypatch.setattr(worker, "begin_attempt", note)
    told: list[tuple[str, int, int]] = []
    run = capture_run(tmp_path, make_spec(), progress=lambda *state, **_: told.append(state))
    assert ran == [p.index for p in run.manifest.partitions[2:]]
    assert told[0][0] == "self-check"
    done = [state[1] for state in told[1:]]
    assert done == sorted(done)
    assert done[0] == sum(p.n_rows for p in run.manifest.partitions[:2])
    assert told[-1] == ("capture", run.n_tokens, run.n_tokens)


def test_another_capture_of_the_run_waits_for_the_open_one(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, worker, "run_batch", 2, after=False)
        with pytest.raises(Crash):
            capture_run(tmp_path, make_spec())
    before = contents(tmp_path)
    for options in ({"max_tokens": 100}, {"sites": "resid"}):
        with pytest.raises(CaptureInProgress) as caught:
            capture_run(tmp_path, make_spec(**options))
        (opened,) = {
            name.split("/")[3] for name in before if "/wip/" in name and not name.endswith("open.json")
        }
        assert opened in str(caught.value)
        assert "again" in caught.value.hint
    assert contents(tmp_path) == before
    assert run_ids(tmp_path) == []
    other = capture_run(tmp_path, make_spec(bos="none", sites="resid"))  # another run is not held up
    assert run_ids(tmp_path) == [other.run_id]
    assert len(capture_run(tmp_path, make_spec()).sites) == len(SITES)


def test_an_open_capture_fixes_the_geometry(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same documents in one partition, nothing else tells the two plans apart."""
    given = {"max_tokens": 60, "partition_tokens": None}
    with monkeypatch.context() as patch:
        crash_at(patch, worker, "run_batch", 1, after=False)
        with pytest.raises(Crash):
            capture_run(tmp_path, make_spec(**given, max_memory="60MiB"))
    assert plan_capture(make_spec(**given, max_memory="1GiB")).manifest.geometry.partition_tokens == 8192
    run = capture_run(tmp_path, make_spec(**given, max_memory="1GiB"))
    rows = run.manifest.geometry.partition_tokens
    assert rows == 4096
    assert run.array("resid").shards == (1, rows, 32)


def test_plans_of_different_geometry_are_different_captures(make_spec: MakeSpec) -> None:
    plans = [plan_capture(make_spec(max_tokens=60, partition_tokens=n)).frozen for n in (96, 128)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].work == plans[1].work
    assert plans[0].capture_id != plans[1].capture_id


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_clean_up_that_was_cut_off_is_made_up_for(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """After the commit; a next capture of the run must not meet a reservation that nobody holds."""
    with monkeypatch.context() as patch:
        crash_at(patch, Store, "delete", max(1, step), after=step > 0)
        with pytest.raises(Crash):
            capture_run(tmp_path, make_spec(sites="resid", max_tokens=100))
    (run_id,) = run_ids(tmp_path)
    store = Store(tmp_path)
    assert read_open_capture(store, run_id) is None
    same = capture_run(tmp_path, make_spec(sites="resid", max_tokens=100))
    assert same.manifest.number == 1
    assert not [name for name, _ in store.walk(f"runs/{run_id}/wip")]
    run = capture_run(tmp_path, make_spec())
    assert run.manifest.number == 2
    assert not [name for name, _ in store.walk(f"runs/{run_id}/wip")]


def test_a_cut_off_clean_up_does_not_hold_up_the_next_capture(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, Store, "delete", 1, after=False)
        with pytest.raises(Crash):
            capture_run(tmp_path, make_spec(sites="resid", max_tokens=100))
    assert capture_run(tmp_path, make_spec()).manifest.number == 2


def test_a_reservation_that_is_held_is_not_released(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = capture_run(tmp_path, make_spec(sites="resid", max_tokens=100))
    with monkeypatch.context() as patch:
        crash_at(patch, worker, "run_batch", 1, after=False)
        with pytest.raises(Crash):
            capture_run(tmp_path, make_spec())
    store = Store(tmp_path)
    release_committed(store, run.run_id)
    assert read_open_capture(store, run.run_id) is not None
    capture_run(tmp_path, make_spec(sites="resid", max_tokens=100))  # there already: nothing to do
    assert read_open_capture(store, run.run_id) is not None


def test_a_plan_that_was_overtaken_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Two plan on the same state; the second must not write over what the first has committed."""
    late = plan_capture(make_spec(sites="resid"), tmp_path)
    first = capture_run(tmp_path, make_spec(sites="resid", max_tokens=100))
    before = contents(tmp_path)
    with pytest.raises(CaptureInProgress, match="was committed since this one was planned") as caught:
        execute_plan(late, tmp_path)
    assert "again" in caught.value.hint
    assert contents(tmp_path) == before
    np.testing.assert_array_equal(first.resid.to_numpy(), Lake(tmp_path).run().resid.to_numpy())
    assert capture_run(tmp_path, make_spec(sites="resid")).manifest.number == 2


def test_it_may_die_at_any_object(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture of made-up values, cut off at each of its writes in turn, and finished by the next attempt."""
    whole = make_run(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    n_left = -1

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **options: Any) -> Any:
            nonlocal n_left
            n_left -= 1
            if n_left == -1:
                raise Crash
            return function(*args, **options)

        return write

    for name in ("write", "create", "write_json"):
        monkeypatch.setattr(Store, name, counting(getattr(Store, name)))
    for n_writes in range(1000):
        lake = tmp_path / f"lake-{n_writes}"
        n_left = n_writes
        try:
            make_run(lake)
        except Crash:
            n_left = -2
        else:
            break
        if run_ids(lake):
            release_committed(Store(lake), whole.run_id)
        else:
            make_run(lake)
        assert run_ids(lake) == [whole.run_id]
        assert contents(lake) == expected, n_writes
    assert n_writes > len(expected)
