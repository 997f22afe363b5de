"""How much host memory a capture takes beyond the loaded model, and how ``--max-memory`` is shared out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..catalog.bands import N_SUMS, QUERIES
from ..catalog.errors import PlanError
from ..catalog.layout import Geometry, itemsize
from ..catalog.manifest import Partition
from ..catalog.shapes import ModelShape
from ..catalog.sites import SITES
from ..catalog.sizes import format_nbytes, parse_nbytes

__all__ = [
    "N_SLOTS",
    "OVERHEAD_NBYTES",
    "MemoryPlan",
    "PeakMemory",
    "forward_nbytes",
    "keep_freed",
    "plan_memory",
    "row_nbytes",
    "values_nbytes",
]

N_SLOTS = 4
"""Pinned slots between an accelerator and the host: one is filled, one emptied, two wait."""

_MAX_WRITE_THREADS = {"local": 2, "remote": 8}
"""A disk is kept busy by two encoders; a remote store answers slowly, and to many at once."""

_SHARD_COPIES = {"local": 1, "remote": 2}
"""What an encoder holds: the shard, and what the client of a remote store makes of it."""

_TABLE_COPIES = 5
"""A table on its way: the sums of all layers stacked, their columns, Arrow's, and the Parquet bytes."""

_TOKEN_NBYTES = 64
"""A token's share of the tables of documents and tokens, in Arrow and in Python."""

_DOCUMENT_NBYTES = 1024
"""A document's share of them, while it is placed."""

OVERHEAD_NBYTES = 32 << 20
"""What Python, the allocator and the clients of stores take by themselves."""

_COMPUTE_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``--max-memory``, shared out, in bytes."""

    max_nbytes: int
    """What must not be exceeded."""
    forward_nbytes: int
    """One batch on its way through the model; 0 where that happens on an accelerator."""
    slot_nbytes: int
    """One pinned slot; 0 on the CPU."""
    writing_nbytes: int
    """Shards being encoded and sent, all threads together."""
    fixed_nbytes: int
    """Tables of documents and tokens, and overhead."""
    partition_nbytes: int
    """The values of the fullest partition."""
    batch_tokens: int
    """Padded tokens of a batch: what was asked for, or fewer if that does not fit."""
    write_threads: int

    @property
    def budget_nbytes(self) -> int:
        """Values that may wait between the model and the store: one partition's, and what else fits."""
        taken = self.forward_nbytes + N_SLOTS * self.slot_nbytes + self.writing_nbytes + self.fixed_nbytes
        return self.max_nbytes - taken

    @property
    def ahead_nbytes(self) -> int:
        """What the model and the encoders may allocate from now on, while one batch runs, without its values."""
        return self.forward_nbytes + self.writing_nbytes

    @property
    def peak_nbytes(self) -> int:
        """The most that the capture allocates: two partitions are in flight, as far as they fit."""
        in_flight = min(self.budget_nbytes, 2 * self.partition_nbytes)
        return self.max_nbytes - self.budget_nbytes + in_flight


def row_nbytes(shape: ModelShape, site: str, dtype: str) -> int:
    """Return the bytes of one row (token, pair or document) of one layer of a site, as they wait in memory."""
    if SITES[site].is_array:
        return SITES[site].width(shape) * itemsize(dtype)
    return SITES[site].width(shape) * len(QUERIES) * N_SUMS * 4


def values_nbytes(
    shape: ModelShape, sites: Iterable[str], dtype: str, *, n_tokens: int, pairs: int, n_documents: int
) -> int:
    """Return the bytes that some documents' values take in memory, all layers together."""
    rows = {"token": n_tokens, "pair": pairs, "document": n_documents}
    return sum(
        SITES[name].n_layers(shape) * row_nbytes(shape, name, dtype) * rows[SITES[name].rows]
        for name in sites
    )


