"""The choice of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.analyze.tokens import canonical_tokens, choose_spread, choose_tokens
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.run import Run


@given(st.integers(1, 500), st.integers(1, 600), st.integers(0, 5))
def test_choose_spread_takes_one_of_each_stretch(n: int, count: int, seed: int) -> None:
    chosen = choose_spread(n, count, seed)
    assert len(chosen) == min(n, count)
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen[0] <= chosen[-1] < n
    gaps = np.diff(np.concatenate([[-1], chosen, [n]]))
    assert gaps.max() <= 2 * (n // min(n, count) + 1)
    np.testing.assert_array_equal(chosen, choose_spread(n, count, seed))


def test_chosen_tokens_are_masked_and_know_what_follows(make_run: Callable[..., Run]) -> None:
    run = make_run()
    table = run.tokens.to_pydict()
    chosen = choose_tokens(run, "all", 0)
    lengths = np.bincount(table["document"])
    expected = [
        (row, document, table["token_id"][i + 1])
        for i, (row, document, position) in enumerate(
            zip(table["row"], table["document"], table["position"], strict=True)
        )
        if 1 <= position <= lengths[document] - 2
    ]
    assert list(zip(chosen.rows, chosen.documents, chosen.next_ids, strict=True)) == expected
    some = choose_tokens(run, "10", 3)
    assert len(some) == 10
    assert set(some.rows) <= set(chosen.rows)
    assert set(some.rows) != set(choose_tokens(run, "10", 4).rows)


def test_a_run_without_masked_tokens_says_so(make_run: Callable[..., Run]) -> None:
    with pytest.raises(AnalysisError, match="no document is longer than 2 tokens"):
        choose_tokens(make_run(lengths=(2, 1, 2)), "all", 0)


@pytest.mark.parametrize("text", ["", "-3", "abc", "0", "1.23"])
def test_not_a_number_of_tokens(text: str) -> None:
    with pytest.raises(AnalysisError, match="not a number of tokens"):
        canonical_tokens(text)
