"""Zones: the least and the largest value of each chunk, so that a question about values need not read them all.

One Parquet object beside each shard, made of the shard's values alone: a capture that stores them and ``index``, which
comes later, make the same bytes. A run may lack them, in whole or in part; nothing but the speed depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .layout import run_path, zones_name
from .manifest import Manifest
from .run import Run
from .sites import SITES, Site
from .tables import read_part

__all__ = ["ZONES", "has_zones", "read_zones", "with_zones", "zone_table"]

Floats = npt.NDArray[np.float32]

ZONES = pa.schema(
    [
        pa.field("site", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),  # the boundary, for resid
        pa.field("head", pa.int32()),  # of pattern, whose chunks are each of one head
        pa.field("chunk", pa.int32(), nullable=False),  # numbered along the whole row axis
        # of the finite values; NULL where there are none
        pa.field("min", pa.float32()),
        pa.field("max", pa.float32()),
        # of the Euclidean norms, in float32, of vectors without a value that is not finite; NULL for pattern
        pa.field("norm_min", pa.float32()),
        pa.field("norm_max", pa.float32()),
        pa.field("n_nonfinite", pa.int64(), nullable=False),
    ]
)
"""The columns of all sites; ``mlp_post`` has one more, ``unit_max``: the largest finite value of each unit."""


class _Zone(NamedTuple):
    """One chunk; NaN stands for what there is not."""

    least: np.float32
    largest: Floats
    """By unit."""
    norms: Floats
    """Of the rows without a value that is not finite."""
    n_nonfinite: int

    @classmethod
    def of(cls, values: Floats, *, with_norms: bool) -> _Zone:
        """Look at the used rows of a chunk: ``[row, value]``."""
        with np.errstate(over="ignore", invalid="ignore"):
            # not BLAS, whose sums depend on how many threads it takes
            squares = np.einsum("rv,rv->r", values, values) if with_norms else np.empty(0, np.float32)
            least, largest, norms = values.min(), values.max(axis=0), np.sqrt(squares)
        n_nonfinite = 0
        if not (np.isfinite(least) and np.isfinite(largest).all()):  # NaN wins in both
            is_finite = np.isfinite(values)
            n_nonfinite = int(is_finite.size - np.count_nonzero(is_finite))
            least = np.where(is_finite, values, np.inf).min()
            largest = np.where(is_finite, values, -np.inf).max(axis=0)
            least, largest = (np.where(np.isfinite(found), found, np.nan) for found in (least, largest))
            norms = norms[is_finite.all(axis=1)] if with_norms else norms
        # 0.0 and -0.0 are equal, and which of them a minimum finds is up to the processor
        return cls(least + np.float32(0), largest + np.float32(0), norms, n_nonfinite)


def zone_table(
    stored: npt.NDArray[Any],
    *,
    site: Site,
    layer: int,
    first_chunk: int,
    chunk_rows: int,
    as_float32: Callable[[npt.NDArray[Any]], Floats],
) -> pa.Table:
    """Return the zones of one shard (:data:`ZONES`), in the order of its heads and chunks.

    Costs 0.3 ns a value beside the conversion.

    Parameters
    ----------
    stored : ndarray
        The used rows as they are stored: ``[token, width]``, or ``[head, pair]`` of ``pattern``.
    site, layer : Site, int
        Which.
    first_chunk : int
        The number of the first chunk along the row axis.
    chunk_rows : int
        Rows of a chunk.
    as_float32 : callable
        Converts stored values, which is exact, so that it may be done in any way.
    """
    is_pair = site.rows == "pair"
    n_rows = stored.shape[1 if is_pair else 0]
    zones, heads, chunks = [], [], []
    for head, series in enumerate(stored[:, :, None] if is_pair else stored[None]):
        for start in range(0, n_rows, chunk_rows):
            values = as_float32(series[start : start + chunk_rows])
            zones.append(_Zone.of(values, with_norms=not is_pair))
            heads.append(head if is_pair else None)
            chunks.append(first_chunk + start // chunk_rows)
    largest = np.stack([zone.largest for zone in zones])  # [zone, unit]
    columns = {
        "site": pa.array([site.name] * len(zones)),
        "layer": pa.array([layer] * len(zones), pa.int32()),
        "head": pa.array(heads, pa.int32()),
        "chunk": pa.array(chunks, pa.int32()),
        "min": _known([zone.least for zone in zones]),
        # fmax: a unit may have no finite value where others have
        "max": _known(np.fmax.reduce(largest, axis=1)),
        "norm_min": _known([zone.norms.min() if len(zone.norms) else np.nan for zone in zones]),
        "norm_max": _known([zone.norms.max() if len(zone.norms) else np.nan for zone in zones]),
        "n_nonfinite": pa.array([zone.n_nonfinite for zone in zones], pa.int64()),
    }
    table = pa.table(columns, schema=ZONES)
    if site.width_name != "d_mlp":
        return table
    by_unit = pa.FixedSizeListArray.from_arrays(_known(largest.reshape(-1)), largest.shape[1])
    return table.append_column(pa.field("unit_max", by_unit.type, nullable=False), by_unit)


def _known(values: npt.NDArray[Any] | Sequence[Any]) -> pa.Array:
    """Return float32 values as a column, NULL where they are NaN."""
    array = np.asarray(values, dtype=np.float32)
    return pa.array(array, mask=np.isnan(array))


def with_zones(
    zones: Mapping[str, tuple[int, ...]], added: Iterable[tuple[str, int]]
) -> dict[str, tuple[int, ...]]:
    """Return the field ``zones`` of a manifest with those of some more (site, partition).

    Examples
    --------
    >>> with_zones({"resid": (0,)}, [("mlp_out", 0), ("resid", 2), ("resid", 1), ("resid", 1)])
    {'resid': (0, 1, 2), 'mlp_out': (0,)}
    """
    held = {site: set(partitions) for site, partitions in zones.items()}
    for site, partition in added:
        held.setdefault(site, set()).add(partition)
    return {site: tuple(sorted(held[site])) for site in SITES if site in held}


def has_zones(manifest: Manifest) -> bool:
    """Tell whether all values of a run that lie in arrays have their zones."""
    return all(
        set(partitions) <= set(manifest.zones.get(site, ()))
        for site, partitions in manifest.sites.items()
        if SITES[site].is_array
    )


def read_zones(
    run: Run, site: str, layer: int, partition: int, *, columns: Sequence[str] | None = None
) -> pa.Table | None:
    """Read the zones of one shard, or some of their columns; None where the run has none.

    Raises
    ------
    CorruptRun
        The object is gone, or is not what was written.
    """
    if partition not in run.manifest.zones.get(site, ()):
        return None
    name = zones_name(SITES[site], layer, partition)
    return read_part(run.store, f"{run_path(run.run_id)}/{name}", columns=columns)
