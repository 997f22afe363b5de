"""Attention locality: how much attention goes to the previous few tokens, and to BOS.

After arXiv 2406.19384, Figures 1 and 6a, and Figure 4 of its first version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.run import Run, decode
from .intervals import bootstrap_sums, percentile_interval, ratio
from .reduce import reduce_statistic
from .statistic import State, Statistic, Unit, require_finite, tidy_table

__all__ = [
    "ATTENTION_VERSION",
    "ATTENTION_VIEWS",
    "MAX_DISTANCE",
    "AttentionOptions",
    "AttentionStatistic",
    "band_counts",
    "band_sums",
    "compute_attention",
    "uniform_sums",
]

ATTENTION_VERSION = 1
ATTENTION_VIEWS = ("attention_locality",)

MAX_DISTANCE = 16
"""Distances 0 (the query itself) … 16 are summed."""

_FIRST_QUERY = MAX_DISTANCE + 1  # t ≥ 17: no key within distance 16 is BOS
_N_SUMS = MAX_DISTANCE + 2  # … and BOS last

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Which queries count."""

    variant: Literal["default", "authors"] = field(
        default="default",
        metadata={
            "help": "default: queries t ≥ 17, so that no key within distance 16 is BOS; authors: at distance k, "
            "all queries t ≥ k."
        },
    )


def band_sums(packed: npt.NDArray[Any], lengths: Ints, starts: Ints) -> Doubles:
    """Sum packed attention weights along the diagonals near the main one, and over the BOS column.

    Costs 36 gathers of [head, token] values; the pattern itself is read once.

    Parameters
    ----------
    packed : floating ``[head, pair]``
        The causal triangles of some documents: pair = start + q(q+1)/2 + k.
    lengths : int64 ``[document]``
        Tokens of each document.
    starts : int64 ``[document]``
        The first pair of each.

    Returns
    -------
    float64 ``[document, query set, head, 18]``
        Σ_t A[t, t-k] for k = 0 … 16, and Σ_t A[t, 0] last, over two sets of queries: all (t ≥ k, and
        t ≥ 1 for BOS), and t ≥ 17. :func:`band_counts` has the number of terms.
    """
    sums = np.zeros((len(lengths), 2, packed.shape[0], _N_SUMS))
    for query_set, earliest in enumerate((0, _FIRST_QUERY)):
        for column in range(_N_SUMS):
            bos = column == MAX_DISTANCE + 1
            first = max(earliest, 1 if bos else column)
            held = np.flatnonzero(lengths > first)
            if not len(held):
                continue
            n_queries = lengths[held] - first
            offsets = np.cumsum(n_queries) - n_queries
            query = np.arange(n_queries.sum()) - np.repeat(offsets, n_queries) + first
            pair = np.repeat(starts[held], n_queries) + query * (query + 1) // 2
            weights = packed[:, pair if bos else pair + query - column].astype(np.float64)
            sums[held, query_set, :, column] = np.add.reduceat(weights, offsets, axis=1).T
    return sums


def band_counts(lengths: Ints) -> Ints:
    """Return how many queries each of :func:`band_sums` adds up: int64 ``[document, query set, 18]``.

    Examples
    --------
    >>> band_counts(np.array([20]))[0, :, [0, 1, 16, 17]].T.tolist()
    [[20, 19, 4, 19], [3, 3, 3, 3]]
    """
    first = np.stack([[*range(MAX_DISTANCE + 1), 1], np.full(_N_SUMS, _FIRST_QUERY)])
    counts: Ints = np.maximum(lengths[:, None, None] - first, 0)
    return counts


def uniform_sums(lengths: Ints) -> Doubles:
    """Return what :func:`band_sums` would be for uniform attention, 1/(t+1): float64 ``[document, query set, 18]``."""
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, max(lengths, default=0) + 1))])
    counts = band_counts(lengths)
    sums: Doubles = harmonic[lengths][:, None, None] - harmonic[lengths[:, None, None] - counts]
    return sums


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """What one unit reads: a partition of one layer."""

    layer: int
    items: Ints
    """Numbers of the documents, in the order of :attr:`AttentionStatistic.documents`."""
    packed: npt.NDArray[Any]
    """``[head, pair]``"""


