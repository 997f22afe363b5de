"""What an analysis machine needs: all but capture is imported where torch is not installed."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys

# Runs first in a child process: the packages of the `capture` extra are not found, as if they were absent.
# (A finder that raised would also break the packages that only ask `find_spec` whether torch is there.)
WITHOUT_CAPTURE_EXTRA = """
import sys
from importlib.machinery import PathFinder

absent = {"datasets", "safetensors", "tokenizers", "torch", "transformer_lens", "transformers"}
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
