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
import pyarrow.compute as pc

from ..catalog.bands import LATE_QUERY, MAX_DISTANCE, N_SUMS, QUERIES, band_counts, band_sums, uniform_sums
from ..catalog.errors import CorruptRun
from ..catalog.layout import n_pairs
from ..catalog.manifest import Partition
from ..catalog.run import Run
from ..catalog.sites import ANALYSIS_SITES
from ..catalog.tables import attn_band_sums
from .intervals import bootstrap_sums, percentile_interval, ratio
from .statistic import State, Statistic, Unit, choose_sites, require_finite, tidy_table

__all__ = [
    "ATTENTION_VERSION",
    "ATTENTION_VIEWS",
    "AttentionOptions",
    "AttentionStatistic",
]

ATTENTION_VERSION = 2
ATTENTION_VIEWS = ("attention_locality",)
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


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """What one unit reads: a partition, of one layer of ``pattern`` or of all layers of ``attn_band``."""

    layers: Ints
    items: Ints
    """Numbers of the documents, in the order of :attr:`AttentionStatistic.documents`."""
    values: npt.NDArray[Any]
    """``[head, pair]`` of ``pattern``, ``[document, layer, head, query set, sum]`` of ``attn_band``."""


@dataclass(frozen=True, slots=True)
class AttentionStatistic(Statistic[AttentionBlock]):
    """Band sums of each document and layer.

    A unit reads one partition of ``attn_band``, or of one layer of ``pattern``: heads × its pairs. The state
    is 288 bytes a document and layer, and serves both variants.
    """

    run: str
    options: AttentionOptions
    source: str
    """The site that is read."""
    documents: Ints
    lengths: Ints
    """Tokens of each document."""
    pair_starts: Ints
    partitions: Ints
    """The partition of each document."""
    n_layers: int
    n_heads: int

    @classmethod
    def open(cls, run: Run, options: AttentionOptions) -> Self:
        """Read the documents table."""
        (source,) = choose_sites(run, ANALYSIS_SITES["attention_locality"])
        table = run.stored_documents.sort_by("pair_start")
        documents, lengths, starts, partitions = (
            table[name].to_numpy().astype(np.int64)
            for name in ("document", "n_tokens", "pair_start", "partition")
        )
        shape = run.shape
        return cls(
            run.run_id, options, source, documents, lengths, starts, partitions, shape.n_layers, shape.n_heads
        )

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        reads = tuple((self.source, layer) for layer in range(self.n_layers))
        together = [reads] if self.source == "attn_band" else [(read,) for read in reads]
        members = [np.flatnonzero(self.partitions == index) for index in np.unique(self.partitions)]
        return [Unit(read, items) for items in members for read in together]

    def keys(self, unit: Unit) -> Ints:  # noqa: D102
        return self._keys(unit.items, np.array([layer for _, layer in unit.reads]))

    def _keys(self, items: Ints, layers: Ints) -> Ints:
        documents, layers = np.meshgrid(self.documents[items], layers, indexing="ij")
        return np.stack([layers.ravel(), documents.ravel()], axis=1)

    def read(self, run: Run, unit: Unit) -> AttentionBlock:  # noqa: D102
        layers = np.array([layer for _, layer in unit.reads])
        index = self.partitions[unit.items[0]]
        partition = run.manifest.partition(index)
        if self.source == "attn_band":
            values = self._read_sums(run, partition, unit.items)
            by_layer = values.swapaxes(0, 1)
        else:
            values = self._read_pairs(run, int(layers[0]), partition, unit.items)
            by_layer = values[None]
        for layer, found in zip(layers, by_layer, strict=True):
            require_finite(run, self.source, layer, found)
        return AttentionBlock(layers, unit.items, values)

    def _read_pairs(self, run: Run, layer: int, partition: Partition, items: Ints) -> npt.NDArray[Any]:
        """Read the pairs of a partition's documents, one after the other: ``[head, pair]``."""
        values = run.read("pattern", layer, partition)
        if len(items) == partition.n_documents:
            return values
        first, _ = run.span("pattern", partition)
        starts = self.pair_starts[items] - first
        spans = zip(starts, starts + n_pairs(self.lengths[items]), strict=True)
        return np.concatenate([values[:, start:stop] for start, stop in spans], axis=1)

    def _read_sums(self, run: Run, partition: Partition, items: Ints) -> npt.NDArray[np.float32]:
        """Read a partition of ``attn_band``: float32 ``[document, layer, head, query set, sum]``."""
        columns = ["document", "distance_sums", "bos_sum"]
        wanted = (
            None if len(items) == partition.n_documents else pc.field("document").isin(self.documents[items])
        )
        table = run.read_attn_band(partition, columns=columns, where=wanted)
        rows_each = self.n_layers * self.n_heads * len(QUERIES)
        if not np.array_equal(table["document"].to_numpy(), np.repeat(self.documents[items], rows_each)):
            raise CorruptRun(
                f"Partition {partition.index} of attn_band in run {self.run} does not have the rows of the "
                f"partition's {len(items)} documents.",
                hint=f"Check the run: layerlake verify LAKE --run {self.run}",
            )
        return attn_band_sums(table, self.n_layers, self.n_heads)

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (len(QUERIES), N_SUMS))

    def measure(self, block: AttentionBlock) -> State:
        """Return the state of a block: key (layer, document), values ``[query set, sum]``, heads added up."""
        if self.source == "attn_band":
            sums = block.values
        else:
            n = self.lengths[block.items]
            pairs = n_pairs(n)
            sums = band_sums(block.values, n, np.cumsum(pairs) - pairs)[:, None]
        keys = self._keys(block.items, block.layers)
        return State.of(keys, sums.sum(axis=2, dtype=np.float64).reshape(-1, len(QUERIES), N_SUMS))

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``attention_locality``: a row for each layer and distance.

        ``mean_weight`` is the mean over heads and queries at exactly that distance, ``cumulative_weight`` its
        sum over the distances 1 … ``distance`` and ``uniform_weight`` what uniform attention would give for it
        (``uniform_mean_weight``: at exactly that distance). ``per_distance_weight`` is the mean over those
        distances (at distance 0, the weight there); in the authors' variant it is pooled as in their code, documents
        weighing equally.
        ``bos_weight`` is the weight on position 0, BOS where the model has one, and is the same for all distances.

        All documents are drawn again together, whatever their length, so that the distances of a cumulative weight
        vary as one; at a distance that few of them have, draws that hold none of these are left out.
        """
        authors = self.options.variant == "authors"
        order = np.argsort(self.documents)  # the order of the state's keys
        lengths = self.lengths[order]
        query_set = 0 if authors else 1
        used = lengths > (1 if authors else LATE_QUERY)
        by_layer = state.values.reshape(self.n_layers, len(lengths), len(QUERIES), N_SUMS)
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
            "n_documents": np.tile(np.count_nonzero(counts, axis=0)[:-1], self.n_layers),
            "source": self.source,
        }
        columns["reason"] = [self._reason(n) for n in columns["n_documents"]]
        return {"attention_locality": tidy_table(self.run, columns, self.key)}

    def _reason(self, n_documents: int) -> str | None:
        """Return why something is NULL."""
        if not n_documents:
            longest = max(self.lengths, default=0)
            return f"no document has a query that counts: the longest has {longest} tokens"
        return "no interval: only one document has a query that counts" if n_documents == 1 else None

    def _layer(self, sums: Doubles, counts: Doubles, uniform: Doubles) -> dict[str, Doubles]:
        """Return the columns of one layer, ``[distance]`` each, from ``[document, sum]``."""
        # the authors pool the entries at distances 1 … k within a document, then weigh documents equally
        pooled = ratio(_up_to_distance(sums), _up_to_distance(counts))
        columns = np.concatenate([sums, counts, np.nan_to_num(pooled), np.isfinite(pooled)], axis=1)
        parts = np.cumsum([N_SUMS, N_SUMS, MAX_DISTANCE + 1])

        def means(totals: Doubles) -> dict[str, Doubles]:
            """Return the means that sums over documents ``[…, column]`` amount to."""
            weight, count, in_documents, n_pooled = np.split(totals, parts, axis=-1)
            mean = ratio(weight, count)
            cumulative = np.cumsum(_previous(mean), axis=-1)
            if self.options.variant == "authors":
                per_distance = ratio(in_documents, n_pooled)
            else:
                per_distance = _up_to_distance(mean) / np.maximum(np.arange(MAX_DISTANCE + 1), 1)
            return {
                "mean_weight": mean[..., :-1],
                "cumulative_weight": cumulative,
                "per_distance_weight": per_distance,
                "bos_weight": np.repeat(mean[..., -1:], MAX_DISTANCE + 1, axis=-1),
            }

        shown: dict[str, Doubles] = {}
        replicates = means(bootstrap_sums(columns)) if len(sums) else {}
        measured = np.count_nonzero(counts, axis=0)
        for name, value in means(columns.sum(axis=0)).items():
            n_documents = measured[-1] if name == "bos_weight" else measured[:-1]
            lo, hi = percentile_interval(replicates.get(name, value[None]), n_documents=n_documents)
            shown |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        expected = ratio(uniform.sum(axis=0), counts.sum(axis=0))
        shown["uniform_weight"] = np.cumsum(_previous(expected))
        shown["uniform_mean_weight"] = expected[:-1]
        return shown


def _previous(values: Doubles) -> Doubles:
    """Return ``[…, sum]`` without BOS, and 0 for the query itself, which is no previous token."""
    return np.asarray(values[..., :-1] * (np.arange(MAX_DISTANCE + 1) > 0))


def _up_to_distance(values: Doubles) -> Doubles:
    """Return the sums over the distances 1 … d of ``[…, sum]``, and for d = 0 the one of the query itself."""
    sums = np.cumsum(_previous(values), axis=-1)
    sums[..., 0] = values[..., 0]
    return sums
