"""How large the outputs of attention and MLP are, alone and beside the residual stream.

After arXiv 2406.19384, Figure 12b, and Figure 5 of its first version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.run import Run
from ..catalog.sizes import parse_count
from .intervals import bootstrap_sums, percentile_interval, ratio
from .statistic import State, Statistic, Unit, read_rows, tidy_table
from .tokens import MaskedTokens, canonical_tokens, choose_spread, choose_tokens

__all__ = ["COMPONENTS", "NORMS_VERSION", "NORMS_VIEWS", "NormsOptions", "NormsStatistic"]

NORMS_VERSION = 2
NORMS_VIEWS = ("norms", "norm_tokens")

COMPONENTS = ("attn_out", "mlp_out", "resid_pre")
_SITES = ("attn_out", "mlp_out", "resid")  # resid_pre of layer l is boundary l of resid

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class NormsOptions:
    """Which tokens ``norm_tokens`` keeps; ``norms`` always uses the whole evaluation mask."""

    tokens: str = field(
        default="20k",
        metadata={
            "help": "How many tokens norm_tokens keeps, spread over the documents (k = 1000), or 'all'; "
            "norms is over all tokens of the mask in any case."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of tokens."})

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", canonical_tokens(self.tokens))


@dataclass(frozen=True, slots=True)
class NormsBlock:
    """What one unit reads: one layer and component after the other, never all at once."""

    items: npt.NDArray[np.int64]
    vectors: Iterator[npt.NDArray[Any]]
    """``[token, d_model]`` for each layer, and within it for each component."""


@dataclass(frozen=True, slots=True)
class NormsStatistic(Statistic[NormsBlock]):
    """The norm of every component of every layer, for each token of the mask.

    A unit reads the masked rows of one partition, one layer of one site at a time: R·d_model values and
    their float64 copy. The state is 12·L + 16 bytes a token (gpt2-xl, a million tokens: 0.6 GB).
    """

    run: str
    options: NormsOptions
    tokens: MaskedTokens
    partition_tokens: int
    n_layers: int
    centred: bool
    """Whether the mean over d_model is subtracted: for LayerNorm, which never sees it."""

    @classmethod
    def open(cls, run: Run, options: NormsOptions) -> Self:
        """Read the token table."""
        tokens = choose_tokens(run, "all", seed=0)
        rows = run.manifest.geometry.partition_tokens
        return cls(run.run_id, options, tokens, rows, run.shape.n_layers, run.shape.norm == "layernorm")

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        reads = tuple((site, layer) for layer in range(self.n_layers) for site in _SITES)
        partitions = self.tokens.rows // self.partition_tokens
        starts = np.flatnonzero(np.diff(partitions, prepend=-1))
        return [Unit(reads, items) for items in np.split(np.arange(len(partitions)), starts[1:])]

    def keys(self, unit: Unit) -> npt.NDArray[np.int64]:  # noqa: D102
        return self.tokens.keys(unit.items)

    def read(self, run: Run, unit: Unit) -> NormsBlock:  # noqa: D102
        rows = self.tokens.rows[unit.items]
        return NormsBlock(unit.items, (read_rows(run, site, layer, rows) for site, layer in unit.reads))

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (self.n_layers, len(COMPONENTS)), np.float32)

    def measure(self, block: NormsBlock) -> State:
        """Return the state of a block: key (document, row), values norm ``[layer, component]``."""
        norms = np.stack([self._norm(vectors) for vectors in block.vectors], axis=1)
        values = norms.reshape(len(block.items), self.n_layers, len(COMPONENTS)).astype(np.float32)
        return State.of(self.tokens.keys(block.items), values)

    def _norm(self, vectors: npt.NDArray[Any]) -> Doubles:
        x = vectors.astype(np.float64)
        if self.centred:
            x -= x.mean(axis=1, keepdims=True)
        return np.asarray(np.sqrt(np.vecdot(x, x)))

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``norms``, a row for each layer and component, and ``norm_tokens``.

        Norms are Euclidean, of single tokens of the evaluation mask. ``relative_norm`` is the mean norm divided
        by that of resid_pre in the same layer. ``attn_mlp_ratio`` (of the means) and ``median_attn_mlp_ratio``
        (of the tokens' ratios) are the layer's, and the same for all components. ``centred`` says whether the mean
        over d_model was subtracted first, which is done for models with LayerNorm.
        """
        params = {**self.key, "centred": self.centred, "variant": "default"}
        return {
            "norms": tidy_table(self.run, self._layers(state), params),
            "norm_tokens": tidy_table(self.run, self._tokens(state), params),
        }

    def _layers(self, state: State) -> dict[str, Any]:
        n_tokens, n_components = len(state.keys), len(COMPONENTS)
        n_rows = self.n_layers * n_components
        documents, starts, counts = np.unique(state.keys[:, 0], return_index=True, return_counts=True)
        by_document = np.add.reduceat(state.values, starts, axis=0, dtype=np.float64).reshape(-1, n_rows)
        columns = np.column_stack([by_document, counts])
        shown = self._means(columns.sum(axis=0))
        replicates = self._means(bootstrap_sums(columns))
        median, p10, p90 = np.quantile(state.values.reshape(n_tokens, n_rows), [0.5, 0.1, 0.9], axis=0)
        table: dict[str, Any] = {
            "layer": np.repeat(np.arange(self.n_layers, dtype=np.int32), n_components),
            "component": list(COMPONENTS) * self.n_layers,
            "n_tokens": np.full(n_rows, n_tokens, dtype=np.int64),
            "n_documents": np.full(n_rows, len(documents), dtype=np.int64),
        }
        for name, value in shown.items():
            lo, hi = percentile_interval(replicates[name], n_documents=len(documents))
            table |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        table |= {
            "median_norm": median.astype(np.float64),
            "p10": p10.astype(np.float64),
            "p90": p90.astype(np.float64),
            "median_attn_mlp_ratio": self._median_ratios(state.values),
        }
        ratios = zip(shown["relative_norm"], shown["attn_mlp_ratio"], strict=True)
        return table | {"reason": [_reason(len(documents), *each) for each in ratios]}

    def _means(self, totals: Doubles) -> dict[str, Doubles]:
        """Return the means that sums over documents ``[…, layer·component + 1]`` amount to: ``[…, row]``."""
        means = (totals[..., :-1] / totals[..., -1:]).reshape(
            *totals.shape[:-1], self.n_layers, len(COMPONENTS)
        )
        attn, mlp, resid = np.moveaxis(means, -1, 0)
        columns = {
            "mean_norm": means,
            "relative_norm": ratio(means, resid[..., None]),
            "attn_mlp_ratio": np.broadcast_to(ratio(attn, mlp)[..., None], means.shape),
        }
        return {name: values.reshape(*totals.shape[:-1], -1) for name, values in columns.items()}

    def _median_ratios(self, norms: npt.NDArray[np.float32]) -> Doubles:
        """Return the median over tokens of ‖attn_out‖/‖mlp_out‖: ``[row]``."""
        medians = np.full(self.n_layers, np.nan)
        for layer in range(self.n_layers):
            attn, mlp = norms[:, layer, 0], norms[:, layer, 1]
            if (mlp > 0).any():  # a token whose MLP writes nothing has no ratio
                medians[layer] = np.median(attn[mlp > 0] / mlp[mlp > 0])
        return np.repeat(medians, len(COMPONENTS))

    def _tokens(self, state: State) -> dict[str, Any]:
        n = len(state.keys)
        count = n if self.options.tokens == "all" else parse_count(self.options.tokens)
        kept = choose_spread(n, count, self.options.seed)
        n_components = len(COMPONENTS)
        return {
            "layer": np.repeat(np.arange(self.n_layers, dtype=np.int32), n_components * len(kept)),
            "component": np.tile(np.repeat(np.array(COMPONENTS, dtype=object), len(kept)), self.n_layers),
            "row": np.tile(state.keys[kept, 1], self.n_layers * n_components),
            "norm": state.values[kept].transpose(1, 2, 0).ravel().astype(np.float64),
        }


def _reason(n_documents: int, relative: float, attn_mlp: float) -> str | None:
    """Return why something of a row is NULL."""
    why = []
    if n_documents < 2:
        why.append("no intervals: the tokens are all of one document")
    if np.isnan(relative):
        why.append("no relative norm: resid_pre is 0 at every token")
    if np.isnan(attn_mlp):
        why.append("no ratio of attn_out to mlp_out: the latter is 0 at every token")
    return "; ".join(why) or None
