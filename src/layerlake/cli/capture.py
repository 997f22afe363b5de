"""Put activations into a lake: demo, plan, capture."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import console
from ..catalog.sites import ANALYSIS_SITES, SITES
from ..catalog.sizes import format_nbytes
from .lake import run_row
from .options import json_option, lake_argument, stack

if TYPE_CHECKING:
    from ..capture.plan import CapturePlan

__all__ = ["capture", "demo", "plan"]

spec_options = stack(
    click.option("--model", required=True, help="Hub id or local directory."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--tokenizer", help="Another tokenizer than the model's own."),
    click.option("--dataset", help="Hub id, or a local txt, jsonl, parquet or arrow file."),
    click.option("--dataset-config", help="Configuration of a hub dataset."),
    click.option("--dataset-revision", help="Branch, tag or commit of a hub dataset."),
    click.option(
        "--split", help="Split of a hub dataset; for --task NAME,NAME or NAME=FILE,NAME=FILE.  [default: train]"
    ),
    click.option("--task", help="Read the items of a task, as prompts: wic, arc_easy, hellaswag, lambada."),
    click.option("--preset", metavar="paper", help="What stands in for options that are not given."),
    click.option("--pack", metavar="concat", help="Join texts, BOS between them, in full windows."),
    click.option("--shuffle-buffer", type=int, metavar="ROWS", help="Shuffle, holding so many rows."),
    click.option("--seed", type=int, help="Of the shuffle.  [default: 0]"),
    click.option("--text-column", help="The column that holds the text.  [default: text]"),
    click.option(
        "--sample-by", type=click.Choice(["paragraph", "line", "file"]), default="paragraph", show_default=True,
        help="What is a document of a txt file.",
    ),
    click.option("--sites", help=f"Of {', '.join(SITES)}; comma-separated.  [default: all]"),
    click.option(
        "--for", "analyses", metavar="ANALYSES",
        help=f"Instead of --sites: the cheapest that answer {', '.join(ANALYSIS_SITES)}; comma-separated.",
    ),
    click.option("--max-tokens", help="Stop at the last whole document that fits (20k, 1.5M)."),
    click.option("--min-tokens", type=int, help="Refuse shorter texts.  [default: 3]"),
    click.option("--context", type=int, help="Cut longer documents.  [default: min(512, the model's); tasks: its]"),
    click.option("--bos", default="auto", show_default=True, help="auto, none, or a token id."),
    click.option("--dtype", default="float16", show_default=True, help="Stored: float16, bfloat16, float32."),
    click.option("--codec", type=click.Choice(["none", "lz4", "zstd"]), help="Compress chunks.  [default: none]"),
    click.option("--compute-dtype", default="float32", show_default=True, help="What the model runs in."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
    click.option("--max-memory", default="4GiB", show_default=True, help="Beyond the loaded model."),
    click.option("--partition-tokens", type=int, help="Token rows of a partition.  [default: by --max-memory]"),
    click.option("--batch-tokens", default=4096, show_default=True, help="Most padded tokens of one forward."),
    click.option(
        "--overflow", type=click.Choice(["stop", "keep"]), default="stop", show_default=True,
        help="What to do with a value that --dtype cannot hold: stop, or keep it as infinity and count.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
)  # fmt: skip


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
@click.option(
    "--calibrate", is_flag=True, help="Load the model, run two batches, and say how long it will take."
)
@json_option
def plan(lake: str | None, calibrate: bool, as_json: bool, **options: Any) -> None:
    """Print what a capture would store and what it costs. Writes nothing, loads no weights unless asked.

    Without --dataset it is for full windows, as many as --max-tokens has; the shapes of the sixteen models of the
    paper are known offline.
    """
    from ..capture.plan import plan_capture
    from ..capture.spec import CaptureSpec

    planned = plan_capture(CaptureSpec(**options), lake)
    numbers = planned.to_json()
    if calibrate:
        from ..capture.calibrate import calibrate as run_sample

        numbers |= run_sample(planned, lake).to_json()
    if as_json:
        console.print_json(numbers)
        return
    if planned.frozen is None:
        console.note(f"The lake holds all of this already, in run {planned.run_id}.")
        return
    console.print_table(
        [
            {
                "site": cost.site,
                "shape": _times(cost.shape),
                "dtype": cost.dtype,
                "chunk": _times(cost.chunks),
                "shard": _times(cost.shards),
                "objects": cost.n_objects,
                "size": format_nbytes(cost.nbytes),
            }
            for cost in planned.costs
        ]
    )
    console.print_table([{"": name, " ": text} for name, text in _summary(planned, numbers).items()])


def _times(lengths: tuple[int, ...]) -> str:
    return "×".join(map(str, lengths))


def _summary(planned: CapturePlan, numbers: dict[str, Any]) -> dict[str, str]:
    """Return what a plan says beside its sites, for people."""
    size = format_nbytes(planned.nbytes)
    lines = {
        "run": planned.run_id or "none: there is no dataset",
        "documents": f"{numbers['documents_stored']:,} stored ({numbers['documents_cut']:,} of them cut), "
        f"{numbers['documents_refused']:,} refused",
        "tokens": f"{numbers['tokens']:,}, at most {numbers['context']} a document",
        "partitions": f"{numbers['partitions']:,} of {numbers['partition_tokens']:,} tokens",
        "size": size if numbers["codec"] == "none" else f"{size}, before {numbers['codec']}",
        "objects": f"{numbers['objects']:,} in {numbers['put_requests']:,} PUT requests, metadata included",
        "memory": f"{format_nbytes(numbers['peak_host_nbytes'])} beside the model, at most",
        "compute": f"{numbers['flops'] / 1e12:,.2f} TFLOP",
    }
    if planned.free_nbytes is not None:
        lines["free"] = f"{format_nbytes(planned.free_nbytes)} at the lake"
    if planned.partial_sites:
        lines["left out"] = f"{', '.join(planned.partial_sites)} of the documents that are added"
    if "seconds" in numbers:
        duration, rate = timedelta(seconds=round(numbers["seconds"])), numbers["calibrated_tokens_per_second"]
        lines["time"] = f"{duration} here, at {rate:,.0f} tokens/s; the store's speed apart"
    return lines


@click.command()
@lake_argument
@spec_options
@click.option(
    "--partition",
    "share",
    metavar="I/N",
    help="Take every N-th partition, from the I-th on, counted from 0.  [default: all; torchrun's RANK/WORLD_SIZE]",
)
@click.option("--finalise", is_flag=True, help="Only commit what the writers of --partition have written.")
@json_option
def capture(lake: str, share: str | None, finalise: bool, as_json: bool, **options: Any) -> None:
    """Run a model over text once and store what happened inside it.

    The same command again goes on where a crash stopped it, and does nothing where all is there.
    """
    from ..capture.execute import execute_plan, finalise_plan
    from ..capture.plan import plan_capture
    from ..capture.share import Share
    from ..capture.spec import CaptureSpec
    from ..capture.worker import Outcome

    taken = Share.parse(share) if share else Share.of_environment()
    if finalise and share:
        raise click.UsageError("--finalise writes no partitions: leave --partition out.")
    planned = plan_capture(CaptureSpec(**options), lake)
    if planned.frozen is None:
        console.note("The lake holds all of this already.")
    if finalise:
        outcome = Outcome(finalise_plan(planned, lake))
    else:
        with console.show_capture(planned.manifest.model_name) as progress:
            outcome = execute_plan(planned, lake, share=taken, progress=progress)
    _note_documents(planned)
    for site, n in outcome.nonfinite.items():
        console.note(f"{site}: {n:,} values are not finite in {planned.manifest.dtype}, and were kept")
    if outcome.run is None:
        console.note(
            f"{outcome.n_pending} of {len(planned.frozen.work) if planned.frozen else 0} partitions are left to other "
            "writers; the last one commits the run (so does --finalise)."
        )
    if as_json:
        console.print_json({"predicted": planned.to_json(), "actual": outcome.to_json()})
    elif outcome.run is not None:
        console.print_table([run_row(outcome.run)])


def _note_documents(planned: CapturePlan) -> None:
    """Say how many of the documents that the capture adds are cut or refused."""
    statuses, reasons = (planned.documents[name].to_pylist() for name in ("status", "reason"))
    for status, what in (("cut", "longer than the context, cut"), ("refused", "refused")):
        if count := statuses.count(status):
            first = next(r for s, r in zip(statuses, reasons, strict=True) if s == status)
            console.note(f"{count} documents {what} (the first: {first})")
