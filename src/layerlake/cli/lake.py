"""What is in a lake: ls, info."""

from __future__ import annotations

from typing import Any

import click

from .. import console
from ..catalog.layout import shard_name
from ..catalog.run import Run
from ..catalog.sites import SITES
from ..catalog.sizes import format_nbytes
from ..lake import open_lake
from .options import json_option, lake_argument, run_options

__all__ = ["describe_run", "info", "ls", "run_row"]


@click.command()
@lake_argument
@json_option
def ls(lake: str, as_json: bool) -> None:
    """List the runs of a lake."""
    rows = [run_row(run) for run in open_lake(lake).runs()]
    if as_json:
        console.print_json(rows)
    elif rows:
        console.print_table(rows)
    else:
        console.note("The lake has no runs.")


@click.command()
@lake_argument
@run_options
@json_option
def info(lake: str, runs: tuple[str, ...], as_json: bool) -> None:
    """Describe runs: model, corpus, sites, provenance."""
    described = [describe_run(run) for run in open_lake(lake).runs(runs)]
    if as_json:
        console.print_json(described)
        return
    for item in described:
        sites = item.pop("sites")
        captures = item.pop("captures")
        console.print_table([{"": name, " ": str(value)} for name, value in item.items()])
        console.print_table(sites)
        for entry in captures:
            checks = ", ".join(f"{name}: {error:.1g}" for name, error in entry.get("self_check", {}).items())
            console.note(f"captured {entry['finished']} on {entry.get('device', '?')}; self-check: {checks}")


def run_row(run: Run) -> dict[str, Any]:
    """Return one run as a row of ``ls``."""
    manifest = run.manifest
    return {
        "run": run.run_id,
        "model": manifest.model_name,
        "dataset": manifest.dataset,
        "documents": manifest.n_documents,
        "tokens": manifest.n_tokens,
        "dtype": manifest.dtype,
        "sites": ",".join(run.sites),
    }


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
                "shape": "×".join(map(str, run.array(name).shape)),
                "partitions": f"{len(manifest.sites[name])}/{len(manifest.partitions)}",
                "size": format_nbytes(nbytes),
                "nbytes": nbytes,
                "first_object": shard_name(SITES[name], 0, manifest.sites[name][0]),
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


def _equals(table: Any, column: str, value: str) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table[column], value)
