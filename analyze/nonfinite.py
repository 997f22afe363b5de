"""Which documents hold values that are not finite, so that an analysis can be asked to leave them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.layout import n_pairs
from ..catalog.run import Run
from ..catalog.sites import SITES
from .reduce import reduce_statistic
from .statistic import State, Statistic, Unit

__all__ = ["NonfiniteStatistic", "find_nonfinite"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NonfiniteStatistic(Statistic[tuple[str, int, int, npt.NDArray[Any]]]):
    """How many values of each document are NaN or infinite, by site and layer.

    A unit reads one layer of one site in one partition: one object, and a flag for each value. The state has a row
    for each document, site and layer that has any.
    """

    run: str
    sites: tuple[str, ...]
    n_layers: tuple[int, ...]
    documents: Ints
    starts: dict[str, Ints]
    """rows (token, pair) → where each document begins on that axis."""
    stops: dict[str, Ints]
    partitions: Ints
    """The partition of each document."""

    @classmethod
    def open(cls, run: Run, sites: tuple[str, ...]) -> Self:
        """Read the documents table."""
        table = run.stored_documents.sort_by("row_start")
        names = ("document", "n_tokens", "row_start", "pair_start", "partition")
        document, length, row, pair, partition = (table[name].to_numpy().astype(np.int64) for name in names)
        starts = {"token": row, "pair": pair}
        stops = {
            "token": row + length,
            "pair": pair + n_pairs(length),
        }
        n_layers = tuple(SITES[site].n_layers(run.shape) for site in sites)
        return cls(run.run_id, sites, n_layers, document, starts, stops, partition)

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return {"sites": list(self.sites)}

    def units(self) -> list[Unit]:  # noqa: D102
        members = [np.flatnonzero(self.partitions == index) for index in np.unique(self.partitions)]
        return [
            Unit(((site, layer),), items)
            for site, n_layers in zip(self.sites, self.n_layers, strict=True)
            for layer in range(1 if site == "attn_band" else n_layers)  # its layers are one object
            for items in members
        ]

    def read(self, run: Run, unit: Unit) -> tuple[str, int, int, npt.NDArray[Any]]:
        """Return site, layer, partition, and how many values of each of the unit's documents are not finite."""
        ((site, layer),) = unit.reads
        index = int(self.partitions[unit.items[0]])
        partition = run.manifest.partition(index)
        if site == "attn_band":
            table = run.read_attn_band(partition, columns=["document", "distance_sums", "bos_sum"])
            sums = table["distance_sums"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            bad = (~np.isfinite(sums)).sum(axis=1) + ~np.isfinite(table["bos_sum"].to_numpy())
            numbers = table["document"].to_numpy()
            counts = np.array([bad[numbers == number].sum() for number in self.documents[unit.items]])
            return site, layer, index, counts
        values = run.read(site, layer, partition)
        rows = SITES[site].rows
        flags = (~np.isfinite(values)).sum(axis=0 if rows == "pair" else 1)
        first, _ = run.span(site, partition)
        before = np.concatenate([[0], np.cumsum(flags)])
        starts, stops = (place[rows][unit.items] - first for place in (self.starts, self.stops))
        return site, layer, index, before[stops] - before[starts]

    def zero(self) -> State:  # noqa: D102
        return State.empty(3, ())

    def measure(self, block: tuple[str, int, int, npt.NDArray[Any]]) -> State:
        """Return the state of a block: key (document, site, layer), values the count."""
        site, layer, index, counts = block
        documents = self.documents[self.partitions == index][counts > 0]
        constant = np.full(len(documents), 0)
        keys = np.stack([documents, constant + self.sites.index(site), constant + layer], axis=1)
        return State.of(keys, counts[counts > 0].astype(np.float64))

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return one table: document, site, layer, n_values."""
        document, site, layer = state.keys.T
        columns = {
            "document": document,
            "site": [self.sites[i] for i in site],
            "layer": layer.astype(np.int32),
            "n_values": state.values.astype(np.int64),
        }
        return {"nonfinite": pa.table(columns)}


def find_nonfinite(run: Run, sites: tuple[str, ...], *, scheduler: str = "threads") -> pa.Table:
    """Return the documents that hold values that are NaN or infinite: document, site, layer, n_values.

    Reads all of the sites once. ``layer`` is 0 for attn_band, whose layers are not told apart.
    """
    statistic = NonfiniteStatistic.open(run, sites)
    return statistic.finalise(reduce_statistic(statistic, run, scheduler=scheduler))["nonfinite"]
