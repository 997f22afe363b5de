"""The report: the findings of a lake as one HTML file that holds all it needs, charts drawn by Vega included."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from ..catalog.errors import LayerLakeError, RunNotFound
from ..catalog.findings import FindingKey, StoredTable, newest_findings, read_finding
from ..catalog.lake import Lake
from ..catalog.run import Run
from .captions import FIGURES, TITLES
from .commands import changed_options, command, sql_literal
from .demands import DEMANDS
from .figure import Figure, Numbers, count_text, remarks
from .provenance import describe_run, params_text
from .series import Axis, Series, series_colors
from .statistic import lacking_sites

__all__ = ["build_report", "label_runs", "write_report"]

# `ast` keeps Vega from compiling its expressions to functions, which the page's policy forbids.
_DRAW = """
for (const node of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(node.dataset.spec).textContent);
  const actions = {export: true, source: false, compiled: false, editor: false};
  vegaEmbed(node, spec, {ast: true, renderer: "svg", actions, downloadFileName: node.dataset.spec}).catch(error => {
    node.textContent = "This chart could not be drawn: " + error;
    node.classList.add("failed");
  });
}
"""


def write_report(
    lake: Lake,
    path: str | os.PathLike[str],
    *,
    runs: Sequence[str] = (),
    axis: Axis = "depth",
    made: datetime | None = None,
) -> None:
    """Write the report of a lake to a local file; one that was there is replaced as a whole.

    Parameters
    ----------
    lake, runs, axis, made
        As for :func:`build_report`.
    path : str or path
        The file.

    Raises
    ------
    LayerLakeError
        The file cannot be written.
    """
    html = build_report(lake, runs=runs, axis=axis, output=os.fspath(path), made=made)
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LayerLakeError(
            f"The report cannot be written to '{target}': {error.strerror or error}."
        ) from error


def build_report(
    lake: Lake,
    *,
    runs: Sequence[str] = (),
    axis: Axis = "depth",
    output: str = "report.html",
    made: datetime | None = None,
) -> str:
    """Return the findings of some runs as one HTML page that needs no network.

    Reads the small views that the charts show, never a row per token or per neuron; the page takes about
    1 MB, most of it Vega. Nothing is computed: an analysis that a run lacks is named, with its command; or that
    its text cannot answer it, which for some analyses the token table says (:data:`DEMANDS`).

    Parameters
    ----------
    lake : Lake
        The lake.
    runs : sequence of str
        Runs by id or unique prefix, in the order of their colours; all runs if empty.
    axis : {'depth', 'paper'}
        Where layers stand on relative depth (:func:`layerlake.analyze.series.relative_depth`).
    output : str
        Where the page will be saved, for the command that it shows.
    made : datetime, optional
        The time to print; now if None. All else is determined by the lake.

    Raises
    ------
    RunNotFound
        A run is not in the lake, or the lake has none.
    LayerLakeError
        There is no such axis.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    if axis not in get_args(Axis):
        raise LayerLakeError(
            f"The axis cannot be {axis!r}.", hint=f"It is one of: {', '.join(get_args(Axis))}."
        )
    opened = list({run.run_id: run for run in lake.runs(runs)}.values())
    if not opened:
        raise RunNotFound(
            f"The lake '{lake.url}' has no runs to report.", hint="Capture one: layerlake capture LAKE …"
        )
    series = label_runs(opened)
    colors = series_colors(series)
    stored = [table for table in newest_findings(lake.findings()) if table.key.run in colors]
    source = _Source(lake, opened, series, stored, axis, frozenset(lake.run_ids), count(1))
    chosen_axis = ["--axis", axis] if axis != "depth" else []
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": True,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    template = environment.from_string(files(__package__).joinpath("report.html").read_text("utf-8"))
    script = _script()
    return template.render(
        title=_title(series),
        lake=lake.url,
        version=version("layerlake"),
        made=(made or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        command=command("report", lake.url, "-o", output, *chosen_axis, runs=source.named(colors)),
        axis=axis,
        runs=[
            describe_run(run, item, colors[item.run], stored)
            for run, item in zip(opened, series, strict=True)
        ],
        sections=[_section(source, analysis) for analysis in TITLES],
        script=Markup(script),  # noqa: S704  # ours and Vega's, and named by its digest in the page's policy
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def label_runs(runs: Sequence[Run]) -> list[Series]:
    """Return the series of some runs, each with a short label that no other has.

    The last part of the model's name, and the schedule of an intervened one; where runs share that, with the text
    that was captured, or else with the digits of the run's id.
    """
    labels = [
        run.manifest.model_name.rstrip("/").rpartition("/")[2]
        + (f" · {run.manifest.schedule}" if run.manifest.schedule else "")
        for run in runs
    ]
    for ending in (
        [run.manifest.dataset.rpartition("/")[2] for run in runs],
        [run.run_id.rpartition("-")[2] for run in runs],
    ):
        shared = {label for label in labels if labels.count(label) > 1}
        labels = [
            f"{label} · {end}" if label in shared else label
            for label, end in zip(labels, ending, strict=True)
        ]
    return [
        Series(run.run_id, label, run.shape.n_layers, run.shape.family)
        for run, label in zip(runs, labels, strict=True)
    ]


def _title(series: Sequence[Series]) -> str:
    labels = [item.label for item in series]
    return f"Activations of {' and '.join(labels) if len(labels) < 3 else f'{len(labels)} runs'}"


@cache  # building the bundle takes seconds, and it is always the same
def _script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed, and what draws the charts with them, as one script."""
    import vl_convert

    script = vl_convert.javascript_bundle(_DRAW)
    # Nothing in it may end the element that it stands in, nor be changed by the parser: its digest is checked.
    return script.replace("</script", "<\\/script").replace("\r", "")


# -- sections -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """What the sections are made from."""

    lake: Lake
    runs: Sequence[Run]
    series: Sequence[Series]
    stored: Sequence[StoredTable]
    axis: Axis
    lake_runs: frozenset[str]
    numbers: Iterator[int]
    """The numbers of the figures to come."""

    def named(self, runs: Iterable[str]) -> list[str]:
        """Return the runs that a command has to name: none where they are all of the lake, which it takes anyway."""
        distinct = list(dict.fromkeys(runs))
        return [] if self.lake_runs == set(distinct) else distinct


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A figure with its chart and its numbers."""

    number: int
    figure: Figure
    computed: str
    counts: str
    """How much of each run went into it."""
    remarks: list[str]
    """Why values are missing."""
    spec: dict[str, Any] | None
    numbers: Numbers | None


@dataclass(frozen=True, slots=True)
class _Group:
    """The figures that one analysis gives with one set of parameters."""

    params: str
    heading: str
    """The parameters that set it apart from the section's other groups; empty if it is the only one."""
    figures: list[_Drawn]
    commands: list[str]
    """The one that computes it, and those that show its numbers."""


@dataclass(frozen=True, slots=True)
class _Note:
    """Something that is missing or out of date, and the command that mends it."""

    text: str
    command: str


@dataclass(frozen=True, slots=True)
class _Section:
    """One analysis."""

    analysis: str
    name: str
    subject: str
    groups: list[_Group]
    left_out: str
    """Which runs hold a text that cannot answer it, and what it lacks."""
    notes: list[_Note]


def _section(source: _Source, analysis: str) -> _Section:
    """Gather the figures of one analysis, and what is missing for them; what an older version found is missing."""
    from .analyses import ANALYSES

    current = (analysis, ANALYSES[analysis].version)
    tables = [table for table in source.stored if (table.key.analysis, table.key.version) == current]
    analysed = {table.key.run for table in tables}
    unsuited = _unsuited_runs(source, analysis, analysed)
    tables = [table for table in tables if table.key.run not in unsuited]
    place = {item.run: i for i, item in enumerate(source.series)}
    # Parameters nearest to the defaults first; within a group, runs in the order of their colours.
    tables.sort(key=lambda table: (len(changed_options(table.key)), place[table.key.run]))
    groups: dict[str, list[StoredTable]] = {}
    for table in tables:
        groups.setdefault(params_text(table.key.params), []).append(table)
    sets = [group[0].key.params for group in groups.values()]
    varied = [
        name
        for name in {name for params in sets for name in params}
        if len({str(p.get(name)) for p in sets}) > 1
    ]
    drawn = [
        _group(source, group, {name: group[0].key.params.get(name) for name in sorted(varied)})
        for group in groups.values()
    ]
    notes = list(_notes(source, analysis, tables, unsuited))
    left_out = f"Left out, with {DEMANDS[analysis].lack}: {'; '.join(unsuited.values())}." if unsuited else ""
    return _Section(analysis, *TITLES[analysis], drawn, left_out, notes)


def _unsuited_runs(source: _Source, analysis: str, analysed: Collection[str]) -> dict[str, str]:
    """Return the labels of the runs that a section leaves out, by their ids."""
    demand = DEMANDS.get(analysis)
    return {
        run.run_id: item.label
        for run, item in zip(source.runs, source.series, strict=True)
        if demand is not None and (demand.is_strict or run.run_id not in analysed) and not demand.is_met(run)
    }


def _notes(
    source: _Source, analysis: str, tables: Sequence[StoredTable], unsuited: Collection[str]
) -> Iterator[_Note]:
    """Say for each run what it lacks of an analysis, unless its text is unsuited, and what it has outgrown."""
    from .analyses import ANALYSES

    for run, item in zip(source.runs, source.series, strict=True):
        if run.run_id in unsuited:
            continue
        keys = {table.key.digest: table.key for table in tables if table.key.run == run.run_id}
        lacking = ",".join(lacking_sites(run, ANALYSES[analysis].sites))
        if not keys and lacking:
            text = f"{item.label} lacks what this reads. Once it is captured (with --sites {lacking}):"
            yield _Note(text, command("analyze", source.lake.url, analysis, runs=[run.run_id]))
        elif not keys:
            text = f"{item.label} has not been analysed for this. To compute it:"
            yield _Note(text, command("analyze", source.lake.url, analysis, runs=[run.run_id]))
        for key in keys.values():
            if _is_outgrown(source, key, run):
                text = f"{item.label} has grown since this was computed. To bring it up to date:"
                options = changed_options(key)
                yield _Note(text, command("analyze", source.lake.url, analysis, *options, runs=[run.run_id]))


def _group(source: _Source, stored: Sequence[StoredTable], varied: Mapping[str, Any]) -> _Group:
    """Draw the figures of one analysis and parameter set; ``varied`` are those that tell it from the others."""
    key = stored[0].key
    figures = [figure for figure in FIGURES if figure.analysis == key.analysis]
    tables: dict[str, pa.Table] = {}
    for view in dict.fromkeys(figure.view for figure in figures):
        found = [read_finding(source.lake.store, table.key, [view]) for table in stored if table.view == view]
        parts = [finding.table for finding in found if finding is not None and finding.table.num_rows]
        if parts:
            tables[view] = pa.concat_tables(parts, promote_options="default")
    shown = [(figure, figure.select(tables[figure.view])) for figure in figures if figure.view in tables]
    drawn = [_draw(source, figure, key.params, table) for figure, table in shown if table.num_rows]
    named = source.named(item.run for item in source.series)
    where = [f"run IN ({', '.join(map(sql_literal, named))})"] if named else []
    where += [f"{name} = {sql_literal(value)}" for name, value in varied.items()]
    condition = f" WHERE {' AND '.join(where)}" if where else ""
    commands = [
        command(
            "analyze",
            source.lake.url,
            key.analysis,
            *changed_options(key),
            runs=source.named(table.key.run for table in stored),
        ),
        *(command("sql", source.lake.url, f"SELECT * FROM {view}{condition}") for view in tables),  # noqa: S608  # shown, not run
    ]
    return _Group(params_text(key.params), params_text(varied), drawn, commands)


def _draw(source: _Source, figure: Figure, params: Mapping[str, Any], table: pa.Table) -> _Drawn:
    spec = None
    if figure.draw is not None:
        axis = {"axis": source.axis} if figure.is_by_depth else {}
        spec = figure.draw(table, source.series, **axis).to_dict(validate=False)  # the tests validate
    return _Drawn(
        next(source.numbers),
        figure,
        figure.say_computed(params),
        count_text(table, source.series),
        remarks(table, source.series, figure.remarks_from),
        spec,
        figure.tabulate(table, source.series) if figure.tabulate else None,
    )


def _is_outgrown(source: _Source, key: FindingKey, run: Run) -> bool:
    """Whether the lake holds more of what the finding was computed from: of the run, or of its findings."""
    from .analyses import ANALYSES

    return any(
        site in run.sites and len(run.manifest.sites[site]) > len(extent["partitions"])
        for site, extent in key.extents.items()
        if "partitions" in extent
    ) or any(
        table.key.digest not in key.extents[table.view]["findings"]
        for table in source.stored
        if table.key.run == key.run
        and "findings" in key.extents.get(table.view, {})
        and not (table.key.analysis in ANALYSES and changed_options(table.key))
    )
