"""The evaluation mask: which tokens enter a token-mean metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_MASKED_TOKENS", "evaluation_mask", "evaluation_positions", "sample_positions"]

MIN_MASKED_TOKENS = 3
"""Documents shorter than this have no masked position."""


def evaluation_positions(n_tokens: int) -> npt.NDArray[np.int64]:
    """Return the positions 1 … n-2 of a document of n tokens: int64 ``[position]``.

    Not the first position (BOS, or a token without context), and only positions that have a next
    token to predict. KL, agreement, entropy, loss, norms and the lens are all evaluated on exactly
    this set, so that they can be compared token by token.

    Examples
    --------
    >>> evaluation_positions(5).tolist()
    [1, 2, 3]
    >>> evaluation_positions(2).tolist()
    []
    """
    return np.arange(1, max(1, n_tokens - 1), dtype=np.int64)


def evaluation_mask(
    document: npt.NDArray[np.int64], position: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.bool_]:
    """Tell of each token whether it is masked in, from its document and its position: bool ``[token]``.

    The tokens of a document follow each other.

    Examples
    --------
    >>> evaluation_mask(np.array([0, 0, 0, 0, 1]), np.array([0, 1, 2, 3, 0])).tolist()
    [False, True, True, False, False]
    """
    lengths = dict(zip(*np.unique(document, return_counts=True), strict=True))
    masked = np.zeros(len(document), dtype=bool)
    for start in np.flatnonzero(position == 0):
        masked[start + evaluation_positions(int(lengths[document[start]]))] = True
    return masked


def sample_positions(document: int, n_tokens: int, n_positions: int | None) -> npt.NDArray[np.int64]:
    """Return some of a document's evaluation positions, ascending, or all: int64 ``[position]``.

    Which they are depends on the document's number alone, so that whoever looks at it later sees the same.

    Examples
    --------
    >>> sample_positions(0, 5, None).tolist(), len(sample_positions(0, 100, 10))
    ([1, 2, 3], 10)
    """
    positions = evaluation_positions(n_tokens)
    if n_positions is None or n_positions >= len(positions):
        return positions
    return np.sort(np.random.default_rng([0, document]).choice(positions, n_positions, replace=False))
