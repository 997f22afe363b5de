"""How large the values of a site relation may be in each chunk of a layer, as far as zones tell without reading it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.manifest import Partition
from ..catalog.run import Run
from ..catalog.sites import SITES
from ..catalog.zones import read_zones

if TYPE_CHECKING:
    from .scan import SiteRelation

__all__ = ["Floats", "Ints", "chunk_bounds", "floats", "norm_bounds"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def chunk_bounds(
    run: Run,
    relation: SiteRelation,
    layer: int,
    partition: Partition,
    bound: Callable[[pa.Table], Floats],
    *,
    columns: Sequence[str] | None = None,
) -> tuple[Ints, Floats]:
    """Return the chunks of a layer in a partition, and a bound on each: infinite where it is not known.

    Parameters
    ----------
    run, relation, layer, partition
        Where. Of a relation that adds sites up, so are their bounds.
    bound : callable
        Takes it from a shard's zones: float32 ``[chunk]``.
    columns : sequence of str, optional
        Those of the zones that it needs.
    """
    name = relation.sites[0]
    start, stop = run.span(name, partition)
    chunk_rows = run.manifest.geometry.chunk_rows[name]
    chunks = np.arange(start // chunk_rows, -(-stop // chunk_rows))
    total = np.zeros(len(chunks), np.float32)
    wanted = None if columns is None else ["n_nonfinite", *columns]
    for name in relation.sites:
        zones = read_zones(run, name, layer + relation.shift, partition.index, columns=wanted)
        total += (
            np.inf if zones is None else np.where(zones["n_nonfinite"].to_numpy() > 0, np.inf, bound(zones))
        )
    return chunks, total


def norm_bounds(run: Run, relation: SiteRelation, layer: int, partition: Partition) -> tuple[Ints, Floats]:
    """Return the chunks of a layer in a partition, and for each what SQL's ``norm(vec)`` does not exceed there.

    Infinite for those without zones, and for those that hold a value that is not finite.
    """
    chunks, bounds = chunk_bounds(
        run, relation, layer, partition, lambda zones: floats(zones["norm_max"]), columns=["norm_max"]
    )
    # float32 sums of as many squares may differ by so much, and squares may be too small or too large for it
    width = SITES[relation.sites[0]].width(run.shape)
    bounds = bounds * np.float32(1 + (width + 4) * 2.0**-23) + np.float32(1e-15)
    bounds[bounds > 1e19] = np.inf
    return chunks, bounds


def floats(column: pa.ChunkedArray) -> Floats:
    """Return a column of float32 as an array."""
    values: Floats = column.to_numpy()
    return values
