"""Subjoiner heads: heads by which the last token of a word looks back at the word's other tokens.

After arXiv 2406.19384, section 4.1 and Figure 6b; "subword merging heads" of Ferrando and Voita 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from .intervals import bootstrap_sums, percentile_interval
from .statistic import State, Statistic, Unit, require_finite, tidy_table
from .words import Words, find_words, pair_words

__all__ = [
    "CLASSES",
    "SUBJOINER_VERSION",
    "SUBJOINER_VIEWS",
    "Prompts",
    "SubjoinerOptions",
    "SubjoinerStatistic",
    "permutation_p_values",
]

SUBJOINER_VERSION = 2
SUBJOINER_VIEWS = ("subjoiner", "subjoiner_attention")

CLASSES = ("split", "single")
"""Words of several tokens, and words of one."""

_WINDOW = 16  # the last positions whose attention is kept: those of the paper's figure
_MIN_PROMPTS = 20  # of a class: 2^-20 is a p-value that survives the correction over any model's heads
_BLOCK = 1 << 22  # random signs held at a time

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SubjoinerOptions:
    """Which words are prompts, and how many."""

    word_tokens: int = field(default=4, metadata={"help": "How many tokens a word of the split class has."})
    words: int = field(
        default=16, metadata={"help": "How many words of letters come before the word in its document."}
    )
    prompts: int = field(default=1000, metadata={"help": "The most prompts of each class."})
    per_word: int = field(default=1, metadata={"help": "The most prompts that end in the same word."})
    per_document: int = field(default=5, metadata={"help": "The most prompts of a class from one document."})
    permutations: int = field(
        default=10_000,
        metadata={
            "help": "Permutations of the class labels; more are taken where one head among all could not "
            "otherwise reach q < 0.05."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of prompts, and of the permutations."})

    def __post_init__(self) -> None:
        least = {"word_tokens": 3, "words": 0, "per_word": 1, "per_document": 1, "permutations": 1}
        for name, low in {**least, "prompts": _MIN_PROMPTS}.items():
            if getattr(self, name) < low:
                raise AnalysisError(f"Option {name} is at least {low}, not {getattr(self, name)}.")
        if self.word_tokens > _WINDOW:
            raise AnalysisError(f"Option word_tokens is at most {_WINDOW}, not {self.word_tokens}.")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts ``[class, pair]``: words with the text before them, where they stand; pair i of both classes match."""

    documents: Ints
    positions: Ints
    """Of the word's last token, which is the query."""
    rows: Ints
    """The same on the token axis."""
    pair_starts: Ints
    """Where the documents begin on the pair axis of ``pattern``."""
    partitions: Ints
    words: npt.NDArray[Any]
    """str."""
    n_found: tuple[int, int]
    """How many words of each class there were to choose from."""

    @property
    def n_pairs(self) -> int:
        """Prompts of each class."""
        return int(self.positions.shape[1])


@dataclass(frozen=True, slots=True)
class SubjoinerBlock:
    """What one unit reads: the prompts of one partition, in one layer."""

    layer: int
    items: Ints
    """Numbers of the prompts, class by class."""
    weights: npt.NDArray[Any]
    """``[head, prompt, key]`` in the stored dtype; keys as in :meth:`SubjoinerStatistic.places`."""


