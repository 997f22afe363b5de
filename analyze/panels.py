"""Panels: what the charts have in common. A line a run against relative depth, and the look of all of them.

Where runs are of several families, each family has a column of panels, on the same axes as its neighbours.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .series import PALETTE, Kind, Row, Series, json_value, series_colors

if TYPE_CHECKING:
    import altair as alt

__all__ = [
    "N_TICKS",
    "WIDTH",
    "Panel",
    "concat",
    "depth_axis",
    "draw_lines",
    "value_scale",
    "wrapped",
]

WIDTH = 1000
"""Pixels of a whole chart, axes included."""

N_TICKS = 5
"""Ticks of a y axis, more or less."""

_GUTTER, _SPACING, _ROW_SPACING = 65, 20, 24  # pixels of a y axis with its title, and between panels
_LETTER = 7  # pixels of a letter, on average
_FACET_HEIGHT = 150
_NARROW = 150  # a panel with fewer ticks

_INK, _GREY = "#222222", "#888888"
_FAR = 10  # a floor so many times below all values is below the axis
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # from the 8th run on, when the colours come round again
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_TEXT = {"labelColor": "#444444", "titleColor": _INK, "titleFontSize": 12, "titleFontWeight": "normal"}
_TITLE = {"color": _INK, "fontSize": 12, "fontWeight": 600}
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
    "legend": _TEXT | {"labelFontSize": 12, "labelLimit": 0},  # none
    "title": _TITLE | {"anchor": "start", "offset": 6},
}
"""The look of all charts."""

_LOG_STEPS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8))
"""Ticks of a logarithmic axis in each decade, from few to many."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity against depth, a line a run. ``<field>_lo`` and ``<field>_hi`` are its 95 % interval."""

    field: str
    """The column of the rows."""
    title: str
    """The y axis's, with the unit."""
    percent: bool = False
    log: bool = False
    zero: bool = True
    """Whether the axis begins at 0, unless it is logarithmic."""
    spread: str = ""
    """What the columns ``<field>_low`` and ``<field>_high`` are; their band is paler than the interval's."""
    baseline: str = ""
    """A column to draw dashed beside the line."""
    floor: str = ""
    """A column to draw thin below the line; the axis does not reach far down for it."""
    rule: float | None = None
    """A value to mark with a horizontal line."""
    unit: str = ""
    """Panels that name the same have the same y axis."""
    place: str = "depth"
    """The column that lies on the x axis."""
    notes: tuple[tuple[str, str], ...] = ()
    """More columns for the tooltip, with their names."""

    @property
    def bands(self) -> tuple[tuple[str, str, str, float], ...]:
        """The lower and upper column of each band, its name and its opacity, from back to front."""
        spread = (f"{self.field}_low", f"{self.field}_high", self.spread, 0.08)
        interval = (f"{self.field}_lo", f"{self.field}_hi", "95 % interval", 0.2)
        return (spread, interval) if self.spread else (interval,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that lie on the y axis, where the rows have them."""
        ends = (end for lo, hi, *_ in self.bands for end in (lo, hi))
        return tuple(filter(None, (self.field, self.baseline, *ends)))

    def values(self, rows: Sequence[Row]) -> list[float]:
        """Return all values that the y axis has to hold."""
        held = [row[name] for row in rows for name in self.columns if row.get(name) is not None]
        near = min(held, default=0.0) / _FAR
        floors = [row[self.floor] for row in rows if row.get(self.floor) is not None]
        return held + [value for value in floors if value > near]


def draw_lines(
    rows: list[Row],
    series: Sequence[Series],
    panels: Sequence[Panel],
    kind: Kind,
    *,
    columns: int,
    height: int,
) -> alt.ConcatChart:
    """Lay panels out in columns; or, with rows of several families, a row a panel and a column a family.

    A panel of which no row has a value is left out. Panels beside each other in a row of families have the same axes.

    Parameters
    ----------
    rows : list of Row
        Of :func:`table_rows`: one row a point of depth and run, with a column for each panel.
    series : sequence of Series
        The runs, in the order of their colours.
    panels : sequence of Panel
        What to draw.
    kind : {'layer', 'boundary', 'pair'}
        The column that ``depth`` was made from.
    columns, height : int
        Panels beside each other, and pixels of one, where there is one family.
    """
    import altair as alt

    for panel in panels:
        if panel.log:  # a logarithmic axis has no place for 0
            drawn = (*panel.columns, *filter(None, [panel.floor]))
            rows = [row | {name: row.get(name) or None for name in drawn} for row in rows]
    panels = [panel for panel in panels if any(row.get(panel.field) is not None for row in rows)]
    families = [
        name
        for name in dict.fromkeys(item.family for item in series)
        if name in {row["family"] for row in rows}
    ]
    wanted = {
        name
        for panel in panels
        for name in (*panel.columns, panel.floor, panel.place, *(name for name, _ in panel.notes))
    }
    filled = sorted(name for name in wanted if any(row.get(name) is not None for row in rows))
    rows = [{name: row.get(name) for name in ("model", "family", kind, *filled)} for row in rows]
    identity = _identity(series, {row["model"] for row in rows})
    # A click on a name of the legend brings out its lines, in all panels.
    picked = alt.selection_point(name="picked", fields=["model"], bind="legend")
    faceted = len(families) > 1
    width = WIDTH // columns - _GUTTER
    if faceted:
        columns, height = len(families), min(height, _FACET_HEIGHT)
        width = (WIDTH - _GUTTER) // columns - _SPACING
    values: dict[str, list[float]] = {}
    for panel in panels:
        values.setdefault(panel.unit or panel.field, []).extend(panel.values(rows))
    charts = []
    for panel in panels:
        scale, look = _value_axis(panel, values[panel.unit or panel.field])
        for family in families:
            # In a grid of families, only the outer panels name the axes and the families.
            has_x, has_y = not faceted or panel is panels[-1], not faceted or family == families[0]
            y = {
                "title": wrapped(panel.title, height + _ROW_SPACING) if has_y else None,
                "scale": scale,
                "axis": alt.Axis(**look, labels=has_y, ticks=has_y),
            }
            own = [row for row in rows if row["family"] == family]
            x = depth_axis(panel.place, width, named=has_x)
            chart = _draw_panel(panel, own, kind, picked=picked, x=x, y=y, identity=identity)
            if faceted and panel is panels[0]:
                chart += _header(family)
            charts.append(chart.properties(width=width, height=height))
    if charts:
        charts[0] = charts[0].add_params(picked)
    return concat(charts, columns=columns)


def _draw_panel(
    panel: Panel,
    rows: list[Row],
    kind: Kind,
    *,
    picked: alt.Parameter,
    x: alt.X,
    y: dict[str, Any],
    identity: dict[str, Any],
) -> alt.LayerChart:
    """Draw bands, baseline, floor and rule, and the lines above them; all encodings of the y axis share ``y``."""
    import altair as alt

    def faded(full: float) -> Any:
        return alt.when(picked).then(alt.value(full)).otherwise(alt.value(full / 6))

    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, **identity)
    layers: list[alt.Chart] = []
    shown = [(panel.field, panel.title)]
    for lo, hi, name, opacity in panel.bands:
        if lo in rows[0] and hi in rows[0]:
            band = base.mark_area(strokeWidth=0)
            layers.append(band.encode(y=alt.Y(f"{lo}:Q", **y), y2=hi, opacity=faded(opacity)))
            shown += [(lo, f"{name}, from"), (hi, f"{name}, to")]
    if panel.baseline in rows[0]:
        dashed = base.mark_line(strokeWidth=1.2).encode(
            strokeDash=alt.value([3, 3])
        )  # a run's own dashes or not
        layers.append(dashed.encode(y=alt.Y(f"{panel.baseline}:Q", **y), opacity=faded(0.9)))
        shown.append((panel.baseline, panel.baseline.replace("_", " ")))
    if panel.floor in rows[0]:
        thin = base.mark_line(strokeWidth=0.8, clip=True)
        layers.append(thin.encode(y=alt.Y(f"{panel.floor}:Q", **y), opacity=faded(0.9)))
        shown.append((panel.floor, "floor"))
    if panel.rule is not None:
        rule = alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=_GREY)
        layers.append(rule.encode(y=alt.datum(panel.rule)))
    if not any(row.get(panel.field) is not None for row in rows):
        layers.append(_no_values())
    shown += [(name, title) for name, title in panel.notes if name in rows[0]]
    tooltip = [
        alt.Tooltip("model:N"),
        alt.Tooltip(f"{kind}:Q"),
        alt.Tooltip(f"{panel.place}:Q", title="relative depth", format=".3f"),
        *(alt.Tooltip(f"{field}:Q", title=title) for field, title in shown),
    ]
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=30))
    layers.append(line.encode(y=alt.Y(f"{panel.field}:Q", **y), opacity=faded(1), tooltip=tooltip))
    return alt.LayerChart(layer=layers)


def _value_axis(panel: Panel, values: Sequence[float]) -> tuple[alt.Scale, dict[str, Any]]:
    """Return the scale of a y axis that holds the values and the panel's rule, and what its axis looks like."""
    held = [*values, panel.rule] if panel.rule is not None else values
    if panel.log:
        return _log_axis(held)
    low, high = min(held), max(held)
    if low == high:  # 0 stays at the bottom
        high += 0.01 if panel.percent else 1.0
    look = {"tickCount": N_TICKS} | ({"format": "~%"} if panel.percent else {})
    return value_scale(zero=panel.zero, domain=(low, high)), look


def _log_axis(values: Sequence[float]) -> tuple[alt.Scale, dict[str, Any]]:
    """Return a logarithmic scale that just holds the values, and a handful of round ticks."""
    import altair as alt

    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in _LOG_STEPS:
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    scale = alt.Scale(type="log", domain=[json_value(low), json_value(high)], nice=False)
    return scale, {"values": ticks, "format": ",~r"}


def value_scale(*, zero: bool = True, domain: tuple[float, float] | None = None) -> alt.Scale:
    """Return the linear scale of a y axis: from 0, or a round number below the values, up to a round number.

    ``domain`` is that of the values; what is drawn decides if it is not given.
    """
    import altair as alt

    if domain is None:
        return alt.Scale(zero=zero, nice=N_TICKS)
    return alt.Scale(domain=list(domain), zero=zero, nice=N_TICKS)


def depth_axis(place: str, width: int, *, named: bool = True) -> alt.X:
    """Return the x axis of relative depth, of a panel so many pixels wide."""
    import altair as alt

    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1] if width > _NARROW else [0, 0.5, 1]
    axis = alt.Axis(values=ticks, format=".1f", labelFlush=False, labels=named, ticks=named)
    title = "relative depth" if named else None
    return alt.X(f"{place}:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=axis)


def _identity(series: Sequence[Series], models: Collection[str]) -> dict[str, Any]:
    """Return the encodings that tell runs apart: colour, and dashes where the colours come round again.

    The legend names those of ``models`` alone; a colour does not depend on them.
    """
    import altair as alt

    labels = [item.label for item in series]
    named = [label for label in labels if label in models]
    longest = max(map(len, named), default=0)
    legend = alt.Legend(
        title=None,
        orient="top",
        values=named,
        columns=max(1, WIDTH // (_LETTER * longest + 45)),
        symbolType="stroke",
        symbolStrokeWidth=3,
        symbolSize=200,
        symbolOpacity=1,
    )
    colors = alt.Scale(domain=labels, range=list(series_colors(series).values()))
    identity: dict[str, Any] = {"color": alt.Color("model:N", scale=colors, legend=legend)}
    if len(labels) > len(PALETTE):
        dashes = [_DASHES[i // len(PALETTE) % len(_DASHES)] for i in range(len(labels))]
        scale = alt.Scale(domain=labels, range=dashes)
        identity["strokeDash"] = alt.StrokeDash("model:N", scale=scale, legend=legend)
    return identity


def wrapped(text: str, width: int) -> str | list[str]:
    """Return a text as lines of so many pixels, or as it is if it fits; Vega would draw it over its neighbour."""
    lines = textwrap.wrap(text, max(8, width // _LETTER))
    return lines if len(lines) > 1 else text


def _no_values() -> alt.Chart:
    return _text("no values", color=_GREY, fontSize=12)


def _header(family: str) -> alt.Chart:
    """Write a family above its column; a title would be the higher the farther the labels of the y axis reach up."""
    return _text(family, x=0, y=-8, align="left", baseline="bottom", **_TITLE)


def _text(text: str, **look: Any) -> alt.Chart:
    import altair as alt

    chart: alt.Chart = alt.Chart(alt.InlineData(values=[{}])).mark_text(text=text, **look)
    return chart


def concat(
    charts: Sequence[Any], *, columns: int, **resolve: Literal["shared", "independent"]
) -> alt.ConcatChart:
    """Lay charts out in columns, all in one type and with quiet axes; without any, say so.

    ``resolve`` says for each channel whether the charts share its scale.
    """
    import altair as alt

    if not charts:
        charts = [_no_values().properties(width=300, height=60)]
    return alt.ConcatChart(
        concat=charts,
        columns=columns,
        spacing={"row": _ROW_SPACING, "column": _SPACING},
        resolve={"scale": resolve},
        config=_CONFIG,
    )
