"""Run a model with its layers in another order: intervene."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .. import console
from ..lake import open_lake
from .options import json_option, lake_argument, run_options, stack

if TYPE_CHECKING:
    from ..capture.interventions import InterventionPlan

__all__ = ["intervene"]

_SHOWN = {
    "intervention_summary": (
        "run", "kind", "layer", "schedule", "n_tokens", "kl_nats", "agreement", "accuracy", "delta_loss_nats",
        "delta_entropy_bits", "kl_noop_nats", "note",
    ),
    "swap_cosines": ("run", "layer", "component", "kind", "cosine", "cosine_lo", "cosine_hi", "n_tokens", "n_zero"),
}  # fmt: skip
"""What of a row fits on a screen."""

_spec_options = stack(
    click.option("--drop", metavar="LAYERS", help="Leave out, each by itself: all, 3, 0-5,9 or 7-."),
    click.option("--swap", metavar="LAYERS", help="Let each change places with the next."),
    click.option("--repeat", metavar="LENGTHS", help="Run each layer of every block of these lengths twice: 3,5."),
    click.option("--ablate-attn", metavar="LAYERS", help="Let attention add nothing."),
    click.option("--ablate-mlp", metavar="LAYERS", help="Let the MLP add nothing."),
    click.option(
        "--schedule", "schedules", multiple=True, metavar="LAYERS",
        help='Run the layers in this order, such as "0-4,6,5,7-"; may be repeated.',
    ),
    click.option("--swap-cosines", metavar="LAYERS", help="Compare what swapped layers give with what they gave."),
    click.option("--stale-kv", is_flag=True, help="Repeated layers see the keys and values of their first run."),
    click.option("--max-documents", type=int, metavar="N", help="The first N documents.  [default: all]"),
    click.option("--positions", type=int, metavar="N", help="N positions of each document.  [default: all]"),
    click.option(
        "--capture-sites", metavar="SITES",
        help="Capture these of each intervened model, over the same documents, in a run of its own.",
    ),
    click.option("--model", help="Where the model is.  [default: where the capture found it]"),
    click.option(
        "--resume/--no-resume", default=True, show_default=True,
        help="Begin at the stored residual stream, or at the embedding.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
    click.option("--max-memory", default="4GiB", show_default=True, help="Beyond the loaded model."),
)  # fmt: skip


@click.command()
@lake_argument
@run_options
@_spec_options
@click.option("--dry-run", is_flag=True, help="Only say what would be run.")
@json_option
def intervene(lake: str, runs: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Run models with layers dropped, swapped, repeated or ablated, and measure what they say then.

    Each order of layers begins where it departs from the model's own, at the stored residual stream. What the lake
    holds already is not run again, after a crash too.
    """
    from ..capture.interventions import InterventionSpec
    from ..interventions import execute_runs, plan_runs, summarise_runs

    opened = open_lake(lake)
    plans, refused = plan_runs(opened, InterventionSpec(**options), runs=runs)
    for run, error in refused.items():
        console.note(f"{run} is left out: {error.advice}")
    planned = [plan.to_json() for plan in plans]
    if not as_json:
        console.print_table([_plan_row(plan) for plan in plans])
        for plan in plans:
            if not plan.units:
                console.note(f"{plan.run.run_id}: the lake holds all of this already.")
    if dry_run:
        if as_json:
            console.print_json({"plan": planned})
        return
    outcomes, captured = [], []
    for plan, outcome, made in execute_runs(plans, console.show_capture):
        ids = [each.run_id for each in made]
        outcomes.append({"run": plan.run.run_id} | outcome.to_json() | {"captured": ids})
        captured += made
    for each in captured:
        console.note(f"captured {each.run_id}: {each.manifest.schedule} of {each.manifest.baseline}")
    findings, missed = summarise_runs(opened, plans)
    for what, error in missed.items():
        console.note(f"{what} is left out: {error.advice}")
    tables = {
        name: [row for plan in plans for row in finding.table.to_pylist() if _is_asked(plan, row)]
        for name, finding in findings.items()
    }
    if as_json:
        summary = tables.pop("intervention_summary", [])
        console.print_json({"plan": planned, "outcome": outcomes, "summary": summary} | tables)
        return
    for name, rows in tables.items():
        shown = _SHOWN.get(name)
        console.print_table([{key: row[key] for key in shown or row} for row in rows], title=name)
    console.note(f"in SQL: {', '.join(['interventions', *tables])}")


def _is_asked(plan: InterventionPlan, row: Mapping[str, Any]) -> bool:
    """Tell whether a row is of what a plan was for: the run may hold more."""
    if "schedule" not in row:  # a swap, compared
        params, is_named = plan.params("swap_cosine_documents"), row["layer"] in {s.layer for s in plan.swaps}
    else:
        asked = {(i.kind, i.layer, i.schedule) for i in plan.interventions}
        params, is_named = plan.params("interventions"), (row["kind"], row["layer"], row["schedule"]) in asked
    same = {"run": plan.run.run_id, **params}
    return is_named and all(row.get(name, value) == value for name, value in same.items())


def _plan_row(plan: InterventionPlan) -> dict[str, Any]:
    """Return what a plan says, for people."""
    numbers = plan.to_json()
    n_blocks, n_whole = (numbers.pop(f"blocks{which}") for which in ("", "_without_resume"))
    beside = numbers.pop("floor_and_cosine_blocks")
    blocks = f"{n_blocks:,} of {n_whole:,}, {1 - n_blocks / n_whole:.0%} saved" if n_whole else "none"
    return numbers | {"blocks": blocks, "for floor and cosines": beside}
