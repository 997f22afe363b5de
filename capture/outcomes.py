"""What the model says at some positions, and how far that is from what it says unmodified: token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from .blocks import Blocks

__all__ = ["Baseline", "Outcomes", "baseline_nbytes"]

_CHUNK_NBYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Logits that are made at a time: what stays near the cores is gone through eight times."""

_COPIES = 4
"""A chunk of logits on its way through softmax, entropy and divergence."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """For each of some positions, float32 unless it says otherwise: ``[token]``."""

    loss_nats: npt.NDArray[np.float32]
    """−ln Q(next token)."""
    entropy_bits: npt.NDArray[np.float32]
    """−Σ Q log₂ Q."""
    top1: npt.NDArray[np.int64]
    """The most likely token's id."""
    kl_nats: npt.NDArray[np.float32]
    """Σ P ln(P / Q), P being the unmodified model."""


class Baseline:
    """What the unmodified model says at some positions, to compare other residual streams with.

    Logits are made a few rows at a time. Divergences are sums of p·ln(p/q) − p + q: none of these is negative, and
    whatever float32 leaves the two short of adding up to 1 falls out.

    Parameters
    ----------
    blocks : Blocks
        Has the final norm and the unembedding.
    residual : torch.Tensor
        x_L at the positions: ``[token, d_model]``.
    targets : torch.Tensor
        The next tokens: int64 ``[token]``.

    Attributes
    ----------
    outcomes : Outcomes
        The unmodified model's own.
    """

    def __init__(self, blocks: Blocks, residual: torch.Tensor, targets: torch.Tensor) -> None:
        import torch

        self._blocks, self._targets = blocks, targets
        # of all tokens and the whole vocabulary
        self._log_p = torch.empty((len(residual), blocks.model.shape.n_vocab), device=residual.device)
        self._total_p = torch.empty(len(residual), device=residual.device)
        self.outcomes = self._measure(residual, is_own=True)

    def compare(self, residual: torch.Tensor) -> Outcomes:
        """Measure another x_L at the same positions: ``[token, d_model]``. Costs one unembedding."""
        return self._measure(residual, is_own=False)

    def _measure(self, residual: torch.Tensor, *, is_own: bool) -> Outcomes:
        import torch
        from torch.nn.functional import kl_div

        n_rows = max(1, _chunk_nbytes(residual.device.type) // (4 * self._log_p.shape[1]))
        parts: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, len(residual), n_rows):
            rows = slice(start, start + n_rows)
            log_q = self._blocks.unembed(self._blocks.norm(residual[rows]))
            log_q -= log_q.logsumexp(dim=1, keepdim=True)
            q = log_q.exp()
            total_q = q.sum(dim=1)
            if is_own:
                self._log_p[rows], self._total_p[rows] = log_q, total_q
            kl = kl_div(log_q, self._log_p[rows], reduction="none", log_target=True).sum(dim=1)
            parts.append(
                (
                    -log_q.gather(1, self._targets[rows, None])[:, 0],
                    torch.linalg.vecdot(q, log_q) / -math.log(2),
                    log_q.argmax(dim=1),
                    kl + (total_q - self._total_p[rows]),
                )
            )
        return Outcomes(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _chunk_nbytes(device: str) -> int:
    return _CHUNK_NBYTES.get(device, _CHUNK_NBYTES["cpu"])


def baseline_nbytes(n_tokens: int, n_vocab: int, device: str) -> int:
    """Return what a :class:`Baseline` of so many positions takes, and a comparison with it."""
    return 4 * n_tokens * n_vocab + _COPIES * _chunk_nbytes(device)
