"""Runs for the tests of what is kept and what is removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layerlake.catalog.run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run()


@pytest.fixture(params=["file", "memory", "s3"])
def any_run(request: pytest.FixtureRequest, make_run: MakeRun, tmp_path: Path) -> Run:
    """A run on a disk, in memory, and in a bucket, where objects are deleted in bulk."""
    if request.param == "s3":
        return make_run(f"{request.getfixturevalue('s3_url')}/lake", sites=("resid", "attn_band"))
    return make_run(None if request.param == "file" else f"memory://{tmp_path}")
