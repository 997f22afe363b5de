"""``--max-memory`` is kept, however slow the store and however long the corpus: measured in fresh processes."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layerlake.catalog.sizes import parse_count, parse_nbytes
from layerlake.demo.tour import demo_model_path

_log = logging.getLogger(__name__)

LAYERLAKE = (sys.executable, "-m", "layerlake")


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten thousand documents of 2 to 400 words; the longest are cut."""
    chance = random.Random(0)  # noqa: S311  # no secret
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = [
        "def",
        "return",
        "if",
        "for",
        "in",
        "not",
        "self",
        "value",
        "name",
        "import",
        "from",
        "the",
        "None",
    ]
    with path.open("w") as file:
        for _ in range(10_000):
            text = " ".join(chance.choices(words, k=int(chance.triangular(2, 400, 20))))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def measure(slowed: ModuleType, folder: Path, latency_s: float, **spec: Any) -> dict[str, Any]:
    """Capture in a fresh process: one that was forked would find memory that its parent has let go of."""
    result = folder / "outcome.json"
    options = {
        "lake": str(folder / "lake"), "spec": {"model": str(demo_model_path("stdlib-gpt2")), **spec},
        "latency_s": latency_s, "result_path": str(result),
    }  # fmt: skip
    subprocess.run([sys.executable, str(slowed.__file__), json.dumps(options)], check=True)
    outcome: dict[str, Any] = json.loads(result.read_text())
    return outcome


@pytest.mark.parametrize(
    ("max_memory", "max_tokens", "latency_s"),
    [
        ("80MiB", "2k", 0.02),
        ("80MiB", "20k", 0.006),
        pytest.param("60MiB", "20k", 0.03, marks=pytest.mark.slow),
        pytest.param("256MiB", "20k", 0.1, marks=pytest.mark.slow),
        pytest.param("96MiB", "200k", 0.01, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_memory_is_bounded_before_a_slow_store(
    *, slowed: ModuleType, text_path: Path, tmp_path: Path, max_memory: str, max_tokens: str, latency_s: float
) -> None:
    outcome = measure(
        slowed, tmp_path, latency_s,
        dataset=str(text_path), max_tokens=max_tokens, max_memory=max_memory, sites="resid,mlp_post,pattern",
    )  # fmt: skip
    peak, predicted = outcome["peak_host_nbytes"], outcome["predicted"]["peak_host_nbytes"]
    if peak is None:
        pytest.skip("only Linux tells how much memory a process has taken")
    _log.warning(
        "--max-memory %s, %d tokens, %.0f MB stored, %.1f s of %.1f s waited: peak %.1f MiB, predicted %.1f MiB",
        max_memory, outcome["tokens"], outcome["nbytes"] / 1e6, outcome["waited_seconds"], outcome["seconds"],
        peak / 2**20, predicted / 2**20,
    )  # fmt: skip
    assert parse_count(max_tokens) * 0.9 < outcome["tokens"] <= parse_count(max_tokens)
    assert outcome["nbytes"] > 0.5 * parse_nbytes(max_memory)
    assert outcome["waited_seconds"] > 0.1 * outcome["seconds"], "the store was not the slower of the two"
    assert peak <= parse_nbytes(max_memory)
    assert predicted <= parse_nbytes(max_memory)


@pytest.mark.parametrize(
    ("max_memory", "n_batches"),
    [
        ("256MiB", 2),
        pytest.param("224MiB", 3, marks=pytest.mark.slow),
        pytest.param("512MiB", 1, marks=pytest.mark.slow),
    ],
)
def test_memory_of_interventions_is_bounded(
    text_path: Path, tmp_path: Path, max_memory: str, n_batches: int
) -> None:
    """The tighter it is, the more batches."""
    model, lake = str(demo_model_path("stdlib-gpt2")), str(tmp_path / "lake")
    given = ("--dataset", str(text_path), "--sites", "resid", "--max-tokens", "5k")
    subprocess.run([*LAYERLAKE, "capture", lake, "--model", model, *given], check=True, capture_output=True)
    asked = ("--drop", "all", "--swap", "all", "--max-memory", max_memory, "--json")
    ran = subprocess.run([*LAYERLAKE, "intervene", lake, *asked], check=True, capture_output=True)
    (outcome,), (plan,) = (json.loads(ran.stdout)[name] for name in ("outcome", "plan"))
    if outcome["peak_host_nbytes"] is None:
        pytest.skip("only Linux tells how much memory a process has taken")
    _log.warning("--max-memory %s: peak %.1f MiB", max_memory, outcome["peak_host_nbytes"] / 2**20)
    assert plan["batches"] >= n_batches + 1  # and the floor
    assert outcome["peak_host_nbytes"] <= parse_nbytes(max_memory)
