"""Charts of the subjoiner heads: their scores by depth, and what the best of them attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .panels import WIDTH, Panel, concat, draw_lines, wrapped
from .series import Axis, Row, Series, table_rows

if TYPE_CHECKING:
    import altair as alt
    import pyarrow as pa

__all__ = ["subjoiner_attention_chart", "subjoiner_chart"]

_N_PROMPTS = 10  # of each class, as in the paper's Figure 6b; their order in the table is random


def subjoiner_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw the score of each layer's best subjoiner head, and how many of its heads are subjoiners (q < 0.05).

    Parameters
    ----------
    table : pa.Table
        The view ``subjoiner``.
    series : sequence of Series
        The runs to draw.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    layers: dict[tuple[str, int], list[Row]] = {}
    for row in table_rows(table, series, "layer", axis):
        layers.setdefault((row["run"], row["layer"]), []).append(row)
    rows = []
    for heads in layers.values():
        n_found = sum(row["q_value"] < 0.05 for row in heads)
        best = min(heads, key=lambda row: row["rank"])
        rows.append(best | {"n_found": n_found, "share": n_found / len(heads)})
    notes = (("head", "head"), ("q_value", "q"), ("split_weight", "on the word"))
    panels = [
        Panel("score", "score of the layer’s best head", notes=notes),
        Panel("share", "subjoiner heads (% of the layer’s)", percent=True, notes=(("n_found", "heads"),)),
    ]
    return draw_lines(rows, series, panels, "layer", columns=2, height=230)


def subjoiner_attention_chart(table: pa.Table, series: Sequence[Series]) -> alt.ConcatChart:
    """Draw what the last tokens of ten prompts of each class attend to in a run's best head, and the mean.

    Parameters
    ----------
    table : pa.Table
        The view ``subjoiner_attention``.
    series : sequence of Series
        The runs to draw, two panels each.
    """
    import altair as alt

    labels = {item.run: item.label for item in series}
    panels_of: dict[tuple[str, str], list[Row]] = {}
    for row in table_rows(table, series):
        panels_of.setdefault((row["run"], row["class"]), []).append(row)
    cells_of = {key: _attention_cells(rows) for key, rows in panels_of.items()}
    highest = max((cell["weight"] for cells in cells_of.values() for cell in cells), default=1.0)
    color = alt.Color(
        "weight:Q",
        scale=alt.Scale(domain=[0, highest], scheme="viridis"),
        legend=alt.Legend(title="attention", gradientLength=180, tickCount=5),
    )
    positions = alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, domain=False, tickSize=3)
    words = alt.Axis(labelLimit=0, domain=False, tickSize=3)
    size = WIDTH // 2 - 170
    panels = []
    for item in series:
        for name, of_class in (("split", "words of several tokens"), ("single", "words of one token")):
            cells = cells_of.get((item.run, name))
            if not cells:
                continue
            first = panels_of[item.run, name][0]
            title = f"{labels[item.run]}, layer {first['layer']}, head {first['head']}: {of_class}"
            chart = alt.Chart(alt.InlineData(values=cells)).mark_rect()
            panels.append(
                chart.encode(
                    x=alt.X("position:O", title="position", axis=positions),
                    y=alt.Y("word:N", title=None, sort=None, axis=words),
                    color=color,
                    tooltip=[
                        alt.Tooltip("word:N"),
                        alt.Tooltip("position:O"),
                        alt.Tooltip("weight:Q", title="attention"),
                    ],
                ).properties(width=size, height=230, title=wrapped(title, size + 75))
            )
    return concat(panels, columns=2, x="independent", y="independent")


def _attention_cells(rows: Sequence[Row]) -> list[Row]:
    """Return the cells of one heat map: the mean over all prompts, then the first ten of them."""
    n_prompts = 1 + max(row["prompt"] for row in rows)
    mean: dict[int, float] = {}
    for row in rows:
        mean[row["distance"]] = mean.get(row["distance"], 0.0) + row["weight"] / n_prompts
    cells = [
        {"word": f"mean of {n_prompts:,}", "position": -1 - distance, "weight": round(weight, 6)}
        for distance, weight in mean.items()
    ]
    shown = [row for row in rows if row["prompt"] < _N_PROMPTS]
    homes: dict[str, set[int]] = {}
    for row in shown:
        homes.setdefault(row["word"], set()).add(row["prompt"])
    for row in shown:  # prompts of one word are told apart by their numbers
        word = row["word"] if len(homes[row["word"]]) == 1 else f"{row['word']} ({row['prompt']})"
        cells.append({"word": word, "position": -1 - row["distance"], "weight": row["weight"]})
    return cells