@dataclass(frozen=True, slots=True)
class SubjoinerStatistic(Statistic[SubjoinerBlock]):
    """The attention of words' tokens to the tokens before them, in every head.

    A unit reads one partition of one layer of ``pattern``: the chunks that hold the queries' rows. The state
    is (14 + word_tokens)·heads·4 bytes a layer and prompt (gpt2-xl, 2000 prompts: 170 MB).
    """

    run: str
    options: SubjoinerOptions
    prompts: Prompts
    n_layers: int
    n_heads: int

    @classmethod
    def open(cls, run: Run, options: SubjoinerOptions) -> Self:
        """Find the prompts in the token table.

        Raises
        ------
        AnalysisError
            There are too few.
        """
        n = options.word_tokens
        found = find_words(run, (n, 1), n_before=options.words, min_position=_WINDOW)
        chosen = pair_words(
            found[n], found[1], n_pairs=options.prompts, per_word=options.per_word,
            per_document=options.per_document, min_gap=n, seed=options.seed,
        )  # fmt: skip
        if len(chosen[0]) < _MIN_PROMPTS:
            raise AnalysisError(
                f"Run {run.run_id} gives {len(chosen[0])} prompts of each class, {_MIN_PROMPTS} are needed: it has "
                f"{len(found[n])} words of {n} tokens ({len(set(found[n].texts))} different) and {len(found[1])} "
                f"of one token ({len(set(found[1].texts))} different) with {options.words} words before them.",
                hint="Capture more text: layerlake capture LAKE … --sites pattern --max-tokens N, with a larger N. "
                "Or take other words: --word-tokens, --words, --per-word, --per-document.",
            )
        prompts = _locate(run, chosen, (len(found[n]), len(found[1])))
        return cls(run.run_id, options, prompts, run.shape.n_layers, run.shape.n_heads)

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        partitions = self.prompts.partitions.ravel()
        members = [np.flatnonzero(partitions == index) for index in np.unique(partitions)]
        return [Unit((("pattern", layer),), items) for items in members for layer in range(self.n_layers)]

    @property
    def places(self) -> Ints:
        """Queries and keys, ``[2, key]``, as distances from the prompt's last token.

        First the last token's attention to the last 16 positions, itself first; then that of the word's
        intermediate tokens to the word's tokens before them.
        """
        n = self.options.word_tokens
        last = [(0, key) for key in range(_WINDOW)]
        return np.array(
            [*last, *((query, key) for query in range(1, n - 1) for key in range(query + 1, n))]
        ).T

    def read(self, run: Run, unit: Unit) -> SubjoinerBlock:  # noqa: D102
        ((site, layer),) = unit.reads
        prompts, (query, key) = self.prompts, self.places
        last = prompts.positions.ravel()[unit.items, None]
        queries = last - query
        starts = prompts.pair_starts.ravel()[unit.items, None]
        pairs, inverse = np.unique(starts + queries * (queries + 1) // 2 + last - key, return_inverse=True)
        values = run.read_rows(site, layer, pairs)
        require_finite(run, site, layer, values)
        return SubjoinerBlock(layer, unit.items, values[:, inverse.reshape(queries.shape)])

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (self.n_heads, _WINDOW + self.options.word_tokens - 2), np.float32)

    def measure(self, block: SubjoinerBlock) -> State:
        """Return the state of a block: key (layer, prompt), values ``[head, weight]``.

        The weights are those of the last token on the last 16 positions, itself first, then the sum of
        each intermediate token over the word's tokens before it, the latest first.
        """
        queries = self.places[0]
        weights = block.weights.swapaxes(0, 1).astype(np.float32)
        sums = [
            weights[..., queries == query].sum(axis=-1, keepdims=True)
            for query in range(1, self.options.word_tokens - 1)
        ]
        keys = np.stack([np.full(len(block.items), block.layer), block.items], axis=1)
        return State.of(keys, np.concatenate([weights[..., :_WINDOW], *sums], axis=-1))

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``subjoiner``, a row for each head, and ``subjoiner_attention``, that of the best of them.

        A prompt is a document up to a word in it: attention is causal, so that what comes after does not
        matter, and the query's row of the stored pattern is that of the prompt run alone. The score of a head is
        the attention of a word's last token to the word's other tokens, less that of words of one token to as
        many tokens before them.
        """
        n_prompts = (len(CLASSES), self.prompts.n_pairs)
        by_layer = state.values.reshape(self.n_layers, *n_prompts, self.n_heads, -1)
        weights = by_layer.transpose(1, 2, 0, 3, 4).reshape(*n_prompts, self.n_layers * self.n_heads, -1)
        heads = self._heads(weights)
        best = int(np.argmin(heads["rank"]))
        params = {**self.key, "variant": "default"}
        return {
            "subjoiner": tidy_table(self.run, heads, params),
            "subjoiner_attention": tidy_table(self.run, self._attention(weights[:, :, best], best), params),
        }

    def _heads(self, weights: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Return the columns of ``subjoiner`` from ``[class, pair, head, weight]``."""
        from scipy.stats import false_discovery_control  # type: ignore[import-untyped]

        n, n_pairs, n_heads = self.options.word_tokens, weights.shape[1], weights.shape[2]
        word: Doubles = np.asarray(weights[..., 1:n].sum(axis=-1, dtype=np.float64))  # [class, pair, head]
        between: Doubles = np.asarray(weights[..., _WINDOW:].mean(axis=-1, dtype=np.float64))
        ordered: Doubles = np.asarray((np.diff(weights[..., :n]) > 0).all(axis=-1), dtype=np.float64)
        differences = word[0] - word[1]
        p_values, n_permutations = permutation_p_values(
            differences, self.options.permutations, self.options.seed
        )
        score, lo, hi = self._mean(differences)
        rank = np.empty(n_heads, dtype=np.int32)
        rank[np.argsort(-score, kind="stable")] = np.arange(1, n_heads + 1)
        columns: dict[str, Any] = {
            "layer": np.repeat(np.arange(self.n_layers, dtype=np.int32), self.n_heads),
            "head": np.tile(np.arange(self.n_heads, dtype=np.int32), self.n_layers),
            "score": score, "score_lo": lo, "score_hi": hi,
            "p_value": p_values, "q_value": false_discovery_control(p_values, method="bh"), "rank": rank,
            "split_weight": word[0].mean(axis=0), "single_weight": word[1].mean(axis=0),
        }  # fmt: skip
        for name, values in {
            "intermediate_score": between[0] - between[1],
            "split_ordered_fraction": ordered[0],
            "single_ordered_fraction": ordered[1],
        }.items():
            mean, lo, hi = self._mean(values)
            columns |= {name: mean, f"{name}_lo": lo, f"{name}_hi": hi}
        n_documents = len(np.unique(self.prompts.documents[0]))
        counts = {
            "n_prompts": n_pairs,
            "n_documents": n_documents,
            "n_found_split": self.prompts.n_found[0],
            "n_found_single": self.prompts.n_found[1],
            "n_permutations": n_permutations,
        }
        columns |= {name: np.full(n_heads, count, np.int64) for name, count in counts.items()}
        reason = "no intervals: the prompts are all of one document" if n_documents < 2 else None
        return columns | {"reason": [reason] * n_heads}

    def _mean(self, values: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """Return the mean over pairs ``[pair, head]`` and its interval: bootstrap over the split words' documents."""
        documents, home = np.unique(self.prompts.documents[0], return_inverse=True)
        sums = np.zeros((len(documents), values.shape[1] + 1))
        np.add.at(sums, home, np.column_stack([values, np.ones(len(values))]))
        replicates = bootstrap_sums(sums)
        interval = percentile_interval(replicates[:, :-1] / replicates[:, -1:], n_documents=len(documents))
        return np.asarray(values.mean(axis=0)), *interval

    def _attention(self, weights: npt.NDArray[np.float32], place: int) -> dict[str, Any]:
        """Return the columns of ``subjoiner_attention`` from ``[class, pair, weight]`` of one head."""
        prompts, n_pairs = self.prompts, self.prompts.n_pairs
        n_rows = len(CLASSES) * n_pairs * _WINDOW
        layer, head = divmod(place, self.n_heads)
        return {
            "layer": np.full(n_rows, layer, np.int32),
            "head": np.full(n_rows, head, np.int32),
            "class": np.repeat(np.array(CLASSES, dtype=object), n_pairs * _WINDOW),
            "prompt": np.tile(np.repeat(np.arange(n_pairs, dtype=np.int32), _WINDOW), len(CLASSES)),
            "word": np.repeat(prompts.words.ravel(), _WINDOW),
            "document": np.repeat(prompts.documents.ravel(), _WINDOW),
            "row": np.repeat(prompts.rows.ravel(), _WINDOW),
            "distance": np.tile(np.arange(_WINDOW, dtype=np.int32), len(CLASSES) * n_pairs),
            "weight": weights[..., :_WINDOW].ravel().astype(np.float64),
        }


def _locate(run: Run, chosen: tuple[Words, Words], n_found: tuple[int, int]) -> Prompts:
    """Look up where the prompts lie in the run's arrays. Reads the documents table."""
    table = run.stored_documents.sort_by("document")
    numbers, rows, pairs, partitions = (
        table[name].to_numpy().astype(np.int64)
        for name in ("document", "row_start", "pair_start", "partition")
    )
    documents = np.stack([words.documents for words in chosen])
    positions = np.stack([words.positions for words in chosen])
    home = np.searchsorted(numbers, documents)
    texts = np.stack([words.texts for words in chosen])
    return Prompts(
        documents, positions, rows[home] + positions, pairs[home], partitions[home], texts, n_found
    )


def permutation_p_values(differences: Doubles, n_permutations: int, seed: int) -> tuple[Doubles, int]:
    """Return the p-value of each mean difference of pairs, one-sided, and the number of permutations.

    Under the null hypothesis the two labels of a pair may be exchanged, which turns the sign of its
    difference; p = (1 + #{permuted mean ≥ mean}) / (1 + permutations), after Phipson and Smyth 2010. All
    columns see the same permutations. At least 40 are taken for each column, so that the smallest p-value
    times the columns is below 0.05. Costs permutations·pairs·columns multiplications.

    Parameters
    ----------
    differences : float64 ``[pair, column]``
        First class less second.
    n_permutations : int
        How many, at least.
    seed : int
        Of the permutations.

    Examples
    --------
    >>> p_values, n = permutation_p_values(np.array([[1.0, 0.0]] * 10), 1000, seed=0)
    >>> bool(p_values[0] < 0.01), float(p_values[1]), n
    (True, 1.0, 1000)
    """
    n_pairs, n_columns = differences.shape
    n_permutations = max(n_permutations, 40 * n_columns)
    totals = differences.sum(axis=0)
    least = totals - 1e-9 * np.abs(differences).sum(
        axis=0
    )  # sums of equal terms may differ in their last digits
    counts = np.ones(n_columns)
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(n_pairs, n_columns))
    for start in range(0, n_permutations, step):
        kept = rng.integers(0, 2, (min(step, n_permutations - start), n_pairs)).astype(np.float64)
        counts += (2 * (kept @ differences) - totals >= least).sum(axis=0)
    return counts / (n_permutations + 1), n_permutations
