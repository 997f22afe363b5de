"""The command line, in the order of work."""

from __future__ import annotations

import sys
import traceback

import click

from .. import console
from ..catalog.errors import LayerLakeError
from .analysis import analyze, report
from .capture import capture, demo, plan
from .index import index
from .intervene import intervene
from .lake import gc, info, ls, rm, verify
from .options import InOrder
from .sql import sql

__all__ = ["main"]


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="layerlake")
def cli(debug: bool) -> None:  # read by main
    """Capture a language model's activations once, then ask questions without the model.

    LAKE is a folder or a URL (s3://…, gs://…, memory://…).
    """


for command in (demo, plan, capture, intervene, ls, info, verify, index, sql, analyze, report, rm, gc):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit 0, or 2 for the user's mistakes, 1 for ours."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(given, standalone_mode=False)
    except click.ClickException as error:
        console.note(f"error: {error.format_message()}")
        if isinstance(error, click.UsageError) and error.ctx is not None:
            console.note(f"hint: {error.ctx.command_path} --help")
        sys.exit(2)
    except click.Abort:
        console.note("interrupted")
        sys.exit(130)
    except LayerLakeError as error:
        if "--debug" in given:
            traceback.print_exc()
        console.note(f"error: {error}")
        if error.hint:
            console.note(f"hint: {error.hint}")
        sys.exit(2)
    except Exception as error:  # noqa: BLE001  # the last resort of a command line
        if "--debug" in given:
            traceback.print_exc()
        console.note(f"error: {type(error).__name__}: {error}")
        console.note("hint: this is a fault of layerlake; run again with --debug for the traceback")
        sys.exit(1)
