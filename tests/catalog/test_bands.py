"""Band sums against dense patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlake.catalog.bands import band_counts, band_sums, uniform_sums

Array = npt.NDArray[Any]


def by_diagonals(pattern: Array) -> tuple[Array, Array]:
    """Sums and counts of one [query, key] pattern: ``[query set, sum]``."""
    weights = [
        [np.diagonal(pattern, -k)[max(0, first - k) :] for k in range(17)] + [pattern[max(first, 1) :, 0]]
        for first in (0, 17)
    ]
    sums, counts = ([[measure(each) for each in of] for of in weights] for measure in (np.sum, len))
    return np.array(sums), np.array(counts)


def packed_with_starts(dense: list[Array]) -> tuple[Array, Array, Array]:
    """Patterns ``[head, query, key]``, packed, with their lengths and first pairs."""
    packed = np.concatenate([p[:, *np.tril_indices(p.shape[1])] for p in dense], axis=1)
    lengths = np.array([p.shape[1] for p in dense])
    pairs = lengths * (lengths + 1) // 2
    return packed, lengths, np.cumsum(pairs) - pairs


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 9))
def test_band_sums_equal_dense_sums(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = [rng.random((2, n, n)) for n in lengths]
    packed, n, starts = packed_with_starts(dense)
    sums, counts = band_sums(packed, n, starts), band_counts(n)
    assert sums.shape == (len(lengths), 2, 2, 18)
    for document, pattern in enumerate(dense):
        for head in range(2):
            expected, expected_counts = by_diagonals(pattern[head])
            np.testing.assert_allclose(sums[document, head], expected, atol=1e-12)
            np.testing.assert_array_equal(counts[document], expected_counts)


def test_uniform_attention_has_the_uniform_sums() -> None:
    dense = [np.ones((1, n, n)) / np.arange(1, n + 1)[:, None] for n in (1, 18, 33)]
    packed, lengths, starts = packed_with_starts(dense)
    np.testing.assert_allclose(band_sums(packed, lengths, starts)[:, 0], uniform_sums(lengths), atol=1e-12)


def test_no_distance_of_a_late_query_reaches_bos() -> None:
    """With all weight on BOS, only the sum over BOS sees anything of the late queries."""
    packed, lengths, starts = packed_with_starts([np.ones((1, 40, 1)) * np.eye(1, 40)])
    assert band_sums(packed, lengths, starts)[0, 0].tolist() == [[1.0] * 17 + [39.0], [0.0] * 17 + [23.0]]
