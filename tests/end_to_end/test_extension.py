"""A run that has grown: its analyses measure what is new, and find what they would have found at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerlake import CaptureSpec, Lake, capture_run
from layerlake.analyze import reduce
from layerlake.analyze.analyses import run_analysis
from layerlake.catalog.verify import verify_lake
from layerlake.demo.tour import demo_model_path

TEXT = "\n\n".join(f"def function_{i}(self, value):\n    return self.value + {i} * value" for i in range(60))

CASES = [
    ("lens", {"tokens": "all"}, 0.6),
    ("norms", {}, 0.6),
    ("cka", {"batch": 8}, 0.6),
    ("attention_locality", {}, 0.6),
    ("neurons", {}, 0.0),  # of the weights, which do not grow
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return {
        "model": demo_model_path("stdlib-gpt2"),
        "dataset": text,
        "partition_tokens": 256,
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def at_once(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """All of it captured in one go, by other partitions."""
    path = tmp_path_factory.mktemp("at-once") / "lake"
    capture_run(path, CaptureSpec(**spec | {"partition_tokens": 4096}))
    return Lake(path)


def test_what_was_measured_before_is_not_measured_again(
    spec: dict[str, Any], at_once: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture_run(tmp_path / "lake", CaptureSpec(**spec, max_tokens=1000))
    lake = Lake(tmp_path / "lake")
    n_items: list[int] = []
    measure = reduce._measure  # noqa: SLF001

    def count(statistic: Any, run: Any, unit: Any) -> Any:
        n_items.append(len(unit.items))
        return measure(statistic, run, unit)

    monkeypatch.setattr("layerlake.analyze.lens._UNIT_TOKENS", 64)
    monkeypatch.setattr(reduce, "_measure", count)
    for name, options, _ in CASES:
        run_analysis(lake, name, options=options, scheduler="synchronous")
    capture_run(tmp_path / "lake", CaptureSpec(**spec))
    lake = Lake(tmp_path / "lake")
    for name, options, share in CASES:
        n_items.clear()
        grown = run_analysis(lake, name, options=options, scheduler="synchronous")
        n_new = sum(n_items)
        n_items.clear()
        whole = run_analysis(at_once, name, options=options, scheduler="synchronous")
        assert n_new <= share * sum(n_items), name
        assert grown.runs == whole.runs
        for column in whole.table.column_names:
            if whole.table[column].type in ("double", "float"):
                ours, theirs = (finding.table[column].to_numpy() for finding in (grown, whole))  # NULL is NaN
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=f"{name}: {column}")
            else:
                assert grown.table[column] == whole.table[column], (name, column)
    shown = {table.view for table in lake.findings()}
    assert not any("state" in view for view in shown)
    verify_lake(lake.store)
