"""The model's last step as the lake holds it: final norm and unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from .run import Run

__all__ = ["Readout"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Readout:
    """Final norm and unembedding, raw: γ and β are applied to the token, nothing is folded or centred.

    (Folding and centring change logits by a constant for each token, hence no distribution.)
    """

    norm: Literal["layernorm", "rmsnorm"]
    eps: float
    gamma: Floats
    """``[d_model]``"""
    beta: Floats
    """``[d_model]``; zeros where there is none."""
    unembed: Floats
    """``[d_model + 1, vocab]``: W_U with b_U as its last row, so that one product applies both."""

    @classmethod
    def open(cls, run: Run) -> Self:
        """Read a model's readout: (d_model + 1)·vocab·4 bytes, and once more while reading."""
        shape = run.shape
        unembed = np.empty((shape.d_model + 1, shape.n_vocab), dtype=np.float32)
        unembed[:-1] = run.weight("W_U")
        unembed[-1] = run.weight("b_U")
        return cls(shape.norm, shape.norm_eps, run.weight("ln_final.w"), run.weight("ln_final.b"), unembed)

    def centre(self, x: npt.NDArray[np.floating]) -> Doubles:
        """Return ``x - mean(x)`` for LayerNorm, ``x`` for RMSNorm: float64 ``[token, d_model]``."""
        wide: Doubles = x.astype(np.float64)
        if self.norm == "layernorm":
            wide -= wide.mean(axis=-1, keepdims=True)
        return wide

    def scale(self, x: npt.NDArray[np.floating]) -> Doubles:
        """Return what the norm divides by, sqrt(mean(centred²) + eps): float64 ``[token, 1]``."""
        scale: Doubles = np.sqrt(np.square(self.centre(x)).mean(axis=-1, keepdims=True) + self.eps)
        return scale

    def normed(
        self, x: npt.NDArray[np.floating], scale: Doubles | None = None, *, biased: bool = True
    ) -> Floats:
        """Return the vectors that ``unembed`` multiplies: float32 ``[token, d_model + 1]``.

        Parameters
        ----------
        x : floating ``[token, d_model]``
            Residuals of any boundary.
        scale : float64 ``[token, 1]``, optional
            What to divide by; ``x``'s own scale if None.
        biased : bool
            Whether β and b_U are added; the authors add neither.
        """
        out = np.empty((len(x), self.unembed.shape[0]), dtype=np.float32)
        out[:, :-1] = self.centre(x) / (self.scale(x) if scale is None else scale) * self.gamma
        if biased:
            out[:, :-1] += self.beta
        out[:, -1] = biased
        return out
