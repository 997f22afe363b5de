"""The demo, shorter than it ships, and the commands that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerlake.demo.tour import MODELS, next_commands
from layerlake.lake import open_lake


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_demo_leaves_a_lake_a_report_and_commands_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = shell("layerlake demo --max-tokens 1k", tmp_path)
    assert ran.returncode == 0, ran.stderr
    lake = open_lake(tmp_path / "demo-lake")
    assert [run.manifest.model_name for run in lake.runs()] == list(MODELS)
    assert {stored.key.analysis for stored in lake.findings()} == {
        "lens", "cka", "neurons", "attention_locality", "norms", "interventions", "intervention_summary", "stages",
    }  # fmt: skip
    assert "<html" in (tmp_path / "demo-report.html").read_text()
    printed = [line.strip() for line in ran.stderr.splitlines() if line.startswith("  layerlake")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert printed == next_commands(Path("demo-lake"), Path("demo-report.html"))
    for command in printed:
        done = shell(command.replace("--max-tokens 24k", "--max-tokens 2k"), tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert open_lake(tmp_path / "demo-lake").run("stdlib-gpt2").n_tokens > 1000
