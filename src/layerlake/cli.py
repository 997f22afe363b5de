"""The command line, in the order of work."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from . import console
from .catalog.errors import LayerLakeError, did_you_mean
from .catalog.layout import shard_name
from .catalog.run import Run
from .catalog.sites import SITES
from .catalog.sizes import format_nbytes
from .lake import open_lake

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])


class _InOrder(click.Group):
    """Lists commands in the order of work, not of the alphabet, and suggests the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            ctx.fail(f"There is no '{name}'.{did_you_mean(name, known)} Choose from: {', '.join(known)}.")
        return super().resolve_command(ctx, args)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="layerlake")
def cli(debug: bool) -> None:  # read by main
    """Capture a language model's activations once, then ask questions without the model.

    LAKE is a folder or a URL (s3://…, gs://…, memory://…).
    """


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


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Combine options into one decorator, so that several commands share them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_lake = click.argument("lake")
_runs = click.option(
    "--run", "runs", multiple=True, metavar="ID", help="A run's id or unique prefix; may be repeated."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_scheduler = click.option(
    "--scheduler", default="threads", show_default=True, help="Dask's: synchronous, threads, or tcp://…"
)
_spec = _stack(
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
)  # fmt: skip


@cli.command()
@click.option(
    "--lake", default="demo-lake", show_default=True, type=click.Path(path_type=Path), help="The lake."
)
@click.option(
    "--report", default="demo-report.html", show_default=True, type=click.Path(path_type=Path), help="The report.",
)  # fmt: skip
@click.option("--max-tokens", default="16k", show_default=True, help="Tokens to capture of each model.")
def demo(lake: Path, report: Path, max_tokens: str) -> None:
    """Capture the two models that ship with layerlake, analyse them, and write a report. Offline."""
    from .demo.tour import run_demo

    run_demo(lake, report, max_tokens=max_tokens)


@cli.command()
@click.argument("lake", required=False)
@_spec
@_json
def plan(lake: str | None, as_json: bool, **options: Any) -> None:
    """Print what a capture would store and what it costs. Writes nothing and loads no weights."""
    from .capture.plan import CapturePlan, CaptureSpec, plan_capture

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


@cli.command()
@_lake
@_spec
@_json
def capture(lake: str, as_json: bool, **options: Any) -> None:
    """Run a model over text once and store what happened inside it."""
    from .capture.execute import execute_plan
    from .capture.plan import CaptureSpec, plan_capture

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
        console.print_json(_describe(run))
    else:
        console.print_table([_row(run)])


@cli.command()
@_lake
@_json
def ls(lake: str, as_json: bool) -> None:
    """List the runs of a lake."""
    rows = [_row(run) for run in open_lake(lake).runs()]
    if as_json:
        console.print_json(rows)
    elif rows:
        console.print_table(rows)
    else:
        console.note("The lake has no runs.")


@cli.command()
@_lake
@_runs
@_json
def info(lake: str, runs: tuple[str, ...], as_json: bool) -> None:
    """Describe runs: model, corpus, sites, provenance."""
    described = [_describe(run) for run in open_lake(lake).runs(runs)]
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


@cli.command()
@_lake
@click.argument("query")
@click.option(
    "--format", "kind", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True,
    help="How to print the result.",
)  # fmt: skip
@click.option("--run", help="The run whose relations need no schema in front.")
def sql(lake: str, query: str, kind: Literal["table", "csv", "json"], run: str | None) -> None:
    """Ask a lake in SQL, read-only. ``SHOW ALL TABLES`` lists the relations."""
    from .sql import write_result

    write_result(open_lake(lake).sql(query, run=run), kind, sys.stdout)


class _Analyses(_InOrder):
    """One subcommand an analysis, made from its options when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        from .analyze.analyses import ANALYSES

        return [*ANALYSES, "all"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "all":
            return _analyze_all
        if cmd_name not in self.list_commands(ctx):
            return None
        return _analysis_command(cmd_name)


@cli.group(cls=_Analyses)
@_lake
@click.pass_context
def analyze(ctx: click.Context, lake: str) -> None:
    """Compute an analysis from the lake alone; the result is kept there, and at once a view in SQL."""
    ctx.obj = lake


def _analysis_command(name: str) -> click.Command:
    """Make the subcommand of an analysis: its options are the fields of its options dataclass."""
    from .analyze.analyses import ANALYSES

    kind = ANALYSES[name].options

    @click.pass_obj
    def command(lake: str, /, runs: tuple[str, ...], scheduler: str, as_json: bool, **options: Any) -> None:
        from .analyze.analyses import run_analysis

        finding = run_analysis(
            open_lake(lake), name, runs=runs, options=options, scheduler=scheduler, progress=not as_json
        )
        if as_json:
            console.print_json(finding.table.to_pylist())
            return
        # of several tables the shortest says most at a glance: counts rather than neurons, means rather than tokens
        console.print_table(min(finding.tables.values(), key=len).to_pylist())
        views = ", ".join(f"{view} ({table.num_rows:,} rows)" for view, table in finding.tables.items())
        console.note(f"in SQL: {views}")

    types = get_type_hints(kind)
    decorated = _stack(
        _runs, _scheduler, _json, *(_option(field, types[field.name]) for field in dataclasses.fields(kind))
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
@_runs
@_scheduler
@_json
@click.pass_obj
def _analyze_all(lake: str, runs: tuple[str, ...], scheduler: str, as_json: bool) -> None:
    from .analyze.analyses import run_all

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


@cli.command()
@_lake
@_runs
@click.option(
    "-o",
    "--output",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The HTML file.",
)
def report(lake: str, runs: tuple[str, ...], output: Path) -> None:
    """Write the findings as one self-contained HTML file."""
    open_lake(lake).report(output, run=runs)
    console.note(f"wrote {output}")


def _row(run: Run) -> dict[str, Any]:
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


def _describe(run: Run) -> dict[str, Any]:
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
