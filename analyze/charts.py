"""Charts: a finding's table in, an altair chart out. Pure: they read no lake, and know nothing of HTML.

A run has the same colour in every chart that is given the same list of :class:`Series`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .panels import WIDTH, Panel, concat, draw_lines, wrapped
from .series import Axis, Row, Series, relative_depth, series_colors, table_rows

if TYPE_CHECKING:
    import altair as alt
    import pyarrow as pa

__all__ = [
    "DISTANCES",
    "Axis",
    "Series",
    "attention_distance_chart",
    "attention_locality_chart",
    "cka_chart",
    "lens_chart",
    "neurons_chart",
    "norms_chart",
    "relative_depth",
    "series_colors",
    "wic_chart",
]

DISTANCES = (1, 2, 4, 8, 16)
"""How many previous tokens the summed attention is shown for (the paper's Figure 6a)."""

_CLASSES = ("prediction", "suppression")

_PAIR_FEATURES = {
    "interaction": "|u−v| and u⊙v",
    "cosine": "the cosine of u and v",
    "concat": "u and v",
    "concat_difference": "u, v and |u−v|",
}


def lens_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw what the logit lens sees at each boundary: entropy, KL to the final, loss, agreement.

    Parameters
    ----------
    table : pa.Table
        The view ``lens``, of one scale.
    series : sequence of Series
        The runs to draw, in the order of their colours.
    axis : {'depth', 'paper'}
        Where boundaries stand.
    """
    rows = table_rows(table, series, "boundary", axis)
    panels = [
        Panel("entropy_bits", "entropy of the lens (bits)"),
        Panel("kl_final_lens_nats", "KL(final ‖ lens) (nats)"),
        Panel("loss_nats", "loss of the lens (nats per token)"),
        Panel("top1_agreement", "top-1 agreement with the final", percent=True),
    ]
    return draw_lines(rows, series, panels, "boundary", columns=2, height=230)


def cka_chart(table: pa.Table, series: Sequence[Series]) -> alt.ConcatChart:
    """Draw the similarity of every two boundaries of a run as a heat map, one panel a run.

    The colours span 0 to 1. The unbiased estimator may be a little below 0: such a cell has the colour of
    0, and its true value in the tooltip. A cell without a value is grey, with the reason in the tooltip.

    Parameters
    ----------
    table : pa.Table
        The view ``cka``, with both orders of two boundaries, or with one.
    series : sequence of Series
        The runs to draw.
    """
    import altair as alt

    cells: dict[tuple[str, int, int], Row] = {}
    for row in table_rows(table, series):
        lo, hi = row.get("cka_lo"), row.get("cka_hi")
        a, b = row["boundary_a"], row["boundary_b"]
        cell = {
            "cka": row["cka"],
            "interval": None if lo is None or hi is None else f"{lo:.4f} – {hi:.4f}",
            "n": row.get("n_samples"),
            "note": row.get("reason") or row.get("note"),
        }
        cell = {name: value for name, value in cell.items() if value is not None}
        cells.setdefault((row["run"], b, a), {"a": b, "b": a, **cell})
        cells[row["run"], a, b] = {"a": a, "b": b, **cell}
    shown = [item for item in series if any(run == item.run for run, _, _ in cells)]
    columns = min(3, max(2, len(shown)))
    size = WIDTH // columns - 80
    legend = alt.Legend(title="CKA", orient="right", gradientLength=min(200, size), tickCount=5)
    color = alt.Color("cka:Q", scale=alt.Scale(domain=[0, 1], clamp=True, scheme="viridis"), legend=legend)
    axis = alt.Axis(labelOverlap=True, labelAngle=0, domain=False, tickSize=3)
    panels = []
    for item in shown:
        own = [cells[key] for key in sorted(cells) if key[0] == item.run]
        base = alt.Chart(alt.InlineData(values=own)).encode(
            x=alt.X("a:O", title="boundary", axis=axis),
            y=alt.Y("b:O", title="boundary", sort="descending", axis=axis),
            tooltip=[
                alt.Tooltip("a:O", title="boundary a"),
                alt.Tooltip("b:O", title="boundary b"),
                alt.Tooltip("cka:Q", title="CKA"),
                alt.Tooltip("interval:N", title="95 % interval"),
                alt.Tooltip("n:Q", title="samples"),
                alt.Tooltip("note:N"),
            ],
        )
        filled = base.transform_filter("isValid(datum.cka)").mark_rect().encode(color=color)
        void = base.transform_filter("!isValid(datum.cka)").mark_rect(color="#dddddd")
        panels.append((filled + void).properties(width=size, height=size, title=wrapped(item.label, size)))
    return concat(panels, columns=columns, x="independent", y="independent")


def neurons_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw the density of prediction and of suppression neurons in each layer.

    Parameters
    ----------
    table : pa.Table
        The view ``neuron_counts``, of which it draws the counts above the threshold of the classes; a class that has
        no row in a layer counts as 0 there.
    series : sequence of Series
        The runs to draw.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    layers: dict[tuple[str, int], Row] = {}
    for row in table_rows(table, series, "layer", axis):
        if row["min_kurtosis"] != row["threshold"]:
            continue
        point = layers.setdefault((row["run"], row["layer"]), row | dict.fromkeys(_CLASSES, 0.0))
        point[row["class"]], point[f"{row['class']}_n"] = row["density"], row["n_units"]
    panels = [
        Panel(
            name,
            f"{name} neurons (% of the layer’s)",
            percent=True,
            unit="share",
            notes=((f"{name}_n", "neurons"),),
        )
        for name in _CLASSES
    ]
    return draw_lines(list(layers.values()), series, panels, "layer", columns=2, height=230)


def attention_locality_chart(
    table: pa.Table, series: Sequence[Series], *, distance: int = 5, axis: Axis = "depth"
) -> alt.ConcatChart:
    """Draw the attention on the previous tokens, dashed what uniform attention would give, and on BOS.

    Parameters
    ----------
    table : pa.Table
        The view ``attention_locality``.
    series : sequence of Series
        The runs to draw.
    distance : int
        How many previous tokens are summed; the query itself does not count.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    rows = [row for row in table_rows(table, series, "layer", axis) if row["distance"] == distance]
    panels = [
        Panel(
            "cumulative_weight", f"attention on the previous {_tokens(distance)}", baseline="uniform_weight"
        ),
        Panel("bos_weight", "attention on the first position"),
    ]
    return draw_lines(rows, series, panels, "layer", columns=2, height=230)


def _with_bounds(name: str, row: Row, column: str) -> Row:
    """Return a column of a row and the ends of its interval, if it has one, under another name."""
    return {f"{name}{end}": row.get(f"{column}{end}") for end in ("", "_lo", "_hi")}


def _tokens(n: int) -> str:
    return f"{n} tokens" if n > 1 else "token"


def attention_distance_chart(
    table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth"
) -> alt.ConcatChart:
    """Draw the attention on the previous 1, 2, 4, 8 and 16 tokens, summed, dashed what uniform attention would give.

    Parameters
    ----------
    table : pa.Table
        The view ``attention_locality``.
    series : sequence of Series
        The runs to draw.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    layers: dict[tuple[str, int], Row] = {}
    for row in table_rows(table, series, "layer", axis):
        point, distance = layers.setdefault((row["run"], row["layer"]), row), row["distance"]
        point |= _with_bounds(f"previous_{distance}", row, "cumulative_weight")
        point[f"uniform_{distance}"] = row["uniform_weight"]
    panels = [
        Panel(
            f"previous_{k}", f"attention on the previous {_tokens(k)}", baseline=f"uniform_{k}", unit="share"
        )
        for k in DISTANCES
    ]
    return draw_lines(list(layers.values()), series, panels, "layer", columns=3, height=190)


def wic_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw the accuracy of the probes at each boundary, with chance; one panel for what they see of two states.

    Parameters
    ----------
    table : pa.Table
        The view ``wic_summary``.
    series : sequence of Series
        The runs to draw.
    axis : {'depth', 'paper'}
        Where boundaries stand.
    """
    boundaries: dict[tuple[str, int], Row] = {}
    for row in table_rows(table, series, "boundary", axis):
        point, name = boundaries.setdefault((row["run"], row["boundary"]), row), row["features"]
        point |= _with_bounds(name, row, "accuracy")
    panels = [
        Panel(
            name,
            f"accuracy, from {seen}",
            percent=True,
            zero=False,
            unit="accuracy",
            rule=0.5,
            notes=(("layer", "layer"), ("n_dev", "items")),
        )
        for name, seen in _PAIR_FEATURES.items()
    ]
    return draw_lines(list(boundaries.values()), series, panels, "boundary", columns=2, height=210)


def norms_chart(table: pa.Table, series: Sequence[Series], *, axis: Axis = "depth") -> alt.ConcatChart:
    """Draw what attention and MLP add to the residual stream: norms, shares of the stream, their ratio.

    Parameters
    ----------
    table : pa.Table
        The view ``norms``. Of the norms themselves, a paler band spans the 10th to 90th percentiles of the tokens.
    series : sequence of Series
        The runs to draw.
    axis : {'depth', 'paper'}
        Where layers stand.
    """
    layers: dict[tuple[str, int], Row] = {}
    for row in table_rows(table, series, "layer", axis):
        point, name = layers.setdefault((row["run"], row["layer"]), row), row["component"]
        point[f"{name}_median"] = row["median_norm"]
        point[f"{name}_low"], point[f"{name}_high"] = row["p10"], row["p90"]
        point |= _with_bounds(name, row, "mean_norm") | _with_bounds(f"{name}_relative", row, "relative_norm")
        if name == "attn_out":
            point |= _with_bounds("ratio", row, "attn_mlp_ratio")
    panels = [
        *(
            Panel(
                name,
                f"norm of {name}",
                log=True,
                spread="10–90 % of the tokens",
                notes=((f"{name}_median", "median"),),
            )
            for name in ("attn_out", "mlp_out", "resid_pre")
        ),
        Panel("attn_out_relative", "‖attn_out‖ / ‖resid_pre‖", log=True),
        Panel("mlp_out_relative", "‖mlp_out‖ / ‖resid_pre‖", log=True),
        Panel("ratio", "‖attn_out‖ / ‖mlp_out‖", log=True, rule=1.0),
    ]
    return draw_lines(list(layers.values()), series, panels, "layer", columns=3, height=190)
