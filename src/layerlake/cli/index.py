"""Add zones to runs that lack them."""

from __future__ import annotations

import dataclasses

import click

from .. import console
from ..catalog.indexing import index_run
from ..catalog.sizes import format_nbytes
from ..lake import open_lake
from .options import json_option, lake_argument, run_options

__all__ = ["index"]


@click.command()
@lake_argument
@run_options
@json_option
def index(lake: str, runs: tuple[str, ...], as_json: bool) -> None:
    """Add zones to runs that lack them: what each chunk holds at most and at least.

    A capture writes them itself; this is for runs captured before it did, and for zones that are gone. Reads the values
    that have none, once. Interrupted, run it again.
    """
    opened = open_lake(lake)
    indexed = [index_run(opened.store, run.run_id) for run in opened.runs(runs)]
    rows = [dataclasses.asdict(each) for each in indexed]
    if as_json:
        console.print_json(rows)
    else:
        console.print_table(rows)
    console.note(f"wrote {format_nbytes(sum(each.nbytes for each in indexed))} of zones")
