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

_COPIES = 3
"""A chunk of logits, and what is made of it on the way through softmax, entropy and divergence."""


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

    Logits are made a few rows at a time, and all that is made of them in the same place. Divergences are sums of
    p·ln(p/q) − p + q: none of these is negative, and whatever float32 leaves the two short of adding up to 1 falls out.

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
        self._n_rows = max(1, _chunk_nbytes(residual.device.type) // (4 * self._log_p.shape[1]))
        self._scratch = (
            torch.empty_like(self._log_p[: self._n_rows]),
            torch.empty_like(self._log_p[: self._n_rows]),
        )
        self.outcomes = self._measure(residual, is_own=True)

    def compare(self, residual: torch.Tensor) -> Outcomes:
        """Measure another x_L at the same positions: ``[token, d_model]``. Costs one unembedding."""
        return self._measure(residual, is_own=False)

    def _measure(self, residual: torch.Tensor, *, is_own: bool) -> Outcomes:
        import torch

        parts: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, len(residual), self._n_rows):
            rows = slice(start, start + self._n_rows)
            log_q = self._blocks.unembed(self._blocks.norm(residual[rows]))
            q, ratio = (scratch[: len(log_q)] for scratch in self._scratch)
            log_q -= log_q.amax(dim=1, keepdim=True)
            log_q -= torch.exp(log_q, out=q).sum(dim=1, keepdim=True).log()
            total_q = torch.exp(log_q, out=q).sum(dim=1)
            if is_own:
                self._log_p[rows], self._total_p[rows] = log_q, total_q
            entropy = torch.mul(q, log_q, out=ratio).sum(dim=1) / -math.log(2)
            torch.sub(self._log_p[rows], log_q, out=ratio)
            kl = ratio.mul_(torch.exp(self._log_p[rows], out=q)).sum(dim=1)
            parts.append(
                (
                    -log_q.gather(1, self._targets[rows, None])[:, 0],
                    entropy,
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
