"""What captures and removals leave behind when they die, made by hand."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from layerlake.catalog.collection import Collection, collect_lake, plan_collection
from layerlake.catalog.findings import Finding, FindingKey, write_finding
from layerlake.catalog.layout import log_path, part_path, run_path, wip_path
from layerlake.catalog.manifest import Manifest
from layerlake.catalog.reservation import reserve_run
from layerlake.catalog.run import Run
from layerlake.catalog.seal import seal_json
from layerlake.catalog.stores import Store
from layerlake.catalog.verify import verify_lake

DAY_S = 86400.0


def names(store: Store) -> set[str]:
    return {stored.name for stored in store.scan()}


def add_finding(run: Run, *, version: int = 1, n_tokens: int | None = None) -> set[str]:
    extent = run.extent("resid") | ({"n_tokens": n_tokens} if n_tokens else {})
    key = FindingKey("lens", version, run.run_id, {"scale": "own"}, {"resid": extent})
    before = names(run.store)
    tables = {view: pa.table({"run": [run.run_id], "x": [1.5]}) for view in ("lens", "lens_tokens")}
    write_finding(run.store, Finding("lens", tables, (key,)))
    return names(run.store) - before


def age(store: Store, chosen: Iterable[str], seconds: float = 2 * DAY_S) -> None:
    """Make objects of a local lake older."""
    for name in chosen:
        then = time.time() - seconds
        os.utime(store.local_path / name, (then, then))


def begin_capture(run: Run, capture_id: str = "abc", *, number: int = 1) -> set[str]:
    """Leave what a capture leaves that dies after its first ledger: of every kind one object."""
    store, run_id = run.store, run.run_id
    before = names(store)
    assert reserve_run(store, run_id, capture_id) == capture_id
    work = wip_path(run_id, capture_id)
    manifest = run.manifest.to_json() | {"number": number}
    store.write_json(f"{work}/plan.json", {"manifest": manifest, "work": [9]})
    store.write_json(f"{work}/attempts/00000009-0.json", {})
    store.write_json(f"{work}/ledgers/00000009.json", {})
    for name in ("activations.zarr/resid/c/0/9/0", "attn_band/part-00000009.parquet"):
        store.write(f"{run_path(run_id)}/{name}", b"of a capture")
    for table in ("documents", "tokens", "objects"):
        store.write(part_path(run_id, table, f"part-{capture_id}"), b"of a capture")
    return names(store) - before


class Crash(BaseException):
    """Nothing may catch it."""


def crash_after(monkeypatch: pytest.MonkeyPatch, n_objects: int) -> None:
    """Die once so many objects have been deleted, one at a time."""
    deleted = 0
    delete_all = Store.delete_all

    def one_by_one(self: Store, given: Iterable[str], **options: Any) -> int:
        nonlocal deleted
        n_gone = 0
        for name in given:
            if deleted == n_objects:
                raise Crash
            n_gone += delete_all(self, [name], **options)
            deleted += 1
        return n_gone

    monkeypatch.setattr(Store, "delete_all", one_by_one)


def second_snapshot(run: Run) -> None:
    run.store.write(log_path(run.run_id, 2), seal_json(replace(run.manifest, number=2).to_json()))


def collect(store: Store, older_than_s: float = DAY_S) -> Collection:
    """Collect, and see that the plan said so, and that what it left is whole."""
    planned = plan_collection(store, older_than_s=older_than_s)
    before = names(store)
    done = collect_lake(store, older_than_s=older_than_s)
    gone = {stored.name for waste in done.waste for stored in waste.objects}
    assert {stored.name for waste in planned.waste for stored in waste.objects} == gone
    assert before - names(store) - gone <= {name for name in before if name.endswith("wip/open.json")}
    assert not names(store) - before
    verify_lake(store)
    assert plan_collection(store, older_than_s=older_than_s).waste == ()
    return done


def without_zones(run: Run) -> Run:
    """Make a run what one was that was captured before there were zones."""
    store, path = run.store, log_path(run.run_id, run.manifest.number)
    snapshot = store.read_json(path)
    del snapshot["zones"]
    store.write_json(path, snapshot)
    store.delete(f"{run_path(run.run_id)}/zones")
    return Run(store, Manifest.from_json(snapshot))
