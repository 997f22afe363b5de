"""Any predicate picks exactly the rows that a mask over all of them picks, in three-valued logic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.sql import connect

Column = npt.NDArray[np.object_]
Mask = npt.NDArray[np.bool_]
Rows = dict[str, Column]
Kleene = tuple[Mask, Mask]  # where a predicate is true, where it is false; where it is NULL, neither
Predicate = tuple[str, Callable[[Rows], Kleene]]

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "<>": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
WORDS = [f"t{i}" for i in range(0, 24, 3)]
NUMBERS = [-0.5, 0.0, 0.25, 0.5]  # exact in float16 and float32, as the values that they are compared with


def on(name: str, sql: str, test: Callable[[Any], bool]) -> Predicate:
    """A predicate that looks at one column, and is NULL where the column is."""

    def evaluate(rows: Rows) -> Kleene:
        answers = [None if value is None else test(value) for value in rows[name]]
        return np.array([a is True for a in answers]), np.array([a is False for a in answers])

    return sql, evaluate


def comparison(name: str, sign: str, value: int | float) -> Predicate:
    constant = f"{value}::FLOAT" if isinstance(value, float) else value
    return on(name, f"{name} {sign} {constant}", lambda x: COMPARISONS[sign](x, value))


def comparison_with_word(sign: str, word: str) -> Predicate:
    return on("text", f"text {sign} '{word}'", lambda x: COMPARISONS[sign](x, word))


def difference(name: str, value: int) -> Predicate:
    return on(name, f"{name} - 2 = {value}", lambda x: x - 2 == value)


def remainder(name: str, value: int) -> Predicate:
    return on(name, f"{name} % 3 = {value}", lambda x: x % 3 == value)


def membership(name: str, values: list[Any]) -> Predicate:
    return on(name, f"{name} IN ({', '.join(map(repr, values))})", lambda x: x in values)


def suffix(letter: str) -> Predicate:
    return on("text", f"text LIKE '%{letter}'", lambda x: x.endswith(letter))


def is_null(name: str) -> Predicate:
    def evaluate(rows: Rows) -> Kleene:
        there = np.array([value is not None for value in rows[name]])
        return ~there, there

    return f"{name} IS NULL", evaluate


def negation(inner: Predicate) -> Predicate:
    return f"(NOT {inner[0]})", lambda rows: inner[1](rows)[::-1]


def conjunction(a: Predicate, b: Predicate) -> Predicate:
    def evaluate(rows: Rows) -> Kleene:
        (true_a, false_a), (true_b, false_b) = a[1](rows), b[1](rows)
        return true_a & true_b, false_a | false_b

    return f"({a[0]} AND {b[0]})", evaluate


def disjunction(a: Predicate, b: Predicate) -> Predicate:
    # a OR b = NOT (NOT a AND NOT b), in three-valued logic too
    return f"({a[0]} OR {b[0]})", negation(conjunction(negation(a), negation(b)))[1]


def predicates(ranges: dict[str, int], number: str, *, has_text: bool) -> st.SearchStrategy[Predicate]:
    """Predicates over integer columns (name → largest value), a column of numbers, and the text."""
    signs = st.sampled_from(list(COMPARISONS))

    def on_integer(name: str) -> st.SearchStrategy[Predicate]:
        value = st.integers(-1, ranges[name])
        return st.one_of(
            st.builds(comparison, st.just(name), signs, value),
            st.builds(difference, st.just(name), value),
            st.builds(remainder, st.just(name), st.integers(0, 2)),
            st.builds(membership, st.just(name), st.lists(value, min_size=1, max_size=4)),
            st.builds(is_null, st.just(name)),
        )

    on_number = st.one_of(
        st.builds(comparison, st.just(number), signs, st.sampled_from(NUMBERS)), st.just(is_null(number))
    )
    on_text = st.one_of(
        st.builds(membership, st.just("text"), st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)),
        st.builds(comparison_with_word, signs, st.sampled_from(WORDS)),
        st.sampled_from("0123").map(suffix),
        st.just(is_null("text")),
    )
    leaves = [
        st.sampled_from(sorted(ranges)).flatmap(on_integer),
        on_number,
        *([on_text] if has_text else []),
    ]
    return st.recursive(
        st.one_of(leaves),
        lambda inner: st.one_of(
            st.builds(conjunction, inner, inner),
            st.builds(disjunction, inner, inner),
            st.builds(negation, inner),
        ),
        max_leaves=6,
    )


VECTORS = 'SELECT * EXCLUDE (vec), vec[1] AS "vec[1]" FROM resid'
PATTERN = "SELECT * FROM pattern"


@pytest.fixture
def lake_rows(make_run: Callable[..., Run]) -> Iterator[tuple[duckdb.DuckDBPyConnection, dict[str, Rows]]]:
    """A run of several partitions, some of whose tokens have no text, and all of its rows (see test_scan)."""
    run = make_run(dtype="float16", vocab=[f"t{i}" for i in range(18)])
    with connect(Lake(run.store.url)) as connection:
        rows = {}
        for query in (VECTORS, PATTERN):
            table = connection.sql(query).to_arrow_table()
            rows[query] = {
                name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names
            }
        yield connection, rows


def assert_exact(
    lake_rows: tuple[duckdb.DuckDBPyConnection, dict[str, Rows]], query: str, predicate: Predicate
) -> None:
    connection, rows = lake_rows[0], lake_rows[1][query]
    mask, _ = predicate[1](rows)
    expected = list(zip(*(column[mask] for column in rows.values()), strict=True))
    found = connection.sql(f"{query} WHERE {predicate[0]}").fetchall()
    assert sorted(found, key=repr) == sorted(expected, key=repr)


by_hypothesis = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@by_hypothesis
@given(
    predicate=predicates(
        {"boundary": 4, "row": 60, "document": 5, "position": 12, "token_id": 24, "chunk": 3},
        "vec[1]",
        has_text=True,
    )
)
def test_any_predicate_on_vectors(
    lake_rows: tuple[duckdb.DuckDBPyConnection, dict[str, Rows]], predicate: Predicate
) -> None:
    assert_exact(lake_rows, VECTORS, predicate)


@by_hypothesis
@given(
    predicate=predicates(
        {"layer": 3, "head": 2, "document": 5, "query": 12, "key": 12}, "value", has_text=False
    )
)
def test_any_predicate_on_pattern(
    lake_rows: tuple[duckdb.DuckDBPyConnection, dict[str, Rows]], predicate: Predicate
) -> None:
    assert_exact(lake_rows, PATTERN, predicate)


@pytest.mark.parametrize("name", ["row", "document", "position", "token_id", "chunk", "boundary"])
def test_every_value_is_found(
    lake_rows: tuple[duckdb.DuckDBPyConnection, dict[str, Rows]], name: str
) -> None:
    """The first and the last row of a partition are where pruning would go wrong."""
    connection, rows = lake_rows[0], lake_rows[1][VECTORS][name]
    for value, n in zip(*np.unique(rows.astype(int), return_counts=True), strict=True):
        for test in (f"= {value}", f"BETWEEN {value} AND {value}"):
            assert connection.sql(f"FROM resid SELECT count(*) WHERE {name} {test}").fetchall() == [(n,)]
