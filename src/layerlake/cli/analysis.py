"""Ask a lake: analyze, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from .. import console
from ..lake import open_lake
from .options import InOrder, json_option, lake_argument, run_options, scheduler_option, stack

__all__ = ["analyze", "report"]

F = TypeVar("F", bound=Callable[..., Any])


class _Analyses(InOrder):
    """One subcommand an analysis, made from its options when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        from ..analyze.analyses import ANALYSES

        return [*ANALYSES, "all"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "all":
            return _analyze_all
        if cmd_name not in self.list_commands(ctx):
            return None
        return _analysis_command(cmd_name)


@click.group(cls=_Analyses)
@lake_argument
@click.pass_context
def analyze(ctx: click.Context, lake: str) -> None:
    """Compute an analysis from the lake alone; the result is kept there, and at once a view in SQL."""
    ctx.obj = lake


def _analysis_command(name: str) -> click.Command:
    """Make the subcommand of an analysis: its options are the fields of its options dataclass."""
    from ..analyze.analyses import ANALYSES

    kind = ANALYSES[name].options

    @click.pass_obj
    def command(
        lake: str,
        /,
        runs: tuple[str, ...],
        scheduler: str,
        as_json: bool,
        exclude_nonfinite: bool,
        **options: Any,
    ) -> None:
        from ..analyze.analyses import run_analysis

        finding = run_analysis(
            open_lake(lake), name, runs=runs, options=options, scheduler=scheduler, progress=not as_json,
            exclude_nonfinite=exclude_nonfinite,
        )  # fmt: skip
        for key in finding.keys:
            excluded = {number for extent in key.extents.values() for number in extent.get("excluded", ())}
            if excluded:
                shown = ", ".join(map(str, sorted(excluded)[:8]))
                more = ", …" if len(excluded) > 8 else ""
                console.note(
                    f"{key.run}: {len(excluded)} documents hold values that are not finite, and are left out "
                    f"({shown}{more})"
                )
        if as_json:
            console.print_json(finding.table.to_pylist())
            return
        console.print_table(finding.table.to_pylist())
        views = ", ".join(f"{view} ({table.num_rows:,} rows)" for view, table in finding.tables.items())
        console.note(f"in SQL: {views}")

    types = get_type_hints(kind)
    decorated = stack(
        run_options,
        scheduler_option,
        json_option,
        click.option(
            "--exclude-nonfinite",
            is_flag=True,
            help="Leave out documents that hold NaN or infinities.",
        ),
        *(_option(field, types[field.name]) for field in dataclasses.fields(kind)),
    )
    return click.command(name, help=ANALYSES[name].summary)(decorated(command))


def _option(field: dataclasses.Field[Any], annotation: Any) -> Callable[[F], F]:
    flag = f"--{field.name.replace('_', '-')}"
    given: dict[str, Any] = {"default": field.default, "show_default": True, "help": field.metadata["help"]}
    if annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", **given)
    if get_origin(annotation) is Literal:
        return click.option(
            flag, type=click.Choice([str(choice) for choice in get_args(annotation)]), **given
        )
    return click.option(flag, type=annotation, **given)


@click.command(
    "all", help="Every analysis with its defaults; what a run cannot answer is skipped and listed."
)
@run_options
@scheduler_option
@json_option
@click.pass_obj
def _analyze_all(lake: str, runs: tuple[str, ...], scheduler: str, as_json: bool) -> None:
    from ..analyze.analyses import run_all

    findings, skipped = run_all(open_lake(lake), runs=runs, scheduler=scheduler, progress=not as_json)
    done = [
        {"analysis": finding.analysis, "view": view, "runs": len(finding.runs), "rows": table.num_rows}
        for finding in findings
        for view, table in finding.tables.items()
    ]
    missed = [{"run": run, "analysis": analysis, "reason": reason} for run, analysis, reason in skipped]
    if as_json:
        console.print_json({"findings": done, "skipped": missed})
        return
    console.print_table(done)
    console.print_table(missed, title="skipped")


@click.command()
@lake_argument
@run_options
@click.option(
    "-o",
    "--output",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The HTML file.",
)
@click.option(
    "--axis", type=click.Choice(["depth", "paper"]), default="depth", show_default=True,
    help="Where layer l of L stands: at (l + 0.5)/L, or as in the paper at l/(L - 1).",
)  # fmt: skip
def report(lake: str, runs: tuple[str, ...], output: Path, axis: Literal["depth", "paper"]) -> None:
    """Write the findings as one self-contained HTML file."""
    open_lake(lake).report(output, run=runs, axis=axis)
    console.note(f"wrote {output}")
