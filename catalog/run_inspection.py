"""One run, inspected: its log against its objects, their checksums, and the account of its rows."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .accounting import DocumentPart, read_document_part, verify_attn_band, verify_token_part
from .arrays import verify_array_metadata, verify_group_metadata, verify_shard
from .inspection import Inspection, open_sealed_parquet, read_sealed_json
from .layout import (
    activations_path,
    frozen_plan_path,
    log_path,
    part_path,
    run_path,
    wip_path,
    zones_name,
)
from .manifest import Manifest
from .problem import Deviation, require
from .references import Key, find_lost_snapshots, named_objects, object_keys, recorded_objects
from .reservation import COLLECTING, INDEXING, REMOVING, remover, reservation_path
from .shards import ShardCut
from .sites import SITES, Site
from .zone_check import ZoneCheck

__all__ = ["Inspected", "inspect_run"]

Record = Mapping[str, Any]


class Inspected(NamedTuple):
    """What the inspection of a run found out of it."""

    newest: Manifest | None
    """Its newest snapshot that can be read."""
    is_log_whole: bool
    """Whether that is the newest of all."""
    models: frozenset[str] | None
    """The models that it needs, or that an open capture of it is about to need; None if that is not known."""


def inspect_run(inspection: Inspection, run_id: str) -> Inspected:
    """Read all that the snapshots of a run name.

    What an open capture has written so far is noted; of it, only what carries a seal is read.
    """
    # Listed first, and its log last: what is committed in between is then not taken for an orphan.
    present = dict(inspection.store.walk(run_path(run_id)))
    holder = _holder(inspection, run_id, present)
    if remover(holder) == REMOVING:
        inspection.notes.append(
            f"Run {run_id} is being removed, or that was interrupted: layerlake rm finishes it."
        )
        return Inspected(None, is_log_whole=False, models=frozenset())
    snapshots = _inspect_log(inspection, run_id)
    named = {name for manifest in snapshots.values() if manifest for name in named_objects(manifest)}
    plan = _inspect_work(inspection, run_id, present, holder)
    is_log_whole = None not in snapshots.values()
    if is_log_whole:
        parts = (name for name in present if name.startswith(f"{run_path(run_id)}/objects/"))
        # gone since: an abandoned capture's, which somebody removes at this moment
        parts_there = [name for name in parts if name in named or inspection.store.exists(name)]
        lost = find_lost_snapshots(run_id, snapshots, parts_there, named, holder)
        extends = plan["manifest"]["number"] if plan else 0
        lost += [log_path(run_id, number) for number in range(max(snapshots, default=0) + 1, extends + 1)]
        for name in dict.fromkeys(lost):
            inspection.miss(name, "snapshot")
        is_log_whole = not lost
    newest = next((manifest for _, manifest in sorted(snapshots.items(), reverse=True) if manifest), None)
    if newest is None and snapshots:
        inspection.notes.append(
            f"What lies in run {run_id} was not looked at: no snapshot of it can be read."
        )
    if newest is not None:
        _inspect_arrays(inspection, newest)
        documents = _inspect_rows(inspection, newest)
        records = _inspect_records(inspection, newest)
        _inspect_values(inspection, newest, records, documents)
    work = f"{run_path(run_id)}/wip/"
    orphans = [
        name for name in present if name not in named and not name.startswith((work, _log_folder(run_id)))
    ]
    if orphans and plan is None and None not in snapshots.values():
        nbytes = sum(present[name] for name in orphans)
        inspection.notes.append(
            f"Run {run_id} has {len(orphans)} objects ({nbytes:,} bytes) that no snapshot names, "
            f"{orphans[0]} among them: layerlake gc removes them."
        )
    named_by = newest.model_id if newest else plan["manifest"].get("model_id") if plan else None
    is_empty = holder is None and not snapshots
    models = frozenset([named_by]) if named_by else frozenset() if is_empty else None
    return Inspected(newest, is_log_whole, models)


def _log_folder(run_id: str) -> str:
    return f"{run_path(run_id)}/log/"


def _holder(inspection: Inspection, run_id: str, present: Mapping[str, int]) -> str | None:
    """Return who holds a run (:mod:`layerlake.catalog.reservation`)."""
    path = reservation_path(run_id)
    if path not in present:
        return None
    return inspection.examine(
        path, lambda content: str(read_sealed_json(content)["capture_id"]), is_optional=True
    )


# -- the log ------------------------------------------------------------------------------------


def _inspect_log(inspection: Inspection, run_id: str) -> dict[int, Manifest | None]:
    """Read every snapshot of a log: number → snapshot, None where it is damaged."""
    snapshots: dict[int, Manifest | None] = {}
    before: Manifest | None = None
    for name in inspection.store.list(_log_folder(run_id).rstrip("/")):
        path = f"{_log_folder(run_id)}{name}"
        digits = name.removesuffix(".json")
        if not digits.isdecimal() or path != log_path(run_id, int(digits)):
            inspection.report(path, Deviation("name", "eight digits and .json", name))
            continue
        number = int(digits)
        read = partial(_read_snapshot, run_id=run_id, number=number, before=before)
        snapshots[number] = manifest = inspection.examine(path, read)
        before = manifest or before
    return snapshots


def _read_snapshot(content: bytes, run_id: str, number: int, before: Manifest | None) -> Manifest:
    """Return a snapshot that agrees with itself, and names all that the one before it names."""
    manifest = Manifest.from_json(read_sealed_json(content))
    require("run and number", (run_id, number), (manifest.run_id, manifest.number))
    indices = [partition.index for partition in manifest.partitions]
    require("partitions, in order", sorted(set(indices)), indices)
    require("sites that are unknown", [], [name for name in manifest.sites if name not in SITES])
    for name, held in manifest.sites.items():
        require(f"partitions of {name} that the run does not have", [], sorted(set(held) - set(indices)))
    for name, indexed in manifest.zones.items():
        unheld = sorted(set(indexed) - set(manifest.sites.get(name, ())))
        require(f"partitions of {name} that have zones and no values", [], unheld)
    require("parts of documents", manifest.parts.get("tokens"), manifest.parts.get("documents"))
    n_rows, n_documents = (
        sum(getattr(p, field) for p in manifest.partitions) for field in ("n_rows", "n_documents")
    )
    require("tokens of all partitions", n_rows, manifest.n_tokens)
    require("documents of all partitions", n_documents, manifest.n_documents)
    if before is not None:
        for what in ("model_id", "shape", "identity", "geometry", "dtype", "codec"):
            require(f"{what} of the run", getattr(before, what), getattr(manifest, what))
        missing = named_objects(before) - named_objects(manifest) - {log_path(run_id, before.number)}
        require("objects that snapshots before it name, and it does not", [], sorted(missing))
    return manifest


def _inspect_work(
    inspection: Inspection, run_id: str, present: Mapping[str, int], holder: str | None
) -> dict[str, Any] | None:
    """Read an open capture's notes, and the objects that its ledgers say are written.

    Returns its frozen plan; None where none is open.
    """
    plan = None
    for name in sorted(present):
        if name.startswith(f"{run_path(run_id)}/wip/") and name != reservation_path(run_id):
            value = inspection.examine(name, read_sealed_json, is_optional=True)
            plan = value if name == frozen_plan_path(run_id, str(holder)) else plan
            if value is not None and name.startswith(f"{wip_path(run_id, str(holder))}/ledgers/"):
                _inspect_ledger(inspection, run_id, name, value)
    if holder == INDEXING or remover(holder) == COLLECTING:
        command = remover(holder) or INDEXING
        inspection.notes.append(
            f"Run {run_id} is held by layerlake {command}; if that was interrupted, run it again."
        )
    elif holder is not None:
        ledgers = sum(name.startswith(f"{wip_path(run_id, holder)}/ledgers/") for name in present)
        of_all = f" of {len(plan['work'])}" if plan else ""
        inspection.notes.append(
            f"A capture of run {run_id} is open ({holder}): {ledgers}{of_all} partitions are written."
        )
    return plan


def _inspect_ledger(inspection: Inspection, run_id: str, name: str, ledger: dict[str, Any]) -> None:
    """Hold the objects of a partition against the ledger that says they are written.

    Unless it has been attempted again: two writers may differ, and the capture itself settles that before its end.
    """
    objects = Inspection(inspection.store)
    objects.examine_all(
        (f"{run_path(run_id)}/{record['name']}", partial(_require_recorded, record=record))
        for record in recorded_objects(ledger)
    )
    folder, _, file = name.rpartition("/ledgers/")
    attempt = file.replace(".json", "-")
    attempts = [each for each in inspection.store.list(f"{folder}/attempts") if each.startswith(attempt)]
    if len(attempts) > 1 or (objects.problems and not inspection.store.exists(name)):
        return
    inspection.problems += objects.problems
    inspection.n_objects += objects.n_objects
    inspection.nbytes += objects.nbytes


def _require_recorded(content: bytes, record: Record) -> None:
    """Raise Deviation unless an object has the length and the checksum of its record."""
    require("bytes", record["nbytes"], len(content))
    require("CRC-32", record["crc32"], f"{zlib.crc32(content):08x}")


# -- tables -------------------------------------------------------------------------------------


def _inspect_rows(inspection: Inspection, manifest: Manifest) -> list[DocumentPart | None]:
    """Hold documents and tokens against each other and the manifest; None stands for a part that is damaged."""
    parts: list[DocumentPart | None] = []
    n_before: int | None = 0
    for name in manifest.parts.get("documents", ()):
        read = partial(read_document_part, manifest=manifest, first=n_before)
        part = inspection.examine(part_path(manifest.run_id, "documents", name), read)
        parts.append(part)
        n_before = n_before + part.n_all if part and n_before is not None else None
    for name, part in zip(manifest.parts.get("tokens", ()), parts, strict=False):
        path = part_path(manifest.run_id, "tokens", name)
        if part is None:
            inspection.examine(path, open_sealed_parquet)
        else:
            inspection.examine(path, partial(verify_token_part, part=part, shape=manifest.shape))
    whole = [part for part in parts if part]
    if len(whole) == len(parts):
        with inspection.of(log_path(manifest.run_id, manifest.number)):
            held = [int(index) for part in whole for index in np.unique(part.partitions)]
            require("partitions of its documents", [p.index for p in manifest.partitions], held)
            require("documents that are cut", sum(part.n_cut for part in whole), manifest.n_cut)
            require("documents that are refused", sum(part.n_refused for part in whole), manifest.n_refused)
    return parts


def _inspect_records(inspection: Inspection, manifest: Manifest) -> dict[Key, Record] | None:
    """Return the record of each object of the manifest; None unless all parts of ``objects`` are whole."""
    keys = object_keys(manifest)
    records: dict[Key, Record] = {}

    def read(content: bytes) -> dict[Key, Record]:
        found: dict[Key, Record] = {}
        for record in open_sealed_parquet(content).read().to_pylist():
            key = (record["site"], record["layer"], record["partition"])
            require(f"records of {record['name']}", 1, 1 + (key in found) + (key in records))
            require("name of an object of the manifest", keys.get(key), record["name"])
            found[key] = record
        return found

    is_whole = True
    for part in manifest.parts.get("objects", ()):
        found = inspection.examine(part_path(manifest.run_id, "objects", part), read)
        records |= found or {}
        is_whole &= found is not None
    if not is_whole:
        return None
    with inspection.of(log_path(manifest.run_id, manifest.number)):
        require("objects without a record", [], [name for key, name in keys.items() if key not in records])
    return records


# -- values -------------------------------------------------------------------------------------


def _inspect_arrays(inspection: Inspection, manifest: Manifest) -> None:
    """Read the ``zarr.json`` of the run's group and arrays."""
    folder = activations_path(manifest.run_id)
    inspection.examine(
        f"{folder}/zarr.json", lambda content: verify_group_metadata(read_sealed_json(content))
    )
    for site in (SITES[name] for name in manifest.sites if SITES[name].is_array):
        inspection.examine(
            f"{folder}/{site.name}/zarr.json", partial(_verify_array, site=site, manifest=manifest)
        )


