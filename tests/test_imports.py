"""What an analysis machine needs: all but capture is imported where torch is not installed."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layerlake.catalog.run import Run
from layerlake.demo.tour import demo_model_path

# Runs first in a child process: the packages of the `capture` extra are not found, as if they were absent.
# (A finder that raised would also break the packages that only ask `find_spec` whether torch is there.)
WITHOUT_CAPTURE_EXTRA = """
import sys
from importlib.machinery import PathFinder

absent = {"datasets", "huggingface_hub", "safetensors", "tokenizers", "torch", "transformer_lens", "transformers"}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in absent else find(name, *rest)
"""


def run_without_capture_extra(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_CAPTURE_EXTRA + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def modules_of_the_analysis_machine() -> list[str]:
    names = [
        name for name in ("layerlake", "layerlake.lake", "layerlake.cli") if importlib.util.find_spec(name)
    ]
    for folder in ("catalog", "sql", "analyze"):
        package = importlib.import_module(f"layerlake.{folder}")
        names.append(package.__name__)
        names += [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return names


def test_child_process_is_without_torch() -> None:
    assert "ModuleNotFoundError: No module named 'torch'" in run_without_capture_extra("import torch").stderr


def test_import_layerlake_is_light() -> None:
    heavy = {"altair", "dask", "distributed", "duckdb", "pandas", "polars", "sklearn", "torch", "xarray"}
    ran = run_without_capture_extra(f"import layerlake; print(*{heavy}.intersection(sys.modules))")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_modules_are_imported_without_torch() -> None:
    names = modules_of_the_analysis_machine()
    assert "layerlake.catalog.errors" in names
    ran = run_without_capture_extra(
        f"import importlib\nfor name in {names}:\n    importlib.import_module(name)"
    )
    assert ran.returncode == 0, ran.stderr


def test_every_analysis_sql_and_the_report_run_without_torch(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    make_run(lengths=(20, 25, 18, 30, 22), partition_tokens=64, context=32)
    lake, report = tmp_path / "lake", tmp_path / "report.html"
    commands = [
        ["analyze", str(lake), "all"],
        [
            "sql",
            str(lake),
            "SELECT count(*) AS n FROM lens JOIN cka ON boundary = boundary_a",
            "--format",
            "csv",
        ],
        ["sql", str(lake), "SELECT count(norm(vec)) AS n FROM resid WHERE boundary = 1", "--format", "csv"],
        ["report", str(lake), "-o", str(report)],
    ]
    ran = run_without_capture_extra(
        f"from layerlake.cli import main\nfor command in {commands}:\n    main(command)\n"
        "assert not absent.intersection(sys.modules)"
    )
    assert ran.returncode == 0, ran.stderr
    # random tokens have no words, and are no task
    skipped = {*ran.stdout.partition("skipped")[2].split()}
    assert not skipped & {"lens", "cka", "neurons", "attention_locality", "norms"}
    assert ran.stdout.split()[-4:] == ["n", "9", "n", "115"]
    assert report.stat().st_size > 100_000


@pytest.mark.parametrize("model", ["gpt2", str(demo_model_path("stdlib-gpt2"))])
def test_capture_without_its_extra_names_the_pip_command(tmp_path: Path, model: str) -> None:
    arguments = ["capture", str(tmp_path / "lake"), "--model", model, "--dataset", "text.txt"]
    ran = run_without_capture_extra(f"from layerlake.cli import main; main({arguments})")
    assert ran.returncode == 2
    assert 'pip install "layerlake[capture]"' in ran.stderr
