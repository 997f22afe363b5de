"""Every fence of the README and of docs/ runs, in order, in one folder; each declares what it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from layerlake.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN_ONLY = {"text", "console"}
"""``text`` is layout, or needs a network; ``console`` is make, whose targets are looked up instead."""


def fences(page: str) -> list[tuple[str, str]]:
    return FENCE.findall((ROOT / page).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands find what they name, and where later pages find its lake."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "README.md").symlink_to(ROOT / "README.md")
    return folder


def run(language: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = (
        [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )


SMALL_DEMO = """
python -c 'from pathlib import Path; from layerlake.demo.corpus import write_excerpts
write_excerpts(Path("demo-text.jsonl"), n_documents=4000)'
for model in stdlib-gpt2 stdlib-neox; do
  layerlake capture demo-lake --model src/layerlake/demo/$model --dataset demo-text.jsonl --max-tokens 2k
done
layerlake analyze demo-lake lens --run stdlib-gpt2
layerlake intervene demo-lake --run stdlib-gpt2 --drop all --max-documents 8
"""
"""What docs/sql.md asks of the lake that `make demo` writes, of fewer tokens."""


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_runs(page: str, folder: Path) -> None:
    if page == "docs/sql.md":
        made = run("bash", SMALL_DEMO, folder)
        assert made.returncode == 0, made.stderr
    for language, code in fences(page):
        assert language in {"bash", "python", *SHOWN_ONLY}, f"a fence of {page} does not say what it is"
        if language not in SHOWN_ONLY:
            done = run(language, code, folder)
            assert done.returncode == 0, f"{page}:\n{code}\n{done.stdout}\n{done.stderr}"


def test_the_make_targets_that_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        line.split()[1]
        for page in PAGES
        for language, code in fences(page)
        if language == "console"
        for line in code.splitlines()
        if line.startswith("make ")
    }
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no make target '{target}'"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), (
                f"{page}: {target}"
            )


def test_the_cli_reference_is_what_the_cli_says() -> None:
    written = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "cli_reference.py")], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs" / "cli.md").read_text() == written, "run: make docs"


def test_every_command_and_option_has_help() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "help":
                assert parameter.help, (
                    name,
                    parameter.name,
                )
