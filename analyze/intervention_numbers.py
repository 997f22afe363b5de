"""What the figures of interventions come to, in a few numbers a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from .figure import Numbers
from .series import Row, Series, relative_depth, table_rows

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["benchmark_numbers", "divergence_numbers", "repeat_numbers"]

_MIDDLE = (0.2, 0.8)
"""The middle of a model, where the paper's claims are about intermediate layers."""

_NOTHING = "–"


def divergence_numbers(table: pa.Table, series: Sequence[Series]) -> Numbers:
    """Return for each run what drops and swaps do to the first layers and to the middle ones."""
    lines = []
    for item, rows in _runs(table, series):
        drops, swaps = (_largest(rows, kind, "n_tokens") for kind in ("drop", "swap"))
        both = [swaps[i]["kl_nats"] - drops[i]["kl_nats"] for i in _middle(item, drops, 1) if i in swaps]
        floors = [
            row["kl_noop_nats"]
            for row in (*drops.values(), *swaps.values())
            if row["kl_noop_nats"] is not None
        ]
        lines.append(
            (
                item.label,
                _effects(drops, [0]),
                _effects(drops, _middle(item, drops, 1)),
                _effects(swaps, [0]),
                _effects(swaps, _middle(item, swaps, 2)),
                f"{median(both):+.3g} nats" if both else _NOTHING,
                f"{max(floors):.1g} nats" if floors else _NOTHING,
            )
        )
    header = (
        "run", "layer 0 dropped", "a middle layer dropped", "layers 0 and 1 swapped", "middle layers swapped",
        "swap − drop, median", "floor, at most",
    )  # fmt: skip
    return Numbers(header, lines)


def repeat_numbers(table: pa.Table, series: Sequence[Series]) -> Numbers:
    """Return for each run and block length which block lowers the entropy most when it is repeated."""
    lines = []
    for item, rows in _runs(table, series):
        repeats = [row for row in rows if row["kind"] == "repeat"]
        for span, variant in sorted({(row["span"], row["variant"]) for row in repeats}):
            own = [row for row in repeats if (row["span"], row["variant"]) == (span, variant)]
            blocks = list(_largest(own, "repeat", "n_tokens").values())
            n_sharper = sum(row["delta_entropy_bits"] < 0 for row in blocks)
            best = min(blocks, key=lambda row: row["delta_entropy_bits"])
            name = (
                f"layers {best['layer']}–{best['layer'] + span - 1}" if span > 1 else f"layer {best['layer']}"
            )
            changes = f"{best['delta_entropy_bits']:+.3g} bits, loss {best['delta_loss_nats']:+.3g} nats"
            length = f"{span}{', stale keys and values' if variant == 'authors' else ''}"
            lines.append((item.label, length, f"{n_sharper} of {len(blocks)}", f"{name}: {changes}"))
    return Numbers(("run", "length", "blocks that lower the entropy", "that lowers it most"), lines)


def benchmark_numbers(table: pa.Table, series: Sequence[Series]) -> Numbers:
    """Return for each run the unmodified model's accuracy, and what is left of it."""
    lines = []
    for item, rows in _runs(table, series):
        for split in dict.fromkeys(row["split"] for row in rows):
            own = [row for row in rows if row["split"] == split and row["acc"] is not None]
            base = max(
                (row for row in own if row["kind"] == "none"), key=lambda row: row["n_items"], default=None
            )
            if base is None:
                continue
            drops, swaps = (_largest(own, kind, "n_items") for kind in ("drop", "swap"))
            error = "" if base["acc_stderr"] is None else f" ± {base['acc_stderr']:.1%}"
            lines.append(
                (
                    item.label,
                    " ".join(filter(None, (base["task"], split))),
                    f"{base['n_items']:,}",
                    f"{base['acc']:.1%}{error}",
                    _shares(drops, [0], "acc"),
                    _shares(drops, _middle(item, drops, 1), "acc"),
                    _shares(swaps, _middle(item, swaps, 2), "acc"),
                )
            )
    header = (
        "run", "task", "items", "unmodified", "layer 0 dropped", "a middle layer dropped", "middle layers swapped",
    )  # fmt: skip
    return Numbers(header, lines)


def _runs(table: pa.Table, series: Sequence[Series]) -> list[tuple[Series, list[Row]]]:
    rows = table_rows(table, series)
    of_runs = [(item, [row for row in rows if row["run"] == item.run]) for item in series]
    return [(item, own) for item, own in of_runs if own]


def _largest(rows: Sequence[Row], kind: str, size: str) -> dict[int, Row]:
    """Return the rows of a kind by layer: of several of one layer, that of the most tokens."""
    return {row["layer"]: row for row in sorted(rows, key=lambda row: row[size]) if row["kind"] == kind}


def _middle(item: Series, rows: dict[int, Row], span: int) -> list[int]:
    low, high = _MIDDLE
    return [i for i in sorted(rows) if low < relative_depth("layer", i, item.n_layers, span=span) < high]


def _effects(rows: dict[int, Row], layers: Sequence[int]) -> str:
    if not set(layers) & rows.keys():
        return _NOTHING
    return f"{_shares(rows, layers, 'agreement')}, {_range(rows, layers, 'kl_nats', '{:.3g}'.format)} nats"


def _shares(rows: dict[int, Row], layers: Sequence[int], column: str) -> str:
    return _range(rows, layers, column, "{:.0%}".format)


def _range(rows: dict[int, Row], layers: Sequence[int], column: str, say: Callable[[float], str]) -> str:
    """Return the least and the largest value of a column at some layers, in words."""
    values = [rows[i][column] for i in layers if i in rows]
    ends = dict.fromkeys(say(value) for value in (min(values), max(values))) if values else [_NOTHING]
    return "–".join(ends)
