"""One partition in memory: forward its batches, and lay every captured value where it belongs."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.bands import N_SUMS, QUERIES
from ..catalog.errors import OverflowInCapture
from ..catalog.layout import array_spec, n_pairs
from ..catalog.manifest import Manifest
from ..catalog.sites import SITES
from .bands import band_sums
from .frozen import PartitionWork
from .hooks import Forward, Take, pad, run_whole
from .memory import values_nbytes
from .staging import as_numpy, as_tensor

if TYPE_CHECKING:
    import torch

    from .model import OpenModel
    from .staging import Staging

__all__ = ["Overflow", "PartitionBuffer", "PlacedDocument", "place_tokens", "run_batch"]

Overflow = Literal["stop", "keep"]
"""What to do with a value that is not finite in the stored dtype."""


@dataclass(frozen=True, slots=True)
class PlacedDocument:
    """A stored document: its tokens and where they go."""

    number: int
    token_ids: npt.NDArray[np.int32]
    row_start: int
    pair_start: int

    @property
    def n_tokens(self) -> int:
        """Stored tokens, BOS included."""
        return len(self.token_ids)


def place_tokens(documents: pa.Table, tokens: pa.Table) -> dict[int, PlacedDocument]:
    """Return each stored document's tokens and place, by its number."""
    token_ids, document = tokens["token_id"].to_numpy(), tokens["document"].to_numpy()
    # Tokens stand in the order of their documents.
    numbers, starts, counts = np.unique(document, return_index=True, return_counts=True)
    spans = zip(starts.tolist(), counts.tolist(), strict=True)
    ids = {
        number: token_ids[start : start + count]
        for number, (start, count) in zip(numbers.tolist(), spans, strict=True)
    }
    columns = (documents[name].to_pylist() for name in ("document", "status", "row_start", "pair_start"))
    return {
        number: PlacedDocument(number, ids[number], row_start, pair_start)
        for number, status, row_start, pair_start in zip(*columns, strict=True)
        if status != "refused"
    }


