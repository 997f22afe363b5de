"""Panels: what the charts have in common. A line a run against relative depth, and the look of all of them.

Runs of different depth are laid over each other on *relative depth*: boundary i of a model with L layers
stands at i/L, layer l in the middle of its block, at (l + 0.5)/L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import altair as alt
    import pyarrow as pa

__all__ = [
    "N_TICKS",
    "WIDTH",
    "Panel",
    "Row",
    "Series",
    "concat",
    "depth_axis",
    "draw_lines",
    "series_colors",
    "table_rows",
    "value_scale",
]

WIDTH = 1000
"""Pixels of a whole chart, axes included."""

N_TICKS = 5
"""Ticks of a y axis, more or less."""

Row = dict[str, Any]
"""One row of a chart's data: JSON values only."""

# Okabe and Ito's palette, which stays apart for colour-blind readers, without its yellow, too pale for lines.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_INK, _GREY = "#222222", "#888888"
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # from the 8th run on, when the colours come round again
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_TEXT = {"labelColor": "#444444", "titleColor": _INK, "titleFontSize": 12, "titleFontWeight": "normal"}
_CONFIG = {
    "font": _FONT,
    "background": "white",
    "padding": 4,
    "view": {"stroke": None},
    "axis": _TEXT
    | {
        "labelFontSize": 11,
        "titlePadding": 8,
        "gridColor": "#ececec",
        "domainColor": "#999999",
        "tickColor": "#999999",
    },
    "legend": _TEXT | {"labelFontSize": 12, "labelLimit": 320},
    "title": {"color": _INK, "fontSize": 12, "fontWeight": 600, "anchor": "start", "offset": 6},
}
"""The look of all charts."""

_LOG_STEPS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8))
"""Ticks of a logarithmic axis in each decade, from few to many."""


@dataclass(frozen=True, slots=True)
class Series:
    """A run, as charts show it."""

    run: str
    """The id by which the tables know it."""
    label: str
    """What the legend calls it; different for each run of a chart."""
    n_layers: int


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: a column of the rows against depth, a line a run."""

    field: str
    title: str
    """The y axis's, with the unit."""
    percent: bool = False
    log: bool = False
    zero: bool = True
    """Whether the axis begins at 0, unless it is logarithmic."""
    band: str = "95 % interval"
    """What the columns ``<field>_lo`` and ``<field>_hi`` are, where there are such."""
    baseline: str = ""
    """A column to draw dashed beside the line."""
    rule: float | None = None
    """A value to mark with a horizontal line."""
    notes: tuple[tuple[str, str], ...] = ()
    """More columns for the tooltip, with their names."""

    @property
    def values(self) -> tuple[str, ...]:
        """The columns that lie on the y axis, where the rows have them."""
        return tuple(filter(None, (self.field, f"{self.field}_lo", f"{self.field}_hi", self.baseline)))


def series_colors(series: Sequence[Series]) -> dict[str, str]:
    """Return the colour of each run, by its id: the first has the first of the palette, and so on."""
    return {item.run: _PALETTE[i % len(_PALETTE)] for i, item in enumerate(series)}


def table_rows(
    table: pa.Table, series: Sequence[Series], axis: Literal["layer", "boundary"] | None = None
) -> list[Row]:
    """Return the rows of the series' runs as JSON values, with ``model`` and, for an axis, ``depth``."""
    known = {item.run: item for item in series}
    rows = []
    for row in table.to_pylist():
        item = known.get(row["run"])
        if item is not None:
            clean = {name: _json_value(value) for name, value in row.items()} | {"model": item.label}
            if axis:
                clean["depth"] = round((row[axis] + (0.5 if axis == "layer" else 0.0)) / item.n_layers, 6)
            rows.append(clean)
    return rows


