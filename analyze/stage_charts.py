"""The four stages in the report: Figure 1's curves, and what speaks for and against each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .curves import Curve, draw_curves
from .figure import Numbers
from .series import Row, Series, json_value, table_rows
from .stages import family_curves

if TYPE_CHECKING:
    import altair as alt
    import pyarrow as pa

__all__ = ["stage_verdicts", "stages_chart"]

_CURVES = {
    ("kl_drop", "default"): Curve("KL of dropping the layer", "#0072B2"),
    ("kl_drop", "log"): Curve("… as log10(1 + KL)", "#56B4E9", is_dashed=True),
    ("attention_previous_5", "default"): Curve("attention to the previous 5 tokens", "#8E5EA2"),
    ("prediction_density", "default"): Curve("prediction neurons", "#009E73"),
    ("suppression_density", "default"): Curve("suppression neurons", "#D55E00"),
}
_VERDICTS = {True: "holds", False: "against", None: "unknown"}


def stages_chart(table: pa.Table, series: Sequence[Series]) -> alt.ConcatChart:
    """Draw the four curves of Figure 1, each divided by its largest value: families of several models, then models.

    Layer l stands at l/(L - 1), which is where the curves begin and end.

    Parameters
    ----------
    table : pa.Table
        The view ``stage_curves``.
    series : sequence of Series
        The runs to draw.
    """
    panels: dict[str, list[Row]] = {}
    known = table.filter(np.isin(table["run"].to_pylist(), [item.run for item in series]))
    for row in family_curves(known).to_pylist():
        if row["n_models"] > 1:
            _add(panels, f"{row['family']}, mean of {row['n_models']} models", row)
    rows = table_rows(known, series)
    for item in series:
        for row in rows:
            if row["run"] == item.run:
                _add(panels, item.label, row)
    return draw_curves(
        list(panels.items()),
        {"/".join(key): curve for key, curve in _CURVES.items()},
        y_title="share of the largest value",
        columns=2,
        height=230,
        notes={"raw": "raw value", "raw_unit": "unit"},
    )


def _add(panels: dict[str, list[Row]], title: str, row: Row) -> None:
    if (row["curve"], row["variant"]) in _CURVES and row["value"] is not None:
        point: Row = {"curve": f"{row['curve']}/{row['variant']}", "depth": round(row["depth"], 4)}
        point |= {"value": json_value(row["value"])}
        point |= {"raw": row["raw"], "raw_unit": row["unit"]} if "raw" in row else {}
        panels.setdefault(title, []).append(point)


def stage_verdicts(table: pa.Table, series: Sequence[Series]) -> Numbers:
    """Return, for each signature and run, whether it holds, and in words why.

    Parameters
    ----------
    table : pa.Table
        The view ``stages``.
    series : sequence of Series
        The runs to show.
    """
    rows = {(row["signature"], row["run"]): row for row in table_rows(table, series)}
    lines = []
    for name in dict.fromkeys(signature for signature, _ in rows):
        for row in filter(None, (rows.get((name, item.run)) for item in series)):
            stage = "all" if row["stage"] is None else str(row["stage"])
            signature = f"{name}: {row['expected']}"
            lines.append((stage, signature, row["model"], _VERDICTS[row["holds"]], row["statement"]))
    return Numbers(("stage", "signature", "run", "verdict", "statement"), lines)