class PartitionBuffer:
    """One partition of some sites in memory, in the stored dtype, laid out as its objects are.

    The memory is virtual until it is filled: unused rows cost nothing, and a batch costs its own bytes.

    Parameters
    ----------
    manifest : Manifest
        The run.
    work : PartitionWork
        The partition and the sites to capture of it.
    documents : mapping
        Document number → its tokens and place, for the documents of the partition at least.
    """

    def __init__(
        self, manifest: Manifest, work: PartitionWork, documents: Mapping[int, PlacedDocument]
    ) -> None:
        self.manifest = manifest
        self.work = work
        members = (documents[number] for batch in work.batches for number in batch)
        self.documents = {d.number: d for d in sorted(members, key=lambda d: d.row_start)}
        self.nonfinite: Counter[str] = Counter()
        """For each site, the values that are not finite in the stored dtype."""
        self.values: dict[tuple[str, int], npt.NDArray[Any]] = {}
        """(site, layer) → ``[token, width]``, ``[head, pair]``, or ``[document, head, query set, sum]``."""
        self._first_row = {
            rows: work.index * manifest.geometry.partition_rows(SITES[name])
            for rows, name in (("token", "resid"), ("pair", "pattern"))
        }
        self._order = {number: i for i, number in enumerate(self.documents)}
        for name in work.sites:
            for layer in range(SITES[name].n_layers(manifest.shape)):
                self.values[name, layer] = self._empty(name)

    def _empty(self, name: str) -> npt.NDArray[Any]:
        if not SITES[name].is_array:
            n_heads = self.manifest.shape.n_heads
            return _untouched((len(self.documents), n_heads, len(QUERIES), N_SUMS), np.dtype(np.float32))
        spec = array_spec(
            SITES[name],
            self.manifest.shape,
            self.manifest.geometry,
            dtype=self.manifest.dtype,
            n_partitions=1,
        )
        return _untouched(spec.shape[1:], np.dtype(spec.dtype))

    def nbytes(self, documents: Iterable[PlacedDocument], sites: tuple[str, ...] | None = None) -> int:
        """Return what the values of some documents take, of all sites of the partition or of some."""
        lengths = [document.n_tokens for document in documents]
        return values_nbytes(
            self.manifest.shape, self.work.sites if sites is None else sites, self.manifest.dtype,
            n_tokens=sum(lengths), pairs=sum(map(n_pairs, lengths)), n_documents=len(lengths),
        )  # fmt: skip

    def release(self, site: str, layer: int | None) -> int:
        """Let go of one object's values (all layers if None), and return the bytes that were reserved for them."""
        layers = range(SITES[site].n_layers(self.manifest.shape)) if layer is None else (layer,)
        for each in layers:
            del self.values[site, each]
        return (
            len(layers)
            * self.nbytes(self.documents.values(), (site,))
            // SITES[site].n_layers(self.manifest.shape)
        )

    def stored(self, site: str, layer: int, document: PlacedDocument) -> npt.NDArray[Any]:
        """Return the place of a document: ``[token, width]``, ``[head, pair]``, or ``[head, query set, sum]``."""
        values, rows = self.values[site, layer], SITES[site].rows
        if rows == "document":
            place: npt.NDArray[Any] = values[self._order[document.number]]
            return place
        start = document.row_start if rows == "token" else document.pair_start
        start -= self._first_row[rows]
        if rows == "token":
            return values[start : start + document.n_tokens]
        return values[:, start : start + n_pairs(document.n_tokens)]

    def place(
        self, site: str, layer: int, documents: Sequence[PlacedDocument], values: Sequence[torch.Tensor]
    ) -> None:
        """Copy the values of some documents to where they belong, cast to the stored dtype.

        Parameters
        ----------
        site, layer : str, int
            Which.
        documents : sequence of PlacedDocument
            Documents of the partition.
        values : sequence of torch.Tensor
            Each one's ``[token, width]``, ``[head, pair]`` or ``[head, query, key]``, or ``[head, query set, sum]``.
        """
        for document, given in zip(documents, values, strict=True):
            target = self.stored(site, layer, document)
            if SITES[site].rows == "pair" and given.ndim == 3:
                _pack(as_numpy(given), target)
            else:
                as_tensor(target).copy_(given)  # casts on the way, on all cores

    def is_finite(self, site: str, layer: int, documents: Sequence[PlacedDocument]) -> bool:
        """Tell whether all that is stored of some documents is finite."""
        import torch

        for document in documents:
            low, high = torch.aminmax(as_tensor(self.stored(site, layer, document)))  # NaN wins in both
            if not math.isfinite(low.item()) or not math.isfinite(high.item()):
                return False
        return True


_HUGE = 32 << 20
"""Bytes of a block from which on the 2 MiB by which it may be larger than what is used are of no consequence."""