def _json_value(value: Any) -> Any:
    """Return a float with six digits, or None where JSON has no number for it."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def draw_lines(
    rows: list[Row],
    series: Sequence[Series],
    panels: Sequence[Panel],
    axis: Literal["layer", "boundary"],
    *,
    columns: int,
    height: int,
    shared_y: bool = False,
) -> alt.ConcatChart:
    """Lay panels out in columns; one of which no row has a value is left out.

    Parameters
    ----------
    rows : list of Row
        One row a point of depth and run, with a column for each panel.
    series : sequence of Series
        The runs, in the order of their colours.
    panels : sequence of Panel
        What to draw.
    axis : {'layer', 'boundary'}
        The column that ``depth`` was made from.
    columns, height : int
        Panels beside each other; pixels of one.
    shared_y : bool
        Whether all panels have the same y axis.
    """
    import altair as alt

    for panel in panels:
        if panel.log:  # a logarithmic axis has no place for 0
            rows = [row | {name: row.get(name) or None for name in panel.values} for row in rows]
    panels = [panel for panel in panels if any(row.get(panel.field) is not None for row in rows)]
    wanted = {name for panel in panels for name in (*panel.values, *(name for name, _ in panel.notes))}
    filled = sorted(name for name in wanted if any(row.get(name) is not None for row in rows))
    rows = [{name: row.get(name) for name in ("model", axis, "depth", *filled)} for row in rows]
    data = alt.InlineData(values=rows)  # one object for all panels, so that the chart holds it once
    # A click on a name of the legend brings out its lines, in all panels.
    picked = alt.selection_point(name="picked", fields=["model"], bind="legend")
    width = WIDTH // columns - 65
    charts = [
        _draw_panel(panel, rows, series, axis, data=data, picked=picked).properties(
            width=width, height=height
        )
        for panel in panels
    ]
    if charts:
        charts[0] = charts[0].add_params(picked)
    return concat(charts, columns=columns, y="shared" if shared_y else "independent")


def _draw_panel(
    panel: Panel,
    rows: list[Row],
    series: Sequence[Series],
    axis: str,
    *,
    data: alt.InlineData,
    picked: alt.Parameter,
) -> alt.LayerChart:
    """Draw band, baseline and rule below, the lines above them."""
    import altair as alt

    lo, hi = f"{panel.field}_lo", f"{panel.field}_hi"
    has_band, has_baseline = lo in rows[0] and hi in rows[0], panel.baseline in rows[0]
    scale, y_axis = value_scale(zero=panel.zero), alt.Axis(tickCount=N_TICKS)
    if panel.percent:
        y_axis = alt.Axis(tickCount=N_TICKS, format="~%")
        if not any(row.get(panel.field) for row in rows):  # nothing above 0: keep 0 at the bottom
            scale = alt.Scale(domain=[0, 0.01])
    if panel.log:
        scale, y_axis = _log_axis([row[name] for row in rows for name in panel.values if row.get(name)])

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=panel.title, scale=scale, axis=y_axis)

    def faded(full: float) -> Any:
        return alt.when(picked).then(alt.value(full)).otherwise(alt.value(full / 6))

    base = alt.Chart(data).encode(x=depth_axis(), **_identity(series))
    layers: list[alt.Chart] = []
    shown = [(panel.field, panel.title)]
    if has_band:
        layers.append(base.mark_area(strokeWidth=0).encode(y=y(lo), y2=hi, opacity=faded(0.18)))
        shown += [(lo, f"{panel.band}, from"), (hi, f"{panel.band}, to")]
    if has_baseline:
        dashed = base.mark_line(strokeDash=[3, 3], strokeWidth=1.2)
        layers.append(dashed.encode(y=y(panel.baseline), opacity=faded(0.9)))
        shown.append((panel.baseline, panel.baseline.replace("_", " ")))
    if panel.rule is not None:
        rule = alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=_GREY)
        layers.append(rule.encode(y=alt.datum(panel.rule)))
    shown += [(name, title) for name, title in panel.notes if name in rows[0]]
    tooltip = [
        alt.Tooltip("model:N"),
        alt.Tooltip(f"{axis}:Q"),
        alt.Tooltip("depth:Q", title="relative depth", format=".3f"),
        *(alt.Tooltip(f"{field}:Q", title=title) for field, title in shown),
    ]
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=30))
    layers.append(line.encode(y=y(panel.field), opacity=faded(1), tooltip=tooltip))
    return alt.LayerChart(layer=layers)


def _log_axis(values: Sequence[float]) -> tuple[alt.Scale, alt.Axis]:
    """Return a logarithmic scale that just holds the values, and an axis with a handful of round ticks."""
    import altair as alt

    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in _LOG_STEPS:
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    scale = alt.Scale(type="log", domain=[_json_value(low), _json_value(high)], nice=False)
    return scale, alt.Axis(values=ticks, format=",~r")


def _identity(series: Sequence[Series]) -> dict[str, Any]:
    """Return the encodings that tell runs apart: colour, and dashes where the colours come round again."""
    import altair as alt

    labels = [item.label for item in series]
    longest = max(map(len, labels), default=0)
    legend = alt.Legend(
        title=None,
        orient="top",
        columns=max(1, WIDTH // (7 * longest + 45)),  # about 7 pixels a letter
        symbolType="stroke",
        symbolStrokeWidth=3,
        symbolSize=200,
        symbolOpacity=1,
    )
    colors = alt.Scale(domain=labels, range=list(series_colors(series).values()))
    identity: dict[str, Any] = {"color": alt.Color("model:N", scale=colors, legend=legend)}
    if len(labels) > len(_PALETTE):
        dashes = [_DASHES[i // len(_PALETTE) % len(_DASHES)] for i in range(len(labels))]
        scale = alt.Scale(domain=labels, range=dashes)
        identity["strokeDash"] = alt.StrokeDash("model:N", scale=scale, legend=legend)
    return identity


def value_scale(*, zero: bool = True) -> alt.Scale:
    """Return the linear scale of the y axes: from 0, or a round number below the values, up to a round number."""
    import altair as alt

    return alt.Scale(zero=zero, nice=N_TICKS)


def depth_axis() -> alt.X:
    """Return the x axis of relative depth."""
    import altair as alt

    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], format=".1f", labelFlush=False)
    return alt.X("depth:Q", title="relative depth", scale=alt.Scale(domain=[0, 1]), axis=axis)


def concat(
    charts: Sequence[Any], *, columns: int, **resolve: Literal["shared", "independent"]
) -> alt.ConcatChart:
    """Lay charts out in columns, all in one type and with quiet axes; without any, say so.

    ``resolve`` says for each channel whether the charts share its scale.
    """
    import altair as alt

    if not charts:
        void = alt.Chart(alt.InlineData(values=[{}])).mark_text(color=_GREY, fontSize=12, text="no values")
        charts = [void.properties(width=300, height=60)]
    return alt.ConcatChart(
        concat=charts,
        columns=columns,
        spacing={"row": 24, "column": 20},
        resolve={"scale": resolve},
        config=_CONFIG,
    )
