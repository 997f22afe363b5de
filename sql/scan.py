"""A site of a run as rows: the reader that DuckDB's predicates and projections reach.

A query reads in three steps, each of which leaves the next one less to do. Arrow simplifies the filter
under what is known of each partition, layer and head without looking (``dataset.possible``). For a
partition that is left, the filter is applied to the labels of its rows (document, position, text, …), which
come from the token table. Only then are values read: the chunks that hold a row which passed, and none at
all if the query does not ask for the values. One batch is one layer of one partition (and one head of
``pattern``), which bounds the memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.manifest import Partition
from ..catalog.run import Run
from ..catalog.shards import Rows, split_rows
from ..catalog.sites import SITES
from .ahead import read_ahead
from .bounds import Ints, norm_bounds
from .dataset import filtered, mentions, possible
from .keys import Keys
from .labels import PAIR_LABELS, TOKEN_LABELS, Labels
from .reads import Read, ReadLog

__all__ = ["SITE_RELATIONS", "SiteRelation", "SiteScan"]


@dataclass(frozen=True, slots=True)
class SiteRelation:
    """How a relation of a run's schema comes from the sites that are stored."""

    name: str
    axis: Literal["boundary", "layer"]
    sites: tuple[str, ...]
    """The sites that are read; their values are added."""
    shift: int = 0
    """Layer l of the relation is at l + shift of the array."""

    def exists_in(self, run: Run) -> bool:
        """Tell whether the run holds what the relation is made of."""
        # in parallel blocks the MLP does not read resid_pre + attn_out: there is no such place in the model
        makes_sense = self.name != "resid_mid" or run.shape.block == "sequential"
        return makes_sense and all(site in run.sites for site in self.sites)

    def n_layers(self, run: Run) -> int:
        """Return the number of layers, or of boundaries."""
        return run.shape.n_layers + (self.axis == "boundary")


SITE_RELATIONS: dict[str, SiteRelation] = {
    relation.name: relation
    for relation in (
        SiteRelation("resid", "boundary", ("resid",)),
        SiteRelation("resid_pre", "layer", ("resid",)),
        SiteRelation("resid_mid", "layer", ("resid", "attn_out")),
        SiteRelation("resid_post", "layer", ("resid",), shift=1),
        SiteRelation("attn_out", "layer", ("attn_out",)),
        SiteRelation("mlp_out", "layer", ("mlp_out",)),
        SiteRelation("mlp_post", "layer", ("mlp_post",)),
        SiteRelation("pattern", "layer", ("pattern",)),
    )
}
"""The site relations of a run's schema, by name."""


