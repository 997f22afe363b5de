"""Between the model and the store: memory is bounded, the store's pace is the model's, and failures come out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from layerlake.capture import worker
from layerlake.capture.execute import capture_run
from layerlake.capture.frozen import PartitionWork
from layerlake.capture.partition import PartitionBuffer, PlacedDocument, run_batch
from layerlake.capture.pipeline import Pipeline
from layerlake.capture.spec import CaptureSpec
from layerlake.capture.staging import Staging
from layerlake.capture.writer import object_keys, write_partition
from layerlake.catalog.errors import OverflowInCapture
from layerlake.catalog.lake import Lake
from layerlake.catalog.manifest import Manifest
from layerlake.catalog.run import Run
from layerlake.catalog.stores import Store

MakeRun = Callable[..., Run]
MakeSpec = Callable[..., CaptureSpec]
TIMEOUT_S = 30.0
"""After which something that should happen has not."""
A_MOMENT_S = 0.2
"""In which something that should not happen would have."""


class GatedStore(Store):
    """A store that takes no shard or table before it is let go; the zones beside a shard come with it."""

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        self.gate = threading.Semaphore(0)
        self.written: list[str] = []

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        if "/zones/" not in name:
            assert self.gate.acquire(timeout=TIMEOUT_S)
            self.written.append(name)
        super().write(name, *pieces)

    def let_go(self, n: int = 1000) -> None:
        self.gate.release(n)


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run(lengths=(12, 3, 14, 2, 16, 7, 9), context=16)


@pytest.fixture
def store(tmp_path: Path) -> GatedStore:
    return GatedStore(tmp_path / "other")


@pytest.fixture
def buffers(run: Run) -> list[PartitionBuffer]:
    """The run's partitions, filled with made-up values."""
    rows = run.stored_documents.to_pylist()
    documents = {
        row["document"]: PlacedDocument(
            row["document"], np.zeros(row["n_tokens"], np.int32), row["row_start"], row["pair_start"]
        )
        for row in rows
    }
    found = []
    for partition in run.manifest.partitions:
        members = tuple(row["document"] for row in rows if row["partition"] == partition.index)
        buffer = PartitionBuffer(
            run.manifest, PartitionWork(partition.index, run.sites, (members,)), documents
        )
        for i, values in enumerate(buffer.values.values()):
            values[...] = partition.index * 100 + i
        found.append(buffer)
    return found


def sizes(buffer: PartitionBuffer) -> int:
    return buffer.nbytes(buffer.documents.values())


def open_pipeline(store: Store, manifest: Manifest, **options: Any) -> Pipeline:
    given: dict[str, Any] = {
        "budget_nbytes": 1 << 30, "n_threads": 2, "is_wanted": lambda _: True, "finish": lambda *_: None,
    }  # fmt: skip
    return Pipeline(store, manifest, **given | options)


class Model:
    """Fills partitions in a thread of its own, as far as the pipeline lets it."""

    def __init__(self, pipeline: Pipeline, buffers: list[PartitionBuffer]) -> None:
        self.begun = self.reserved = self.handed_over = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(pipeline, buffers), daemon=True)
        self._thread.start()

    def _run(self, pipeline: Pipeline, buffers: list[PartitionBuffer]) -> None:
        try:
            for buffer in buffers:
                pipeline.begin()
                self.begun += 1
                pipeline.reserve(sizes(buffer))
                self.reserved += sizes(buffer)
                pipeline.write(buffer)
                self.handed_over += 1
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            self.error = error

    def rest(self) -> None:
        """Wait until it has come as far as it can."""
        self._thread.join(A_MOMENT_S)

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


def test_objects_and_records_are_those_of_the_plain_writer(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer], tmp_path: Path
) -> None:
    finished: dict[int, list[dict[str, Any]]] = {}
    store.let_go()
    n_objects = sum(len(object_keys(run.manifest, run.sites)) for _ in buffers)
    n_zones = n_objects - len(buffers)  # all but those of attn_band are shards
    plain = Store(tmp_path / "plain")
    expected = {buffer.work.index: write_partition(plain, run.manifest, buffer) for buffer in buffers}
    with open_pipeline(
        store, run.manifest, finish=lambda buffer, records: finished.update({buffer.work.index: records})
    ) as pipeline:
        for buffer in buffers:
            pipeline.begin()
            pipeline.reserve(sizes(buffer))
            pipeline.write(buffer)
    assert finished == expected
    assert pipeline.nbytes_written == sum(r["nbytes"] for records in expected.values() for r in records)
    assert pipeline.n_queued == 0
    names = [name for name, _ in plain.walk()]
    assert len(names) == n_objects + n_zones
    assert {name: store.read(name) for name in names} == {name: plain.read(name) for name in names}
    assert not any(buffer.values for buffer in buffers)  # and nothing is kept


