"""The contract of all statistics: merging, partitions, schedulers, stored states."""

from __future__ import annotations

import io
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from layerlake.analyze import cka, lens, neurons
from layerlake.analyze.attention import AttentionOptions, AttentionStatistic
from layerlake.analyze.cka import CkaOptions, CkaStatistic
from layerlake.analyze.lens import LensOptions, LensStatistic
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic
from layerlake.analyze.norms import NormsOptions, NormsStatistic
from layerlake.analyze.reduce import reduce_statistic
from layerlake.analyze.statistic import State, Statistic
from layerlake.catalog.run import Run

Open = Callable[[Run], Statistic[Any]]

STATISTICS: dict[str, Open] = {
    "lens": lambda run: LensStatistic.open(run, LensOptions(tokens="30")),
    "lens, authors": lambda run: LensStatistic.open(run, LensOptions(scale="authors", tokens="all")),
    "cka": lambda run: CkaStatistic.open(run, CkaOptions(batch=4)),
    "cka, tokens": lambda run: CkaStatistic.open(run, CkaOptions(samples="tokens_per_doc")),
    "neurons": lambda run: NeuronStatistic.open(run, NeuronOptions()),
    "attention": lambda run: AttentionStatistic.open(run, AttentionOptions()),
    "attention, authors": lambda run: AttentionStatistic.open(run, AttentionOptions(variant="authors")),
    "norms": lambda run: NormsStatistic.open(run, NormsOptions(tokens="30")),
}

runs = given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=10).filter(lambda lengths: max(lengths) > 2),
    partition_tokens=st.sampled_from([24, 32, 64, 256]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 3),
)
few = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even a tiny run have several units, and a tiny vocabulary several blocks."""
    monkeypatch.setattr(lens, "_UNIT_TOKENS", 7)
    monkeypatch.setattr(neurons, "_UNIT_NEURONS", 5)
    monkeypatch.setattr(neurons, "_COLUMNS", 9)
    monkeypatch.setattr(cka, "_GRAM_ROWS", 3)
    monkeypatch.setattr("layerlake.analyze.readout._COLUMNS", 9)


def assert_equal(a: State, b: State) -> None:
    np.testing.assert_array_equal(a.keys, b.keys)
    np.testing.assert_array_equal(a.values, b.values)
    assert a.values.dtype == b.values.dtype


def without_rows(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables without the places of tokens, which do depend on the partitions."""
    return {
        view: table.drop_columns([n for n in ("row",) if n in table.column_names])
        for view, table in tables.items()
    }


@few
@runs
def test_merging_is_associative_commutative_and_has_a_neutral_element(
    make_run: Callable[..., Run], tmp_path: Path, **drawn: Any
) -> None:
    run = make_run(url=tmp_path / uuid.uuid4().hex, context=24, **drawn)
    shuffled = random.Random(drawn["seed"])  # noqa: S311 (not for secrets)
    for name, open_statistic in STATISTICS.items():
        note(name)
        statistic = open_statistic(run)
        blocks = [statistic.read(run, unit) for unit in statistic.units()]
        states = [statistic.update(statistic.zero(), block) for block in blocks]
        in_order = statistic.zero()
        for state in states:
            assert_equal(statistic.merge(statistic.zero(), state), state)
            assert_equal(statistic.merge(state, statistic.zero()), state)
            in_order = statistic.merge(in_order, state)
        while len(states) > 1:  # any tree, any order
            shuffled.shuffle(states)
            states.append(statistic.merge(states.pop(), states.pop()))
        for state in states:
            assert_equal(state, in_order)
        file = io.BytesIO()
        in_order.save(file)
        file.seek(0)
        assert_equal(State.load(file), in_order)


@few
@runs
def test_neither_partitions_nor_schedulers_change_a_digit(
    make_run: Callable[..., Run], tmp_path: Path, **drawn: Any
) -> None:
    run = make_run(url=tmp_path / uuid.uuid4().hex, context=24, **drawn)
    whole = make_run(url=tmp_path / uuid.uuid4().hex, context=24, **{**drawn, "partition_tokens": 512})
    assert len(whole.manifest.partitions) == 1
    for name, open_statistic in STATISTICS.items():
        note(name)
        statistic = open_statistic(run)
        state = reduce_statistic(statistic, run, scheduler="synchronous")
        assert_equal(reduce_statistic(statistic, run, scheduler="threads"), state)
        tables = statistic.finalise(state)
        other = open_statistic(whole)
        expected = other.finalise(reduce_statistic(other, whole, scheduler="synchronous"))
        assert without_rows(tables) == without_rows(expected)
        for table in tables.values():
            assert table.column_names[0] == "run"
            assert {*statistic.key, "variant"} <= {*table.column_names}
            for column in table.columns:
                assert (
                    not pa.types.is_floating(column.type) or not np.isnan(column.drop_null().to_numpy()).any()
                )


@pytest.mark.parametrize("name", STATISTICS)
def test_units_read_what_they_declare(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = make_run(lengths=(20, 24, 18, 24), context=24, partition_tokens=64)
    statistic = STATISTICS[name](run)
    read: list[str] = []
    array, weight = Run.array, Run.weight_array

    def recorded_array(run: Run, site: str) -> Any:
        read.append(site)
        return array(run, site)

    def recorded_weight(run: Run, name: str) -> Any:
        read.append(name)
        return weight(run, name)

    monkeypatch.setattr(Run, "array", recorded_array)
    monkeypatch.setattr(Run, "weight_array", recorded_weight)
    for unit in statistic.units():
        read.clear()
        statistic.measure(statistic.read(run, unit))
        assert read == [site for site, _ in unit.reads]
