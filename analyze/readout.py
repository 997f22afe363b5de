"""What comes out of a model's readout, compared between boundaries: entropy, KL, loss, rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MEASURES", "compare_distributions"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MEASURES = (
    "entropy_nats",
    "kl_final_lens_nats",
    "kl_lens_final_nats",
    "loss_nats",
    "rank",
    "top1_token",
    "agrees",
)
"""What is known of each token at each boundary, in the order of :func:`compare_distributions`'s last axis."""

CLAMP = 1e-9
"""The authors raise every probability to at least this before they take the entropy."""

_COLUMNS = 1024  # of the vocabulary at a time: four blocks of 256 tokens stay in a core's cache
_LOWEST = -1e30  # a maximum before anything was seen; finite, so that rescaling nothing gives nothing


class _Softmax:
    """Running sums over blocks of the vocabulary that fix one distribution p ∝ e^z for each token.

    With m the largest logit so far and u = z - m: S = Σ e^u and T = Σ e^u·u. When m rises, the old sums
    are rescaled (the online softmax of Milakov and Gimelshein, arXiv 1805.02867). Logits, exponentials and
    the sums within a block are float32, the sums across blocks float64.
    """

    def __init__(self, x: Floats, unembed: Floats, of_targets: Floats) -> None:
        n = len(x)
        self.x = x
        self.unembed = unembed
        self.of_target: Doubles = np.vecdot(x, of_targets).astype(np.float64)  # z of the true next token
        self.n_above = np.zeros(n, dtype=np.int64)  # other tokens with a larger z
        self.top = np.full(n, _LOWEST)  # m
        self.top1 = np.zeros(n, dtype=np.int64)
        self.mass = np.zeros(n)  # S
        self.energy = np.zeros(n)  # T

    def add(self, columns: slice, targets: Ints, u: Floats, exponentials: Floats) -> tuple[Doubles, Doubles]:
        """Add a block of the vocabulary; write its u and e^u.

        Returns
        -------
        rise, old_mass : float64 ``[token]``
            By how much m rose, and S of the blocks before this one, rescaled to the new m.
        """
        np.matmul(self.x, self.unembed[:, columns], out=u)
        self._count_above(u, columns.start, targets)
        column = u.argmax(axis=1)
        highest = np.take_along_axis(u, column[:, None], axis=1)[:, 0].astype(np.float64)
        higher = highest > self.top
        rise = np.where(higher, highest - self.top, 0.0)
        self.top1 = np.where(higher, columns.start + column, self.top1)
        self.top = np.where(higher, highest, self.top)
        old_mass = np.exp(-rise) * self.mass
        np.subtract(u, self.top[:, None].astype(np.float32), out=u)
        np.exp(u, out=exponentials)
        self.energy = np.exp(-rise) * self.energy - rise * old_mass + np.vecdot(exponentials, u)
        self.mass = old_mass + np.vecdot(
            exponentials, np.ones_like(exponentials[0])
        )  # three times as fast as sum
        return rise, old_mass

    def _count_above(self, logits: Floats, first: int, targets: Ints) -> None:
        above = logits > self.of_target[:, None].astype(np.float32)
        here = np.flatnonzero((targets >= first) & (targets < first + logits.shape[1]))
        above[here, targets[here] - first] = False  # its own column: two products differ in the last digit
        self.n_above += np.count_nonzero(above, axis=1)

    def log_mass(self) -> Doubles:
        return np.log(self.mass)

    def entropy(self) -> Doubles:
        """H = ln S - T/S, in nats."""
        return self.log_mass() - self.energy / self.mass

    def clamped_entropy(self) -> Doubles:
        """-Σ q ln q in nats, q = max(p, 1e-9) and not renormalised. Costs all products again."""
        entropy = np.zeros(len(self.x))
        for columns in _blocks(self.unembed.shape[1]):
            u = self.x @ self.unembed[:, columns] - self.top[:, None].astype(np.float32)
            q = np.maximum(np.exp(u) / self.mass[:, None], CLAMP)
            entropy -= np.vecdot(q, np.log(q))
        return entropy

    def loss(self) -> Doubles:
        """-ln p of the true next token, in nats."""
        loss: Doubles = self.log_mass() + self.top - self.of_target
        return loss


def _blocks(n_columns: int) -> list[slice]:
    return [slice(start, min(start + _COLUMNS, n_columns)) for start in range(0, n_columns, _COLUMNS)]


def compare_distributions(
    unembed: Floats, final: Floats, lenses: Sequence[Floats], targets: Ints, *, clamped: bool = False
) -> Doubles:
    """Compare what each boundary would predict with what the model does predict, token by token.

    The cost is one product [token, d_model + 1] × [d_model + 1, vocab] for each distribution; no logits
    are kept, so memory beyond the inputs is four blocks of tokens × 1024 float32.

    Parameters
    ----------
    unembed : float32 ``[d_model + 1, vocab]``
        Of :class:`~layerlake.catalog.readout.Readout`.
    final : float32 ``[token, d_model + 1]``
        The final residual, normed: the model's own distribution.
    lenses : sequence of float32 ``[token, d_model + 1]``
        Other residuals, normed.
    targets : int64 ``[token]``
        The true next tokens.
    clamped : bool
        Whether the lenses' entropy is the authors', with probabilities of at least 1e-9.

    Returns
    -------
    float64 ``[token, lens, measure]``
        The measures of each lens, and after the last lens those of the final distribution itself, whose KL
        is 0. ``rank`` is the number of tokens that are likelier than the true next one: 0 is the top.
        Entropy, loss and KL are in nats.
    """
    n_tokens = len(targets)
    of_targets = np.ascontiguousarray(unembed[:, targets].T)
    model = _Softmax(final, unembed, of_targets)
    sums = [_Softmax(x, unembed, of_targets) for x in lenses]
    forward, backward = np.zeros((2, len(lenses), n_tokens))  # Σ e^u_f (u_f - u_l) and Σ e^u_l (u_l - u_f)
    buffers = np.empty((4, n_tokens * _COLUMNS), dtype=np.float32)
    for columns in _blocks(unembed.shape[1]):
        width = columns.stop - columns.start
        u_f, e_f, u_l, e_l = buffers[:, : n_tokens * width].reshape(4, n_tokens, width)
        rise_f, mass_f = model.add(columns, targets, u_f, e_f)
        for i, lens in enumerate(sums):
            rise_l, mass_l = lens.add(columns, targets, u_l, e_l)
            between = np.subtract(u_f, u_l, out=u_l)
            forward[i] = np.exp(-rise_f) * forward[i] + (rise_l - rise_f) * mass_f + np.vecdot(e_f, between)
            backward[i] = np.exp(-rise_l) * backward[i] + (rise_f - rise_l) * mass_l - np.vecdot(e_l, between)
    out = np.empty((n_tokens, len(lenses) + 1, len(MEASURES)))
    for i, lens in enumerate([*sums, model]):
        own = lens is model
        ratio = lens.log_mass() - model.log_mass()
        out[:, i] = np.stack(
            [
                lens.clamped_entropy() if clamped and not own else lens.entropy(),
                np.zeros(n_tokens) if own else np.maximum(forward[i] / model.mass + ratio, 0.0),
                np.zeros(n_tokens) if own else np.maximum(backward[i] / lens.mass - ratio, 0.0),
                lens.loss(),
                lens.n_above,
                lens.top1,
                lens.top1 == model.top1,
            ],
            axis=-1,
        )
    return out
