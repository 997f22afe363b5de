"""The main job from end to end on what ships with the package: capture, analyse, report. Offline."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path

from .. import console
from ..catalog.errors import ModelError
from ..interventions import execute_runs, plan_runs
from ..lake import open_lake
from .corpus import write_excerpts

__all__ = ["MODELS", "demo_model_path", "run_demo"]

MODELS = ("stdlib-gpt2", "stdlib-neox")
"""A sequential and a parallel model, trained on the standard library's text (``demo/train.py``)."""

_N_DOCUMENTS = 4000


def demo_model_path(name: str) -> Path:
    """Return the directory of a model that ships with the package.

    Raises
    ------
    ModelError
        There is no such model, or the installation lacks its weights.
    """
    path = Path(str(files(__package__) / name))
    if not (path / "model.safetensors").exists():
        raise ModelError(
            f"The demo model '{name}' is not in this installation.", hint=f"Models: {', '.join(MODELS)}."
        )
    return path


def run_demo(lake: Path, report: Path, *, max_tokens: str = "16k") -> None:
    """Capture both models over held-out text, intervene on them, run every analysis, and write the report.

    Parameters
    ----------
    lake : Path
        The lake; made if need be. Beside it ``demo-text.jsonl`` is written, the text that is captured.
    report : Path
        The HTML file.
    max_tokens : str
        Tokens to capture of each model.
    """
    from ..analyze.analyses import run_all
    from ..capture.execute import execute_plan
    from ..capture.interventions import InterventionSpec
    from ..capture.plan import plan_capture
    from ..capture.spec import CaptureSpec

    began = time.monotonic()
    text = lake.parent / "demo-text.jsonl"
    lake.parent.mkdir(parents=True, exist_ok=True)
    write_excerpts(text, n_documents=_N_DOCUMENTS)
    for name in MODELS:
        spec = CaptureSpec(model=str(demo_model_path(name)), dataset=str(text), max_tokens=max_tokens)
        with console.show_capture(f"capture {name}") as progress:
            execute_plan(plan_capture(spec, str(lake)), str(lake), progress=progress)
    opened = open_lake(lake)
    plans, _ = plan_runs(opened, InterventionSpec(drop="all", swap="all", repeat="3"))
    for _ in execute_runs(plans, console.show_capture):
        pass
    run_all(opened, progress=True)
    opened.report(report)
    console.note(
        f"\n{lake} and {report} are ready after {time.monotonic() - began:.0f} s.\n\nWhat to do next:\n"
    )
    for command in next_commands(lake, report):
        console.note(f"  {command}")


def next_commands(lake: Path, report: Path) -> list[str]:
    """Return three commands that work as they stand, in the folder where the demo ran."""
    layerlake, at, text = (
        _program(),
        shlex.quote(str(lake)),
        shlex.quote(str(lake.parent / "demo-text.jsonl")),
    )
    model = shlex.quote(_relative(demo_model_path(MODELS[0])))
    query = (
        "SELECT model, boundary, round(entropy_bits, 2) AS entropy_bits, round(top1_agreement, 2) AS agreement "
        "FROM lens JOIN runs USING (run) ORDER BY model, boundary"
    )
    remake = f"{layerlake} analyze {at} all && {layerlake} report {at} -o {shlex.quote(str(report))}"
    return [
        f'{layerlake} sql {at} "{query}"',
        f"{layerlake} capture {at} --model {model} --dataset {text} --max-tokens 24k",
        remake,
    ]


def _program() -> str:
    """Return how this program can be called again from here: by name if it is on the path."""
    if shutil.which("layerlake"):
        return "layerlake"
    script = Path(sys.argv[0])
    if script.name != "layerlake":
        return f"{shlex.quote(sys.executable)} -m layerlake"
    return shlex.quote(_relative(script.resolve()))


def _relative(path: Path) -> str:
    """Return the path as seen from here, if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
