"""Charts of interventions: what dropping, swapping, repeating and ablating layers does, against depth.

A layer stands where it is, two that are swapped at the boundary between them, a block that is repeated at its middle.
Where the table has several rows of one intervention, at drawn positions and at all, that of the most tokens is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .curves import Curve, draw_curves
from .panels import Panel, draw_lines
from .series import Axis, Row, Series, relative_depth, table_rows

if TYPE_CHECKING:
    import altair as alt
    import pyarrow as pa

__all__ = [
    "benchmarks_chart",
    "changes_chart",
    "divergence_chart",
    "repeats_chart",
    "swap_cosines_chart",
]

_WORDS = {
    "drop": "a layer dropped",
    "swap": "two swapped",
    "ablate_attn": "without attention",
    "ablate_mlp": "without MLP",
}
_KINDS = (*_WORDS, "repeat")

_CHANCE = {"arc_easy": 0.25, "hellaswag": 0.25}
"""Of tasks whose items have four choices, nearly all."""

_STANDARD_ERRORS = 1.96
"""To each side of a mean, in a 95 % interval."""

_COSINES = {
    "self_earlier": Curve("with itself, moved forward", "#0072B2"),
    "self_later": Curve("with itself, moved back", "#D55E00"),
    "index_earlier": Curve("with the layer whose place it takes, moved forward", "#009E73"),
    "index_later": Curve("with the layer whose place it takes, moved back", "#E69F00", is_dashed=True),
    "adjacent": Curve("of the two layers as they are", "#888888", is_dashed=True),
}


@dataclass(frozen=True, slots=True, order=True)
class _Effect:
    """One intervention, wherever it is done: what one panel shows."""

    part: str
    """Of several that are measured apart, which; or empty."""
    rank: int
    """Of the kind among the kinds."""
    span: int
    is_stale: bool

    @classmethod
    def of(cls, row: Row) -> _Effect:
        return cls(row.get("part", ""), _KINDS.index(row["kind"]), row["span"], row["variant"] == "authors")

    @property
    def name(self) -> str:
        words = (self.part, _KINDS[self.rank], str(self.span), "stale" * self.is_stale)
        return "_".join(filter(None, words)).replace(" ", "_")

    @property
    def words(self) -> str:
        """What is done, for people."""
        kind = _KINDS[self.rank]
        return _WORDS.get(kind, f"blocks of {self.span} repeated{' (stale keys)' * self.is_stale}")

    @property
    def place(self) -> str:
        """The column that says where it is done."""
        return "depth" if self.span == 1 else f"depth_{self.span}"

    def panel(self, column: str, title: str, **look: Any) -> Panel:
        """Return the panel of one of its columns; a look that names a column names one of its own."""
        for name in ("floor", "baseline"):
            if name in look:
                look[name] = f"{self.name}_{look[name]}"
        return Panel(f"{self.name}_{column}", f"{title}, {self.words}", place=self.place, **look)


def divergence_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw the divergence that each intervention makes, on a logarithmic axis, and how often the first choice stays.

    The floor is a thin line where it is not far below all effects.

    Parameters
    ----------
    table : pa.Table
        The view ``intervention_summary``.
    series : sequence of Series
        The runs to draw.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    rows, effects = _by_layer(table_rows(table, series), series, axis)
    panels = [
        *(
            effect.panel("kl_nats", "KL (nats)", log=True, unit="nats", floor="kl_noop_nats")
            for effect in effects
        ),
        *(effect.panel("agreement", "same first choice", percent=True, unit="share") for effect in effects),
    ]
    return draw_lines(rows, series, panels, "layer", columns=2, height=230)


def changes_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw the changes of entropy and of loss that each intervention makes.

    Parameters
    ----------
    table, series, axis
        As for :func:`divergence_chart`.
    """
    rows, effects = _by_layer(table_rows(table, series), series, axis)
    panels = [
        effect.panel(column, title, unit=column, rule=0.0)
        for column, title in (
            ("delta_entropy_bits", "change of entropy (bits)"),
            ("delta_loss_nats", "change of loss (nats)"),
        )
        for effect in effects
    ]
    return draw_lines(rows, series, panels, "layer", columns=2, height=230)