@dataclass(frozen=True, slots=True)
class AttentionStatistic(Statistic[AttentionBlock]):
    """Band sums of each document and layer.

    A unit reads one partition of one layer of ``pattern``: heads × its pairs. The state is 288 bytes a
    document and layer, and serves both variants.
    """

    run: str
    options: AttentionOptions
    documents: Ints
    lengths: Ints
    """Tokens of each document."""
    pair_starts: Ints
    partitions: tuple[tuple[int, int], ...]
    """The pairs that each partition uses: first, and the one after the last."""
    n_layers: int
    n_heads: int

    @classmethod
    def open(cls, run: Run, options: AttentionOptions) -> Self:
        """Read the documents table."""
        table = run.stored_documents.sort_by("pair_start")
        documents, lengths, starts = (
            table[name].to_numpy().astype(np.int64) for name in ("document", "n_tokens", "pair_start")
        )
        partitions = tuple(run.span("pattern", partition) for partition in run.manifest.partitions)
        return cls(
            run.run_id, options, documents, lengths, starts, partitions, run.shape.n_layers, run.shape.n_heads
        )

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        units = []
        for start, stop in self.partitions:
            items = np.arange(*np.searchsorted(self.pair_starts, [start, stop]))
            if len(items):
                units += [Unit((("pattern", layer),), items) for layer in range(self.n_layers)]
        return units

    def read(self, run: Run, unit: Unit) -> AttentionBlock:  # noqa: D102
        ((site, layer),) = unit.reads
        last = self.lengths[unit.items[-1]]
        start = self.pair_starts[unit.items[0]]
        stop = self.pair_starts[unit.items[-1]] + last * (last + 1) // 2
        packed = decode(np.asarray(run.array(site)[layer, :, start:stop]), run.manifest.dtype)
        require_finite(run, site, layer, packed)
        return AttentionBlock(layer, unit.items, packed)

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (2, _N_SUMS))

    def measure(self, block: AttentionBlock) -> State:
        """Return the state of a block: key (layer, document), values ``[query set, sum]``, heads added up."""
        starts = self.pair_starts[block.items]
        sums = band_sums(block.packed, self.lengths[block.items], starts - starts[0]).sum(axis=2)
        documents = self.documents[block.items]
        return State.of(np.stack([np.full_like(documents, block.layer), documents], axis=1), sums)

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``attention_locality``: a row for each layer and distance."""
        authors = self.options.variant == "authors"
        order = np.argsort(self.documents)  # the order of the state's keys
        lengths = self.lengths[order]
        query_set = 0 if authors else 1
        used = lengths > (1 if authors else _FIRST_QUERY)
        by_layer = state.values.reshape(self.n_layers, len(lengths), 2, _N_SUMS)
        sums = by_layer[:, used, query_set] / self.n_heads
        counts = band_counts(lengths[used])[:, query_set].astype(np.float64)
        uniform = uniform_sums(lengths[used])[:, query_set]
        layers = [self._layer(s, counts, uniform) for s in sums]
        n_distances = MAX_DISTANCE + 1
        columns: dict[str, Any] = {
            "layer": np.repeat(np.arange(self.n_layers, dtype=np.int32), n_distances),
            "distance": np.tile(np.arange(n_distances, dtype=np.int32), self.n_layers),
            **{name: np.concatenate([layer[name] for layer in layers]) for name in layers[0]},
            "n_queries": np.tile(counts.sum(axis=0)[:-1].astype(np.int64), self.n_layers),
            "n_documents": np.full(self.n_layers * n_distances, used.sum(), dtype=np.int64),
        }
        columns["reason"] = [
            self._reason(n, lo) for n, lo in zip(columns["n_queries"], columns["mean_weight_lo"], strict=True)
        ]
        return {"attention_locality": tidy_table(self.run, columns, self.key)}

    def _reason(self, n_queries: int, lo: float) -> str | None:
        if not n_queries:
            longest = max(self.lengths, default=0)
            return f"no document has a query that counts: the longest has {longest} tokens"
        return "no interval: too few documents have a query that counts" if np.isnan(lo) else None

    def _layer(self, sums: Doubles, counts: Doubles, uniform: Doubles) -> dict[str, Doubles]:
        """Return the columns of one layer, ``[distance]`` each, from ``[document, sum]``."""
        n_documents = len(sums)
        # the authors pool the entries at distances 1 … k within a document, then weigh documents equally
        pooled = ratio(np.cumsum(_previous(sums), axis=1), np.cumsum(_previous(counts), axis=1))
        columns = np.concatenate([sums, counts, np.nan_to_num(pooled), np.isfinite(pooled)], axis=1)
        parts = np.cumsum([_N_SUMS, _N_SUMS, MAX_DISTANCE + 1])

        def means(totals: Doubles) -> dict[str, Doubles]:
            """Return the means that sums over documents ``[…, column]`` amount to."""
            weight, count, in_documents, n_pooled = np.split(totals, parts, axis=-1)
            mean = ratio(weight, count)
            cumulative = np.cumsum(_previous(mean), axis=-1)
            if self.options.variant == "authors":
                per_distance = ratio(in_documents, n_pooled)
            else:
                per_distance = ratio(cumulative, np.arange(MAX_DISTANCE + 1))
            return {
                "mean_weight": mean[..., :-1],
                "cumulative_weight": cumulative,
                "per_distance_weight": per_distance,
                "bos_weight": np.repeat(mean[..., -1:], MAX_DISTANCE + 1, axis=-1),
            }

        shown: dict[str, Doubles] = {}
        replicates = means(bootstrap_sums(columns)) if n_documents else {}
        for name, value in means(columns.sum(axis=0)).items():
            lo, hi = percentile_interval(replicates.get(name, value[None]), n_documents=n_documents)
            shown |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        expected = ratio(uniform.sum(axis=0), counts.sum(axis=0))
        shown["uniform_weight"] = np.cumsum(_previous(expected))
        shown["uniform_mean_weight"] = expected[:-1]
        return shown


def _previous(values: Doubles) -> Doubles:
    """Return ``[…, sum]`` without BOS, and 0 for the query itself, which is no previous token."""
    return np.asarray(values[..., :-1] * (np.arange(MAX_DISTANCE + 1) > 0))


def compute_attention(
    run: Run, options: AttentionOptions, *, scheduler: str = "threads", progress: bool = False
) -> dict[str, pa.Table]:
    """Compute ``attention_locality`` of one run (columns in docs/analyses.md).

    ``mean_weight`` is the mean over heads and queries at exactly that distance, ``cumulative_weight`` its
    sum over the distances 1 … ``distance`` and ``uniform_weight`` what uniform attention would give for it
    (``uniform_mean_weight``: at exactly that distance). ``per_distance_weight`` is the mean over those
    distances; in the authors' variant it is pooled as in their code, documents weighing equally.
    ``bos_weight`` is the weight on position 0, BOS where the model has one, and is the same for all distances.
    """
    statistic = AttentionStatistic.open(run, options)
    return statistic.finalise(reduce_statistic(statistic, run, scheduler=scheduler, progress=progress))
