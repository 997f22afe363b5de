"""The recipe for a cluster: its array is what its commands share out, and it leaves what one writer leaves."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from layerlake.catalog.lake import Lake
from layerlake.cli import cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/cluster.md").read_text()
FENCES = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(TORCHRUN,) = re.findall(r"^```text\n(torchrun .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the page's commands find what they name."""
    for name in ("src", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(code: str, folder: Path, **environment: str) -> list[list[str]]:
    """Run a fence whose ``layerlake`` and ``torchrun`` only say what they were given."""
    for name in ("layerlake", "torchrun"):
        stand_in = folder / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text('#!/bin/bash\nprintf "%s\\t" "$@"\necho\n')
        stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env=os.environ | environment | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split("\t")[:-1] for line in done.stdout.splitlines()]


def contents(lake: Path) -> dict[str, bytes]:
    """Every object but the log, which says when a capture ended."""
    return {
        path.relative_to(lake).as_posix(): path.read_bytes()
        for path in lake.rglob("*")
        if path.is_file() and "/log/" not in path.as_posix()
    }


def run(words: list[str]) -> None:
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_the_recipe_leaves_what_one_writer_leaves(folder: Path) -> None:
    torch.set_num_threads(1)
    write_script, array, finalise = FENCES
    commands(write_script, folder)
    script = (folder / "capture.sbatch").read_text()
    (last,) = re.findall(r"^#SBATCH --array=0-(\d+)$", script, re.MULTILINE)
    n_tasks = int(last) + 1

    by_slurm = [
        words
        for i in range(n_tasks)
        for words in commands("bash capture.sbatch", folder, SLURM_ARRAY_TASK_ID=str(i))
    ]
    assert by_slurm == commands(array, folder)
    assert [words[-2:] for words in by_slurm] == [["--partition", f"{i}/{n_tasks}"] for i in range(n_tasks)]
    ((*common, last_word),) = commands(finalise, folder)
    assert last_word == "--finalise"
    assert all(words[:-2] == common for words in by_slurm)

    for words in reversed(by_slurm):
        assert not (folder / "cluster-lake").exists() or Lake(folder / "cluster-lake").run_ids == []
        run(words)
    run([*common, "--finalise"])
    run([word.replace("cluster-lake", "alone") for word in common])
    assert len(Lake(folder / "alone").run().manifest.partitions) >= n_tasks
    assert contents(folder / "cluster-lake") == contents(folder / "alone")


def test_the_line_for_torchrun_asks_for_the_same_run(folder: Path) -> None:
    """That it shares out what it is given, tests/capture/test_writers.py shows."""
    (words,) = commands(TORCHRUN, folder)
    ((*common, _),) = commands(FENCES[2], folder)
    assert words[:3] == ["--standalone", "--nproc-per-node", "2"]
    assert words[3:] == ["-m", "layerlake", "capture", "torchrun-lake", *common[2:]]
