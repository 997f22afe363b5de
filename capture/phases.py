"""The three phases of a capture: *init* freezes the plan, *partition* writes shards, *finalise* commits.

Every step may be repeated, by this process or another, after a crash at any point: objects are created
whole, the frozen plan and the ledgers only if absent, and nothing that a reader sees changes before
``finalise`` appends the next manifest to the log.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ..catalog.errors import CaptureInProgress, CorruptRun
from ..catalog.layout import part_path, run_path, wip_path
from ..catalog.manifest import Manifest, commit_manifest, read_manifest
from ..catalog.stores import Store
from ..catalog.tables import OBJECTS, to_parquet
from .frozen import FrozenPlan, PartitionWork
from .writer import create_arrays

__all__ = [
    "begin_attempt",
    "finalise_capture",
    "init_capture",
    "pending_work",
    "read_open_capture",
    "release_committed",
    "write_ledger",
]


def _open_path(run_id: str) -> str:
    return f"{run_path(run_id)}/wip/open.json"


def _reserved_by(store: Store, run_id: str) -> str | None:
    """Return the id of the capture that has reserved a run, or None."""
    path = _open_path(run_id)
    return str(store.read_json(path)["capture_id"]) if store.exists(path) else None


def _find_committed(store: Store, run_id: str, capture_id: str) -> Manifest | None:
    """Return the newest snapshot of a run if the capture is part of it."""
    newest = read_manifest(store, run_id)
    if newest is not None and any(entry["capture_id"] == capture_id for entry in newest.captures):
        return newest
    return None


def read_open_capture(store: Store, run_id: str) -> FrozenPlan | None:
    """Return the frozen plan of the capture that is open on a run, or None."""
    capture_id = _reserved_by(store, run_id)
    if capture_id is None or _find_committed(store, run_id, capture_id):
        return None
    path = f"{wip_path(run_id, capture_id)}/plan.json"
    return FrozenPlan.from_json(store.read_json(path)) if store.exists(path) else None


def release_committed(store: Store, run_id: str) -> None:
    """Clean up after a capture that was committed, and interrupted before it had done so itself."""
    capture_id = _reserved_by(store, run_id)
    if capture_id is not None and _find_committed(store, run_id, capture_id):
        _clean_up(store, run_id, capture_id)


def init_capture(store: Store, plan: FrozenPlan, *, documents: pa.Table, tokens: pa.Table) -> None:
    """Reserve the run for this capture, write its tables and freeze its plan.

    Parameters
    ----------
    store : Store
        The lake.
    plan : FrozenPlan
        The plan; a capture with the same plan is joined.
    documents, tokens : pa.Table
        The rows that this capture adds (``tables.DOCUMENTS``, ``tables.TOKENS``), if the plan says that it does.

    Raises
    ------
    CaptureInProgress
        Another capture of the run is open, or was committed since this one was planned.
    """
    run_id, capture_id = plan.manifest.run_id, plan.capture_id
    try:
        store.write_json(_open_path(run_id), {"capture_id": capture_id}, create=True)
    except FileExistsError:
        opened = store.read_json(_open_path(run_id))["capture_id"]
        if opened != capture_id:
            raise CaptureInProgress(
                f"Another capture ({opened}) of run {run_id} is open.",
                hint="Run its command again to finish it, or remove "
                f"{store.url}/{wip_path(run_id, opened)} and {_open_path(run_id)} if it is abandoned.",
            ) from None
    newest = read_manifest(store, run_id)
    if newest is not None and newest.number != plan.manifest.number:
        store.delete(_open_path(run_id))
        raise CaptureInProgress(
            f"Another capture of run {run_id} was committed since this one was planned.",
            hint="Run the command again.",
        )
    if plan.adds_documents:
        for name, table in (("documents", documents), ("tokens", tokens)):
            store.write(part_path(run_id, name, plan.part), to_parquet(table))
    create_arrays(store, plan.manifest)
    path = f"{wip_path(run_id, capture_id)}/plan.json"
    if not store.exists(path):
        store.write_json(path, plan.to_json())


def _ledger_path(plan: FrozenPlan, partition: int) -> str:
    return f"{wip_path(plan.manifest.run_id, plan.capture_id)}/ledgers/{partition:08d}.json"


def pending_work(store: Store, plan: FrozenPlan) -> list[PartitionWork]:
    """Return the work of the partitions that have no ledger yet."""
    done = set(store.list(f"{wip_path(plan.manifest.run_id, plan.capture_id)}/ledgers"))
    return [work for work in plan.work if f"{work.index:08d}.json" not in done]


def begin_attempt(store: Store, plan: FrozenPlan, partition: int) -> None:
    """Note that somebody is about to compute a partition, before its first forward."""
    folder = f"{wip_path(plan.manifest.run_id, plan.capture_id)}/attempts"
    attempt = 0
    while True:
        try:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            store.write_json(f"{folder}/{partition:08d}-{attempt}.json", {"started": started}, create=True)
        except FileExistsError:
            attempt += 1
        else:
            return


def write_ledger(store: Store, plan: FrozenPlan, partition: int, objects: list[dict[str, Any]]) -> None:
    """Record that a partition's objects are all written; whoever comes second keeps the first ledger."""
    try:
        store.write_json(_ledger_path(plan, partition), {"objects": objects}, create=True)
    except FileExistsError:
        return


def finalise_capture(store: Store, plan: FrozenPlan, *, provenance: dict[str, Any]) -> Manifest:
    """Commit the next manifest once every partition has its ledger, and remove the work in progress.

    Parameters
    ----------
    store : Store
        The lake.
    plan : FrozenPlan
        The plan whose partitions are written.
    provenance : dict
        What is worth knowing and is not identity: versions, device, self-check.

    Raises
    ------
    CorruptRun
        A partition has no ledger.
    """
    run_id, capture_id = plan.manifest.run_id, plan.capture_id
    committed = _find_committed(store, run_id, capture_id)
    if committed is None:
        committed = _commit(store, plan, provenance)
    _clean_up(store, run_id, capture_id)
    return committed


def _commit(store: Store, plan: FrozenPlan, provenance: dict[str, Any]) -> Manifest:
    run_id, capture_id = plan.manifest.run_id, plan.capture_id
    missing = [work.index for work in pending_work(store, plan)]
    if missing:
        raise CorruptRun(f"Capture {capture_id} cannot be finalised: partitions {missing} are not written.")
    records = [
        record for work in plan.work for record in store.read_json(_ledger_path(plan, work.index))["objects"]
    ]
    store.write(part_path(run_id, "objects", plan.part), to_parquet(pa.Table.from_pylist(records, OBJECTS)))
    entry = {
        "capture_id": capture_id,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "sites": sorted({site for work in plan.work for site in work.sites}),
        "partitions": [work.index for work in plan.work],
        **provenance,
    }
    added = ("documents", "tokens", "objects") if plan.adds_documents else ("objects",)
    parts = plan.manifest.parts | {name: (*plan.manifest.parts.get(name, ()), plan.part) for name in added}
    manifest = dataclasses.replace(plan.manifest, parts=parts, captures=(*plan.manifest.captures, entry))
    try:
        return commit_manifest(store, manifest)
    except FileExistsError:
        # Only one capture of a run is ever open, so the one who came first committed this same plan.
        committed = _find_committed(store, run_id, capture_id)
        if committed is None:
            raise
        return committed


def _clean_up(store: Store, run_id: str, capture_id: str) -> None:
    """Remove what a committed capture leaves behind; its reservation last, so that the rest can be found."""
    store.delete(wip_path(run_id, capture_id))
    store.delete(_open_path(run_id))
