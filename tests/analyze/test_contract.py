"""The contract of all statistics: merging, partitions, schedulers, stored states."""

from __future__ import annotations

import io
import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from layerlake.analyze import cka, lens, neurons, wic
from layerlake.analyze.attention import AttentionOptions, AttentionStatistic
from layerlake.analyze.cka import CkaOptions, CkaStatistic
from layerlake.analyze.ing_examples import Examples, IngTokens
from layerlake.analyze.ing_probes import IngActivationStatistic, IngProbeStatistic, ProbeNeurons
from layerlake.analyze.lens import LensOptions, LensStatistic
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic
from layerlake.analyze.norms import NormsOptions, NormsStatistic
from layerlake.analyze.reduce import reduce_statistic
from layerlake.analyze.statistic import State, Statistic
from layerlake.analyze.subjoiner import Prompts, SubjoinerOptions, SubjoinerStatistic
from layerlake.analyze.wic import WicOptions, WicStatistic
from layerlake.analyze.wic_items import WicItems, hold_out_words
from layerlake.catalog.manifest import Partition
from layerlake.catalog.readout import Readout
from layerlake.catalog.run import Run
from layerlake.catalog.tables import to_parquet

Open = Callable[[Run], Statistic[Any]]


def open_ing(run: Run) -> IngActivationStatistic:
    """Every token ten times as an example, with labels that mean nothing."""
    rows, documents = (np.repeat(run.tokens[name].to_numpy(), 10) for name in ("row", "document"))
    items = np.arange(len(rows))
    examples = Examples(rows, items % 5, items % 2 == 0, documents, items // 2 % 5)
    is_ing = np.arange(run.shape.n_vocab) % 5 == 0
    tokens = IngTokens(is_ing, ~is_ing, is_ing, is_ing)
    neurons = ProbeNeurons.of(np.array([[1, 3], [0, 2]]), np.array([[1, 3], [1, 4]]), run.shape.d_mlp, 0)
    params = {"seed": 0, "variant": "default"}
    return IngActivationStatistic(examples, neurons, tokens, Readout.open(run), run.shape.n_layers, params)


def open_ing_probes(run: Run) -> IngProbeStatistic:
    """The probes of those, on activations."""
    gather = open_ing(run)
    values = reduce_statistic(gather, run, scheduler="synchronous").values
    effects = ("promotes", "suppresses")
    return IngProbeStatistic(
        run.run_id, gather.examples, gather.neurons, gather.tokens, effects, values, gather.params
    )


def open_subjoiner(run: Run) -> SubjoinerStatistic:
    """The heads' scores for the third and the last token of each document, as if they were words."""
    table = run.stored_documents
    table = table.filter(pc.greater(table["n_tokens"], 2))
    names = ("document", "n_tokens", "row_start", "pair_start", "partition")
    documents, lengths, rows, pairs, partitions = (table[name].to_numpy().astype(np.int64) for name in names)
    positions = np.stack([np.full_like(lengths, 2), lengths - 1])
    documents, rows, pairs, partitions = (
        np.stack([each, each]) for each in (documents, rows, pairs, partitions)
    )
    words = np.full(positions.shape, "word", dtype=object)
    prompts = Prompts(documents, positions, rows + positions, pairs, partitions, words, (9, 9))
    options = SubjoinerOptions(word_tokens=3, permutations=50)
    return SubjoinerStatistic(run.run_id, options, prompts, run.shape.n_layers, run.shape.n_heads)


def open_wic(run: Run) -> WicStatistic:
    """The probes of pairs of tokens drawn from any run, as if they were a word in two sentences."""
    rows = run.tokens["row"].to_numpy()
    starts = rows[np.random.default_rng(0).integers(0, len(rows), (24, 2))]
    spans = np.stack([starts, starts + 1], axis=-1)
    words = np.array([f"word{i % 6}" for i in range(24)])
    items = WicItems(np.arange(24) % 5 < 2, words, spans, n_train=18, n_left_out=0, dev_split="dev")
    held_out = hold_out_words(run, items, 1)
    return WicStatistic(run.run_id, WicOptions(seeds=1), items, held_out, run.shape.n_layers + 1)


STATISTICS: dict[str, Open] = {
    "lens": lambda run: LensStatistic.open(run, LensOptions(tokens="30")),
    "lens, authors": lambda run: LensStatistic.open(run, LensOptions(scale="authors", tokens="all")),
    "cka": lambda run: CkaStatistic.open(run, CkaOptions(batch=4)),
    "cka, tokens": lambda run: CkaStatistic.open(run, CkaOptions(samples="tokens_per_doc")),
    "neurons": lambda run: NeuronStatistic.open(run, NeuronOptions()),
    "attention": lambda run: AttentionStatistic.open(run, AttentionOptions()),
    "attention, pattern": lambda run: AttentionStatistic.open(without(run, "attn_band"), AttentionOptions()),
    "attention, authors": lambda run: AttentionStatistic.open(run, AttentionOptions(variant="authors")),
    "norms": lambda run: NormsStatistic.open(run, NormsOptions(tokens="30")),
    "ing, activations": open_ing,
    "ing": open_ing_probes,
    "subjoiner": open_subjoiner,
    "wic": open_wic,
}


def without(run: Run, site: str) -> Run:
    """The run as it would be if a site had not been captured."""
    sites = {name: held for name, held in run.manifest.sites.items() if name != site}
    return Run(run.store, replace(run.manifest, sites=sites))


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
    monkeypatch.setattr("layerlake.analyze.ing_probes._UNIT_EXAMPLES", 50)
    monkeypatch.setattr(cka, "_GRAM_ROWS", 3)
    monkeypatch.setattr("layerlake.analyze.subjoiner._WINDOW", 3)
    monkeypatch.setattr(wic, "C_GRID", (1e-3,))
    monkeypatch.setattr(wic, "FEATURES", ("interaction", "cosine"))
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
        stored = pq.read_table(io.BytesIO(to_parquet(in_order.to_table())))
        assert_equal(State.of_table(stored, statistic.zero()), in_order)


@few
@runs
def test_what_is_known_already_changes_no_digit_and_is_not_measured_again(
    make_run: Callable[..., Run], tmp_path: Path, **drawn: Any
) -> None:
    run = make_run(url=tmp_path / uuid.uuid4().hex, context=24, **drawn)
    rng = np.random.default_rng(drawn["seed"])
    for name, open_statistic in STATISTICS.items():
        note(name)
        statistic = open_statistic(run)
        whole = reduce_statistic(statistic, run, scheduler="synchronous")
        foreign = State(whole.keys + 1_000_000, whole.values + 1)  # of what this extent does not ask for
        for share in (0.0, 0.5, 0.9, 1.0):
            kept = rng.random(len(whole.keys)) < share
            known = State(whole.keys[kept], whole.values[kept]).union(foreign)
            assert_equal(reduce_statistic(statistic, run, scheduler="synchronous", known=known), whole)
        for unit in statistic.units():
            keys = statistic.keys(unit)
            if keys is not None:
                measured = statistic.measure(statistic.read(run, unit))
                np.testing.assert_array_equal(np.unique(keys, axis=0), measured.keys)
        if all(statistic.keys(unit) is not None for unit in statistic.units()):
            nowhere = cast(Run, None)  # so that whatever is read fails
            assert_equal(reduce_statistic(statistic, nowhere, known=whole), whole)


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
    rows, weight, bands = Run.read_rows, Run.weight_array, Run.read_attn_band

    def recorded_rows(run: Run, site: str, *args: Any) -> Any:
        read.append(site)
        return rows(run, site, *args)

    def recorded_weight(run: Run, name: str) -> Any:
        read.append(name)
        return weight(run, name)

    def recorded_bands(run: Run, partition: Partition, **given: Any) -> Any:
        read.extend(["attn_band"] * run.shape.n_layers)  # which lie in one object
        return bands(run, partition, **given)

    monkeypatch.setattr(Run, "read_attn_band", recorded_bands)
    monkeypatch.setattr(Run, "read_rows", recorded_rows)
    monkeypatch.setattr(Run, "weight_array", recorded_weight)
    for unit in statistic.units():
        read.clear()
        statistic.measure(statistic.read(run, unit))
        assert read == [site for site, _ in unit.reads]
