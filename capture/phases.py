"""The three phases of a capture: *init* freezes the plan, *partition* writes shards, *finalise* commits.

Every step may be repeated, by this process or another, at the same time or after a crash at any point: objects
are created whole, the frozen plan and the ledgers only if absent, and nothing that a reader sees changes before
``finalise`` appends the next manifest to the log.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime

import pyarrow as pa

from ..catalog.errors import CaptureInProgress, CaptureUnfinished
from ..catalog.layout import frozen_plan_path, part_path, wip_path
from ..catalog.manifest import Manifest, commit_manifest, read_manifest
from ..catalog.reservation import (
    INDEXING,
    release_run,
    remover,
    requested_by,
    reserve_run,
    reserved_by,
    take_over_run,
)
from ..catalog.stores import Store
from ..catalog.tables import DOCUMENTS, OBJECTS, TOKENS, read_parts, to_parquet
from ..catalog.zones import with_zones
from .frozen import FrozenPlan
from .ledgers import is_open, pending_work, read_ledger
from .writer import create_arrays

PATIENCE_S = 30.0
"""How long a capture may take from its reservation to its frozen plan."""

__all__ = [
    "await_plan",
    "finalise_capture",
    "find_committed",
    "init_capture",
    "open_elsewhere",
    "read_capture_tables",
    "read_open_capture",
    "release_committed",
]


def find_committed(store: Store, run_id: str, capture_id: str) -> Manifest | None:
    """Return the newest snapshot of a run if the capture is part of it."""
    newest = read_manifest(store, run_id)
    return newest if newest is not None and newest.has_capture(capture_id) else None


def read_open_capture(store: Store, run_id: str) -> FrozenPlan | None:
    """Return the frozen plan of the capture that is open on a run, or None."""
    capture_id = reserved_by(store, run_id)
    if capture_id is None or find_committed(store, run_id, capture_id):
        return None
    path = frozen_plan_path(run_id, capture_id)
    return FrozenPlan.from_json(store.read_json(path)) if store.exists(path) else None


def read_capture_tables(store: Store, plan: FrozenPlan) -> tuple[pa.Table, pa.Table]:
    """Return the documents and tokens that an open capture adds, as its init wrote them."""
    run_id = plan.manifest.run_id
    documents, tokens = (
        read_parts(store, [part_path(run_id, name, plan.part)] if plan.adds_documents else [], schema)
        for name, schema in (("documents", DOCUMENTS), ("tokens", TOKENS))
    )
    return documents, tokens


def release_committed(store: Store, run_id: str) -> None:
    """Clean up after a capture that was committed, and interrupted before it had done so itself."""
    capture_id = reserved_by(store, run_id)
    if capture_id is not None and find_committed(store, run_id, capture_id):
        _clean_up(store, run_id, capture_id)


def init_capture(store: Store, plan: FrozenPlan, *, documents: pa.Table, tokens: pa.Table) -> Manifest | None:
    """Reserve the run for this capture, write its tables and freeze its plan.

    Any number of writers may do so at once; whoever comes when the plan is frozen writes nothing.

    Parameters
    ----------
    store : Store
        The lake.
    plan : FrozenPlan
        The plan; a capture with the same plan is joined.
    documents, tokens : pa.Table
        The rows that this capture adds (``tables.DOCUMENTS``, ``tables.TOKENS``), if the plan says that it does.

    Returns
    -------
    Manifest or None
        The run, where other writers have committed this very capture in the meantime: nothing is left to do.

    Raises
    ------
    CaptureInProgress
        Another capture of the run is open, or was committed since this one was planned.
    """
    run_id, capture_id = plan.manifest.run_id, plan.capture_id
    holder = reserve_run(store, run_id, capture_id, request=plan.request)
    if holder != capture_id:
        raise open_elsewhere(store, run_id, holder)
    committed = _find_overtaken(store, plan)
    path = frozen_plan_path(run_id, capture_id)
    if committed is not None or store.exists(path):
        return committed
    if plan.adds_documents:
        for name, table in (("documents", documents), ("tokens", tokens)):
            store.write(part_path(run_id, name, plan.part), to_parquet(table))
    create_arrays(store, plan.manifest)
    with suppress(FileExistsError):
        store.write_json(path, plan.to_json(), create=True)
    # Others may have begun this capture, ended it and cleaned up while this process stood still.
    return _find_overtaken(store, plan)


def await_plan(store: Store, plan: FrozenPlan) -> bool:
    """Wait until the capture that holds a plan's run has frozen its own; tell whether it was asked for the same.

    One that was, and freezes none in half a minute, has died as it began: its reservation is taken over.
    """
    run_id = plan.manifest.run_id
    if requested_by(store, run_id) != plan.request:
        return False
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE_S:
        holder = reserved_by(store, run_id)
        if holder is None or store.exists(frozen_plan_path(run_id, holder)):
            return True
        time.sleep(0.1)
    take_over_run(store, run_id, plan.capture_id, request=plan.request)
    return True


def _find_overtaken(store: Store, plan: FrozenPlan) -> Manifest | None:
    """Return the run if this very capture was committed since it was planned, and None if nothing was.

    Raises
    ------
    CaptureInProgress
        Another capture was committed, or the run removed.
    """
    run_id = plan.manifest.run_id
    newest = read_manifest(store, run_id)
    if (newest.number if newest else 0) == plan.manifest.number:
        return None
    committed = find_committed(store, run_id, plan.capture_id)
    _clean_up(store, run_id, plan.capture_id)
    if committed is None:
        raise _was_overtaken(run_id)
    return committed


def _was_overtaken(run_id: str) -> CaptureInProgress:
    return CaptureInProgress(
        f"Another capture of run {run_id} was committed since this one was planned, or the run was removed.",
        hint="Run the command again.",
    )


def open_elsewhere(store: Store, run_id: str, holder: str | None) -> CaptureInProgress:
    """Return the error that says which other capture of a run is open, or who else holds it."""
    if holder == INDEXING:
        return CaptureInProgress(
            f"Run {run_id} is held by layerlake index, which adds zones to it.",
            hint=f"Run the command again when that is done; if it was interrupted: layerlake index {store.url}",
        )
    if command := remover(holder):
        return CaptureInProgress(
            f"Run {run_id} is held by layerlake {command} ({holder}), which removes objects of it.",
            hint=f"Run the command again when that is done; if it was interrupted: layerlake {command} {store.url}",
        )
    return CaptureInProgress(
        f"Another capture ({holder}) of run {run_id} is open.",
        hint=f"Run its command again to finish it, or remove it if it is abandoned: layerlake gc {store.url}",
    )


def finalise_capture(store: Store, plan: FrozenPlan) -> Manifest:
    """Commit the next manifest once every partition has its ledger, and remove the work in progress.

    Of several who finalise at once, one commits, and all return the same snapshot.

    Parameters
    ----------
    store : Store
        The lake.
    plan : FrozenPlan
        The plan whose partitions are written.

    Raises
    ------
    CaptureUnfinished
        A partition has no ledger.
    CaptureInProgress
        The capture is not open: another was committed since it was planned, or the run was removed.
    """
    run_id, capture_id = plan.manifest.run_id, plan.capture_id
    committed = find_committed(store, run_id, capture_id)
    if committed is None:
        try:
            committed = _commit(store, plan)
        except (FileExistsError, CaptureUnfinished, CaptureInProgress) as error:
            # Only one capture of a run is ever open: whoever was faster committed this same plan and cleaned up.
            committed = find_committed(store, run_id, capture_id)
            if committed is None:
                raise (_was_overtaken(run_id) if isinstance(error, FileExistsError) else error) from None
    _clean_up(store, run_id, capture_id)
    return committed


def _commit(store: Store, plan: FrozenPlan) -> Manifest:
    run_id, capture_id = plan.manifest.run_id, plan.capture_id
    if not is_open(store, plan):  # else its ledgers, which have gone too, would be taken for others' work
        raise _was_overtaken(run_id)
    missing = [work.index for work in pending_work(store, plan)]
    if missing:
        raise _unfinished(plan, missing)
    ledgers = []
    for work in plan.work:
        if (ledger := read_ledger(store, plan, work.index)) is None:  # withdrawn since
            raise _unfinished(plan, [work.index])
        ledgers.append(ledger)
    records = [record for ledger in ledgers for record in ledger["objects"]]
    store.write(part_path(run_id, "objects", plan.part), to_parquet(pa.Table.from_pylist(records, OBJECTS)))
    nonfinite = sum((Counter(ledger["nonfinite"]) for ledger in ledgers), Counter[str]())
    writers = [ledger["writer"] for ledger in ledgers]
    others = [writer for i, writer in enumerate(writers) if writer not in writers[:i]][1:]
    entry = {
        "capture_id": capture_id,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": plan.request,
        "sites": list(plan.sites),
        "partitions": [work.index for work in plan.work],
        "nonfinite": dict(sorted(nonfinite.items())),
        **writers[0],
        **({"other_writers": others} if others else {}),
    }
    added = ("documents", "tokens", "objects") if plan.adds_documents else ("objects",)
    parts = plan.manifest.parts | {name: (*plan.manifest.parts.get(name, ()), plan.part) for name in added}
    zones = with_zones(plan.manifest.zones, ((r["site"], r["partition"]) for r in records if "zones" in r))
    if not is_open(store, plan):
        raise _was_overtaken(run_id)
    manifest = dataclasses.replace(
        plan.manifest, parts=parts, zones=zones, captures=(*plan.manifest.captures, entry)
    )
    return commit_manifest(store, manifest)


def _unfinished(plan: FrozenPlan, missing: list[int]) -> CaptureUnfinished:
    shown = f"{', '.join(map(str, missing[:20]))}{', …' if len(missing) > 20 else ''}"
    return CaptureUnfinished(
        f"{len(missing)} of {len(plan.work)} partitions of capture {plan.capture_id} of run "
        f"{plan.manifest.run_id} are not written: {shown}.",
        hint="Run the capture again, for all of it or for those partitions.",
    )


def _clean_up(store: Store, run_id: str, capture_id: str) -> None:
    """Remove what a committed capture leaves behind.

    Its plan goes first, so that no late writer goes on; its reservation last, so that the rest can be found.
    """
    store.delete(frozen_plan_path(run_id, capture_id))
    store.delete(wip_path(run_id, capture_id))
    release_run(store, run_id, capture_id)
