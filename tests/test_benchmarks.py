"""A smoke run of every benchmark: that it runs and prints its ratios, not how large they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_runs(path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(path), "--smoke"], capture_output=True, text=True, check=False, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert "| ratio | measured |" in ran.stdout
