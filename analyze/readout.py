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

_COLUMNS = 512  # of the vocabulary at a time: four blocks of 256 tokens stay in a core's cache
_LOWEST = -1e30  # a maximum before anything was seen; finite, so that rescaling nothing gives nothing


class _Softmax:
    """Running sums over blocks of the vocabulary that fix one distribution p ∝ e^z for each token.

    With m the largest logit so far and u = z - m: S = Σ e^u and T = Σ e^u·u. When m rises, the old sums
    are rescaled (the online softmax of Milakov and Gimelshein, arXiv 1805.02867). Logits, exponentials and
    the sums within a block are float32, the sums across blocks float64.
    """

    def __init__(self, x: Floats, of_targets: Floats) -> None:
        n = len(x)
        self.of_target: Doubles = np.vecdot(x, of_targets).astype(np.float64)  # z of the true next token
        self.n_above = np.zeros(n, dtype=np.int64)  # other tokens with a larger z
        self.top = np.full(n, _LOWEST)  # m
        self.top1 = np.zeros(n, dtype=np.int64)
        self.mass = np.zeros(n)  # S
        self.energy = np.zeros(n)  # T

    def add(self, logits: Floats, exponentials: Floats, first: int, targets: Ints) -> tuple[Doubles, Doubles]:
        """Add a block of the vocabulary, from token id ``first`` on; turn its logits into u, and write e^u.

        Returns
        -------
        rise, old_mass : float64 ``[token]``
            By how much m rose, and S of the blocks before this one, rescaled to the new m.
        """
        self._count_above(logits, first, targets)
        column = logits.argmax(axis=1)
        highest = np.take_along_axis(logits, column[:, None], axis=1)[:, 0].astype(np.float64)
        higher = highest > self.top
        rise = np.where(higher, highest - self.top, 0.0)
        self.top1 = np.where(higher, first + column, self.top1)
        self.top = np.where(higher, highest, self.top)
        old_mass = np.exp(-rise) * self.mass
        u = np.subtract(logits, self.top[:, None].astype(np.float32), out=logits)
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
        self.n_above += above.view(np.uint8).sum(axis=1, dtype=np.uint32)  # twice as fast as count_nonzero

    def log_mass(self) -> Doubles:
        return np.log(self.mass)

    def entropy(self) -> Doubles:
        """H = ln S - T/S, in nats."""
        return self.log_mass() - self.energy / self.mass

    def clamped_entropy(self, x: Floats, unembed: Floats) -> Doubles:
        """-Σ q ln q in nats, q = max(p, 1e-9) and not renormalised. Costs the products again."""
        entropy = np.zeros(len(x))
        for columns in _blocks(unembed.shape[1]):
            u = x @ unembed[:, columns] - self.top[:, None].astype(np.float32)
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
    are kept, so memory beyond the inputs and a copy of them is, whatever the vocabulary, a block of
    tokens × 512 float32 for each distribution, and two.

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
    model = _Softmax(final, of_targets)
    sums = [_Softmax(x, of_targets) for x in lenses]
    together = np.concatenate([final, *lenses])  # a tall product runs faster than many
    forward, backward = np.zeros((2, len(lenses), n_tokens))  # Σ e^u_f (u_f - u_l) and Σ e^u_l (u_l - u_f)
    buffer = np.empty((len(lenses) + 3) * n_tokens * _COLUMNS, dtype=np.float32)
    for columns in _blocks(unembed.shape[1]):
        width = columns.stop - columns.start
        first, blocks = columns.start, buffer[: (len(lenses) + 3) * n_tokens * width]
        e_f, e_l, u_f, *logits = blocks.reshape(-1, n_tokens, width)
        np.matmul(together, unembed[:, columns], out=blocks[2 * n_tokens * width :].reshape(-1, width))
        rise_f, mass_f = model.add(u_f, e_f, first, targets)
        for i, (lens, u_l) in enumerate(zip(sums, logits, strict=True)):
            rise_l, mass_l = lens.add(u_l, e_l, first, targets)
            between = np.subtract(u_f, u_l, out=u_l)
            forward[i] = np.exp(-rise_f) * forward[i] + (rise_l - rise_f) * mass_f + np.vecdot(e_f, between)
            backward[i] = np.exp(-rise_l) * backward[i] + (rise_f - rise_l) * mass_l - np.vecdot(e_l, between)
    out = np.empty((n_tokens, len(lenses) + 1, len(MEASURES)))
    for i, (lens, x) in enumerate(zip([*sums, model], [*lenses, final], strict=True)):
        own = lens is model
        ratio = lens.log_mass() - model.log_mass()
        out[:, i] = np.stack(
            [
                lens.clamped_entropy(x, unembed) if clamped and not own else lens.entropy(),
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
