"""What the writers of a capture leave for each other: attempts that were begun, and ledgers of what is written."""

from __future__ import annotations

import os
import platform
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ..catalog.layout import frozen_plan_path, run_path, wip_path
from ..catalog.references import recorded_objects
from ..catalog.reservation import reserved_by
from ..catalog.stores import Store
from .frozen import FrozenPlan, PartitionWork

__all__ = [
    "begin_attempt",
    "is_open",
    "is_wanted",
    "pending_work",
    "read_ledger",
    "withdraw_disputed",
    "write_ledger",
]


def _ledger_path(plan: FrozenPlan, partition: int) -> str:
    return f"{wip_path(plan.manifest.run_id, plan.capture_id)}/ledgers/{partition:08d}.json"


def pending_work(store: Store, plan: FrozenPlan) -> list[PartitionWork]:
    """Return the work of the partitions that have no ledger yet."""
    done = set(store.list(f"{wip_path(plan.manifest.run_id, plan.capture_id)}/ledgers"))
    return [work for work in plan.work if f"{work.index:08d}.json" not in done]


def is_wanted(store: Store, plan: FrozenPlan, partition: int) -> bool:
    """Tell whether a partition has yet to be written: it has no ledger, and the capture is open.

    Looks in this order: a committed capture loses its plan before its ledgers.
    """
    return not store.exists(_ledger_path(plan, partition)) and is_open(store, plan)


def is_open(store: Store, plan: FrozenPlan) -> bool:
    """Tell whether a capture is begun, and neither committed nor removed."""
    return reserved_by(store, plan.manifest.run_id) == plan.capture_id and store.exists(
        frozen_plan_path(plan.manifest.run_id, plan.capture_id)
    )


def begin_attempt(store: Store, plan: FrozenPlan, partition: int) -> int:
    """Note that somebody is about to compute a partition, before its first forward; return which attempt it is."""
    folder = f"{wip_path(plan.manifest.run_id, plan.capture_id)}/attempts"
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    note = {"started": started, "by": f"{platform.node()}:{os.getpid()}"}
    attempt = 0
    while True:
        try:
            store.write_json(f"{folder}/{partition:08d}-{attempt}.json", note, create=True)
        except FileExistsError:
            attempt += 1
        else:
            return attempt


def write_ledger(
    store: Store,
    plan: FrozenPlan,
    partition: int,
    objects: list[dict[str, Any]],
    *,
    attempt: int = 0,
    nonfinite: Mapping[str, int] | None = None,
    writer: Mapping[str, Any] | None = None,
) -> None:
    """Record that a partition's objects are all written; whoever comes second, or too late, changes nothing.

    Parameters
    ----------
    store, plan, partition
        Which.
    objects : list of dict
        A record of each object, as ``writer.write_object`` returns it.
    attempt : int
        Which attempt at the partition it comes from: tells a ledger from the one that it replaces.
    nonfinite : mapping, optional
        site → values that are not finite in the stored dtype.
    writer : mapping, optional
        What is worth knowing of the writer and is not identity: versions, device, self-check.
    """
    ledger = {
        "attempt": attempt,
        "objects": objects,
        "nonfinite": dict(nonfinite or {}),
        "writer": dict(writer or {}),
    }
    if not is_open(store, plan):  # or a capture that is begun anew would take this for its own
        return
    with suppress(FileExistsError):
        store.write_json(_ledger_path(plan, partition), ledger, create=True)


def withdraw_disputed(store: Store, plan: FrozenPlan) -> list[int]:
    """Withdraw the ledgers of partitions whose objects are not what the ledgers say, so that they are pending again.

    All objects must be there with their lengths: a machine that loses power may lose what it had written. Where
    a partition was attempted more than once their bytes are read: writers on unlike machines differ in them.

    Returns
    -------
    list of int
        The partitions whose ledgers were withdrawn.
    """
    run_id = plan.manifest.run_id
    attempts = store.list(f"{wip_path(run_id, plan.capture_id)}/attempts")
    count = Counter(int(name.partition("-")[0]) for name in attempts)
    there = dict(store.walk(run_path(run_id)))
    return [
        work.index
        for work in plan.work
        if _withdraw(store, plan, work.index, there, read=count[work.index] > 1)
    ]


def _withdraw(
    store: Store, plan: FrozenPlan, partition: int, there: Mapping[str, int], *, read: bool
) -> bool:
    ledger = read_ledger(store, plan, partition)
    if ledger is None:  # not written yet; or another writer has committed the capture
        return False
    run_id, records = plan.manifest.run_id, recorded_objects(ledger)
    is_there = all(there.get(f"{run_path(run_id)}/{r['name']}") == r["nbytes"] for r in records)
    if is_there and not (read and not all(_is_as_recorded(store, run_id, record) for record in records)):
        return False
    if read_ledger(store, plan, partition) == ledger:  # and not one that has taken its place meanwhile
        store.delete(_ledger_path(plan, partition))
    return True


def read_ledger(store: Store, plan: FrozenPlan, partition: int) -> dict[str, Any] | None:
    """Return a partition's ledger, or None if there is none."""
    try:
        ledger: dict[str, Any] = store.read_json(_ledger_path(plan, partition))
    except FileNotFoundError:
        return None
    return ledger


def _is_as_recorded(store: Store, run_id: str, record: Mapping[str, Any]) -> bool:
    try:
        content = store.read(f"{run_path(run_id)}/{record['name']}")
    except FileNotFoundError:
        return False
    found = (len(content), f"{zlib.crc32(content):08x}")
    return found == (record["nbytes"], record["crc32"])
