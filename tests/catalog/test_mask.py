"""The evaluation mask is positions 1 … n-2."""

from __future__ import annotations

import pytest

from layerlake.catalog.mask import MIN_MASKED_TOKENS, evaluation_positions


@pytest.mark.parametrize(("n_tokens", "positions"), [(0, []), (1, []), (2, []), (3, [1]), (6, [1, 2, 3, 4])])
def test_positions(n_tokens: int, positions: list[int]) -> None:
    assert evaluation_positions(n_tokens).tolist() == positions
    assert (len(positions) > 0) == (n_tokens >= MIN_MASKED_TOKENS)
