"""20k tokens and 4GiB, exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.catalog.errors import PlanError
from layerlake.catalog.sizes import format_nbytes, parse_count, parse_nbytes


@given(st.integers(1, 10**7))
def test_thousandths_of_a_k_are_whole_counts(count: int) -> None:
    """16.1 × 1000 is not 16100 in binary floating point."""
    assert parse_count(f"{count // 1000}.{count % 1000:03d}k") == count
    assert parse_count(count) == count


@pytest.mark.parametrize(
    ("text", "count"), [("20k", 20_000), ("2.01M", 2_010_000), (" 3 K", 3000), ("1b", 10**9)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["0", "-5", "many", "1.5", "1.0005k", "", "1e3", "k", "5KiB"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is not a count") as caught:
        parse_count(text)
    assert "20k" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 4 * 2**30), ("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("512", 512), (7, 7), ("3kb", 3000)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["4iB", "GiB", "-1", "4 giga", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is not a size"):
        parse_nbytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**50, "1024.0 TiB")]
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text
