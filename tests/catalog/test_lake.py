"""Opening and making lakes, and finding runs in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerlake.catalog.errors import AmbiguousRun, CorruptRun, FormatError, LakeNotFound, RunNotFound
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.layout import log_path
from layerlake.catalog.run import Run


def test_a_new_lake_is_empty(tmp_path: Path) -> None:
    create_lake(tmp_path / "lake")
    lake = Lake(tmp_path / "lake")
    assert (lake.run_ids, lake.runs(), lake.models(), lake.findings()) == ([], [], [], [])
    marker = json.loads((tmp_path / "lake" / "layerlake.json").read_text())
    assert marker | {"checksum": ""} == {"checksum": "", "format": "layerlake", "format_version": 2}
    with pytest.raises(RunNotFound, match="has no runs") as caught:
        lake.run()
    assert "layerlake capture" in caught.value.hint


def test_making_a_lake_twice_changes_nothing(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    create_lake(tmp_path / "lake")
    assert Lake(tmp_path / "lake").run_ids == [run.run_id]


@pytest.mark.parametrize("open_or_create", [Lake, create_lake])
def test_a_folder_with_something_else_is_neither_opened_nor_taken(
    tmp_path: Path, open_or_create: Callable[[Path], Any]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LakeNotFound, match="is not a lake") as caught:
        open_or_create(tmp_path)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(LakeNotFound, match="is not a lake"):
        open_or_create(tmp_path / "thesis.tex")


def test_what_does_not_exist_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(LakeNotFound, match="does not exist"):
        Lake(tmp_path / "nowhere")
    with pytest.raises(LakeNotFound, match="does not exist"):
        Lake("memory://nowhere")


@pytest.mark.parametrize(
    ("marker", "mend"),
    [
        ('{"format_version": 3}', "Upgrade"),
        ('{"format_version": "2"}', "Upgrade"),
        ('{"format_version": 1}', "capture it again"),
        ('{"format": "layerlake"}', "Upgrade"),
        ("[]", "Upgrade"),
        ("3", "Upgrade"),
    ],
)
@pytest.mark.parametrize("open_or_create", [Lake, create_lake])
def test_another_format_is_refused_with_the_mend(
    tmp_path: Path, marker: str, mend: str, open_or_create: Callable[[Path], Any]
) -> None:
    (tmp_path / "layerlake.json").write_text(marker)
    with pytest.raises(FormatError, match="reads format 2") as caught:
        open_or_create(tmp_path)
    assert mend in caught.value.hint
    assert (tmp_path / "layerlake.json").read_text() == marker


def test_runs_are_found_by_unique_prefixes(make_run: Callable[..., Run], tmp_path: Path) -> None:
    one, two = make_run(name="gpt2"), make_run(name="gpt2-xl")
    make_run(name="llama")
    lake = Lake(tmp_path / "lake")
    assert len(lake.runs()) == len(lake.models()) == 3
    assert lake.run("ll").run_id.startswith("llama-")
    assert lake.run(two.run_id).run_id == two.run_id
    assert [run.run_id for run in lake.runs(["lla", "gpt2-x"])] == [lake.run("l").run_id, two.run_id]
    for prefix in ("gpt2", None):
        with pytest.raises(AmbiguousRun) as caught:
            lake.run(prefix)
        assert one.run_id in str(caught.value)
        assert two.run_id in str(caught.value)
        assert "--run" in caught.value.hint
    with pytest.raises(RunNotFound, match="Did you mean 'llama-") as unknown:
        lake.run(lake.run("llama").run_id.replace("llama", "lama"))
    assert one.run_id in unknown.value.hint


def test_an_empty_name_is_no_choice(tiny_lake: Lake) -> None:
    """A script whose variable is not set must not get the one run that there is."""
    with pytest.raises(RunNotFound, match="empty") as caught:
        tiny_lake.run("")
    assert tiny_lake.run().run_id in caught.value.hint
    with pytest.raises(RunNotFound, match="empty"):
        tiny_lake.runs([""])


def test_a_damaged_run_takes_no_other_with_it(make_run: Callable[..., Run]) -> None:
    whole, damaged = make_run(), make_run(name="other")
    damaged.store.write(log_path(damaged.run_id, 1), b"[]")
    lake = Lake(whole.store.url)
    opened = lake.readable_runs()
    assert isinstance(opened[whole.run_id], Run)
    assert isinstance(opened[damaged.run_id], CorruptRun)
    assert list(lake.readable_runs(["tiny"])) == [whole.run_id]
    with pytest.raises(CorruptRun, match=damaged.run_id):
        lake.runs()


def test_an_id_that_is_a_prefix_of_another_is_not_ambiguous(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    source = tmp_path / "lake" / "runs" / run.run_id
    (tmp_path / "lake" / "runs" / f"{run.run_id}0" / "log").mkdir(parents=True)
    (tmp_path / "lake" / "runs" / f"{run.run_id}0" / "log" / "00000001.json").write_bytes(
        (source / "log" / "00000001.json").read_bytes()
    )
    assert Lake(tmp_path / "lake").run(run.run_id).run_id == run.run_id


def test_a_run_without_a_committed_manifest_is_not_listed(tmp_path: Path) -> None:
    create_lake(tmp_path)
    (tmp_path / "runs" / "half-01234567" / "log").mkdir(parents=True)
    (tmp_path / "runs" / "half-01234567" / "documents").mkdir()
    (tmp_path / "runs" / "half-01234567" / "log" / ".00000001.json.ab.partial").write_text("{")
    assert Lake(tmp_path).run_ids == []


def test_models_are_described(tiny_lake: Lake) -> None:
    (model,) = tiny_lake.models()
    assert model["shape"]["d_model"] == 8
    assert model["model_id"] == tiny_lake.run().manifest.model_id
    assert "1 runs" in repr(tiny_lake)
    assert Lake.open(tiny_lake.url).run_ids == tiny_lake.run_ids