def _untouched(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return zeros that take no memory before they are filled, and give it back when they are let go of.

    What comes from malloc does neither, once blocks of its size were freed: it keeps them, and clears them when they
    are used again (the threshold above which it does not grows up to 32 MiB; mallopt(3), M_MMAP_THRESHOLD).
    """
    n_values = math.prod(shape)
    memory = mmap.mmap(-1, max(1, n_values * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if len(memory) >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):  # a fault for 2 MiB in place of 512
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=dtype, count=n_values).reshape(shape)


def _pack(pattern: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """Copy a pattern ``[head, query, key]`` into its causal triangle ``[head, pair]``.

    Query by query, which is nine times as fast as gathering single pairs.
    """
    start = 0
    for query in range(pattern.shape[1]):
        stop = start + query + 1
        target[:, start:stop] = pattern[:, query, : query + 1]
        start = stop


def run_batch(
    model: OpenModel,
    buffer: PartitionBuffer,
    batch: Sequence[int],
    staging: Staging,
    *,
    overflow: Overflow = "stop",
    forward: Forward = run_whole,
) -> None:
    """Forward one batch; each site and layer is unpadded, cast and copied once to its rows.

    The LM head is not run. On CUDA the last values may still be under way: ``staging.drain()`` waits for them.

    Parameters
    ----------
    model : OpenModel
        The model.
    buffer : PartitionBuffer
        Takes the values.
    batch : sequence of int
        Numbers of documents of the buffer.
    staging : Staging
        Brings the values to the host.
    overflow : ``stop`` or ``keep``
        Whether a value that is not finite in the stored dtype is an error, or kept and counted.
    forward : callable
        Runs the model.

    Raises
    ------
    OverflowInCapture
        A value is not finite in the stored dtype.
    """
    import torch

    placed = [buffer.documents[number] for number in batch]
    takers = {
        (site, layer): _taker(buffer, site, layer, placed=placed, staging=staging, overflow=overflow)
        for site, layer in buffer.values
    }
    ids = pad([document.token_ids.tolist() for document in placed], device=model.device)
    with torch.inference_mode():
        forward(model, ids, takers)


def _taker(
    buffer: PartitionBuffer,
    site: str,
    layer: int,
    *,
    placed: Sequence[PlacedDocument],
    staging: Staging,
    overflow: Overflow,
) -> Take:
    """Return the function that puts one site and layer of a batch where it belongs."""
    import torch

    lengths = [document.n_tokens for document in placed]
    rows, dtype = SITES[site].rows, buffer.manifest.dtype
    stored = torch.float32 if rows == "document" else getattr(torch, dtype)
    ran_in: list[str] = []

    def deliver(values: list[torch.Tensor], is_finite: bool | None) -> None:
        buffer.place(site, layer, placed, values)
        if is_finite is None:
            is_finite = buffer.is_finite(site, layer, placed)
        if not is_finite:
            found = _find_nonfinite(buffer, site, layer, placed)
            if overflow == "stop":
                raise _overflow(found, site, layer, dtype, computed=ran_in[0])
            buffer.nonfinite[site] += found.n_nan + found.n_infinite

    def take(value: torch.Tensor) -> None:
        ran_in[:] = [str(value.dtype).removeprefix("torch.")]
        value = band_sums(value, lengths) if rows == "document" else value
        staging.put(value, rows, lengths, deliver, dtype=stored)

    return take


@dataclass(frozen=True, slots=True)
class _NonFinite:
    n_nan: int
    n_infinite: int
    documents: list[int]


def _find_nonfinite(
    buffer: PartitionBuffer, site: str, layer: int, placed: Sequence[PlacedDocument]
) -> _NonFinite:
    """Count what is not finite among the values that are stored of a batch, and name the documents."""
    n_nan = n_infinite = 0
    documents = []
    for document in placed:
        values = as_tensor(buffer.stored(site, layer, document))
        nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
        n_nan, n_infinite = n_nan + nan, n_infinite + infinite
        if nan or infinite:
            documents.append(document.number)
    return _NonFinite(n_nan, n_infinite, documents)


_LARGEST = {"float16": 65504.0, "bfloat16": 3.4e38, "float32": 3.4e38}


def _overflow(found: _NonFinite, site: str, layer: int, dtype: str, *, computed: str) -> OverflowInCapture:
    """Return the error that names the place and the cure: what overflowed is the store's dtype, or the model's."""
    where = f"Site {site} at {SITES[site].axis} {layer}"
    shown = (
        f"(documents {', '.join(map(str, found.documents[:8]))}{', …' if len(found.documents) > 8 else ''})"
    )
    other = "--overflow keep stores them as they are."
    if found.n_nan or _LARGEST[dtype] >= _LARGEST[computed]:
        what = (
            f"{found.n_nan} values that are not a number"
            if found.n_nan
            else f"{found.n_infinite} infinite values"
        )
        mend = (
            "Run the model in --compute-dtype float32; "
            if computed != "float32"
            else "Look at weights and text; "
        )
        return OverflowInCapture(f"{where} has {what}, as computed in {computed} {shown}.", hint=mend + other)
    return OverflowInCapture(
        f"{where} has {found.n_infinite} values that {dtype} cannot hold {shown}.",
        hint="Store it as --dtype bfloat16 or float32; --overflow keep stores infinities instead.",
    )
