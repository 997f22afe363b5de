"""Curves: panels that lay several quantities of one model over each other, a line a quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .panels import N_TICKS, WIDTH, concat, depth_axis, value_scale, wrapped
from .series import Row

if TYPE_CHECKING:
    import altair as alt

__all__ = ["Curve", "draw_curves"]

_GUTTER = 75  # pixels of the y axis


@dataclass(frozen=True, slots=True)
class Curve:
    """How a quantity is drawn."""

    title: str
    """What the legend calls it."""
    color: str
    is_dashed: bool = False


def draw_curves(
    panels: Sequence[tuple[str, Sequence[Row]]],
    curves: Mapping[str, Curve],
    *,
    y_title: str,
    columns: int,
    height: int,
    has_points: bool = False,
    notes: Mapping[str, str] | None = None,
) -> alt.ConcatChart:
    """Lay panels out in columns, all on the same axes, with one legend.

    Parameters
    ----------
    panels : sequence of (str, sequence of Row)
        Title and rows: ``curve``, ``depth`` and ``value``, and ``lo`` and ``hi`` where there is an interval.
    curves : mapping of str to Curve
        The quantities by the name that the rows have for them, in the order of the legend.
    y_title : str
        The y axis's, with the unit.
    columns, height : int
        Panels beside each other, and pixels of one.
    has_points : bool
        Whether the values are marked.
    notes : mapping of str to str, optional
        More columns for the tooltip, with their names.
    """
    import altair as alt

    shown = {row["curve"] for _, rows in panels for row in rows}
    curves = {name: curve for name, curve in curves.items() if name in shown}
    titles = [curve.title for curve in curves.values()]
    legend = alt.Legend(
        orient="top", columns=3, symbolType="stroke", symbolStrokeWidth=3, symbolSize=200, symbolOpacity=1
    )
    colors = alt.Scale(domain=titles, range=[curve.color for curve in curves.values()])
    dashes = alt.Scale(
        domain=titles, range=[[4, 3] if curve.is_dashed else [1, 0] for curve in curves.values()]
    )
    ends = ("value", "lo", "hi")
    values = [row[end] for _, rows in panels for row in rows for end in ends if row.get(end) is not None]
    width = WIDTH // columns - _GUTTER
    y = alt.Y(
        "value:Q",
        title=y_title,
        scale=value_scale(domain=(min(values, default=0), max(values, default=1))),
        axis=alt.Axis(tickCount=N_TICKS),
    )
    tooltip = [
        alt.Tooltip("what:N"),
        alt.Tooltip("depth:Q", title="relative depth", format=".3f"),
        alt.Tooltip("value:Q"),
        *(alt.Tooltip(f"{name}:N", title=title) for name, title in (notes or {}).items()),
    ]
    charts = []
    for title, rows in panels:
        named = [
            {"what": curves[row["curve"]].title} | {k: v for k, v in row.items() if k != "curve"}
            for row in rows
        ]
        base = alt.Chart(alt.InlineData(values=named)).encode(
            x=depth_axis("depth", width), color=alt.Color("what:N", title=None, scale=colors, legend=legend)
        )
        layers = []
        if any(row.get("lo") is not None for row in rows):
            layers.append(
                base.mark_area(opacity=0.15, strokeWidth=0).encode(y=alt.Y("lo:Q", title=y_title), y2="hi")
            )
        line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=24) if has_points else False)
        stroke = alt.StrokeDash("what:N", title=None, scale=dashes, legend=legend)
        layers.append(line.encode(y=y, strokeDash=stroke, tooltip=tooltip))
        chart = alt.LayerChart(layer=layers)
        charts.append(chart.properties(width=width, height=height, title=wrapped(title, width)))
    return concat(charts, columns=columns, color="shared", strokeDash="shared", y="shared")
