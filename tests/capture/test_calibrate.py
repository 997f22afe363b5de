"""A calibration runs one batch, writes nothing, and says how long all of it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layerlake.capture.calibrate import calibrate
from layerlake.capture.execute import capture_run
from layerlake.capture.plan import plan_capture
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import PlanError

MakeSpec = Callable[..., CaptureSpec]


def test_a_sample_is_run_and_nothing_is_written(make_spec: MakeSpec, tmp_path: Path) -> None:
    plan = plan_capture(make_spec(), tmp_path / "lake")
    found = calibrate(plan, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()
    assert min(found.tokens_per_second, found.encode_nbytes_per_second, found.seconds) > 0
    assert set(found.to_json()) == {
        "calibrated_tokens_per_second", "calibrated_encode_nbytes_per_second", "seconds",
    }  # fmt: skip


def test_an_extension_is_calibrated_by_the_documents_that_are_there(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    capture_run(tmp_path / "lake", make_spec(sites="resid"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "lake").rglob("*")}
    assert (
        calibrate(plan_capture(make_spec(sites="mlp_post"), tmp_path / "lake"), tmp_path / "lake").seconds > 0
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "lake").rglob("*")} == before


def test_more_tokens_take_longer_in_proportion(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says the same of every batch."""
    times = iter(range(1000))
    monkeypatch.setattr("layerlake.capture.calibrate.time.perf_counter", lambda: next(times))
    few, many = (
        calibrate(plan_capture(make_spec(dataset=None, max_tokens=n, batch_tokens=96))) for n in (960, 9600)
    )
    assert many.seconds == pytest.approx(10 * few.seconds, rel=0.01)
    assert few.tokens_per_second == 96  # one batch in one second
    assert few.seconds == pytest.approx(
        10 + 5, rel=0.02
    )  # ten batches, and half of that to encode them: two threads


def test_where_nothing_is_left_there_is_nothing_to_calibrate(make_spec: MakeSpec, tmp_path: Path) -> None:
    capture_run(tmp_path / "lake", make_spec(sites="resid"))
    with pytest.raises(PlanError, match="nothing left to capture"):
        calibrate(plan_capture(make_spec(sites="resid"), tmp_path / "lake"), tmp_path / "lake")
