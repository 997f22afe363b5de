"""Profiles: what findings say of a run, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from ..catalog.run import Run
from .inputs import Input
from .series import Kind, relative_depth

__all__ = ["Profile", "read_profiles"]

_NO_INTERVAL = "no interval: it is counted in the weights, not estimated"

Doubles = npt.NDArray[np.float64]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Profile:
    """A quantity at every layer or boundary, or why it is not known."""

    what: str
    unit: str
    kind: Kind
    values: Doubles
    """The value and the ends of its interval, NaN where it has none: ``[place, 3]``."""
    depth: Doubles
    """Layer l is at l/(L - 1), boundary i at i/L: ``[place]``."""
    note: str | None
    lacking: str | None
    """Why it is not known, and what would help."""

    @property
    def value(self) -> Doubles:
        """The values alone."""
        return self.values[:, 0]

    @property
    def peak(self) -> int:
        """Where it is largest; the first of several such places."""
        return int(self.value.argmax())

    def are_apart(self, a: int, b: int) -> bool:
        """Tell whether the intervals of two places do not overlap; without intervals, whether the values differ."""
        (value_a, lo_a, hi_a), (value_b, lo_b, hi_b) = self.values[[a, b]]
        return bool(value_a != value_b and not (lo_a <= hi_b and lo_b <= hi_a))

    def say(self, place: int) -> str:
        """Return the value of a place in words."""
        value, lo, hi = self.values[place]
        interval = "" if np.isnan(lo) else f" ({lo:.3g} to {hi:.3g})"
        return f"{value:.3g}{interval} at {self.kind} {place}"

    @property
    def no_interval(self) -> str | None:
        """Why its peak has no interval, if it has none."""
        return _NO_INTERVAL if np.isnan(self.values[self.peak, 1]) else None


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a profile is found."""

    view: str
    column: str
    what: str
    unit: str
    kind: Kind
    choose: Callable[[Sequence[Row], int], Sequence[Row]]
    """Of the rows of the view and the number of layers: those of the profile."""
    help: str
    """What to do where there are none; may name the run in braces."""


def _where(**equal: Any) -> Callable[[Sequence[Row], int], list[Row]]:
    """Choose the rows with some values."""
    return lambda rows, n_layers: [row for row in rows if all(row[k] == v for k, v in equal.items())]  # noqa: ARG005


def _drops(rows: Sequence[Row], n_layers: int) -> list[Row]:
    """Choose the rows of dropped layers: of the request that looked at the most tokens, if it dropped every layer."""

    def request(row: Row) -> tuple[int, bool]:
        return row["positions"] or 0, row["is_resumed"]

    drops = sorted((row for row in rows if row["kind"] == "drop"), key=request)
    whole = [list(group) for _, group in groupby(drops, request)]
    whole = [group for group in whole if len(group) == n_layers]
    return max(whole, key=lambda group: min(row["n_tokens"] for row in group), default=[])


def _counted(name: str) -> Callable[[Sequence[Row], int], list[Row]]:
    """Choose the counts of a class of neurons, unless there are none of it in the whole model."""

    def choose(rows: Sequence[Row], n_layers: int) -> list[Row]:  # noqa: ARG001
        own = [row for row in rows if row["class"] == name and row["min_kurtosis"] == row["threshold"]]
        return own if any(row["n_units"] for row in own) else []

    return choose


def _probes(rows: Sequence[Row], n_layers: int) -> list[Row]:  # noqa: ARG001
    """Choose the probes of the run that has the most items, of all runs of the model."""
    own = sorted((row for row in rows if row["features"] == "interaction"), key=lambda row: row["run"])
    runs = [list(group) for _, group in groupby(own, lambda row: row["run"])]
    return max(runs, key=lambda group: group[0]["n_dev"], default=[])


_SOURCES = {
    "kl_drop": _Source(
        "intervention_summary", "kl_nats", "the KL divergence that dropping a layer makes", "nats", "layer", _drops,
        "not every layer was dropped: layerlake intervene LAKE --run {run} --drop all",
    ),
    "attention_previous_5": _Source(
        "attention_locality", "cumulative_weight", "attention to the previous 5 tokens", "share", "layer",
        _where(distance=5), "",
    ),
    "prediction_density": _Source(
        "neuron_counts", "density", "the density of prediction neurons", "share", "layer", _counted("prediction"),
        "no neuron of the model is a prediction neuron",
    ),
    "suppression_density": _Source(
        "neuron_counts", "density", "the density of suppression neurons", "share", "layer", _counted("suppression"),
        "no neuron of the model is a suppression neuron",
    ),
    "lens_kl": _Source(
        "lens", "kl_final_lens_nats", "the KL divergence from the output to the lens", "nats", "boundary", _where(),
        "",
    ),
    "lens_entropy": _Source("lens", "entropy_bits", "the entropy of the lens", "bits", "boundary", _where(), ""),
    "mlp_norm": _Source(
        "norms", "mean_norm", "the norm of the MLP's output", "length", "layer", _where(component="mlp_out"), ""
    ),
    "wic_accuracy": _Source(
        "wic_summary", "accuracy", "the accuracy of probes of word in context", "share", "boundary", _probes,
        "no run of the model has been probed: layerlake analyze LAKE wic, after layerlake capture LAKE … --task wic",
    ),
}  # fmt: skip


def read_profiles(run: Run, inputs: Mapping[str, Input]) -> dict[str, Profile]:
    """Return the profiles of a run by name. Reads tables of a few rows a layer only."""
    rows = {view: [row for table in it.tables() for row in table.to_pylist()] for view, it in inputs.items()}
    return {
        name: _profile(run, source, source.choose(rows[source.view], run.shape.n_layers), inputs[source.view])
        for name, source in _SOURCES.items()
    }


def _profile(run: Run, source: _Source, rows: Sequence[Row], found: Input) -> Profile:
    rows = sorted(rows, key=lambda row: row[source.kind])
    columns = (source.column, f"{source.column}_lo", f"{source.column}_hi")
    values = np.array([[row.get(name) for name in columns] for row in rows], dtype=np.float64).reshape(-1, 3)
    lacking = None if rows else found.lacking or source.help.format(run=run.run_id)
    if np.isnan(values[:, 0]).any():
        lacking = next(row["reason"] for row in rows if row[source.column] is None)
    depth = [relative_depth(source.kind, row[source.kind], run.shape.n_layers, "paper") for row in rows]
    remarks = [row["note"] for row in rows if row.get("note")]
    remarks += [f"from run {row['run']}" for row in rows if row["run"] != run.run_id]
    note = "; ".join(dict.fromkeys(remarks)) or None
    return Profile(source.what, source.unit, source.kind, values, np.array(depth), note, lacking)
