"""Series: a run as charts show it: its label, its colour, its family, and where its layers stand.

Runs of different depth are laid over each other on *relative depth* (:func:`relative_depth`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "PALETTE",
    "Axis",
    "Kind",
    "Row",
    "Series",
    "json_value",
    "relative_depth",
    "series_colors",
    "table_rows",
]

Axis = Literal["depth", "paper"]
"""Where things stand on the axis of relative depth; ``paper`` is as in the paper's figures."""

Kind = Literal["layer", "boundary"]
"""What has a place in the depth of a model: a block, or the residual stream between two."""

Row = dict[str, Any]
"""One row of a chart's data: JSON values only."""

# Okabe and Ito's palette, which stays apart for colour-blind readers, without its yellow, too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Colours of the first runs; after them they come round again."""


@dataclass(frozen=True, slots=True)
class Series:
    """A run, as charts show it."""

    run: str
    """The id by which the tables know it."""
    label: str
    """What the legend calls it; different for each run of a chart."""
    n_layers: int
    family: str
    """The model's (:attr:`layerlake.catalog.shapes.ModelShape.family`); each has a column in the charts by depth."""


def series_colors(series: Sequence[Series]) -> dict[str, str]:
    """Return the colour of each run, by its id: the first has the first of the palette, and so on."""
    return {item.run: PALETTE[i % len(PALETTE)] for i, item in enumerate(series)}


def relative_depth(kind: Kind, index: int, n_layers: int, axis: Axis = "depth", *, span: int = 1) -> float:
    """Return where something stands in a model's depth, from 0 to 1.

    ====================  ===========  =========
    kind                  ``depth``    ``paper``
    ====================  ===========  =========
    layer l               (l + 0.5)/L  l/(L - 1)
    s layers, from l on   (l + s/2)/L  l/(L - 1)
    boundary i            i/L          i/L
    ====================  ===========  =========

    On ``depth`` a block lies between its two boundaries; on ``paper`` the first and the last lie at the ends.

    Parameters
    ----------
    kind : {'layer', 'boundary'}
        What it is.
    index : int
        Which; of several layers, the first.
    n_layers : int
        L.
    axis : {'depth', 'paper'}
        Where things stand.
    span : int
        How many neighbouring layers it is: two that are swapped stand at the boundary between them.
    """
    if kind == "boundary":
        return index / n_layers
    if axis == "paper":
        return index / max(n_layers - 1, 1)
    return (index + span / 2) / n_layers


def table_rows(
    table: pa.Table, series: Sequence[Series], kind: Kind | None = None, axis: Axis = "depth"
) -> list[Row]:
    """Return the rows of the series' runs as JSON values, with ``model`` and ``family``, and ``depth`` for a kind.

    ``kind`` is the column that ``depth`` is made from.
    """
    known = {item.run: item for item in series}
    rows = []
    for row in table.to_pylist():
        item = known.get(row["run"])
        if item is not None:
            clean = {name: json_value(value) for name, value in row.items()}
            clean |= {"model": item.label, "family": item.family}
            if kind:
                clean["depth"] = round(relative_depth(kind, row[kind], item.n_layers, axis), 6)
            rows.append(clean)
    return rows


def json_value(value: Any) -> Any:
    """Return a float with six digits, or None where JSON has no number for it."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