def _verify_array(content: bytes, site: Site, manifest: Manifest) -> None:
    verify_array_metadata(read_sealed_json(content), site, manifest)


def _inspect_values(
    inspection: Inspection,
    manifest: Manifest,
    records: Mapping[Key, Record] | None,
    parts: list[DocumentPart | None],
) -> None:
    """Read every object of every site; count the values that are not finite against those that captures counted."""
    keys = object_keys(manifest)
    verify = partial(_verify_object, inspection, manifest=manifest, parts=parts)
    found = inspection.examine_all(
        (f"{run_path(manifest.run_id)}/{name}", partial(verify, key=key, record=(records or {}).get(key)))
        for key, name in keys.items()
    )
    n_found: Counter[str] = Counter()
    for (site, _, _), n in zip(keys, found, strict=True):
        n_found[site] += n or 0
    n_told = sum(
        (Counter(entry["nonfinite"]) for entry in manifest.captures if "nonfinite" in entry), Counter[str]()
    )
    with inspection.of(log_path(manifest.run_id, manifest.number)):
        # Captures may count more: a weight that is not a number stands above the diagonal too, where none is stored.
        untold = {site: n for site, n in n_found.items() if n > n_told[site]}
        require("values that are not finite, and no capture counted", {}, untold)


def _verify_object(
    inspection: Inspection,
    content: bytes,
    *,
    key: Key,
    manifest: Manifest,
    record: Record | None,
    parts: list[DocumentPart | None],
) -> int:
    """Hold an object against its record, then decode it, and hold its zones against its values.

    Returns how many of these are not finite.
    """
    if record is not None:
        _require_recorded(content, record)
    name, layer, partition = key
    site = SITES[name]
    if layer is not None:
        cut = ShardCut.of(site, manifest, partition)
        if partition not in manifest.zones.get(name, ()):
            return verify_shard(content, cut)
        check = ZoneCheck(site, layer, partition, manifest)
        n_nonfinite = verify_shard(content, cut, check.look)
        zones = f"{run_path(manifest.run_id)}/{zones_name(site, layer, partition)}"
        inspection.examine(zones, check.verify)
        return n_nonfinite
    documents = next((part for part in parts if part and partition in part.partitions), None)
    if documents is None:  # its part of the table is damaged: there is nothing to hold this against
        open_sealed_parquet(content)
        return 0
    return verify_attn_band(content, *documents.of_partition(partition), manifest.shape)
