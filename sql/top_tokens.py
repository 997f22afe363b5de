"""The tokens at which a unit is largest: zones tell in which chunks to look first, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.errors import QueryError, SiteNotFound, did_you_mean
from ..catalog.run import Run
from ..catalog.sites import SITES
from .bounds import Floats, Ints, chunk_bounds, floats
from .labels import TOKEN_LABELS, Labels
from .reads import ReadLog
from .scan import SITE_RELATIONS, SiteScan

__all__ = ["TOP_TOKENS", "top_tokens"]

TOP_TOKENS = pa.schema(
    [
        *((name, TOKEN_LABELS[name]) for name in ("row", "document", "position", "text")),
        ("value", pa.float32()),
    ]
)
"""The columns of :func:`top_tokens`."""

_N_READS = 8
"""Objects of zones that are read at once: hides the way to a remote store."""


def top_tokens(
    run: Run, site: str, layer: int, unit: int, k: int = 10, *, log: ReadLog | None = None
) -> pa.Table:
    """Return the k tokens at which a unit has its largest values, the largest first, equal ones in stored order.

    Reads the zones of the layer, then its chunks from the largest value that one may hold downwards, until no other
    can hold a larger one than the k that are found. Without zones, it reads all chunks of the layer. Values that are
    not a number count for nothing.

    Parameters
    ----------
    run : Run
        The run.
    site : str
        A relation with vectors: ``mlp_post``, ``resid``, ``resid_mid``, … Zones know the units of ``mlp_post`` one by
        one; of another site's, only how large any of them gets.
    layer : int
        The layer, or the boundary of ``resid``.
    unit : int
        The unit, from 0.
    k : int
        How many; fewer if the run has fewer tokens.
    log : ReadLog, optional
        Is told of every read of values.

    Returns
    -------
    pa.Table
        :data:`TOP_TOKENS`.

    Raises
    ------
    SiteNotFound
        There is no such site, or the run lacks it.
    QueryError
        The site has no such layer or unit, or k is not positive.
    """
    scan = _vectors(run, site, layer, log)
    width = scan.site.width(run.shape)
    if not 0 <= unit < width:
        raise QueryError(f"{site} has no unit {unit}.", hint=f"Units are 0 … {width - 1}.")
    if k < 1:
        raise QueryError(f"The top {k} tokens are none.", hint="k is at least 1.")

    def largest(zones: pa.Table) -> Floats:
        if "unit_max" not in zones.column_names:
            return floats(zones["max"])
        return floats(pc.list_element(zones["unit_max"], unit))

    chunks, bounds = _bounds(run, scan, layer, largest)
    best = TOP_TOKENS.empty_table()
    for i in np.argsort(-bounds, kind="stable").tolist():
        if best.num_rows == k and best["value"][-1].as_py() > bounds[i]:
            break
        found = pa.concat_tables([best, _values(scan, layer, int(chunks[i]), unit)])
        order = pc.sort_indices(found, [("value", "descending"), ("row", "ascending")])
        best = found.take(order[:k])
    return best


def _vectors(run: Run, site: str, layer: int, log: ReadLog | None) -> SiteScan:
    """Return the scan of a site relation that has vectors and the layer."""
    names = [name for name, relation in SITE_RELATIONS.items() if SITES[relation.sites[0]].rows == "token"]
    if site not in names:
        raise SiteNotFound(
            f"There are no vectors of '{site}'.{did_you_mean(site, names)}",
            hint=f"Sites with vectors are: {', '.join(names)}.",
        )
    relation = SITE_RELATIONS[site]
    if not relation.exists_in(run):
        run.require_sites(*relation.sites)
        raise SiteNotFound(f"Run {run.run_id} has no {site}: its blocks are {run.shape.block}.")
    if not 0 <= layer < relation.n_layers(run):
        last = relation.n_layers(run) - 1
        raise QueryError(
            f"{site} has no {relation.axis} {layer}.", hint=f"Of run {run.run_id} it has 0 … {last}."
        )
    return SiteScan(run, relation, Labels(run), log)


def _bounds(run: Run, scan: SiteScan, layer: int, bound: Callable[[pa.Table], Floats]) -> tuple[Ints, Floats]:
    """Return the chunks of a layer in all partitions, and a bound on each (:func:`chunk_bounds`)."""
    with ThreadPoolExecutor(_N_READS) as pool:
        found = list(pool.map(lambda p: chunk_bounds(run, scan.relation, layer, p, bound), scan.partitions))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    chunks, bounds = zip(*found, strict=True)
    return np.concatenate(chunks), np.concatenate(bounds)


def _values(scan: SiteScan, layer: int, chunk: int, unit: int) -> pa.Table:
    """Return one unit's values in one chunk that are numbers (:data:`TOP_TOKENS`)."""
    place = (pc.field(scan.relation.axis) == layer) & (pc.field("chunk") == chunk)
    labels = TOP_TOKENS.names[:-1]
    batches = list(scan.batches([*labels, "vec"], place))
    table = pa.Table.from_batches(batches)  # no chunk is without a row
    values = table.select(labels).append_column("value", pc.list_element(table["vec"], unit))
    return values.filter(pc.invert(pc.is_nan(values["value"]))).cast(TOP_TOKENS)
