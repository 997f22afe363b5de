"""Several writers at once: a drawn schedule says whose turn it is, for how many steps, and who dies where."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerlake.capture import ledgers as ledger_module
from layerlake.capture.execute import write_share
from layerlake.capture.frozen import FrozenPlan, PartitionWork
from layerlake.capture.ledgers import begin_attempt, is_wanted, pending_work, withdraw_disputed, write_ledger
from layerlake.capture.partition import PartitionBuffer, PlacedDocument
from layerlake.capture.phases import finalise_capture, init_capture, read_open_capture, release_committed
from layerlake.capture.placement import EncodedDocument, place_documents
from layerlake.capture.share import Share
from layerlake.capture.writer import create_arrays, object_keys, write_object
from layerlake.catalog.errors import CaptureInProgress, CaptureUnfinished, CorruptRun
from layerlake.catalog.layout import plan_geometry
from layerlake.catalog.manifest import Manifest, read_manifest
from layerlake.catalog.reservation import COLLECTING, REMOVING, reservation_path, take_over_run
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.stores import Store

from .race import Play, Stepping

RUN_ID = "tiny-00000000"
LENGTHS = (3, 1, 2, 4, 1, 2, 4)
SHAPE = ModelShape(
    family="gpt2", n_layers=1, d_model=2, n_heads=1, n_kv_heads=1, d_head=2, d_mlp=4, n_vocab=8, n_ctx=4,
    block="sequential", norm="layernorm", norm_eps=1e-5, act_fn="gelu_new", gated_mlp=False, tied_unembed=False,
)  # fmt: skip

ENCODED = [EncodedDocument((f"d:{i}",), np.arange(n, dtype=np.int32), n) for i, n in enumerate(LENGTHS)]
GEOMETRY = plan_geometry(SHAPE, context=4, dtype="float32", max_memory=1 << 20, partition_tokens=4)


def first_plan(*sites: str) -> FrozenPlan:
    """Plan a run of seven documents in five partitions."""
    placed = place_documents(ENCODED, GEOMETRY)
    indices = tuple(partition.index for partition in placed.partitions)
    manifest = Manifest(
        run_id=RUN_ID, model_id="tiny", model_name="tiny", shape=SHAPE, identity={}, dataset="synthetic",
        geometry=GEOMETRY, dtype="float32", bos_token_id=None, n_documents=len(LENGTHS), n_tokens=sum(LENGTHS),
        partitions=placed.partitions, sites=dict.fromkeys(sites, indices),
    )  # fmt: skip
    numbers = placed.documents["partition"].to_pylist()
    work = tuple(
        PartitionWork(index, sites, (tuple(i for i, p in enumerate(numbers) if p == index),))
        for index in indices
    )
    return FrozenPlan(manifest, work, adds_documents=True, n_threads=1, request={"sites": list(sites)})


PLAN, RIVAL = first_plan("resid", "attn_band"), first_plan("resid")
PLACED = place_documents(ENCODED, GEOMETRY)
DOCUMENTS = {
    row["document"]: PlacedDocument(row["document"], item.token_ids, row["row_start"], row["pair_start"])
    for row, item in zip(PLACED.documents.to_pylist(), ENCODED, strict=True)
}


def fill(plan: FrozenPlan, work: PartitionWork, machine: int) -> PartitionBuffer:
    """Make up a partition's values; another machine's differ."""
    buffer = PartitionBuffer(plan.manifest, work, DOCUMENTS)
    rng = np.random.default_rng([work.index, machine])
    for values in buffer.values.values():
        values[...] = rng.standard_normal(values.shape)
    return buffer


def write_partitions(store: Store, plan: FrozenPlan, mine: Sequence[PartitionWork], machine: int = 0) -> None:
    """Do what a worker does, in one thread and without a model."""
    indices = {work.index for work in mine}
    for work in (work for work in pending_work(store, plan) if work.index in indices):
        if not is_wanted(store, plan, work.index):
            continue
        attempt = begin_attempt(store, plan, work.index)
        buffer = fill(plan, work, machine)
        records = []
        for site, layer in object_keys(plan.manifest, work.sites):
            if not is_wanted(store, plan, work.index):
                break
            records.append(write_object(store, plan.manifest, buffer, site, layer))
        else:
            write_ledger(store, plan, work.index, records, attempt=attempt, writer={"device": "cpu"})


def capture(
    store: Store, plan: FrozenPlan = PLAN, share: Share | None = None, *, machine: int = 0
) -> Manifest | None:
    """Init, write, and finalise if it was the last: what every writer of a capture does."""
    release_committed(store, RUN_ID)
    committed = init_capture(store, plan, documents=PLACED.documents, tokens=PLACED.tokens)
    if committed is not None:
        return committed
    return write_share(
        store, plan, share or Share(), lambda mine: write_partitions(store, plan, mine, machine)
    )


def objects(store: Store) -> dict[str, bytes]:
    """Return everything but the log, which says when a capture ended."""
    return {name: store.read(name) for name, _ in store.walk() if "/log/" not in name}


def verify(store: Store) -> None:
    """Hold every object that any committed snapshot names against its record."""
    for name in store.list(f"runs/{RUN_ID}/log"):
        manifest = Manifest.from_json(store.read_json(f"runs/{RUN_ID}/log/{name}"))
        run = Run(store, manifest)
        assert run.documents.num_rows == len(LENGTHS)
        records = run.objects.to_pylist()
        assert records
        for record in records:
            content = store.read(f"runs/{RUN_ID}/{record['name']}")
            assert (len(content), f"{zlib.crc32(content):08x}") == (record["nbytes"], record["crc32"]), record


play_out = partial(Play, watch=verify)
"""Whatever is committed is whole, at every moment."""

_lakes = itertools.count()


def new_url() -> str:
    return f"memory://race-{next(_lakes)}"


@pytest.fixture(scope="module")
def sequential() -> Iterator[dict[str, bytes]]:
    """What one writer leaves that nobody disturbs."""
    store = Store(new_url())
    capture(store)
    yield objects(store)
    store.delete("")


schedules = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=25)
deaths = st.dictionaries(st.integers(0, 2), st.integers(0, 150), max_size=3)
N_STEPS = 150
"""About how many steps a writer takes that writes everything: deaths and pauses fall anywhere."""


def test_a_writer_takes_about_so_many_steps() -> None:
    play = play_out(new_url(), [capture], [], {})
    assert N_STEPS / 2 < play.writers[0].n_steps < N_STEPS


@settings(max_examples=60, deadline=None)
@given(schedule=schedules, deaths=deaths, shared=st.booleans())
def test_whatever_the_order_one_capture_comes_out(
    schedule: list[tuple[int, int]], deaths: dict[int, int], shared: bool, sequential: dict[str, bytes]
) -> None:
    """Three writers with a third each or with all of it; some die. Another always finishes, to the same bytes."""
    shares = [Share(i, 3) for i in range(3)] if shared else [Share()] * 3
    url = new_url()
    play = play_out(url, [partial(capture, share=share) for share in shares], schedule, deaths)
    assert play.failures == []
    manifest = capture(play.store)
    verify(play.store)
    assert manifest is not None
    assert manifest.number == len(manifest.captures) == 1
    assert objects(play.store) == sequential
    play.store.delete("")


@settings(max_examples=60, deadline=None)
@given(
    schedule=schedules,
    deaths=deaths,
    machines=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
)
@example(schedule=[(2, 2)], deaths={1: 0}, machines=(0, 0, 1))  # one stands still in init, one dies there
def test_unlike_machines_that_write_the_same_partitions_agree_in_the_end(
    schedule: list[tuple[int, int]], deaths: dict[int, int], machines: tuple[int, int, int]
) -> None:
    """Or give up. Nobody can keep one apart that stands still between looking and writing, so that none does here."""
    play = play_out(
        new_url(),
        [partial(capture, machine=machine) for machine in machines],
        schedule, deaths, pauses_before_writes=False,
    )  # fmt: skip
    assert all(isinstance(error, CorruptRun) for error in play.failures)
    manifest = capture(play.store)
    assert manifest is not None
    verify(play.store)
    assert not [name for name, _ in play.store.walk(f"runs/{RUN_ID}/wip")]
    play.store.delete("")


@settings(max_examples=60, deadline=None)
@given(schedule=schedules, deaths=deaths)
def test_of_two_different_captures_one_is_open(
    schedule: list[tuple[int, int]], deaths: dict[int, int], sequential: dict[str, bytes]
) -> None:
    """The other is refused, at once or when it sees that it was overtaken; it may come too late to a whole run."""
    rival = partial(capture, plan=RIVAL, machine=1)  # other values under the same names
    play = play_out(new_url(), [capture, capture, rival], schedule, deaths)
    assert all(isinstance(error, CaptureInProgress) for error in play.failures)
    for plan, again in ((PLAN, capture), (RIVAL, rival)):
        try:
            manifest = again(play.store)
        except CaptureInProgress:
            continue
        assert manifest is not None
        assert [entry["capture_id"] for entry in manifest.captures] == [plan.capture_id]
        found = objects(play.store)
        if plan is PLAN:
            assert {name: found[name] for name in sequential if "zarr.json" not in name} == {
                name: content for name, content in sequential.items() if "zarr.json" not in name
            }
    verify(play.store)
    newest = read_manifest(play.store, RUN_ID)
    assert newest is not None
    assert newest.number == 1
    play.store.delete("")


@settings(max_examples=40, deadline=None)
@given(schedule=schedules)
def test_two_finalise_at_once_and_return_the_same_snapshot(
    schedule: list[tuple[int, int]], sequential: dict[str, bytes]
) -> None:
    store = Store(new_url())
    init_capture(store, PLAN, documents=PLACED.documents, tokens=PLACED.tokens)
    write_partitions(store, PLAN, PLAN.work)
    play = play_out(store.url, [lambda store: finalise_capture(store, PLAN)] * 2, schedule, {})
    first, second = (writer.result for writer in play.writers)
    assert isinstance(first, Manifest)
    assert first == second == read_manifest(store, RUN_ID)
    assert objects(store) == sequential
    store.delete("")


@pytest.mark.parametrize("pauses_before_writes", [False, True])
def test_a_writer_that_wakes_after_the_commit_writes_nothing(
    pauses_before_writes: bool, sequential: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another did everything while it stood still, or is cleaning up. Only what it was about to write, it writes."""
    late: list[str] = []
    write = Stepping.write

    def note(store: Stepping, name: str, *pieces: bytes | memoryview) -> None:
        write(store, name, *pieces)
        if Store(store.url).list(f"runs/{RUN_ID}/log") and ("activations" in name or "attn_band" in name):
            late.append(name)

    monkeypatch.setattr(Stepping, "write", note)
    after_all = [(pause, 10_000) for pause in (*range(20), *range(20, N_STEPS, 4))]
    while_cleaning = [(40, n_steps) for n_steps in range(N_STEPS // 2, N_STEPS)]
    for pause, n_steps in after_all + while_cleaning:
        late.clear()
        schedule = [(0, pause), (1, n_steps), (0, 10_000)]
        both = [capture, capture]
        play = play_out(new_url(), both, schedule, {}, pauses_before_writes=pauses_before_writes)
        assert play.failures == []
        assert len(late) <= pauses_before_writes, (pause, n_steps)
        assert objects(play.store) == sequential, (pause, n_steps)
        play.store.delete("")


@pytest.fixture
def begun() -> Iterator[Store]:
    """A capture whose partitions are all written."""
    store = Store(new_url())
    init_capture(store, PLAN, documents=PLACED.documents, tokens=PLACED.tokens)
    write_partitions(store, PLAN, PLAN.work)
    yield store
    store.delete("")


def ledgers(store: Store) -> list[str]:
    return store.list(f"runs/{RUN_ID}/wip/{PLAN.capture_id}/ledgers")


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_disputed_partition_is_withdrawn_and_written_again(
    begun: Store, damage: str, sequential: dict[str, bytes]
) -> None:
    disputed, untouched = PLAN.work[1], PLAN.work[3]
    for work in (disputed, untouched):
        begin_attempt(begun, PLAN, work.index)
    if damage == "other bytes":
        write_object(begun, PLAN.manifest, fill(PLAN, disputed, machine=1), "resid", 1)
    else:
        begun.delete(f"runs/{RUN_ID}/attn_band/part-{disputed.index:08d}.parquet")
    assert withdraw_disputed(begun, PLAN) == [disputed.index]
    assert len(ledgers(begun)) == len(PLAN.work) - 1
    with pytest.raises(CaptureUnfinished, match=rf"1 of 5 partitions .* not written: {disputed.index}\."):
        finalise_capture(begun, PLAN)
    assert capture(begun) is not None
    assert objects(begun) == sequential


def test_a_partition_that_was_tried_once_is_not_read_again(
    begun: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.read

    def read_notes(store: Store, name: str) -> bytes:
        assert "/wip/" in name, "read an object"
        return read(store, name)

    monkeypatch.setattr(Store, "read", read_notes)
    assert withdraw_disputed(begun, PLAN) == []


@pytest.mark.parametrize("harm", ["gone", "cut short"])
def test_what_a_machine_lost_with_its_power_is_written_again(
    begun: Store, sequential: dict[str, bytes], harm: str
) -> None:
    """Its ledger says that it is there; nothing is read to find out."""
    name = f"runs/{RUN_ID}/activations.zarr/resid/c/1/2/0"
    begun.delete(name) if harm == "gone" else begun.write(name, b"")
    assert withdraw_disputed(begun, PLAN) == [2]
    assert capture(begun) is not None
    assert objects(begun) == sequential


def test_a_ledger_that_comes_when_the_capture_is_over_is_not_written(begun: Store) -> None:
    """Else the next capture of the same plan would take the partition for written."""
    begun.delete(f"runs/{RUN_ID}/wip")
    write_ledger(begun, PLAN, 0, [])
    assert not begun.list(f"runs/{RUN_ID}/wip")


def test_a_ledger_that_replaced_the_disputed_one_is_kept(
    begun: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer has seen the dispute too, and has been faster."""
    work = PLAN.work[0]
    begin_attempt(begun, PLAN, work.index)
    write_object(begun, PLAN.manifest, fill(PLAN, work, machine=1), "resid", 0)
    looked = ledger_module._is_as_recorded  # noqa: SLF001

    def overtaken(*_: Any) -> bool:
        monkeypatch.setattr(ledger_module, "_is_as_recorded", looked)
        assert withdraw_disputed(begun, PLAN) == [work.index]
        write_partitions(begun, PLAN, [work])
        return False

    monkeypatch.setattr(ledger_module, "_is_as_recorded", overtaken)
    withdraw_disputed(begun, PLAN)
    assert len(ledgers(begun)) == len(PLAN.work)
    finalise_capture(begun, PLAN)
    verify(begun)


def test_writers_that_never_agree_are_told(begun: Store) -> None:
    begin_attempt(begun, PLAN, PLAN.work[2].index)

    def spoil(mine: Sequence[PartitionWork]) -> None:
        write_partitions(begun, PLAN, mine)
        write_object(begun, PLAN.manifest, fill(PLAN, PLAN.work[2], machine=1), "resid", 0)

    with pytest.raises(CorruptRun, match=f"go on writing partitions {PLAN.work[2].index} differently"):
        write_share(begun, PLAN, Share(), spoil)
    assert read_manifest(begun, RUN_ID) is None


def test_who_finalises_late_finds_it_done(begun: Store, sequential: dict[str, bytes]) -> None:
    first = finalise_capture(begun, PLAN)
    assert finalise_capture(begun, PLAN) == first
    assert begun.list(f"runs/{RUN_ID}/log") == ["00000001.json"]
    assert objects(begun) == sequential


@pytest.mark.parametrize("holder", [REMOVING, COLLECTING])
def test_a_capture_whose_run_is_removed_stops(begun: Store, holder: str) -> None:
    take_over_run(begun, RUN_ID, holder)
    assert not any(is_wanted(begun, PLAN, work.index) for work in PLAN.work)
    for step in (capture, lambda store: finalise_capture(store, PLAN)):
        with pytest.raises(CaptureInProgress) as caught:
            step(begun)
        assert caught.value.hint
    assert read_manifest(begun, RUN_ID) is None
    assert read_open_capture(begun, RUN_ID) is None


def test_a_run_that_was_removed_since_is_not_extended() -> None:
    store = Store(new_url())
    extension = dataclasses.replace(PLAN, manifest=dataclasses.replace(PLAN.manifest, number=3))
    with pytest.raises(CaptureInProgress, match="or the run was removed"):
        capture(store, extension)
    assert not store.exists(reservation_path(RUN_ID))  # nor held


def test_an_array_that_another_has_made_is_not_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two begin; the one that looked first writes last."""
    store = Store(new_url())
    fewer = dataclasses.replace(PLAN.manifest, partitions=PLAN.manifest.partitions[:1])
    exists = Store.exists

    def late(self: Store, name: str) -> bool:
        found = exists(self, name)
        if name.endswith("/zarr.json"):
            monkeypatch.setattr(Store, "exists", exists)
            create_arrays(self, PLAN.manifest)
        return found

    monkeypatch.setattr(Store, "exists", late)
    create_arrays(store, fewer)
    shape = store.read_json(f"runs/{RUN_ID}/activations.zarr/resid/zarr.json")["shape"]
    assert shape[1] == len(PLAN.work) * GEOMETRY.partition_tokens
    store.delete("")