class SiteScan:
    """The rows of one site relation of one run.

    Parameters
    ----------
    run : Run
        The snapshot that is read.
    relation : SiteRelation
        What is read of it.
    labels : Labels
        The run's labels, shared by all of its relations.
    log : ReadLog, optional
        Is told of every read of values.
    """

    def __init__(self, run: Run, relation: SiteRelation, labels: Labels, log: ReadLog | None = None) -> None:
        self.run = run
        self.relation = relation
        self.labels = labels
        self.log = log
        self.site = SITES[relation.sites[0]]
        self.is_pairs = self.site.rows == "pair"
        # zones are whole objects, and a query may scan a site several times: 12 bytes a chunk are kept of them
        self._norm_bounds = cache(partial(norm_bounds, run, relation))

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns: the places of the first dimensions, the labels of the row, the values."""
        places = [(name, pa.int32()) for name in self._axes]
        if self.is_pairs:
            return pa.schema([*places, *PAIR_LABELS.items(), ("value", pa.float32())])
        vector = pa.list_(pa.float32(), self.site.width(self.run.shape))
        return pa.schema([*places, *TOKEN_LABELS.items(), ("chunk", pa.int32()), ("vec", vector)])

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The columns that count from 0 wherever the others are equal: layer and head, query and key."""
        return (*self._axes, "query", "key") if self.is_pairs else self._axes

    @property
    def partitions(self) -> list[Partition]:
        """The partitions that all of the relation's sites hold."""
        manifest = self.run.manifest
        return [
            p for p in manifest.partitions if all(p.index in manifest.sites[s] for s in self.relation.sites)
        ]

    def batches(
        self,
        columns: Sequence[str],
        where: pc.Expression | None,
        keys: Keys | None = None,
        min_norm: float | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows that pass the filter, partition by partition, layer by layer (see :data:`Scan`).

        Rows that are not among the ``keys`` are left out, and so are chunks in which no vector's norm can reach
        ``min_norm`` (the zones of the layers that are left tell). Reads the token table once; of the arrays, the chunks
        that hold the rows, if ``columns`` or the filter names the values. Memory: one layer of one partition in
        float32, and the next ones, of which none is begun while those under way come to 128 MiB; each is held as
        stored and as float32 while it is read.
        """
        payload = self.schema.field(len(self.schema) - 1)
        # A filter on the values themselves can only be applied after they are read.
        is_late = where is not None and mentions(where, payload.name, self.schema)
        bounds = where if keys is None else keys.guard if where is None else where & keys.guard
        named = [] if bounds is None else [n for n in _COSTLY_LABELS if mentions(bounds, n, self.schema)]
        found = self._matches({*columns, *named}, bounds, None if is_late else where, keys, min_norm)
        if is_late or payload.name in columns:
            width = getattr(payload.type, "list_size", 1)
            # a remote store makes one wait; of a local one, the cores are what there is to be used
            at_once = min(os.cpu_count() or 1, _AT_ONCE) if self.run.store.is_local else _AT_ONCE
            found = read_ahead(
                self._with_values,
                self._logged(found),
                size=lambda match: match.rows.nbytes + 4 * width * match.rows.num_rows,
                most=_AHEAD_NBYTES,
                at_once=at_once,
            )
        for match in found:
            rows = filtered(match.rows, where) if is_late else match.rows
            yield from rows.select(columns).to_batches()
            del match, rows  # while the next is waited for

    def _matches(
        self,
        names: set[str],
        bounds: pc.Expression | None,
        where: pc.Expression | None,
        keys: Keys | None,
        min_norm: float | None,
    ) -> Iterator[_Match]:
        """Yield the rows that labels and zones leave, without their values, partition by partition, layer by layer."""
        places = self._possible_places(bounds)
        for partition in self._possible_partitions(bounds):
            labels = self._labels(partition, names)
            for place in places:
                rows = self._with_place(labels, place)
                if keys is not None:
                    rows = keys.pick(rows)
                if where is not None:
                    rows = filtered(rows, where)
                if min_norm is not None and rows.num_rows:
                    chunks = self.chunks_with_norm_above(place[0], partition, min_norm)
                    rows = rows.filter(np.isin(rows[_INDEX].to_numpy() // self._chunk_rows, chunks))
                if rows.num_rows:
                    yield _Match(partition, place, rows)

    # -- which parts of the site ------------------------------------------------------------------

    @cached_property
    def _axes(self) -> tuple[str, ...]:
        return (self.relation.axis, "head") if self.is_pairs else (self.relation.axis,)

    def _possible_places(self, where: pc.Expression | None) -> list[tuple[int, ...]]:
        """Return the layers, or (layer, head) pairs, whose rows may pass the filter."""
        lengths = (self.relation.n_layers(self.run), self.site.width(self.run.shape))
        kept = [
            possible(where, self.schema, [pc.field(axis) == _int32(i) for i in range(length)])
            for axis, length in zip(self._axes, lengths, strict=False)
        ]
        return list(itertools.product(*kept))

    def _possible_partitions(self, where: pc.Expression | None) -> list[Partition]:
        """Return the partitions whose rows may pass the filter."""
        held = self.partitions
        if where is None:
            return held
        return [held[i] for i in possible(where, self.schema, [self._guarantee(p) for p in held])]

    def _guarantee(self, partition: Partition) -> pc.Expression:
        """Return what is true of all rows of a partition."""
        guarantee = self.labels.guarantee(partition)
        if self.is_pairs:
            return guarantee
        start, stop = self.run.span(self.site.name, partition)
        chunks = _int32(start // self._chunk_rows), _int32((stop - 1) // self._chunk_rows)
        guarantee &= (pc.field("row") >= start) & (pc.field("row") < stop)
        return guarantee & (pc.field("chunk") >= chunks[0]) & (pc.field("chunk") <= chunks[1])

    def chunks_with_norm_above(self, layer: int, partition: Partition, threshold: float) -> Ints:
        """Return the chunks that may hold a vector for which SQL's ``norm(vec)`` reaches a threshold, in order."""
        chunks, bounds = self._norm_bounds(layer, partition)
        return chunks[~(bounds < np.float64(threshold))]  # which float32 may not hold

    # -- the rows' labels -------------------------------------------------------------------------

    @cached_property
    def _chunk_rows(self) -> int:
        return self.run.manifest.geometry.chunk_rows[self.site.name]

    def _labels(self, partition: Partition, names: set[str]) -> pa.Table:
        """Return those of a partition's labels that are asked for, and each row's place in the array."""
        if self.is_pairs:
            return self.labels.pairs(partition)
        start, stop = self.run.span(self.site.name, partition)
        labels = self.labels.tokens(start, stop, with_text="text" in names)
        index = labels["row"].to_numpy()
        if "chunk" in names:
            labels = labels.append_column("chunk", pa.array((index // self._chunk_rows).astype(np.int32)))
        return labels.append_column(_INDEX, pa.array(index))

    def _with_place(self, labels: pa.Table, place: tuple[int, ...]) -> pa.Table:
        """Add the columns ``layer`` or ``boundary``, and ``head``, which are constant in a batch."""
        for axis, index in zip(self._axes, place, strict=True):
            labels = labels.append_column(axis, pa.array(np.full(labels.num_rows, index, dtype=np.int32)))
        return labels

    # -- the values -------------------------------------------------------------------------------

    def _logged(self, found: Iterator[_Match]) -> Iterator[_Match]:
        """Yield what is about to be read, once the log has been told; never in a thread that reads."""
        for match in found:
            if self.log is not None:
                self.log.reads += [self._reads_of(match, site) for site in self.relation.sites]
            yield match

    def _reads_of(self, match: _Match, site: str) -> Read:
        chunk_rows = self.run.manifest.geometry.chunk_rows[site]
        chunks = tuple(number for number, _ in split_rows(match.places, chunk_rows))
        return Read(
            self.run.run_id, site, self._layer(match), self._head(match), match.partition.index, chunks
        )

    def _with_values(self, match: _Match) -> _Match:
        """Read the chunks that hold the rows, and add the values in float32 as the last column."""
        payload = self.schema.field(len(self.schema) - 1)
        first, *others = (
            self.run.read_rows(site, self._layer(match), match.places, head=self._head(match)).astype(
                np.float32, copy=False
            )
            for site in self.relation.sites
        )
        values = sum(others, start=first)
        return replace(match, rows=match.rows.append_column(payload, _column(values, payload.type)))

    def _layer(self, match: _Match) -> int:
        """Return the place on the array's first axis."""
        return match.place[0] + self.relation.shift

    def _head(self, match: _Match) -> int | None:
        return match.place[1] if self.is_pairs else None


@dataclass(frozen=True, slots=True)
class _Match:
    """Rows of one layer (and head) of one partition that a query needs, with the labels that it asks for."""

    partition: Partition
    place: tuple[int, ...]
    rows: pa.Table

    @property
    def places(self) -> Rows:
        """Where the rows lie on the array's long axis: all different, and ascending."""
        index = self.rows[_INDEX].to_numpy()
        first, last = int(index[0]), int(index[-1])
        return range(first, last + 1) if last - first == len(index) - 1 else index


_AHEAD_NBYTES = 1 << 27
"""Bytes of rows, labels and values, that are read before they are asked for."""

_AT_ONCE = 8
"""Batches of values that are read at a time, at most."""

_COSTLY_LABELS = ("text", "chunk")
"""The labels that are looked up only where a query names them."""

_INDEX = "__index"
"""The column of each row's place on the array's row axis; never part of a result."""


def _int32(value: int) -> pa.Scalar:
    return pa.scalar(value, pa.int32())


def _column(values: npt.NDArray[np.float32], kind: pa.DataType) -> pa.Array:
    """Return values as an Arrow column, without a copy: ``[row, width]`` as lists of fixed size."""
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind) if values.ndim == 2 else flat
