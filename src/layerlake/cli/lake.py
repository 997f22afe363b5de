"""What is in a lake: ls, info, verify, rm, gc."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .. import console
from ..catalog.collection import collect_lake, plan_collection
from ..catalog.errors import CorruptRun, DamagedLake, LayerLakeError
from ..catalog.lake import match_run
from ..catalog.layout import object_name
from ..catalog.removal import Removal, plan_removal, remove_run
from ..catalog.run import Run
from ..catalog.sites import SITES
from ..catalog.sizes import format_nbytes, parse_duration_s
from ..catalog.stores import Store
from ..catalog.verify import verify_lake
from ..lake import open_lake
from .options import json_option, lake_argument, run_options

__all__ = ["describe_run", "gc", "info", "ls", "rm", "run_row", "verify"]


@click.command()
@lake_argument
@json_option
def ls(lake: str, as_json: bool) -> None:
    """List the runs of a lake.

    Exits with 1 if one cannot be read, and says why.
    """
    opened = open_lake(lake).readable_runs()
    rows = [
        run_row(run) if isinstance(run, Run) else _damaged_row(run_id, run) for run_id, run in opened.items()
    ]
    if as_json:
        console.print_json(rows)
    elif rows:
        console.print_table([row for row in rows if "error" not in row])
    else:
        console.note("The lake has no runs.")
    _say_damaged(rows)


@click.command()
@lake_argument
@run_options
@json_option
def info(lake: str, runs: tuple[str, ...], as_json: bool) -> None:
    """Describe runs: model, corpus, sites, provenance.

    Exits with 1 if one cannot be read, and says why.
    """
    described = [_described(run_id, run) for run_id, run in open_lake(lake).readable_runs(runs).items()]
    if as_json:
        console.print_json(described)
    for item in () if as_json else (item for item in described if "error" not in item):
        sites = item.pop("sites")
        captures = item.pop("captures")
        console.print_table([{"": name, " ": str(value)} for name, value in item.items()])
        console.print_table(sites)
        for entry in captures:
            checks = ", ".join(f"{name}: {error:.1g}" for name, error in entry.get("self_check", {}).items())
            console.note(f"captured {entry['finished']} on {entry.get('device', '?')}; self-check: {checks}")
    _say_damaged(described)


def _damaged_row(run_id: str, error: LayerLakeError) -> dict[str, Any]:
    return {"run": run_id, "error": error.advice}


def _say_damaged(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what is wrong with the runs that are damaged, and exit with 1 if there are any."""
    damaged = [row for row in rows if "error" in row]
    for row in damaged:
        console.note(f"error: run {row['run']} cannot be read: {row['error']}")
    if damaged:
        sys.exit(1)


@click.command()
@lake_argument
@run_options
@json_option
def verify(lake: str, runs: tuple[str, ...], as_json: bool) -> None:
    """Read every object and check that it is there and is what was written.

    Exits with 1 if anything is damaged or missing, and names it. With --run, only those runs, with their models and
    findings.
    """
    error = None
    try:
        verification = verify_lake(Store(lake), runs)
    except DamagedLake as damaged:
        error, verification = damaged, damaged.verification
    result = verification.to_json()
    if as_json:
        console.print_json(result)
    else:
        console.print_table(result["problems"], limit=200)
        for text in verification.notes:
            console.note(f"note: {text}")
    console.note(
        f"read {verification.n_objects:,} objects, {format_nbytes(verification.nbytes)}: {verification.n_runs} runs, "
        f"{verification.n_models} models, {verification.n_findings} tables of findings"
    )
    if error is not None:
        console.note(f"error: {error}")
        console.note(f"hint: {error.hint}")
        sys.exit(1)


@click.command()
@lake_argument
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
@click.option("--force", is_flag=True, help="Take captures that are open for abandoned.")
@json_option
def rm(lake: str, runs: tuple[str, ...], *, yes: bool, dry_run: bool, force: bool, as_json: bool) -> None:
    """Remove whole runs, and the findings computed from them.

    RUN is an id or a unique prefix. If it is interrupted, run it again. Models stay: gc removes those that no run
    names.
    """
    store = open_lake(lake).store
    known = store.list("runs")  # what an interrupted removal has left is in no other listing
    chosen = dict.fromkeys(match_run(prefix, known, url=store.url) for prefix in runs)
    planned = [plan_removal(store, run_id) for run_id in chosen]
    if not as_json:
        console.print_table([_removal_row(removal) for removal in planned])
    if not dry_run:
        for removal in () if force else planned:
            removal.require_free()
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("There is nobody to ask: add --yes.")
            click.confirm(
                f"Remove {format_nbytes(sum(removal.nbytes for removal in planned))}?", abort=True, err=True
            )
        planned = [remove_run(store, removal.run_id, force=force) for removal in planned]
        console.note(f"removed {format_nbytes(sum(removal.nbytes for removal in planned))}")
    if as_json:
        console.print_json([_removal_row(removal) for removal in planned])