def test_two_partitions_are_in_flight_at_most(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer]
) -> None:
    with open_pipeline(store, run.manifest, n_threads=1) as pipeline:
        model = Model(pipeline, buffers)
        for n_stored in range(3):
            model.rest()
            assert (model.begun, model.handed_over) == (n_stored + 2, n_stored + 2)
            store.let_go(len(object_keys(run.manifest, run.sites)))
        store.let_go()
        model.join()
    assert model.handed_over == len(buffers)
    assert pipeline.waited_s > 0


def test_values_beyond_the_budget_wait_until_as_many_are_stored(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer]
) -> None:
    budget = max(sizes(a) + sizes(b) // 2 for a, b in itertools.pairwise(buffers))
    with open_pipeline(store, run.manifest, budget_nbytes=budget) as pipeline:
        model = Model(pipeline, buffers)
        model.rest()
        assert (model.begun, model.handed_over) == (2, 1)
        for _ in range(len(buffers) * len(object_keys(run.manifest, run.sites))):
            store.let_go(1)
            stored = sum(sizes(buffer) for buffer in buffers if not buffer.values)
            assert model.reserved - stored <= budget + max(map(sizes, buffers))
        model.join()
    assert model.reserved == sum(map(sizes, buffers))


def test_every_byte_comes_back(run: Run, store: GatedStore, buffers: list[PartitionBuffer]) -> None:
    """Or a long capture would come to a halt."""
    store.let_go()
    budget = max(map(sizes, buffers))
    with open_pipeline(store, run.manifest, budget_nbytes=budget) as pipeline:
        for buffer in buffers:
            pipeline.begin()
            pipeline.reserve(sizes(buffer))
            pipeline.write(buffer)
            pipeline.begin()
            pipeline.reserve(budget)  # waits for all of it
            pipeline._budget += budget  # noqa: SLF001  # and gives it back
            pipeline.skip()


def test_a_partition_that_is_not_needed_makes_room(run: Run, store: GatedStore) -> None:
    with open_pipeline(store, run.manifest) as pipeline:
        for _ in range(10):
            pipeline.begin()
            pipeline.skip()


def test_what_the_store_raises_reaches_the_model_and_ends_the_writing(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[int] = []
    n_calls = 0

    def break_down(*_: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GatedStore, "write", break_down)

    def fill_all() -> None:
        with open_pipeline(
            store, run.manifest, n_threads=1, finish=lambda buffer, _: finished.append(buffer.work.index)
        ) as pipeline:
            for buffer in buffers:
                pipeline.begin()
                pipeline.reserve(sizes(buffer))
                pipeline.write(buffer)

    with pytest.raises(OSError, match="No space left"):
        fill_all()
    assert n_calls == 1
    assert finished == []


def test_a_failure_in_the_last_partition_is_not_lost(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("the ledger cannot be written")

    def fill_one() -> None:
        with open_pipeline(store, run.manifest, finish=refuse) as pipeline:
            pipeline.begin()
            pipeline.write(buffers[0])

    store.let_go()
    with pytest.raises(OSError, match="the ledger cannot be written"):
        fill_one()


def test_whoever_waits_is_woken_by_a_failure(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer]
) -> None:
    error = OverflowInCapture("too large")

    def fill_all() -> None:
        with open_pipeline(store, run.manifest, budget_nbytes=sizes(buffers[0])) as pipeline:
            model = Model(pipeline, buffers)
            model.rest()
            assert (model.begun, model.handed_over) == (2, 1)
            pipeline.fail(error)
            model.join()
            assert model.error is error
            store.let_go()

    with pytest.raises(OverflowInCapture, match="too large"):
        fill_all()
    assert len(store.written) == 2  # those that the threads held already


def test_a_partition_that_another_has_written_is_abandoned(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer]
) -> None:
    """In the middle: what is left of it is not written, there is no ledger, and its memory comes back."""
    finished: list[int] = []
    wanted = threading.Event()
    wanted.set()
    with open_pipeline(
        store,
        run.manifest,
        n_threads=1,
        budget_nbytes=sizes(buffers[0]),
        is_wanted=lambda index: index != buffers[0].work.index or wanted.is_set(),
        finish=lambda buffer, _: finished.append(buffer.work.index),
    ) as pipeline:
        pipeline.begin()
        pipeline.reserve(sizes(buffers[0]))
        pipeline.write(buffers[0])
        wanted.clear()
        store.let_go()
        pipeline.begin()
        pipeline.reserve(sizes(buffers[0]))
        pipeline.begin()
    assert len(store.written) <= 1
    assert finished == []


def test_an_error_of_the_model_lets_complete_partitions_be_written(
    run: Run, store: GatedStore, buffers: list[PartitionBuffer]
) -> None:
    finished: list[int] = []

    def stumble(error: type[BaseException]) -> None:
        with open_pipeline(
            store, run.manifest, n_threads=1, finish=lambda buffer, _: finished.append(buffer.work.index)
        ) as pipeline:
            pipeline.begin()
            pipeline.write(buffers.pop())
            threading.Timer(A_MOMENT_S, store.let_go).start()
            raise error("stumbled")

    with pytest.raises(ValueError, match="stumbled"):
        stumble(ValueError)
    assert len(finished) == 1


def test_an_interrupt_is_in_a_hurry(run: Run, store: GatedStore, buffers: list[PartitionBuffer]) -> None:
    """What is being written is written; what waits is dropped."""
    finished: list[int] = []

    def interrupt() -> None:
        with open_pipeline(
            store, run.manifest, n_threads=1, finish=lambda buffer, _: finished.append(buffer.work.index)
        ) as pipeline:
            pipeline.begin()
            pipeline.write(buffers[0])
            threading.Timer(A_MOMENT_S, store.let_go).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert len(store.written) <= 1
    assert finished == []


def test_an_interrupted_capture_goes_on(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0

    def interrupted(*args: Any, **options: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            raise KeyboardInterrupt
        run_batch(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture_run(tmp_path, make_spec(sites="resid"))
    assert Lake(tmp_path).run_ids == []
    assert capture_run(tmp_path, make_spec(sites="resid")).manifest.number == 1


class ThreadedStaging(Staging):
    """Hands values on in a thread, as on CUDA, and the values are on the CPU; not before the gate is open."""

    gate = threading.Event()

    def __init__(self, _device: Any, *, slot_nbytes: int, n_slots: int, on_failure: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "Stream", lambda _: None)
            cuda: Any = SimpleNamespace(type="cuda")
            super().__init__(cuda, slot_nbytes=slot_nbytes, n_slots=0 * n_slots, on_failure=on_failure)

    def wait(self) -> None:
        self.gate.wait(TIMEOUT_S)

    def put(self, value: torch.Tensor, rows: Any, lengths: Any, deliver: Any, *, dtype: torch.dtype) -> None:
        assert rows == "token"
        self._raise_failure()
        value = value.to(dtype, copy=True)
        copies = [each[: lengths[i]] for i, each in enumerate(value)]
        self._coming.put(self.wait)
        self._coming.put(lambda: deliver(copies, is_finite=bool(value.isfinite().all())))


def test_an_overflow_on_its_way_to_the_host_ends_a_model_that_waits_for_memory(
    make_spec: MakeSpec, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The partition with the overflow is never stored: memory that it holds would be waited for in vain."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1e6)
    monkeypatch.setattr(worker, "Staging", ThreadedStaging)
    reserve = Pipeline.reserve

    def scarce(pipeline: Pipeline, nbytes: int) -> None:
        if pipeline._in_flight == 2:  # noqa: SLF001
            pipeline._budget = 0  # noqa: SLF001
            threading.Timer(A_MOMENT_S, ThreadedStaging.gate.set).start()
        reserve(pipeline, nbytes)

    ThreadedStaging.gate.clear()
    monkeypatch.setattr(Pipeline, "reserve", scarce)
    with pytest.raises(OverflowInCapture, match="mlp_out"):
        capture_run(tmp_path, make_spec(model=model, tokenizer=tokenizer, sites="mlp_out", dtype="float16"))


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("encode", "staging"))]
