"""States, reading and tables: what every analysis stands on."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerlake.analyze.statistic import State, choose_sites, read_rows, tidy_table
from layerlake.catalog.errors import AnalysisError, SiteNotFound
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.shards import decode
from layerlake.catalog.tables import to_parquet


def test_state_refuses_overlapping_units() -> None:
    state = State.of(np.array([[1, 2], [0, 5]]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="overlap"):
        state.union(State.of(np.array([[0, 5]]), np.zeros((1, 3))))


def test_state_is_ordered_by_all_parts_of_the_key() -> None:
    state = State.of(np.array([[1, 0], [0, 9], [0, 2]]), np.array([[3.0], [2.0], [1.0]]))
    assert state.keys.tolist() == [[0, 2], [0, 9], [1, 0]]
    assert state.values.ravel().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stored_state_loads_equal(dtype: type) -> None:
    rng = np.random.default_rng(0)
    state = State.of(np.array([[2], [1]]), rng.standard_normal((2, 3, 4)).astype(dtype))
    stored = pq.read_table(io.BytesIO(to_parquet(state.to_table())))
    loaded = State.of_table(stored, State.empty(1, (3, 4), dtype))
    np.testing.assert_array_equal(loaded.keys, state.keys)
    np.testing.assert_array_equal(loaded.values, state.values)
    assert loaded.values.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [[], [3], [0, 1, 2, 3], [0, 2, 3], [1, 12, 13], [2, 2, 4]])
def test_read_rows(make_run: Callable[..., Run], dtype: str, rows: list[int]) -> None:
    run = make_run(dtype=dtype)
    everything = decode(np.asarray(run.array("resid")[1]), dtype)
    read = read_rows(run, "resid", 1, np.array(rows, dtype=np.int64))
    np.testing.assert_array_equal(read, everything[rows])
    if rows:
        assert read.dtype == (np.float16 if dtype == "float16" else np.float32)


def test_all_sites_that_lack_are_named_at_once(make_run: Callable[..., Run]) -> None:
    run = make_run(sites=("resid",))
    with pytest.raises(SiteNotFound, match="'attn_out' not at all and site 'mlp_out' not at all") as caught:
        choose_sites(run, [("attn_out", "mlp_out", "resid"), ("pattern",)])
    assert caught.value.hint.endswith("--sites attn_out,mlp_out")
    assert choose_sites(run, [("pattern",), ("resid",)]) == ("resid",)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(
    make_run: Callable[..., Run], shape: ModelShape, bad: float
) -> None:
    values = np.ones((2, 5, shape.d_model), dtype=np.float32)
    values[1, 2, 3:5] = bad
    run = make_run(shape=shape, lengths=(5,), values={"attn_out": values})
    read_rows(run, "attn_out", 0, np.arange(5))
    read_rows(run, "attn_out", 1, np.array([1, 3]))
    with pytest.raises(AnalysisError, match=r"2 values that are not finite .* of site 'attn_out', layer 1"):
        read_rows(run, "attn_out", 1, np.arange(5))


def test_tidy_table_has_run_first_and_null_for_nan() -> None:
    columns = {"scale": "own", "x": np.array([1.0, np.nan]), "reason": [None, "too few"]}
    table = tidy_table(
        "r", columns, {"scale": "own", "tokens": "20k", "seed": 0, "all": True, "threshold": 10.0}
    )
    assert table.column_names == ["run", "scale", "x", "reason", "tokens", "seed", "all", "threshold"]
    assert [field.type for field in table.schema] == [
        pa.string(), pa.string(), pa.float64(), pa.string(), pa.string(), pa.int64(), pa.bool_(), pa.float64(),
    ]  # fmt: skip
    assert table["x"].to_pylist() == [1.0, None]