def _removal_row(removal: Removal) -> dict[str, Any]:
    return {
        "run": removal.run_id,
        "objects": len(removal.objects),
        "findings": len(removal.findings),
        "nbytes": removal.nbytes,
        "size": format_nbytes(removal.nbytes),
        "open_capture": removal.held_by,
    }


@click.command()
@lake_argument
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
@click.option(
    "--older-than", default="24h", show_default=True, metavar="AGE",
    help="How long a capture must have written nothing to be abandoned (90s, 30m, 24h, 7d).",
)  # fmt: skip
@json_option
def gc(lake: str, dry_run: bool, older_than: str, as_json: bool) -> None:
    """Remove what nothing needs any more.

    That is: abandoned captures, interrupted removals, objects of a run that no snapshot of it names, models that no run
    names, findings that are superseded in extent or version, and files that were not written to their end.
    """
    collect = plan_collection if dry_run else collect_lake
    collection = collect(open_lake(lake).store, older_than_s=parse_duration_s(older_than))
    rows = [
        {"kind": waste.kind, "where": waste.where, "objects": len(waste.objects), "nbytes": waste.nbytes,
         "size": format_nbytes(waste.nbytes)}
        for waste in collection.waste
    ]  # fmt: skip
    if as_json:
        console.print_json({"waste": rows, "notes": list(collection.notes)})
    else:
        console.print_table(rows, limit=200)
        for text in collection.notes:
            console.note(f"note: {text}")
    console.note(f"{'would free' if dry_run else 'freed'} {format_nbytes(collection.nbytes)}")


def run_row(run: Run) -> dict[str, Any]:
    """Return one run as a row of ``ls``."""
    manifest = run.manifest
    return {
        "run": run.run_id,
        "model": manifest.model_name,
        "schedule": manifest.schedule,
        "dataset": manifest.dataset,
        "documents": manifest.n_documents,
        "tokens": manifest.n_tokens,
        "dtype": manifest.dtype,
        "sites": ",".join(run.sites),
    }


def _described(run_id: str, run: Run | LayerLakeError) -> dict[str, Any]:
    """Return what ``info`` says of a run, or what is wrong with it."""
    try:
        if isinstance(run, Run):
            return describe_run(run)
    except CorruptRun as damage:
        return _damaged_row(run_id, damage)
    return _damaged_row(run_id, run)


def describe_run(run: Run) -> dict[str, Any]:
    """Return all that ``info`` says of a run."""
    manifest, shape = run.manifest, run.shape
    objects = run.objects
    sites = []
    for name in run.sites:
        nbytes = sum(objects.filter(_equals(objects, "site", name))["nbytes"].to_pylist())
        sites.append(
            {
                "site": name,
                "dims": "×".join(SITES[name].dims),
                "shape": "×".join(map(str, _site_shape(run, name))),
                "partitions": f"{len(manifest.sites[name])}/{len(manifest.partitions)}",
                "size": format_nbytes(nbytes),
                "nbytes": nbytes,
                "first_object": object_name(SITES[name], 0, manifest.sites[name][0]),
            }
        )
    return {
        "run": run.run_id,
        "model": manifest.model_name,
        "model_id": manifest.model_id,
        "architecture": f"{shape.family}, {shape.n_layers} {shape.block} layers, d_model {shape.d_model}, "
        f"{shape.n_heads} heads, d_mlp {shape.d_mlp}, vocabulary {shape.n_vocab}, {shape.norm}",
        "dataset": manifest.dataset,
        "identity": manifest.identity,
        "documents": manifest.n_documents,
        "cut": manifest.n_cut,
        "refused": manifest.n_refused,
        "tokens": manifest.n_tokens,
        "context": manifest.geometry.context,
        "bos_token_id": manifest.bos_token_id,
        "dtype": manifest.dtype,
        "sites": sites,
        "captures": list(manifest.captures),
    }


def _site_shape(run: Run, name: str) -> tuple[int, ...]:
    """Return the array's shape as it lies on disk, or what the rows of ``attn_band`` count."""
    if SITES[name].is_array:
        return tuple(run.array(name).shape)
    held = run.manifest.sites[name]
    n_documents = sum(p.n_documents for p in run.manifest.partitions if p.index in held)
    return n_documents, run.shape.n_layers, run.shape.n_heads


def _equals(table: Any, column: str, value: str) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table[column], value)
