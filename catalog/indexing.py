"""Write the zones that a run lacks, because it was captured before there were any, or because they are gone.

Shards are never rewritten, so zones that are there stay right, and whoever is interrupted goes on where he was. The
next manifest, which names them all, comes last.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CaptureInProgress, RunNotFound
from .layout import run_path, zones_name
from .manifest import Manifest, commit_manifest, read_manifest
from .references import object_keys
from .reservation import INDEXING, release_run, reserve_run, reserved_by, take_over_run
from .run import Run
from .shards import decode, read_site
from .sites import SITES
from .stores import Store
from .tables import to_parquet
from .zones import with_zones, zone_table

__all__ = ["Indexed", "index_run"]

_N_THREADS = 4
"""Shards that are read at once: as many are in memory."""

_Key = tuple[str, int, int]
"""(site, layer, partition) of a shard."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """What was written."""

    run: str
    """Its id."""
    objects: int
    nbytes: int


def index_run(store: Store, run_id: str) -> Indexed:
    """Write the zones that a run lacks, and the manifest that names them; of a run that lacks none, nothing.

    Reads the shards whose zones are lacking, once, four at a time.

    Parameters
    ----------
    store : Store
        The lake.
    run_id : str
        The run.

    Raises
    ------
    CaptureInProgress
        Somebody holds the run: a capture of it is open, or it is being removed.
    CorruptRun
        A shard is gone, or is not what was written.
    RunNotFound
        It was removed.
    """
    _reserve(store, run_id)
    try:
        manifest = _read_manifest(store, run_id)
        run, lacking = Run(store, manifest), _lacking(store, manifest)
        with ThreadPoolExecutor(_N_THREADS) as pool:
            nbytes = list(pool.map(lambda key: _write_zones(run, key), lacking))
        zones = with_zones(manifest.zones, [(site, partition) for site, _, partition in _shards(manifest)])
        if zones != manifest.zones:
            with suppress(FileExistsError):  # another who does the same was faster
                commit_manifest(store, dataclasses.replace(manifest, zones=zones))
    finally:
        release_run(store, run_id, INDEXING)
    return Indexed(run_id, len(lacking), sum(nbytes))


def _reserve(store: Store, run_id: str) -> None:
    holder = reserve_run(store, run_id, INDEXING)
    if holder == INDEXING:
        return
    newest = read_manifest(store, run_id)
    is_over = newest is not None and newest.has_capture(holder)  # and did not come to say so
    if not (is_over and take_over_run(store, run_id, INDEXING, held_by=holder)):
        raise CaptureInProgress(
            f"Run {run_id} is held by {holder}: a capture of it is open, or somebody clears up.",
            hint="Run the command again when that is done; what is abandoned, layerlake gc removes.",
        )


def _read_manifest(store: Store, run_id: str) -> Manifest:
    manifest = read_manifest(store, run_id)
    if manifest is None:
        raise RunNotFound(f"Run {run_id} has no manifest.")
    return manifest


def _shards(manifest: Manifest) -> list[_Key]:
    return [(site, layer, partition) for site, layer, partition in object_keys(manifest) if layer is not None]


def _lacking(store: Store, manifest: Manifest) -> list[_Key]:
    """Return the shards beside which no zones lie, whatever the manifest says."""
    folder = run_path(manifest.run_id)
    there = {name for name, _ in store.walk(f"{folder}/zones")}
    return [
        (site, layer, partition)
        for site, layer, partition in _shards(manifest)
        if f"{folder}/{zones_name(SITES[site], layer, partition)}" not in there
    ]


def _write_zones(run: Run, key: _Key) -> int:
    """Write the zones of one shard, and return their bytes."""
    name, layer, partition = key
    site, manifest = SITES[name], run.manifest
    start, stop = run.span(name, manifest.partition(partition))
    chunk_rows, is_pairs = manifest.geometry.chunk_rows[name], site.rows == "pair"
    series = range(manifest.shape.n_heads) if is_pairs else (0,)
    stored = read_site(run.store, manifest, site, layer, range(start, stop), series=series)

    def as_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return decode(values, manifest.dtype).astype(np.float32, copy=False)

    content = to_parquet(
        zone_table(
            stored[..., 0] if is_pairs else stored[0],
            site=site,
            layer=layer,
            first_chunk=start // chunk_rows,
            chunk_rows=chunk_rows,
            as_float32=as_float32,
        )
    )
    if reserved_by(run.store, run.run_id) != INDEXING:
        raise CaptureInProgress(
            f"Run {run.run_id} was taken over while it was indexed.",
            hint="See what is there, and run the command again: layerlake ls LAKE",
        )
    run.store.write(f"{run_path(run.run_id)}/{zones_name(site, layer, partition)}", content)
    return len(content)
