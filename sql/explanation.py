"""What a query read of the sites that it names: it is run, and its reads are held against what the lake stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..catalog.lake import Lake
from ..catalog.layout import object_name, run_path
from ..catalog.run import Run
from ..catalog.shards import ShardCut, read_index
from ..catalog.sites import SITES
from ..catalog.sizes import format_nbytes
from .connection import Session
from .guard import require_read
from .keys import Restriction
from .reads import Read, ReadLog
from .syntax import walk
from .translation import translated

__all__ = ["Explanation", "SiteReads", "explain"]


@dataclass(frozen=True, slots=True)
class SiteReads:
    """What a query read of one stored site of a run."""

    run: str
    site: str
    n_chunks: int
    """Chunks that were read; one that was read twice counts twice. An object of ``attn_band`` is one."""
    n_chunks_stored: int
    nbytes: int
    """Their bytes as they are stored, compressed or not."""
    nbytes_stored: int
    parts: dict[str, tuple[int, int]] = field(repr=False)
    """What left something out, from the coarse to the fine: name → how many of how many were read of."""

    def __str__(self) -> str:
        pruned = ", ".join(f"{n} of {of} {name}" for name, (n, of) in self.parts.items())
        return (
            f"{self.site} of {self.run}: {self.n_chunks} of {self.n_chunks_stored} chunks, "
            f"{format_nbytes(self.nbytes)} of {format_nbytes(self.nbytes_stored)} ({pruned})"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a query read. As text: a line for each site, one for each first phase, and the total.

    What counts is the values of sites. Tokens, documents, zones and findings, which are small beside them, are not in
    it.
    """

    sites: tuple[SiteReads, ...]
    keys: tuple[Restriction, ...]
    """What joins and subqueries told of the rows before any value was read."""

    @property
    def n_chunks(self) -> int:
        """Chunks read."""
        return sum(site.n_chunks for site in self.sites)

    @property
    def n_chunks_stored(self) -> int:
        """Chunks that the sites have."""
        return sum(site.n_chunks_stored for site in self.sites)

    @property
    def nbytes(self) -> int:
        """Bytes read, without the shards' indexes (16 bytes a chunk)."""
        return sum(site.nbytes for site in self.sites)

    @property
    def nbytes_stored(self) -> int:
        """Bytes that the sites have."""
        return sum(site.nbytes_stored for site in self.sites)

    def __str__(self) -> str:
        total = f"read {self.n_chunks} of {self.n_chunks_stored} chunks ({self.nbytes} of {self.nbytes_stored} bytes)"
        return "\n".join([*map(str, self.sites), *map(str, self.keys), total])


def explain(
    lake: Lake,
    text: str,
    *,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    run: str | None = None,
    memory_limit: str | None = None,
    unsafe: bool = False,
) -> Explanation:
    """Run a query, throw its rows away, and tell what it read of the sites that it names.

    Parameters
    ----------
    lake, text, params, run, memory_limit, unsafe
        As for :func:`layerlake.sql.query`, and so are the errors.
    """
    log = ReadLog()
    session = Session(lake, run=run, log=log, memory_limit=memory_limit, unsafe=unsafe)
    relation = session.sql(text, params)
    named = _named_sites(session, text)
    with translated(session.connection, lake, session.chosen):
        for _ in relation.to_arrow_reader():
            pass
        for read in log.reads:  # by a function, which is told its site as it runs
            if (read.run, read.site) not in named and (found := session.stored_sites((read.run, read.site))):
                named[read.run, read.site] = found[0]
        reads = [
            _site_reads(opened, site, [read for read in log.reads if (read.run, read.site) == (run_id, site)])
            for (run_id, site), opened in named.items()
        ]
    return Explanation(tuple(reads), tuple(session.restrictions))


def _named_sites(session: Session, text: str) -> dict[tuple[str, str], Run]:
    """Return the stored sites that a query's relations are made of."""
    named: dict[tuple[str, str], Run] = {}
    for node in walk(require_read(session.connection, text)):
        if node.get("type") == "BASE_TABLE" and (
            found := session.stored_sites(node["qualified_name"]["path"])
        ):
            run, sites = found
            named |= {(run.run_id, site): run for site in sites}
    return named


def _site_reads(run: Run, name: str, reads: Sequence[Read]) -> SiteReads:
    """Sum up the reads of one stored site."""
    stored = _Stored(run, name)
    layers = {(read.layer, read.head) for read in reads}
    shards = {(read.layer, read.head, read.partition) for read in reads}
    n_chunks = sum(len(read.chunks) for read in reads)
    n_series = stored.n_layers * stored.n_heads
    parts = {"partitions": (len({read.partition for read in reads}), len(stored.n_used))}
    if SITES[name].is_array:
        n_there = sum(stored.n_used[partition] for *_, partition in shards)
        parts = {stored.unit: (len(layers), n_series), **parts, "chunks there": (n_chunks, n_there)}
    return SiteReads(
        run.run_id,
        name,
        n_chunks,
        n_series * sum(stored.n_used.values()),
        sum(map(stored.nbytes_of, reads)),
        stored.nbytes,
        parts,
    )


class _Stored:
    """How one site of a run lies in the store, chunk by chunk."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.site = site = SITES[name]
        held = run.manifest.sites[name]
        self.n_layers = site.n_layers(run.shape) if site.is_array else 1
        self.n_heads = run.shape.n_heads if site.rows == "pair" else 1
        unit = "boundaries" if site.axis == "boundary" else "layers"
        self.unit = "heads of layers" if site.rows == "pair" else unit
        self._cuts = (
            {index: ShardCut.of(site, run.manifest, index) for index in held} if site.is_array else {}
        )
        self.n_used = {index: self._cuts[index].n_used if site.is_array else 1 for index in held}
        """Chunks of a series by partition: one layer of it, or one head of a layer."""
        sizes = dict(zip(run.objects["name"].to_pylist(), run.objects["nbytes"].to_pylist(), strict=True))
        self._objects: dict[tuple[int | None, int], tuple[str, int]] = {
            (layer, index): (object_name(site, layer, index), sizes[object_name(site, layer, index)])
            for layer in range(self.n_layers)
            for index in held
        }
        self._lengths = cache(self._read_lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        whole = sum(nbytes for _, nbytes in self._objects.values())
        return whole - self.n_layers * sum(cut.index_nbytes for cut in self._cuts.values())

    def nbytes_of(self, read: Read) -> int:
        """Return the bytes of the chunks that were read."""
        if not self.site.is_array:
            return self._objects[0, read.partition][1]
        places = np.array(read.chunks) - read.partition * self._cuts[read.partition].n_chunks
        return int(self._lengths(read.layer, read.partition)[read.head or 0, places].sum())

    def _read_lengths(self, layer: int | None, partition: int) -> npt.NDArray[np.uint64]:
        """Return the bytes of each chunk of a shard, from its index: ``[head, chunk]``."""
        name, _ = self._objects[layer, partition]
        path = f"{run_path(self.run.run_id)}/{name}"
        return read_index(self.run.store, path, self._cuts[partition])[..., 1]
