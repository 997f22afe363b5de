"""Who writes what: i/n, torchrun's environment, and the device that goes with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerlake.capture import model
from layerlake.capture.share import Share, place_on_machine
from layerlake.catalog.errors import PlanError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@given(count=st.integers(1, 40), n_partitions=st.integers(0, 200))
def test_every_partition_is_taken_once(count: int, n_partitions: int) -> None:
    shares = [Share.parse(f"{i}/{count}") for i in range(count)]
    taken = [sum(share.takes(place) for share in shares) for place in range(n_partitions)]
    assert taken == [1] * n_partitions
    sizes = [sum(map(share.takes, range(n_partitions))) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/2", "1/2/3", "-1/2", "1 / 2", "0.5/2"])
def test_what_is_not_i_of_n_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="does not say which writer") as caught:
        Share.parse(text)
    assert "0/n" in caught.value.hint


@pytest.mark.parametrize("text", ["2/2", "7/3", "0/0"])
def test_a_writer_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="There is no writer") as caught:
        Share.parse(text)
    assert "counts from 0" in caught.value.hint


def test_only_torchrun_shares_out_by_itself() -> None:
    """Other launchers set RANK and WORLD_SIZE too, and mean something else."""
    assert Share.of_environment(TORCHRUN) == Share(5, 8)
    assert place_on_machine(TORCHRUN) == 1
    others = {name: value for name, value in TORCHRUN.items() if not name.startswith("TORCH")}
    assert Share.of_environment(others) == Share.of_environment({}) == Share()
    assert place_on_machine(others) is None


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with four accelerators, and the names of the devices that were asked for."""
    asked: list[str] = []

    def empty(_size: int, *, device: str) -> torch.Tensor:
        asked.append(device)
        return torch.zeros(0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", empty)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize(("local_rank", "expected"), [(0, "cuda:0"), (3, "cuda:3"), (5, "cuda:1")])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_under_torchrun_each_process_takes_its_own_device(
    devices: list[str], monkeypatch: pytest.MonkeyPatch, name: str, local_rank: int, expected: str
) -> None:
    for variable, value in (TORCHRUN | {"LOCAL_RANK": str(local_rank)}).items():
        monkeypatch.setenv(variable, value)
    model.choose_device(name)
    assert devices == [expected]


def test_a_device_that_is_named_is_taken(devices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "cuda"):  # no torchrun
        model.choose_device(name)
    for variable, value in TORCHRUN.items():
        monkeypatch.setenv(variable, value)
    for name in ("cuda:3", "cpu"):
        model.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.choose_device("auto")
    assert devices == ["cuda", "cuda", "cuda:3", "cpu", "cpu"]
