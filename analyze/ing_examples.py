"""Examples for the "-ing" probes: tokens of a run that end in "-ing", and others that are like them.

An example is a token with enough context before it in its document. Half of them end in "-ing"; each of
these is paired with another token that is about as frequent, and begins with a blank if it does. Documents
are dealt into five folds, and pairs are made within a fold, so that every fold is balanced and matched.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ..catalog.errors import AnalysisError
from ..catalog.run import Run

__all__ = ["MIN_EXAMPLES", "N_FOLDS", "Examples", "IngTokens", "find_examples"]

MIN_EXAMPLES = 200
"""Of each class; with fewer no accuracy is reported."""

N_FOLDS = 5

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class IngTokens:
    """What the tokenizer's vocabulary says of each column of the unembedding."""

    is_ing: Bools
    """``[vocab]``: the text, stripped, ends in "ing" in any case."""
    is_known: Bools
    """``[vocab]``: it has a text; padding has none."""
    is_special: Bools
    has_blank: Bools
    """``[vocab]``: the text begins with a blank."""

    @classmethod
    def open(cls, run: Run) -> Self:
        """Read the vocabulary.

        Raises
        ------
        AnalysisError
            No token ends in "-ing".
        """
        vocab = run.vocab
        ids, texts = vocab["token_id"].to_numpy(), vocab["text"].to_pylist()
        is_ing, is_known, is_special, has_blank = np.zeros((4, run.shape.n_vocab), dtype=np.bool_)
        is_known[ids], is_special[ids] = True, vocab["is_special"].to_pylist()
        is_ing[ids] = [text.strip().lower().endswith("ing") for text in texts]
        is_ing &= ~is_special
        has_blank[ids] = [text.startswith(" ") for text in texts]
        if not is_ing.any():
            raise AnalysisError(
                f"The tokenizer of run {run.run_id} has no token that ends in '-ing', among {len(texts):,}.",
                hint="This analysis is for models whose tokens are English words or their parts.",
            )
        return cls(is_ing, is_known, is_special, has_blank)


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokens to be foretold, ordered by their place in the run; half of them end in "-ing"."""

    rows: Ints
    """``[example]``: the row of the token *before*, where the model foretells."""
    targets: Ints
    """``[example]``: the token that follows."""
    labels: Bools
    """``[example]``: whether it ends in "-ing"."""
    documents: Ints
    folds: Ints
    """``[example]``: 0 … 4, one a document."""

    def __len__(self) -> int:
        return len(self.rows)


def find_examples(run: Run, tokens: IngTokens, *, context: int, most: int, seed: int) -> Examples:
    """Find the examples in the run's token table: as many pairs as there are, at most ``most``.

    Parameters
    ----------
    run : Run
        The run.
    tokens : IngTokens
        Of its vocabulary.
    context : int
        How many tokens have to stand before the target, in its document and since the last BOS, which does
        not count.
    most : int
        Pairs to keep.
    seed : int
        Of the folds, the pairs and which of them are kept.

    Raises
    ------
    AnalysisError
        There are fewer than :data:`MIN_EXAMPLES` pairs, or a fold has none; the message says how many.
    """
    table = run.tokens
    ids, positions, documents, rows = (
        table[name].to_numpy().astype(np.int64) for name in ("token_id", "position", "document", "row")
    )
    places = np.arange(len(ids))
    is_bos = (
        ids == run.manifest.bos_token_id if run.manifest.bos_token_id is not None else np.zeros_like(ids) > 0
    )
    starts = np.maximum.accumulate(np.where(is_bos | (positions == 0), places, 0))
    n_before = places - starts - is_bos[starts]
    eligible = (n_before >= context) & ~tokens.is_special[ids]
    positive, negative = eligible & tokens.is_ing[ids], eligible & ~tokens.is_ing[ids]
    rng = np.random.default_rng(seed)
    folds = _deal_documents(documents, positive, negative, rng)
    # Tokens are as frequent if their counts in the run have equally many binary digits.
    band = np.floor(np.log2(np.maximum(np.bincount(ids), 1))).astype(np.int64)[ids]
    strata = (folds * 2 + tokens.has_blank[ids]) * 64 + band
    pairs = _pair(strata, positive, negative, rng)
    if len(pairs) > most:
        pairs = pairs[np.sort(rng.choice(len(pairs), most, replace=False))]
    n_used = len(np.unique(folds[pairs[:, 0]]))
    if len(pairs) < MIN_EXAMPLES or n_used < N_FOLDS:
        n_documents = len(np.unique(documents[positive]))
        raise AnalysisError(
            f"Run {run.run_id} has too few examples: {positive.sum():,} tokens that end in '-ing' stand behind at "
            f"least {context} others of their document, in {n_documents:,} documents, and {len(pairs):,} of them "
            f"have a counterpart of like frequency. A probe needs {MIN_EXAMPLES} of each class, and "
            f"{N_FOLDS} parts of the documents with both.",
            hint="Capture more text into the run (layerlake capture LAKE … --max-tokens …), or in longer "
            "documents (--sample-by file, --context).",
        )
    chosen = np.sort(pairs.ravel())
    return Examples(rows[chosen - 1], ids[chosen], positive[chosen], documents[chosen], folds[chosen])


def _deal_documents(documents: Ints, positive: Bools, negative: Bools, rng: np.random.Generator) -> Ints:
    """Return the fold of each token's document: the heaviest first, each into the lightest fold so far."""
    numbers, inverse = np.unique(documents, return_inverse=True)
    load = np.bincount(inverse, positive / max(positive.sum(), 1) + negative / max(negative.sum(), 1))
    order = rng.permutation(len(numbers))
    order = order[np.argsort(-load[order], kind="stable")]
    folds = np.empty(len(numbers), dtype=np.int64)
    filled = [(0.0, fold) for fold in range(N_FOLDS)]
    for document in order:
        weight, fold = filled[0]
        folds[document] = fold
        heapq.heapreplace(filled, (weight + float(load[document]), fold))
    return np.asarray(folds[inverse])


def _pair(strata: Ints, positive: Bools, negative: Bools, rng: np.random.Generator) -> Ints:
    """Pair at random, within each stratum, the one class with the other: ``[pair, class]`` of places."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for stratum in np.unique(strata[positive]):
        inside = strata == stratum
        ours, others = (rng.permutation(np.flatnonzero(inside & of)) for of in (positive, negative))
        n = min(len(ours), len(others))
        pairs.append(np.stack([ours[:n], others[:n]], axis=1))
    return np.concatenate(pairs)
