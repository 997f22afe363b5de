"""Charts of the analysis ``ing``, by the rules of :mod:`layerlake.analyze.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .panels import N_TICKS, WIDTH, concat, value_scale, wrapped
from .series import Row, Series, table_rows

if TYPE_CHECKING:
    import altair as alt
    import pyarrow as pa

__all__ = ["ing_chart", "ing_histograms_chart"]

_BLUE, _SKY, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#B2182B", "#9A9A9A"

# what the legend calls it → how it is drawn, in the order of the legend
_LINES = {"best k of the neurons": _BLUE, "best k of random neurons": _GREY}
_LEVELS = {
    "the model: its first choice is -ing": _RED,
    "the model: P(-ing) above a tuned threshold": _GREEN,
    "all heavy-tailed neurons of these layers": "#222222",
}
_POINTS = {"promotes": ("one neuron for -ing", _SKY), "suppresses": ("one neuron against -ing", _ORANGE)}

_N_HISTOGRAMS, _N_HISTOGRAMS_OF_MANY = 12, 4
_FEW_RUNS = 2
_LEAST = 0.5  # the bottom of a logarithmic axis of counts


def ing_chart(table: pa.Table, series: Sequence[Series]) -> alt.ConcatChart:
    """Draw how often probes are right: single neurons from the best on, ensembles by size, and the model.

    Parameters
    ----------
    table : pa.Table
        The view ``ing``.
    series : sequence of Series
        The runs to draw, a panel each.
    """
    import altair as alt

    rows = table_rows(table, series)
    shown = [item for item in series if any(row["run"] == item.run for row in rows)]
    columns = min(2, len(shown)) or 1
    marks = [_probe_marks([row for row in rows if row["run"] == item.run]) for item in shown]
    drawn = {mark["what"] for of_run in marks for kind in of_run for mark in kind}
    looks = _LINES | dict(_POINTS.values()) | _LEVELS
    named = [name for name in looks if name in drawn]
    colors = alt.Color(
        "what:N",
        title=None,
        scale=alt.Scale(domain=list(looks), range=list(looks.values())),
        legend=alt.Legend(
            orient="top", columns=3, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1, values=named
        ),
    )
    panels = []
    for item, (lines, points, levels) in zip(shown, marks, strict=True):
        last = max(row["k"] for row in lines)
        x = alt.X(
            "k:Q",
            title="neurons together, or place of one neuron",
            scale=alt.Scale(domain=[0, last + 1], nice=False),
            axis=alt.Axis(tickMinStep=1),
        )
        y = alt.Y(
            "accuracy:Q",
            title="accuracy",
            scale=value_scale(zero=False),
            axis=alt.Axis(tickCount=N_TICKS, format="~%"),
        )
        lo = alt.Y("lo:Q", title="accuracy")
        tooltip = [
            alt.Tooltip("what:N"),
            alt.Tooltip("k:Q"),
            alt.Tooltip("accuracy:Q"),
            alt.Tooltip("lo:Q", title="95 % interval, from"),
            alt.Tooltip("hi:Q", title="to"),
        ]
        line = alt.Chart(alt.InlineData(values=lines)).encode(x=x, color=colors)
        level = alt.Chart(alt.InlineData(values=levels)).encode(color=colors)
        point = alt.Chart(alt.InlineData(values=points)).encode(x=x, color=colors)
        chance = alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=_GREY, strokeWidth=1)
        layers = [
            level.mark_rect(opacity=0.08).encode(y=lo, y2="hi"),
            line.mark_area(opacity=0.18).encode(y=lo, y2="hi"),
            point.mark_rule(opacity=0.4).encode(y=lo, y2="hi"),
            chance.encode(y=alt.datum(0.5)),
            level.mark_rule(strokeDash=[5, 3], strokeWidth=1.6).encode(y=y, tooltip=tooltip),
            line.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=22)).encode(y=y, tooltip=tooltip),
            point.mark_point(size=36, strokeWidth=1.5, opacity=0.8, fill="white").encode(
                y=y, tooltip=["neuron:N", *tooltip]
            ),
        ]
        width = WIDTH // columns - 90 if columns > 1 else WIDTH * 2 // 3
        chart = alt.LayerChart(layer=layers)
        panels.append(chart.properties(width=width, height=260, title=wrapped(item.label, width)))
    return concat(panels, columns=columns, y="shared", color="shared")


def _probe_marks(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return what is drawn of one run as lines, as points and as horizontal lines."""
    lines, points, levels = [], [], []
    singles = [row for row in rows if row["probe"] == "neuron" and row["features"] == "selected"]
    singles.sort(key=lambda row: -row["validation_accuracy"])  # the order in which ensembles add them
    for place, row in enumerate(singles, 1):
        name, _ = _POINTS[row["effect"]]
        points.append(_mark(row, name) | {"k": place, "neuron": f"L{row['layer']}.{row['unit']}"})
    names = dict(zip(("selected", "random"), _LINES, strict=True))
    of_levels = dict(zip(("top1_is_ing", "p_ing_tuned", "heavy_tailed"), _LEVELS, strict=True))
    for row in rows:
        if row["probe"] == "ensemble" and row["features"] in names:
            lines.append(_mark(row, names[row["features"]]))
        elif row["features"] in of_levels:
            levels.append(_mark(row, of_levels[row["features"]]))
    return lines, points, levels


