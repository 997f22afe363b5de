"""The package that is installed is the one in the tree: links, the package map, and a wheel's content.

An editable install finds every file of the tree and so hides a forgotten one; only a wheel shows it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOOR = ROOT / "src" / "layerlake"
FOLDERS = ["analyze", "capture", "catalog", "sql"]
SOURCES = ["LICENSE", "README.md", "pyproject.toml", "src", *FOLDERS]


@pytest.fixture(scope="module")
def setuptools_map() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the tree, so that no `build/` of an earlier one can leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_and_package_map_name_the_same_folder(folder: str, setuptools_map: dict[str, Any]) -> None:
    link = DOOR / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (ROOT / setuptools_map["package-dir"][f"layerlake.{folder}"]).resolve()
    assert (link / "__init__.py").is_file()


def test_every_folder_with_code_is_in_the_package_map(setuptools_map: dict[str, Any]) -> None:
    found = {"layerlake"} | {f"layerlake.{path.parent.name}" for path in DOOR.glob("*/__init__.py")}
    assert set(setuptools_map["packages"]) == found


def test_folders_stay_flat() -> None:
    """The map names each package by hand: one that lies deeper would be left out in silence."""
    deeper = [path for package in FOLDERS for path in (ROOT / package).glob("*/**/*.py")]
    assert not deeper
    assert not list((DOOR / "demo").glob("*/**/*.py"))


def test_wheel_holds_every_module(wheel_names: set[str]) -> None:
    modules = {
        f"layerlake/{path.relative_to(DOOR).as_posix()}"
        for path in [*DOOR.glob("*.py"), *DOOR.glob("*/*.py")]
    }
    assert modules == {name for name in wheel_names if name.endswith(".py")}


def test_wheel_holds_the_data_files(wheel_names: set[str]) -> None:
    data = [
        DOOR / "py.typed",
        *DOOR.glob("sql/*.sql"),
        *DOOR.glob("demo/*/*.safetensors"),
        *DOOR.glob("demo/*/*.json"),
    ]
    assert {f"layerlake/{path.relative_to(DOOR).as_posix()}" for path in data} <= wheel_names


def test_wheel_puts_nothing_generic_at_the_top(wheel_names: set[str]) -> None:
    """A top-level `sql` or `catalog` in site-packages would overwrite that of another distribution."""
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"layerlake"}


def test_base_install_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [
        name for name in project["dependencies"] if name.startswith(("torch", "transformer", "datasets"))
    ]
    assert any(name.startswith("torch") for name in project["optional-dependencies"]["capture"])


def test_constraints_are_exact_and_of_no_machine() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name, pin
        assert version, pin
        assert not set("+@/ ;") & set(pin), f"{pin}: a local version, a URL or a path"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it downloads and installs torch
def test_wheel_in_a_clean_environment_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints), f"{wheel}[capture]"]
    subprocess.run(install, check=True)

    lake, report = tmp_path / "lake", tmp_path / "report.html"
    # Away from the repository, and without the variables that could lead back to it.
    variables = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}
    }
    demo = [str(environment / "bin" / "layerlake"), "demo", "--lake", str(lake), "--report", str(report)]
    ran = subprocess.run(demo, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (lake / "layerlake.json").is_file()
    assert "<html" in report.read_text(encoding="utf-8")[:1000].lower()
