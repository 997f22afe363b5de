"""Attach to a model's hook points, and hand every captured value on without its padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..catalog.shapes import ModelShape

if TYPE_CHECKING:
    import torch

    from .model import OpenModel

__all__ = ["Forward", "Take", "hook_name", "listen", "pad", "run_whole", "unpad"]

Take = Callable[["torch.Tensor"], None]
"""Is given a value as a hook point shows it."""

Forward = Callable[["OpenModel", "torch.Tensor", Mapping[tuple[str, int], Take]], None]
"""Runs a model over ids and shows each (site, layer) that is asked for to its taker, in the order of the forward."""

_HOOKS = {
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "pattern": "blocks.{}.attn.hook_pattern",
    "attn_band": "blocks.{}.attn.hook_pattern",
}


def hook_name(site: str, layer: int, shape: ModelShape) -> str:
    """Return TransformerLens's name for a site at a layer (or, for ``resid``, a boundary).

    The last boundary is the last block's output: Hugging Face's own last hidden state is taken after
    the final norm and is never what is meant here.
    """
    if site != "resid":
        return _HOOKS[site].format(layer)
    last = shape.n_layers
    return f"blocks.{last - 1}.hook_resid_post" if layer == last else f"blocks.{layer}.hook_resid_pre"


@contextmanager
def listen(model: OpenModel, takers: Mapping[tuple[str, int], Take]) -> Iterator[None]:
    """Show each (site, layer) to its taker at every forward, until the block ends."""
    points = []
    try:
        for (site, layer), take in takers.items():
            point = model.hook_point(hook_name(site, layer, model.shape))
            points.append(point)
            point.add_hook(_observer(take))
        yield
    finally:
        for point in points:
            point.remove_hooks("fwd")


def run_whole(model: OpenModel, ids: torch.Tensor, takers: Mapping[tuple[str, int], Take]) -> None:
    """Run a model as it is, without its LM head. See :data:`Forward`."""
    with listen(model, takers):
        model.body(ids, use_cache=False)


def _observer(function: Take) -> Callable[..., None]:
    def observe(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001  # TransformerLens passes it by name
        function(value)

    return observe


def pad(batch: Sequence[Sequence[int]], *, device: torch.device) -> torch.Tensor:
    """Pad token ids on the right: int64 ``[batch, position]``.

    Under a causal mask no position sees what is to its right, so that no attention mask is needed and
    positions count from 0 in every document.
    """
    import torch

    longest = max(len(ids) for ids in batch)
    padded = torch.zeros((len(batch), longest), dtype=torch.int64)
    for i, ids in enumerate(batch):
        padded[i, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return padded.to(device)


def unpad(value: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Drop the padding of a captured value, on its device.

    Parameters
    ----------
    value : torch.Tensor
        ``[batch, position, width]``, or a pattern ``[batch, head, query, key]``.
    lengths : sequence of int
        Tokens of each document of the batch.

    Returns
    -------
    torch.Tensor
        ``[token, width]``, documents one after the other, or ``[head, pair]`` with the causal triangles
        packed query by query: the pair of query q and key k is number q·(q+1)/2 + k of its document.
    """
    import torch

    if value.ndim == 3:
        return torch.cat([value[i, :n] for i, n in enumerate(lengths)])
    # one flat index is three times as fast as a pair of them
    triangles = value.flatten(2).index_select(2, _triangle(value.shape[2], value.device))
    # [batch, head, pair]: the pairs of a shorter document come first
    return torch.cat([triangles[i, :, : n * (n + 1) // 2] for i, n in enumerate(lengths)], dim=1)


@lru_cache(maxsize=8)
def _triangle(length: int, device: torch.device) -> torch.Tensor:
    """Return where the causal triangle lies in a flattened square, query by query: int64 ``[pair]``."""
    import torch

    queries, keys = torch.tril_indices(length, length, device=device)
    flat: torch.Tensor = queries * length + keys
    return flat
