"""Run one partition: forward its batches, and lay every captured value into the partition's buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..catalog.errors import OverflowInCapture
from ..catalog.layout import n_pairs
from ..catalog.manifest import Manifest
from ..catalog.sites import SITES
from .frozen import PartitionWork
from .hooks import hook_name, listen, pad, unpad
from .writer import PartitionBuffer

if TYPE_CHECKING:
    import torch

    from .model import OpenModel

__all__ = ["PlacedDocument", "run_partition"]


@dataclass(frozen=True, slots=True)
class PlacedDocument:
    """A stored document: its tokens and where they go."""

    token_ids: npt.NDArray[np.int32]
    row_start: int
    pair_start: int


def run_partition(
    model: OpenModel,
    manifest: Manifest,
    work: PartitionWork,
    documents: Mapping[int, PlacedDocument],
    *,
    on_batch: Callable[[int], None] = lambda _n_tokens: None,
) -> PartitionBuffer:
    """Forward every batch of a partition and return its values, ready to be written.

    Each site and layer is unpadded and cast on the device, and copied once to its rows.

    Parameters
    ----------
    model : OpenModel
        The model.
    manifest : Manifest
        The run: geometry and stored dtype.
    work : PartitionWork
        The partition, its missing sites and its batches.
    documents : mapping
        Document number → its tokens and place.
    on_batch : callable
        Called with the number of tokens after each batch.

    Raises
    ------
    OverflowInCapture
        A value is not finite in the stored dtype.
    """
    import torch

    buffer = PartitionBuffer(manifest, work.sites)
    for batch in work.batches:
        placed = [documents[number] for number in batch]
        observers = {
            hook_name(site, layer, model.shape): _store(
                buffer, manifest, work.index, site=site, layer=layer, batch=batch, placed=placed
            )
            for site in work.sites
            for layer in range(SITES[site].n_layers(model.shape))
        }
        ids = pad([document.token_ids.tolist() for document in placed], device=model.device)
        with torch.inference_mode(), listen(model, observers):
            model.body(ids, use_cache=False)
        on_batch(sum(len(document.token_ids) for document in placed))
    return buffer


def _store(
    buffer: PartitionBuffer,
    manifest: Manifest,
    partition: int,
    *,
    site: str,
    layer: int,
    batch: Sequence[int],
    placed: Sequence[PlacedDocument],
) -> Callable[[torch.Tensor], None]:
    """Return the function that puts one site and layer of a batch where it belongs."""
    target, is_pair = buffer.arrays[site][layer], SITES[site].rows == "pair"
    first = partition * manifest.geometry.partition_rows(SITES[site])
    lengths = [len(document.token_ids) for document in placed]

    def store(value: torch.Tensor) -> None:
        values = _cast(unpad(value, lengths), manifest.dtype)
        if values is None:
            raise _overflow(value, site, layer, manifest.dtype, batch)
        start = 0
        for n_tokens, document in zip(lengths, placed, strict=True):
            n = n_pairs(n_tokens) if is_pair else n_tokens
            to = (document.pair_start if is_pair else document.row_start) - first
            if is_pair:
                target[:, to : to + n] = values[:, start : start + n]
            else:
                target[to : to + n] = values[start : start + n]
            start += n

    return store


def _cast(value: torch.Tensor, dtype: str) -> npt.NDArray[Any] | None:
    """Cast to the stored dtype on the device and copy to the host; None if anything is not finite."""
    import torch

    cast = value.to(getattr(torch, dtype))
    if not bool(torch.isfinite(cast.abs().amax())):  # NaN wins a maximum; far faster than asking each value
        return None
    if dtype == "bfloat16":  # numpy has none: keep the bits
        bits: npt.NDArray[Any] = cast.view(torch.int16).cpu().numpy().view(np.uint16)
        return bits
    values: npt.NDArray[Any] = cast.cpu().numpy()
    return values


def _overflow(
    value: torch.Tensor, site: str, layer: int, dtype: str, batch: Sequence[int]
) -> OverflowInCapture:
    import torch

    finite = bool(torch.isfinite(value).all())
    largest = float(value.float().abs().max())
    what = f"reaches {largest:.4g}, which {dtype} cannot hold" if finite else "is not finite"
    return OverflowInCapture(
        f"Site {site} at {SITES[site].axis} {layer} {what} (documents {', '.join(map(str, batch))}).",
        hint="Store it as --dtype bfloat16 or float32."
        if finite
        else "Run the model in --compute-dtype float32.",
    )
