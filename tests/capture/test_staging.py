"""From device to host: directly on the CPU, through the ring on CUDA; the ring's order and bounds need no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from layerlake.capture.staging import Rows, Staging, as_numpy

Array = np.ndarray[Any, np.dtype[Any]]
LENGTHS = [3, 5, 1]


class Taken:
    """What was delivered, copied at once: the memory is taken back afterwards."""

    def __init__(self) -> None:
        self.values: list[list[Array]] = []
        self.is_finite: list[bool | None] = []

    def __call__(self, values: list[torch.Tensor], is_finite: bool | None) -> None:
        self.values.append([value.numpy().copy() for value in values])
        self.is_finite.append(is_finite)


def make_batch(rows: Rows, seed: int = 0) -> torch.Tensor:
    sizes = {"token": (3, 5, 4), "pair": (3, 2, 5, 5), "document": (3, 2, 4)}
    value = torch.randn(sizes[rows], generator=torch.Generator().manual_seed(seed))
    return value.tril() if rows == "pair" else value


def expected(rows: Rows, value: torch.Tensor, *, is_packed: bool) -> list[Array]:
    """Cut every document out by hand."""
    found = []
    for i, n in enumerate(LENGTHS):
        if rows == "token":
            found.append(value[i, :n].numpy())
        elif rows == "document":
            found.append(value[i].numpy())
        elif is_packed:
            found.append(np.stack([head[np.tril_indices(n)] for head in value[i].numpy()]))
        else:
            found.append(value[i, :, :n, :n].numpy())
    return found


def same(found: list[Array], wanted: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_bfloat16_comes_as_its_bits() -> None:
    bits = as_numpy(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert bits.dtype == np.uint16
    assert bits.tolist() == [0x3F80, 0xC000]


@pytest.mark.parametrize("rows", ["token", "pair", "document"])
def test_on_the_cpu_values_are_handed_on_at_once(rows: Rows) -> None:
    taken, called = Taken(), []
    with Staging(torch.device("cpu"), slot_nbytes=0, n_slots=0) as staging:
        value = make_batch(rows)
        staging.put(value, rows, LENGTHS, taken, dtype=torch.float32)
        assert same(taken.values[0], expected(rows, value, is_packed=False))
        staging.then(lambda: called.append(len(taken.values)))
        assert called == [1]
        staging.drain()
    assert staging.waited_s == 0


def test_on_the_cpu_what_the_taker_raises_comes_out() -> None:
    def refuse(_values: list[torch.Tensor], _is_finite: bool | None) -> None:
        raise ValueError("no")

    with (
        pytest.raises(ValueError, match="no"),
        Staging(torch.device("cpu"), slot_nbytes=0, n_slots=0) as staging,
    ):
        staging.put(make_batch("token"), "token", LENGTHS, refuse, dtype=torch.float32)


def unpinned(empty: Any, *size: int, pin_memory: bool, **options: Any) -> torch.Tensor:
    """Pinning memory needs CUDA."""
    assert pin_memory
    value: torch.Tensor = empty(*size, **options)
    return value


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Staging]:
    """Make the ring that CUDA gets; without CUDA its copies are ordinary ones, and its streams do nothing."""
    if torch.cuda.is_available():
        return lambda **options: Staging(torch.device("cuda"), **options)
    idle = SimpleNamespace(wait_stream=lambda _: None, record=lambda _: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: idle)
    monkeypatch.setattr(torch.cuda, "Event", lambda: idle)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: idle)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch, "empty", partial(unpinned, torch.empty))
    return lambda **options: Staging(SimpleNamespace(type="cuda"), **options)  # type: ignore[arg-type]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds back whoever takes values; opened at the end, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", ["token", "pair", "document"])
def test_the_ring_keeps_values_and_order(ring: Callable[..., Staging], rows: Rows) -> None:
    """With fewer slots than values, so that each slot is used again."""
    taken, seen = Taken(), []
    batches = [make_batch(rows, seed) for seed in range(9)]
    with ring(slot_nbytes=4096, n_slots=2) as staging:
        for i, batch in enumerate(batches):
            staging.put(batch.to(device()), rows, LENGTHS, taken, dtype=torch.float32)
            staging.then(lambda i=i: seen.append((i, len(taken.values))))  # type: ignore[misc]
        staging.drain()
        assert seen == [(i, i + 1) for i in range(9)]
    for found, batch in zip(taken.values, batches, strict=True):
        assert same(found, expected(rows, batch, is_packed=True))
    assert taken.is_finite == [True] * 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_noticed_on_the_device(
    ring: Callable[..., Staging], bad: float
) -> None:
    taken, value = Taken(), make_batch("token")
    with ring(slot_nbytes=4096, n_slots=2) as staging:
        staging.put(value.to(device()), "token", LENGTHS, taken, dtype=torch.float32)
        value = value.clone()
        value[1, 2, 3] = bad
        staging.put(value.to(device()), "token", LENGTHS, taken, dtype=torch.float32)
        value = value.clone()
        value[1, 2, 3], value[1, 0, 0] = 0, 1e6
        staging.put(value.to(device()), "token", LENGTHS, taken, dtype=torch.float16)
        staging.drain()
    assert taken.is_finite == [True, False, False]


def test_with_all_slots_taken_the_model_waits(ring: Callable[..., Staging], gate: threading.Event) -> None:
    n_put = 0

    def wait(_values: list[torch.Tensor], _is_finite: bool | None) -> None:
        gate.wait()

    def put_all(staging: Staging) -> None:
        nonlocal n_put
        for _ in range(5):
            staging.put(make_batch("token").to(device()), "token", LENGTHS, wait, dtype=torch.float32)
            n_put += 1

    with ring(slot_nbytes=4096, n_slots=2) as staging:
        model = threading.Thread(target=put_all, args=(staging,))
        model.start()
        model.join(timeout=0.3)
        assert model.is_alive()
        assert n_put == 2
        gate.set()
        model.join()
        staging.drain()
    assert n_put == 5
    assert staging.waited_s > 0


def test_a_failure_in_the_ring_is_told_and_raised_and_frees_the_slots(ring: Callable[..., Staging]) -> None:
    told: list[BaseException] = []
    called: list[int] = []

    def refuse(_values: list[torch.Tensor], _is_finite: bool | None) -> None:
        raise ValueError("disk full")

    def put_many() -> None:
        with ring(slot_nbytes=4096, n_slots=2, on_failure=told.append) as staging:
            for _ in range(50):  # far more than there are slots
                staging.put(make_batch("token").to(device()), "token", LENGTHS, refuse, dtype=torch.float32)
            staging.then(lambda: called.append(1))
            staging.drain()

    with pytest.raises(ValueError, match="disk full"):
        put_many()
    assert [str(error) for error in told] == ["disk full"]
    assert not called


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on a stream of their own")
def test_on_cuda_values_survive_that_their_memory_is_used_again() -> None:
    taken = Taken()
    lengths = [512] * 8
    with Staging(torch.device("cuda"), slot_nbytes=64 << 20, n_slots=3) as staging:
        for i in range(32):
            staging.put(
                torch.full((8, 512, 1024), float(i), device="cuda"),
                "token",
                lengths,
                taken,
                dtype=torch.float32,
            )
        staging.drain()
    assert [float(values[-1].min()) for values in taken.values] == list(range(32))
    assert [float(values[-1].max()) for values in taken.values] == list(range(32))
