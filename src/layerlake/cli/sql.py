"""Ask a lake in SQL."""

from __future__ import annotations

import sys
from typing import Literal

import click

from ..lake import open_lake
from .options import lake_argument

__all__ = ["sql"]


@click.command()
@lake_argument
@click.argument("query")
@click.option(
    "--format", "kind", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True,
    help="How to print the result.",
)  # fmt: skip
@click.option("--run", help="The run whose relations need no schema in front.")
def sql(lake: str, query: str, kind: Literal["table", "csv", "json"], run: str | None) -> None:
    """Ask a lake in SQL, read-only. ``SHOW ALL TABLES`` lists the relations."""
    from ..sql import write_result

    write_result(open_lake(lake).sql(query, run=run), kind, sys.stdout)
