"""What several commands share: the lake, the choice of runs, and how results are printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..catalog.errors import did_you_mean

__all__ = ["InOrder", "json_option", "lake_argument", "run_options", "scheduler_option", "stack"]

F = TypeVar("F", bound=Callable[..., Any])


class InOrder(click.Group):
    """Lists commands in the order of work, not of the alphabet, and suggests the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002, D102  # click's
        return list(self.commands)

    def resolve_command(  # noqa: D102
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            ctx.fail(f"There is no '{name}'.{did_you_mean(name, known)} Choose from: {', '.join(known)}.")
        return super().resolve_command(ctx, args)


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Combine options into one decorator, so that several commands share them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


lake_argument = click.argument("lake")
run_options = click.option(
    "--run", "runs", multiple=True, metavar="ID", help="A run's id or unique prefix; may be repeated."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
scheduler_option = click.option(
    "--scheduler", default="threads", show_default=True, help="Dask's: synchronous, threads, or tcp://…"
)
