"""What the snapshots of a run name: the objects that must be there, and that nobody may remove."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .layout import activations_path, log_path, object_name, part_path, run_path, zones_name
from .manifest import Manifest
from .reservation import remover
from .sites import SITES

__all__ = ["find_lost_snapshots", "named_objects", "object_keys", "recorded_objects", "zone_keys"]

Key = tuple[str, int | None, int]
"""(site, layer, partition) of an object; layer None where all layers are in one."""


def object_keys(manifest: Manifest) -> dict[Key, str]:
    """Return the objects that hold the values of a snapshot's sites, by key; names are those in the run's folder."""
    keys: dict[Key, str] = {}
    for name, partitions in manifest.sites.items():
        site = SITES[name]
        layers: list[int | None] = list(range(site.n_layers(manifest.shape))) if site.is_array else [None]
        for layer in layers:
            for partition in partitions:
                keys[name, layer, partition] = object_name(site, layer or 0, partition)
    return keys


def zone_keys(manifest: Manifest) -> dict[Key, str]:
    """Return the objects that hold a snapshot's zones, by the key of the object that they are the zones of."""
    return {
        (name, layer, partition): zones_name(SITES[name], layer, partition)
        for name, partitions in manifest.zones.items()
        for layer in range(SITES[name].n_layers(manifest.shape))
        for partition in partitions
    }


def recorded_objects(ledger: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return name, length and checksum of every object that a ledger says is written: shards, tables and zones."""
    records = list(ledger.get("objects", ()))
    return records + [record["zones"] for record in records if "zones" in record]


def named_objects(manifest: Manifest) -> set[str]:
    """Return the name of every object in the lake that a snapshot of a run names, itself included."""
    run_id = manifest.run_id
    folder, arrays = run_path(run_id), activations_path(run_id)
    return {
        log_path(run_id, manifest.number),
        *(part_path(run_id, table, part) for table, parts in manifest.parts.items() for part in parts),
        f"{arrays}/zarr.json",
        *(f"{arrays}/{site}/zarr.json" for site in manifest.sites if SITES[site].is_array),
        *(f"{folder}/{name}" for keys in (object_keys, zone_keys) for name in keys(manifest).values()),
    }


def find_lost_snapshots(
    run_id: str, numbers: Iterable[int], object_parts: Iterable[str], named: set[str], holder: str | None
) -> list[str]:
    """Return the snapshots that a run's log has lost.

    The log has no gaps. And a capture writes its part of the table ``objects`` right before its snapshot, and holds
    the run until after it: a part that no snapshot names, of a capture that does not hold the run, has lost its own.

    Parameters
    ----------
    run_id : str
        The run.
    numbers : iterable of int
        Those of the snapshots in its log.
    object_parts : iterable of str
        Names in the lake of the parts of its table ``objects``, listed before the log was.
    named : set of str
        What the snapshots name.
    holder : str or None
        Who holds the run (:mod:`layerlake.catalog.reservation`).
    """
    there = set(numbers)
    newest = max(there, default=0)
    lost = [number for number in range(1, newest + 1) if number not in there]
    orphans = [name for name in object_parts if name not in named and f"part-{holder}.parquet" not in name]
    if orphans and remover(holder) is None:
        lost.append(newest + 1)
    return [log_path(run_id, number) for number in lost]