def plan_memory(
    shape: ModelShape,
    geometry: Geometry,
    partitions: Sequence[Partition],
    *,
    sites: Iterable[str],
    dtype: str,
    compute_dtype: str,
    batch_tokens: int,
    max_memory: int | str,
    n_tokens: int,
    n_documents: int,
    on_host: bool,
    is_local: bool,
) -> MemoryPlan:
    """Share out ``max_memory``, taking smaller batches and fewer encoder threads where they would not fit.

    Parameters
    ----------
    shape, geometry : ModelShape, Geometry
        The run's.
    partitions : sequence of Partition
        Those that are captured: the fullest of them has to fit.
    sites : iterable of str
        What is captured.
    dtype, compute_dtype : str
        What is stored, and what the model runs in.
    batch_tokens : int
        The padded tokens of a batch that were asked for.
    max_memory : int or str
        Bytes, or a size such as ``"4GiB"``.
    n_tokens, n_documents : int
        Of all documents, whose tables are held.
    on_host : bool
        Whether the model runs on the CPU.
    is_local : bool
        Whether the lake is.

    Raises
    ------
    PlanError
        A partition, a batch and a shard do not fit together.
    """
    sites, max_nbytes = tuple(sites), parse_nbytes(max_memory)
    rows, context = geometry.partition_tokens, geometry.context
    partition = max(
        values_nbytes(shape, sites, dtype, n_tokens=p.n_rows, pairs=p.n_pairs, n_documents=p.n_documents)
        for p in partitions
    )
    place = "local" if is_local else "remote"
    most = max(p.n_documents for p in partitions)
    largest = max(_object_nbytes(shape, geometry, name, dtype, n_documents=most) for name in sites)
    fixed = OVERHEAD_NBYTES + _TOKEN_NBYTES * n_tokens + _DOCUMENT_NBYTES * n_documents
    threads = _MAX_WRITE_THREADS[place]

    def share_out() -> MemoryPlan:
        return MemoryPlan(
            max_nbytes=max_nbytes,
            forward_nbytes=forward_nbytes(shape, context, batch_tokens, compute_dtype) if on_host else 0,
            slot_nbytes=0 if on_host else _slot_nbytes(shape, sites, dtype, context, batch_tokens),
            writing_nbytes=threads * _SHARD_COPIES[place] * largest,
            fixed_nbytes=fixed,
            partition_nbytes=partition,
            batch_tokens=batch_tokens,
            write_threads=threads,
        )

    plan = share_out()
    while plan.budget_nbytes < partition:
        # the larger of the two gives way
        if batch_tokens > context and plan.forward_nbytes + plan.slot_nbytes >= plan.writing_nbytes:
            batch_tokens = max(context, batch_tokens // 2)
        elif threads > 1:
            threads -= 1
        elif batch_tokens > context:
            batch_tokens = max(context, batch_tokens // 2)
        else:
            needed = partition + max_nbytes - plan.budget_nbytes
            raise PlanError(
                f"A partition of {rows} tokens needs {format_nbytes(needed)} of memory, "
                f"more than --max-memory {format_nbytes(max_nbytes)}.",
                hint=f"Take --max-memory {-(-needed // 2**20)}MiB or more, a smaller --partition-tokens "
                f"(at least the context of {context}), or a shorter --context.",
            )
        plan = share_out()
    return plan


def _object_nbytes(shape: ModelShape, geometry: Geometry, site: str, dtype: str, *, n_documents: int) -> int:
    """Return what one object of a site takes while it is encoded."""
    if SITES[site].is_array:
        return row_nbytes(shape, site, dtype) * geometry.partition_rows(SITES[site])
    return _TABLE_COPIES * shape.n_layers * row_nbytes(shape, site, dtype) * n_documents


def forward_nbytes(shape: ModelShape, context: int, batch_tokens: int, compute_dtype: str) -> int:
    """Return what a forward allocates on the host, measured on GPT-2, GPT-NeoX and Llama with eager attention.

    Eight residual-sized tensors, and either three squares of attention or six MLP activations beside them;
    the logits are never made. A sixteenth more for what the allocator scatters.
    """
    largest = max(3 * shape.n_heads * context, 6 * shape.d_mlp)
    nbytes = batch_tokens * (8 * shape.d_model + largest) * _COMPUTE_ITEMSIZE[compute_dtype]
    return nbytes + nbytes // 16


def _slot_nbytes(
    shape: ModelShape, sites: tuple[str, ...], dtype: str, context: int, batch_tokens: int
) -> int:
    """Return a slot that holds one layer of any site of a batch: n documents of m tokens, n·m ≤ ``batch_tokens``.

    Their pairs are n·m·(m + 1)/2 at most. A power of two, which is what PyTorch takes for pinned memory anyway.
    """
    rows = {"token": batch_tokens, "pair": -(-batch_tokens * (context + 1) // 2), "document": batch_tokens}
    largest = max(row_nbytes(shape, name, dtype) * rows[SITES[name].rows] for name in sites)
    return 1 << (largest - 1).bit_length()


class PeakMemory:
    """Measures the most memory that this process takes while a ``with`` block runs, beyond what it had before."""

    def __init__(self) -> None:
        self.nbytes: int | None = None
        """Bytes; None before the end of the block, and where the system does not tell (only Linux does)."""
        self._before: int | None = None

    def __enter__(self) -> Self:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # begins a new high-water mark
            self._before = _status_nbytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            self.nbytes = _status_nbytes("VmHWM") - self._before

    def trim_above(self, nbytes: int) -> None:
        """Give back to the system what was let go of, if more than this is taken, or if nobody knows.

        glibc keeps it, scattered, for blocks to come. What then comes waits for the system to clear it again, page by
        page: a tenth of a forward on two cores.
        """
        taken = None if self._before is None else _status_nbytes("VmRSS") - self._before
        if (taken is None or taken > nbytes) and (malloc_trim := _of_glibc("malloc_trim")):
            malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def _of_glibc(name: str) -> Any:
    """Return a function of glibc's malloc; None where memory is another library's."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed() -> None:
    """Let glibc keep what a layer of a forward lets go of for the next, for this whole process.

    By itself it gives large blocks back to the system at once, and gets them again page by page: for 6000 tokens of
    GPT-2 on two cores, two seconds beside the five of the forward.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes


def _status_nbytes(field: str) -> int:
    """Return a size that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024
