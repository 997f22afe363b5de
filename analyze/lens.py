"""The logit lens: what each boundary of the residual stream would predict (arXiv 2406.19384, Figures 7b and 8).

The lens reads x_i through the model's own last step, norm_f and W_U, at every boundary i = 0 … L. At
i = L that is the model itself: KL 0, agreement 1, and the model's own entropy and loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.readout import Readout
from ..catalog.run import Run
from .intervals import bootstrap_sums, percentile_interval
from .readout import MEASURES, compare_distributions
from .statistic import State, Statistic, Unit, read_rows, tidy_table
from .tokens import MaskedTokens, canonical_tokens, choose_tokens

__all__ = ["LENS_VERSION", "LENS_VIEWS", "LensOptions", "LensStatistic"]

LENS_VERSION = 2
LENS_VIEWS = ("lens", "lens_tokens")

_UNIT_TOKENS = 256  # enough for a product to run at full speed, and small enough for all boundaries at once


@dataclass(frozen=True, slots=True)
class LensOptions:
    """How the lens looks, and at which tokens."""

    scale: Literal["own", "final", "authors"] = field(
        default="own",
        metadata={
            "help": "What norm_f divides x_i by: its own scale, or that of the final residual; 'authors' is the "
            "final scale without biases, and an entropy of probabilities clamped to 1e-9."
        },
    )
    tokens: str = field(
        default="20k",
        metadata={
            "help": "How many tokens of the evaluation mask, spread over the documents (k = 1000), or 'all'."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of tokens."})

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", canonical_tokens(self.tokens))


@dataclass(frozen=True, slots=True)
class LensBlock:
    """What one unit reads."""

    resid: list[npt.NDArray[Any]]
    """``[token, d_model]`` for each boundary, in the stored dtype."""
    items: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LensStatistic(Statistic[LensBlock]):
    """The lens at every boundary, for each chosen token.

    A unit reads 256 tokens at all boundaries together, because each lens is compared with the final
    distribution: 256·(L + 1)·d_model values, and 512 logits beside each token. All workers of a process share
    the readout, (d_model + 1)·vocab·4 bytes. The state is 56 bytes a token and boundary. Each token costs
    2·d_model·vocab operations a boundary (twice that for the authors' entropy).
    """

    run: str
    options: LensOptions
    readout: Readout
    tokens: MaskedTokens
    n_boundaries: int

    @classmethod
    def open(cls, run: Run, options: LensOptions) -> Self:
        """Choose the tokens and read the weights."""
        tokens = choose_tokens(run, options.tokens, options.seed)
        return cls(run.run_id, options, Readout.open(run), tokens, run.shape.n_layers + 1)

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        reads = tuple(("resid", boundary) for boundary in range(self.n_boundaries))
        items = np.arange(len(self.tokens))
        return [Unit(reads, items[i : i + _UNIT_TOKENS]) for i in range(0, len(items), _UNIT_TOKENS)]

    def keys(self, unit: Unit) -> npt.NDArray[np.int64]:  # noqa: D102
        return self.tokens.keys(unit.items)

    @property
    def is_extendable(self) -> bool:
        """Whether all tokens are looked at: a choice of them is spread anew over a longer extent."""
        return self.tokens.are_all

    def read(self, run: Run, unit: Unit) -> LensBlock:  # noqa: D102
        rows = self.tokens.rows[unit.items]
        return LensBlock([read_rows(run, site, boundary, rows) for site, boundary in unit.reads], unit.items)

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (self.n_boundaries, len(MEASURES)))

    def measure(self, block: LensBlock) -> State:
        """Return the state of a block: key (document, row), values ``[boundary, measure]``."""
        readout, last = self.readout, block.resid[-1]
        targets = self.tokens.next_ids[block.items]
        final = readout.normed(last)
        if self.options.scale == "authors":  # no biases, so that the last boundary is not the model either
            scale = readout.scale(last)
            lenses = [readout.normed(x, scale, biased=False) for x in block.resid]
            values = compare_distributions(readout.unembed, final, lenses, targets, clamped=True)[:, :-1]
        else:
            scale_or_own = readout.scale(last) if self.options.scale == "final" else None
            lenses = [readout.normed(x, scale_or_own) for x in block.resid[:-1]]
            values = compare_distributions(readout.unembed, final, lenses, targets)
        return State.of(self.tokens.keys(block.items), values)

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``lens``, means over tokens with intervals over documents, and ``lens_tokens``.

        ``rank`` is the number of tokens that the lens holds likelier than the true next one: 0 is the top.
        """
        params = {**self.key, "variant": "authors" if self.options.scale == "authors" else "default"}
        return {
            "lens": tidy_table(self.run, self._means(state), params),
            "lens_tokens": tidy_table(self.run, self._tokens(state), params),
        }

    def _means(self, state: State) -> dict[str, Any]:
        shown = {  # column → (measure, unit)
            "entropy_bits": ("entropy_nats", math.log(2)),
            "entropy_nats": ("entropy_nats", 1.0),
            "kl_final_lens_nats": ("kl_final_lens_nats", 1.0),
            "kl_lens_final_nats": ("kl_lens_final_nats", 1.0),
            "loss_nats": ("loss_nats", 1.0),
            "top1_agreement": ("agrees", 1.0),
        }
        documents, starts, counts = np.unique(state.keys[:, 0], return_index=True, return_counts=True)
        columns: dict[str, Any] = {
            "boundary": np.arange(self.n_boundaries, dtype=np.int32),
            "scale": self.options.scale,
            "n_tokens": np.full(self.n_boundaries, len(state.keys), dtype=np.int64),
            "n_documents": np.full(self.n_boundaries, len(documents), dtype=np.int64),
        }
        by_document = np.add.reduceat(state.values, starts, axis=0)  # [document, boundary, measure]
        together = np.column_stack([by_document.reshape(len(documents), -1), counts])
        resampled = bootstrap_sums(together)
        shape = (-1, self.n_boundaries, len(MEASURES))
        means = (together.sum(axis=0)[:-1] / len(state.keys)).reshape(shape)[0]
        replicates = (resampled[:, :-1] / resampled[:, -1:]).reshape(shape)
        lo, hi = percentile_interval(replicates, n_documents=len(documents))
        for name, (measure, unit) in shown.items():
            at = MEASURES.index(measure)
            columns[name] = means[:, at] / unit
            columns[f"{name}_lo"], columns[f"{name}_hi"] = lo[:, at] / unit, hi[:, at] / unit
        reason = "no intervals: the tokens are all of one document" if len(documents) < 2 else None
        return columns | {"reason": [reason] * self.n_boundaries}

    def _tokens(self, state: State) -> dict[str, Any]:
        n_tokens = len(state.keys)
        flat = {name: state.values[:, :, i].T.ravel() for i, name in enumerate(MEASURES)}
        return {
            "boundary": np.repeat(np.arange(self.n_boundaries, dtype=np.int32), n_tokens),
            "scale": self.options.scale,
            "row": np.tile(state.keys[:, 1], self.n_boundaries),
            "entropy_bits": flat["entropy_nats"] / math.log(2),
            "kl_final_lens_nats": flat["kl_final_lens_nats"],
            "kl_lens_final_nats": flat["kl_lens_final_nats"],
            "loss_nats": flat["loss_nats"],
            "rank": flat["rank"].astype(np.int32),
            "top1_token": flat["top1_token"].astype(np.int32),
        }