def _mark(row: Row, what: str) -> Row:
    return {"what": what, "k": row["k"], "accuracy": row["accuracy"]} | {
        end: row[f"accuracy_{end}"] for end in ("lo", "hi")
    }


def ing_histograms_chart(table: pa.Table, series: Sequence[Series]) -> alt.ConcatChart:
    """Draw what the first neurons write at each token, split by whether it ends in "-ing"; counts are logarithmic.

    Parameters
    ----------
    table : pa.Table
        The view ``ing_histograms``.
    series : sequence of Series
        The runs to draw: twelve neurons of each, or four where there are more than two runs.
    """
    import altair as alt

    rows = table_rows(table, series)
    n_runs = len({row["run"] for row in rows})
    n_shown = _N_HISTOGRAMS if n_runs <= _FEW_RUNS else _N_HISTOGRAMS_OF_MANY
    of_panel: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["rank"] <= n_shown:
            of_panel.setdefault((row["run"], row["rank"]), []).append(row)
    for own in of_panel.values():
        own.sort(key=lambda row: row["tokens"], reverse=True)  # the fewer, "ing", in front
    color = alt.Color(
        "tokens:N",
        title=None,
        scale=alt.Scale(domain=["end in -ing", "other tokens"], range=[_ORANGE, _BLUE]),
        legend=alt.Legend(orient="top", symbolOpacity=0.8),
    )
    opacity = alt.Opacity(
        "tokens:N", scale=alt.Scale(domain=["end in -ing", "other tokens"], range=[0.85, 0.45]), legend=None
    )
    panels = []
    for item in series:
        for rank in range(1, n_shown + 1):
            own = of_panel.get((item.run, rank), [])
            if not own:
                continue
            first, high = own[0], max(row["count"] for row in own)
            title = f"L{first['layer']}.{first['unit']}: D = {first['difference']:+#.2g}"
            panels.append(
                alt.Chart(alt.InlineData(values=[_bar(row) for row in own if row["count"]]))
                .mark_rect()
                .encode(
                    x=alt.X("low:Q", title=None, axis=alt.Axis(tickCount=N_TICKS)),
                    x2="high",
                    y=alt.Y(
                        "count:Q",
                        title="tokens",
                        scale=alt.Scale(type="log", domain=[_LEAST, 2 * high], nice=False, clamp=True),
                        axis=alt.Axis(values=[1, 10, 100, 1000, 10_000, 100_000], format=",~r"),
                    ),
                    y2=alt.datum(_LEAST),
                    color=color,
                    opacity=opacity,
                    tooltip=["tokens:N", "low:Q", "high:Q", "count:Q"],
                )
                .properties(width=WIDTH // 4 - 65, height=120, title=_title(title, item, n_runs))
            )
    return concat(panels, columns=4, x="independent", y="independent", color="shared")


def _title(text: str, item: Series, n_runs: int) -> Any:
    import altair as alt

    if n_runs == 1:
        return text
    return alt.TitleParams(text, subtitle=wrapped(item.label, WIDTH // 4), subtitleColor=_GREY)


def _bar(row: Row) -> Row:
    tokens = "end in -ing" if row["tokens"] == "ing" else "other tokens"
    return {"tokens": tokens} | {name: row[name] for name in ("low", "high", "count")}
