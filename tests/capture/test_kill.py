"""kill −9 at any moment, then the same again: the lake is the one that an uninterrupted capture leaves."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layerlake.catalog.lake import Lake

_log = logging.getLogger(__name__)
LATENCY_S = 0.002
N_WORDS = (7, 12, 3, 15, 0, 9, 15, 70, 5, 11, 8, 14)
"""Of each paragraph, again and again: one is too short to be stored, one longer than the context."""


def contents(lake: Path) -> dict[str, bytes]:
    """Every object but the log, which says when a capture ended."""
    return {
        path.relative_to(lake).as_posix(): path.read_bytes()
        for path in lake.rglob("*")
        if path.is_file() and "/log/" not in path.as_posix()
    }


@dataclass
class Killed:
    """A capture that is killed again and again, and what it should come to."""

    slowed: ModuleType
    folder: Path
    options: dict[str, Any]
    lake: Path
    n_paragraphs: int
    whole: dict[str, bytes]
    """What an uninterrupted capture leaves."""
    n_operations: int
    """What an uninterrupted capture asks of the store."""
    n_kills: int = 0

    def run(self, kill: dict[str, Any] | None = None) -> bool:
        """Run the capture until it ends or is killed; tell whether it came to its end."""
        process = self.slowed.start(
            self.folder / "outcome.json", lake=str(self.lake), kill=kill,
            attempts_path=str(self.folder / "attempts"), **self.options,
        )  # fmt: skip
        process.join(timeout=120)
        assert process.exitcode in (0, -9), process.exitcode
        self.n_kills += process.exitcode == -9
        return bool(process.exitcode == 0)

    def require_whole(self) -> None:
        """Hold what is there in the end against the uninterrupted lake, and count (``pytest -rP`` shows it)."""
        assert self.run()
        run = Lake(self.lake).run()
        # a file that was cut off has a name of its own, which only gc looks at
        found = {name: c for name, c in contents(self.lake).items() if not name.endswith(".partial")}
        assert found == self.whole
        assert not [name for name in found if "/wip/" in name]
        (entry,) = run.manifest.captures
        assert "other_writers" not in entry

        statuses = run.documents["status"].to_pylist()
        assert len(statuses) == self.n_paragraphs
        assert run.documents["document"].to_pylist() == list(range(self.n_paragraphs))
        assert Counter(statuses) == {
            "refused": N_WORDS.count(0) * self.n_paragraphs // len(N_WORDS),
            "cut": N_WORDS.count(70) * self.n_paragraphs // len(N_WORDS),
            "stored": 10 * self.n_paragraphs // len(N_WORDS),
        }
        reasons = run.documents["reason"].to_pylist()
        assert all(reason for status, reason in zip(statuses, reasons, strict=True) if status != "stored")

        n_partitions = len(run.manifest.partitions)
        n_attempts = max(map(int, (self.folder / "attempts").read_text().split()))
        _log.warning("%d kills, %d partitions, %d attempts", self.n_kills, n_partitions, n_attempts)
        assert n_partitions >= 20
        assert n_partitions <= n_attempts <= n_partitions + 2 * self.n_kills


@pytest.fixture
def killed(slowed: ModuleType, model_path: Callable[[str], Path], tmp_path: Path) -> Killed:
    """A capture of 24 partitions that is ready to be killed."""
    paragraphs = [
        " ".join(f"fox {i}" for _ in range(max(1, n))) if n else "a" for i in range(4) for n in N_WORDS
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    options = {
        "latency_s": LATENCY_S,
        "spec": {
            "model": str(model_path("gpt2")), "dataset": str(tmp_path / "text.txt"), "dtype": "float32",
            "partition_tokens": 48, "batch_tokens": 96,
        },
    }  # fmt: skip
    process = slowed.start(tmp_path / "outcome.json", lake=str(tmp_path / "whole"), **options)
    process.join(timeout=120)
    assert process.exitcode == 0
    n_operations = json.loads((tmp_path / "outcome.json").read_text())["n_operations"]
    return Killed(
        slowed,
        tmp_path,
        options,
        tmp_path / "lake",
        len(paragraphs),
        contents(tmp_path / "whole"),
        n_operations,
    )


def test_kill_9_and_again(killed: Killed) -> None:
    """At six random moments, each within a sixth of the work, so that none comes too late."""
    chance = random.Random(3)  # noqa: S311  # no secret
    for _ in range(6):
        count, delay = chance.randint(1, killed.n_operations // 6), chance.uniform(0, 2 * LATENCY_S)
        assert not killed.run({"match": "", "count": count, "delay_s": delay})
    killed.require_whole()


@pytest.mark.slow
def test_kill_9_many_times_in_every_phase(killed: Killed) -> None:
    """While the run is begun, over and over while it is written, and at each step of its end."""
    chance = random.Random(4)  # noqa: S311  # no secret

    def moments() -> Iterator[tuple[str, int]]:
        # in the order in which they come: each is met again by the next attempt
        for what in (
            r"layerlake\.json",
            r"write_json .*open\.json",
            "documents/",
            "tokens/",
            r"activations\.zarr",
        ):
            yield what, 1
        for what in (r"write_json .*plan\.json", r"weights\.zarr", "vocab"):
            yield what, 1
        for _ in range(6):
            yield "", chance.randint(1, 60)
        for _ in range(14):
            yield "", chance.randint(60, killed.n_operations // 20)
        for what in (r"write_json .*attempts/", r"write_json .*ledgers/", "attn_band", r"exists .*ledgers/"):
            yield what, chance.randint(1, 3)

    for match, count in moments():
        kill = {"match": match, "count": count, "delay_s": chance.uniform(0, 2 * LATENCY_S)}
        killed.run(kill)
    steps = (r"write .*/objects/", r"write_json .*/log/", r"delete .*plan\.json", r"delete .*wip/\w+$")
    for what in (*steps, r"delete .*open\.json"):
        killed.run({"match": what, "count": 1, "delay_s": chance.uniform(0, 2 * LATENCY_S)})
    assert killed.n_kills >= 35
    killed.require_whole()