def repeats_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw entropy and loss where the layers of a block run twice, dashed those of the unmodified model.

    Parameters
    ----------
    table, series, axis
        As for :func:`divergence_chart`. The lengths of blocks have panels of their own.
    """
    measured = table_rows(table, series)
    for row in measured:  # at the very same tokens
        for name in ("entropy_bits", "loss_nats"):
            row[f"unmodified_{name}"] = row[name] - row[f"delta_{name}"]
    rows, effects = _by_layer(measured, series, axis)
    panels = [
        effect.panel(column, title, zero=False, unit=column, baseline=f"unmodified_{column}")
        for effect in effects
        for column, title in (("entropy_bits", "entropy (bits)"), ("loss_nats", "loss (nats)"))
    ]
    return draw_lines(rows, series, panels, "layer", columns=2, height=210)


def benchmarks_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw the accuracy of each task under each intervention, dashed that of the unmodified model, grey chance.

    Parameters
    ----------
    table : pa.Table
        The view ``benchmarks``.
    series, axis
        As for :func:`divergence_chart`.
    """
    scored = [row for row in table_rows(table, series) if row["acc"] is not None]
    unmodified: dict[tuple[str, str | None], Row] = {}
    for row in scored:
        home = row["run"], row["split"]
        if row["kind"] == "none" and row["n_items"] >= unmodified.get(home, row)["n_items"]:
            unmodified[home] = row
    splits: dict[str, set[str | None]] = {}
    for row in scored:
        splits.setdefault(row["task"], set()).add(row["split"])
    tasks: dict[str, str] = {}
    for row in scored:
        is_split = len(splits[row["task"]]) > 1
        row["part"] = " ".join(filter(None, (row["task"], row["split"] if is_split else None)))
        tasks[row["part"]] = row["task"]
        base = unmodified.get((row["run"], row["split"]))
        row["unmodified"] = base and base["acc"]
        error = _STANDARD_ERRORS * (row["acc_stderr"] or 0.0)
        row["acc_lo"], row["acc_hi"] = max(row["acc"] - error, 0.0), min(row["acc"] + error, 1.0)
    rows, effects = _by_layer(scored, series, axis, size="n_items")
    panels = [
        effect.panel(
            "acc",
            effect.part,
            percent=True,
            unit=effect.part,
            baseline="unmodified",
            rule=_CHANCE.get(tasks[effect.part]),
        )
        for effect in effects
    ]
    return draw_lines(rows, series, panels, "layer", columns=2, height=190)


def swap_cosines_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw how like what swapped layers give is to what they gave, and to what the other layer gave.

    Parameters
    ----------
    table : pa.Table
        The view ``swap_cosines``.
    series : sequence of Series
        The runs to draw: a panel for attention and one for the MLP of each.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    panels: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    for row in sorted(table_rows(table, series), key=lambda row: row["n_tokens"]):
        point = {"curve": row["kind"], "layer": row["layer"], "value": row["cosine"]}
        point |= {end: row[f"cosine_{end}"] for end in ("lo", "hi")}
        panels.setdefault((row["run"], row["component"]), {})[row["kind"], row["layer"]] = point
    shown = []
    for item in series:
        for component in ("attn", "mlp"):
            points = list(panels.get((item.run, component), {}).values())
            for point in points:
                point["depth"] = round(
                    relative_depth("layer", point["layer"], item.n_layers, axis, span=2), 6
                )
            points.sort(key=lambda point: point["layer"])
            if points:
                shown.append((f"{item.label}: {component}", points))
    return draw_curves(
        shown, _COSINES, y_title="cosine", columns=2, height=160, has_points=True, notes={"layer": "layer"}
    )


def _by_layer(
    measured: Iterable[Row], series: Sequence[Series], axis: Axis, *, size: str = "n_tokens"
) -> tuple[list[Row], list[_Effect]]:
    """Put what is measured at one layer of a run side by side: a row a layer, columns named after their effects."""
    depths = {item.run: item.n_layers for item in series}
    layers: dict[tuple[str, int], Row] = {}
    effects = set()
    for row in sorted((row for row in measured if row["kind"] in _KINDS), key=lambda row: row[size]):
        effect, layer = _Effect.of(row), row["layer"]
        effects.add(effect)
        home = {name: row[name] for name in ("run", "model", "family", "layer")}
        point = layers.setdefault((row["run"], layer), home)
        place = relative_depth("layer", layer, depths[row["run"]], axis, span=row["span"])
        point[effect.place] = round(place, 6)
        point |= {
            f"{effect.name}_{name}": value for name, value in row.items() if isinstance(value, float | int)
        }
    return [layers[key] for key in sorted(layers)], sorted(effects)
