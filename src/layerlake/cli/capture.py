"""Put activations into a lake: demo, plan, capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import console
from ..catalog.sites import SITES
from ..catalog.sizes import format_nbytes
from .lake import describe_run, run_row
from .options import json_option, lake_argument, stack

__all__ = ["capture", "demo", "plan"]

spec_options = stack(
    click.option("--model", required=True, help="Hub id or local directory."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--tokenizer", help="Another tokenizer than the model's own."),
    click.option("--dataset", required=True, help="Hub id, or a local txt, jsonl, parquet or arrow file."),
    click.option("--dataset-config", help="Configuration of a hub dataset."),
    click.option("--dataset-revision", help="Branch, tag or commit of a hub dataset."),
    click.option("--split", default="train", show_default=True, help="Split of a hub dataset."),
    click.option("--text-column", help="The column that holds the text.  [default: text]"),
    click.option(
        "--sample-by", type=click.Choice(["paragraph", "line", "file"]), default="paragraph", show_default=True,
        help="What is a document of a txt file.",
    ),
    click.option("--sites", default="all", show_default=True, help=f"Of {', '.join(SITES)}; comma-separated."),
    click.option("--max-tokens", help="Stop at the last whole document that fits (20k, 1.5M)."),
    click.option("--min-tokens", default=3, show_default=True, help="Refuse shorter documents."),
    click.option("--context", type=int, help="Cut longer documents.  [default: min(512, the model's)]"),
    click.option("--bos", default="auto", show_default=True, help="auto, none, or a token id."),
    click.option("--dtype", default="float16", show_default=True, help="Stored: float16, bfloat16, float32."),
    click.option("--compute-dtype", default="float32", show_default=True, help="What the model runs in."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
    click.option("--max-memory", default="4GiB", show_default=True, help="Beyond the loaded model."),
    click.option("--partition-tokens", type=int, help="Token rows of a partition.  [default: by --max-memory]"),
    click.option("--batch-tokens", default=4096, show_default=True, help="Most padded tokens of one forward."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
)  # fmt: skip  # fmt: skip


@click.command()
@click.option(
    "--lake", default="demo-lake", show_default=True, type=click.Path(path_type=Path), help="The lake."
)
@click.option(
    "--report", default="demo-report.html", show_default=True, type=click.Path(path_type=Path), help="The report.",
)  # fmt: skip
@click.option("--max-tokens", default="16k", show_default=True, help="Tokens to capture of each model.")
def demo(lake: Path, report: Path, max_tokens: str) -> None:
    """Capture the two models that ship with layerlake, analyse them, and write a report. Offline."""
    from ..demo.tour import run_demo

    run_demo(lake, report, max_tokens=max_tokens)


@click.command()
@click.argument("lake", required=False)
@spec_options
@json_option
def plan(lake: str | None, as_json: bool, **options: Any) -> None:
    """Print what a capture would store and what it costs. Writes nothing and loads no weights."""
    from ..capture.plan import CapturePlan, CaptureSpec, plan_capture

    planned: CapturePlan = plan_capture(CaptureSpec(**options), lake)
    if as_json:
        console.print_json(planned.to_json())
        return
    numbers = planned.to_json()
    sites = numbers.pop("sites")
    nbytes = numbers.pop("nbytes")
    console.print_table([{"": name, " ": value} for name, value in numbers.items()])
    if planned.frozen is None:
        console.note("The lake holds all of this already.")
        return
    rows = [
        {"site": s["site"], "shape": "×".join(map(str, s["shape"])), "chunk": "×".join(map(str, s["chunks"])),
         "objects": s["n_objects"], "size": format_nbytes(s["nbytes"])}
        for s in sites
    ]  # fmt: skip
    console.print_table(rows)
    console.note(f"in all: {format_nbytes(nbytes)}, before compression")


@click.command()
@lake_argument
@spec_options
@json_option
def capture(lake: str, as_json: bool, **options: Any) -> None:
    """Run a model over text once and store what happened inside it."""
    from ..capture.execute import execute_plan
    from ..capture.plan import CaptureSpec, plan_capture

    planned = plan_capture(CaptureSpec(**options), lake)
    statuses = planned.documents["status"].to_pylist()
    if planned.frozen is None:
        console.note("The lake holds all of this already.")
    with console.show_capture(planned.model.name) as progress:
        run = execute_plan(planned, lake, progress=progress)
    for status, what in (("cut", "longer than the context, cut"), ("refused", "refused")):
        if count := statuses.count(status):
            reasons = planned.documents["reason"].to_pylist()
            first = next(r for s, r in zip(statuses, reasons, strict=True) if s == status)
            console.note(f"{count} documents {what} (the first: {first})")
    if as_json:
        console.print_json(describe_run(run))
    else:
        console.print_table([run_row(run)])
