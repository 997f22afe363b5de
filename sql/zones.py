"""``zones`` as rows: one a chunk, and one a chunk and unit where the largest value of each unit is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.run import Run
from ..catalog.sites import SITES
from ..catalog.zones import ZONES, read_zones
from .dataset import Scan, filtered, possible

__all__ = ["ZONE_ROWS", "zone_scan"]

_PLACE, _FOUND = ZONES.names[:4], ZONES.names[4:]

ZONE_ROWS = pa.schema(
    [*((name, ZONES.field(name).type) for name in _PLACE), ("unit", pa.int32())]
    + [(name, ZONES.field(name).type) for name in _FOUND]
)
"""``catalog.zones.ZONES`` and the unit: NULL where a row is about a whole chunk; else only ``max`` is known."""


def zone_scan(run: Run) -> Scan:
    """Return the scan of a run's zones, shard by shard.

    Reads the objects of the sites, layers and chunks that may pass the filter, and makes rows of units only if some
    may. Memory: the rows of one shard's units that may pass.

    Parameters
    ----------
    run : Run
        The snapshot that is read.
    """

    def scan(columns: Sequence[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        units = _possible_units(run, where)
        for site, layer, partition in _possible_shards(run, where):
            has_units = SITES[site].width_name == "d_mlp" and bool(units)
            names = [*ZONES.names, *(["unit_max"] if has_units else [])]
            zones = read_zones(run, site, layer, partition, columns=names)
            if zones is None:
                continue
            for table in (zones, *([_by_unit(zones, units)] if has_units else [])):
                rows = pa.table([_column(table, name) for name in ZONE_ROWS.names], schema=ZONE_ROWS)
                kept = rows if where is None else filtered(rows, where)
                yield from kept.select(columns).to_batches()

    return scan


def _column(table: pa.Table, name: str) -> pa.Array | pa.ChunkedArray:
    has = name in table.column_names
    return table[name] if has else pa.nulls(table.num_rows, ZONE_ROWS.field(name).type)


def _possible_shards(run: Run, where: pc.Expression | None) -> Iterator[tuple[str, int, int]]:
    """Yield site, layer and partition of the shards whose zones may pass a filter."""
    manifest, field = run.manifest, pc.field
    places = [(site, layer) for site in manifest.zones for layer in range(SITES[site].n_layers(run.shape))]
    guarantees = [(field("site") == site) & (field("layer") == layer) for site, layer in places]
    for place in possible(where, ZONE_ROWS, guarantees):
        site, layer = places[place]
        held, chunk_rows = manifest.zones[site], manifest.geometry.chunk_rows[site]
        spans = [run.span(site, manifest.partition(index)) for index in held]
        bounds = [
            (field("chunk") >= start // chunk_rows) & (field("chunk") <= (stop - 1) // chunk_rows)
            for start, stop in spans
        ]
        for i in possible(where, ZONE_ROWS, [bound & guarantees[place] for bound in bounds]):
            yield site, layer, held[i]


def _possible_units(run: Run, where: pc.Expression | None) -> list[int]:
    """Return the units whose rows may pass a filter."""
    return possible(where, ZONE_ROWS, [pc.field("unit") == unit for unit in range(run.shape.d_mlp)])


def _by_unit(zones: pa.Table, units: Sequence[int]) -> pa.Table:
    """Return a row for each chunk and unit."""
    by_chunk = zones["unit_max"].combine_chunks()
    largest = by_chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(by_chunk), -1)[:, units]
    chunk = np.repeat(np.arange(len(by_chunk)), len(units))
    table = zones.select(_PLACE).take(pa.array(chunk))
    table = table.append_column("unit", pa.array(np.tile(np.array(units, np.int32), len(by_chunk))))
    flat = largest.reshape(-1)
    return table.append_column("max", pa.array(flat, mask=np.isnan(flat)))
