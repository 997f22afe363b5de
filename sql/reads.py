"""The log of what a query read of the sites' values: it makes pushdown countable."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Read", "ReadLog"]


@dataclass(frozen=True, slots=True)
class Read:
    """Some chunks of one partition of one layer (and head) of a site's array, or a partition of ``attn_band``."""

    run: str
    site: str
    """The stored site: ``resid`` for the relation ``resid_pre``, too."""
    layer: int | None
    """The place on the array's first dimension: a layer, or a boundary of ``resid``; None for ``attn_band``."""
    head: int | None
    """The head, for ``pattern``."""
    partition: int
    chunks: tuple[int, ...]
    """The chunks that were read, numbered along the whole row axis; an object of ``attn_band`` is one."""


@dataclass(slots=True)
class ReadLog:
    """The reads of all queries on one connection, in the order in which they happened."""

    reads: list[Read] = field(default_factory=list)

    @property
    def n_chunks(self) -> int:
        """Chunks read, all together."""
        return sum(len(read.chunks) for read in self.reads)

    def layers(self, site: str) -> set[int]:
        """Return the layers (or boundaries) of a site that were read."""
        return {read.layer for read in self.reads if read.site == site and read.layer is not None}
