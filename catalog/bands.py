"""Sums of attention weights along the diagonals near the main one, and over the BOS column.

The weight of query t on the token at distance k is A[t, t-k]. For each document and head, 18 sums over the
queries t: Σ A[t, t-k] for k = 0 … 16, and Σ A[t, 0], over two sets of queries: *all* that have a token at that
distance, and the *late* ones, t ≥ 17, none of which has BOS within distance 16. They are all that attention
locality needs (arXiv 2406.19384, Figures 1 and 6a), and a document of n tokens has n(n+1)/72 times as
many weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "FIRST_QUERIES",
    "LATE_QUERY",
    "MAX_DISTANCE",
    "N_SUMS",
    "QUERIES",
    "band_counts",
    "band_sums",
    "uniform_sums",
]

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_DISTANCE = 16
"""Distances 0 (the query itself) … 16 are summed."""

N_SUMS = MAX_DISTANCE + 2
"""One sum for each distance, and that over BOS last."""

LATE_QUERY = MAX_DISTANCE + 1
"""The first late query: no key within distance 16 of it is BOS."""

QUERIES = ("all", "late")
"""The two sets of queries."""

FIRST_QUERIES: Ints = np.stack([[*range(MAX_DISTANCE + 1), 1], np.full(N_SUMS, LATE_QUERY)])
"""The first query of each sum: int64 ``[query set, sum]``. BOS is not summed over itself."""


def band_sums(packed: npt.NDArray[Any], lengths: Ints, starts: Ints) -> Doubles:
    """Sum packed attention weights near the diagonal and over BOS.

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
    float64 ``[document, head, query set, sum]``
        See the module; :func:`band_counts` has the number of terms.
    """
    sums = np.zeros((len(lengths), packed.shape[0], len(QUERIES), N_SUMS))
    for (query_set, column), first in np.ndenumerate(FIRST_QUERIES):
        held = np.flatnonzero(lengths > first)
        if not len(held):
            continue
        n_queries = lengths[held] - first
        offsets = np.cumsum(n_queries) - n_queries
        query = np.arange(n_queries.sum()) - np.repeat(offsets, n_queries) + first
        pair = np.repeat(starts[held], n_queries) + query * (query + 1) // 2
        weights = packed[:, pair + query - column if column <= MAX_DISTANCE else pair].astype(np.float64)
        sums[held, :, query_set, column] = np.add.reduceat(weights, offsets, axis=1).T
    return sums


def band_counts(lengths: Ints) -> Ints:
    """Return how many queries each of :func:`band_sums` adds up: int64 ``[document, query set, sum]``.

    Examples
    --------
    >>> band_counts(np.array([20]))[0, :, [0, 1, 16, 17]].T.tolist()
    [[20, 19, 4, 19], [3, 3, 3, 3]]
    """
    counts: Ints = np.maximum(lengths[:, None, None] - FIRST_QUERIES, 0)
    return counts


def uniform_sums(lengths: Ints) -> Doubles:
    """Return :func:`band_sums` of uniform attention, 1/(t+1): float64 ``[document, query set, sum]``."""
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, max(lengths, default=0) + 1))])
    counts = band_counts(lengths)
    sums: Doubles = harmonic[lengths][:, None, None] - harmonic[lengths[:, None, None] - counts]
    return sums
