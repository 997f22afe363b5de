"""Band sums of attention patterns where they arise: on the device, before anything is copied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ..catalog.bands import FIRST_QUERIES, LATE_QUERY, MAX_DISTANCE

if TYPE_CHECKING:
    import torch

__all__ = ["band_sums"]


def band_sums(pattern: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sum attention weights near the diagonal and over BOS, on their device (see :mod:`..catalog.bands`).

    Costs one gather of 18 weights a query and head, and two sums of them: a T/18-th of the pattern's memory.

    Parameters
    ----------
    pattern : torch.Tensor
        ``[batch, head, query, key]``, padded on the right; any floating dtype.
    lengths : sequence of int
        Tokens of each document of the batch.

    Returns
    -------
    torch.Tensor
        float32 ``[document, head, query set, sum]``.
    """
    import torch

    n_batch, n_heads, n_queries, _ = pattern.shape
    keys, early, padding = _places(tuple(lengths), n_queries, pattern.device)
    keys = keys.expand(n_batch, n_heads, n_queries, -1)
    weights = pattern.gather(3, keys).float()  # [batch, head, query, sum]
    weights.masked_fill_(padding, 0)
    late = weights[:, :, LATE_QUERY:].sum(2)
    return torch.stack([(weights[:, :, :LATE_QUERY] * early).sum(2) + late, late], dim=2)


@lru_cache(maxsize=8)
def _places(
    lengths: tuple[int, ...], n_queries: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, once for all layers of a batch, what is summed.

    Returns
    -------
    keys : int64 ``[query, sum]``
        Where each weight is; some key that exists where there is none at that distance.
    early : bool ``[query, sum]``
        Which of the weights of the first 17 queries count among all.
    padding : bool ``[batch, 1, query, 1]``
        Which queries are none.
    """
    import torch

    query = torch.arange(n_queries, device=device)[:, None]
    distances = torch.arange(MAX_DISTANCE + 1, device=device)
    keys = torch.cat([(query - distances).clamp(min=0), torch.zeros_like(query)], dim=1)
    first = torch.as_tensor(FIRST_QUERIES[0], device=device)
    padding = query >= torch.as_tensor(lengths, device=device)[:, None, None, None]
    return keys, query[:LATE_QUERY] >= first, padding
