"""A run's sites as labelled arrays, over Dask over Zarr (see :meth:`Run.array` for what Zarr does not tell)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray

from .shards import decode
from .sites import SITES
from .tables import TOKENS

if TYPE_CHECKING:
    from .run import Run

__all__ = ["labelled"]


def labelled(run: Run, name: str) -> xarray.DataArray:
    """Return a site without its unwritten rows, labelled by row, document, position and token_id.

    Nothing is read of the values; of the tables, the tokens. Excluded documents are in it (:meth:`Run.excluding`).

    Raises
    ------
    SiteNotFound
        The run does not hold the site in every partition.
    """
    run.require_sites(name)
    site, array = SITES[name], run.array(name)
    axis = site.dims.index(site.rows)
    # Dask takes equal names for equal values: two lakes may hold runs of one id, captured on two machines.
    key = f"{run.store.url}/{run.run_id}/{name}/{array.shape}"
    lazy = da.from_array(array, chunks=array.shards or array.chunks, name=key)
    pieces = []
    for partition in run.manifest.partitions:
        index = [slice(None)] * 3
        index[axis] = slice(*run.span(name, partition))
        pieces.append(lazy[tuple(index)])
    values = da.concatenate(pieces, axis=axis)
    if run.manifest.dtype == "bfloat16":
        values = values.map_blocks(decode, "bfloat16", dtype=np.float32)
    coords: dict[str, Any] = {site.dims[0]: np.arange(values.shape[0])}
    if site.rows == "token":
        whole = type(run)(run.store, run.manifest) if run.excluded else run
        coords |= {label: ("token", whole.tokens[label].to_numpy()) for label in TOKENS.names}
    return xarray.DataArray(values, dims=site.dims, coords=coords, name=name)
