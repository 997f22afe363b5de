"""What docstrings ask of pytest by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from layerlake.catalog.lake import Lake


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Return a lake with one run: a few lines of Python in one of the models that the package ships."""
    pytest.importorskip("torch", reason="a capture needs torch")
    from layerlake import CaptureSpec, capture_run, open_lake
    from layerlake.demo.tour import demo_model_path

    folder = tmp_path_factory.mktemp("example")
    text = "def first(names):\n    for name in names:\n        return name\n"
    (folder / "text.jsonl").write_text(json.dumps({"text": text}))
    spec = CaptureSpec(
        model=demo_model_path("stdlib-gpt2"),
        dataset=folder / "text.jsonl",
        sites="resid,mlp_post",
        context=64,
    )
    capture_run(folder / "lake", spec)
    return open_lake(folder / "lake")
