"""Interventions summed up: how much the output changes, on average, where layers are dropped, swapped or repeated.

After arXiv 2406.19384, §3.1 and §4.4, Figures 5, 11 and 13, and Figure 3 of its first version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from ..catalog.schedules import Kind
from .inputs import Input, NoOptions
from .intervals import bootstrap_sums, percentile_interval, ratio
from .statistic import tidy_table

__all__ = [
    "INTERVENTION_SUMMARY_VERSION",
    "INTERVENTION_SUMMARY_VIEWS",
    "Measured",
    "intervention_columns",
    "measure_interventions",
    "summarise_interventions",
]

INTERVENTION_SUMMARY_VERSION = 1
INTERVENTION_SUMMARY_VIEWS = ("intervention_summary",)

_MEASURES = {
    "kl_nats": "kl_nats",
    "agreement": "agree",
    "accuracy": "correct",
    "loss_nats": "loss_nats",
    "delta_loss_nats": "delta_loss_nats",
    "entropy_bits": "entropy_bits",
    "delta_entropy_bits": "delta_entropy_bits",
}
"""What is shown → the column whose mean it is."""

_IDENTITY = ("positions", "is_resumed", "kind", "layer", "span", "schedule", "resumes_at")
_KINDS = get_args(Kind)

_FLOOR_SHARE = 0.1
"""The floor is well below an effect that is ten times as large."""

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Measured:
    """One intervention, and what it comes to in each of the documents that it was done to."""

    positions: int | None
    is_resumed: bool
    kind: str
    layer: int | None
    span: int | None
    schedule: str
    resumes_at: int
    documents: Ints
    """Ascending."""
    counts: Ints
    """Tokens that were looked at: ``[document]``."""
    sums: Doubles
    """Over these tokens: ``[document, measure]``."""

    @property
    def request(self) -> tuple[bool, int, bool]:
        """What interventions that can be compared have in common, as something to sort by."""
        return self.positions is not None, self.positions or 0, not self.is_resumed

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands in a table."""
        within = self.span or 0, -1 if self.layer is None else self.layer, self.schedule
        return *self.request, _KINDS.index(self.kind), *within

    @property
    def variant(self) -> str:
        """``authors`` where repeated layers see stale keys and values, as in the authors' script."""
        return "authors" if "(stale)" in self.schedule else "default"


def measure_interventions(run: Run, rows: Input, measures: Sequence[str]) -> list[Measured]:
    """Add up the rows of each intervention and document. Holds one part at a time, and the sums.

    Parameters
    ----------
    run : Run
        Documents that it leaves out are left out.
    rows : Input
        The parts of the view ``interventions``.
    measures : sequence of str
        Columns of the rows.

    Raises
    ------
    AnalysisError
        There are no rows, or a value is not finite.
    """
    keys = [*_IDENTITY, "document"]
    parts = [_add_up(table, keys, measures) for table in rows.tables()]
    if not any(map(len, parts)):
        raise AnalysisError(
            f"Run {run.run_id} has no rows of interventions.",
            hint=f"Make them: layerlake intervene LAKE --run {run.run_id} --drop all --swap all",
        )
    whole = pa.concat_tables(parts)
    whole = whole.filter(np.isin(whole["document"].to_numpy(), list(run.excluded), invert=True))
    # two processes may have stored the same at the same moment: it counts once
    values = [*measures, "n_rows"]
    once = whole.group_by(keys, use_threads=False).aggregate([(name, "first") for name in values])
    together = once.rename_columns([*keys, *values]).group_by(list(_IDENTITY), use_threads=False)
    lists = together.aggregate([(name, "list") for name in ("document", *values)])
    found = [_measured(row, lists, measures) for row in range(len(lists))]
    for item in found:
        if not np.isfinite(item.sums).all():
            raise AnalysisError(
                f"Run {run.run_id} holds rows of {item.kind} {item.schedule} that are not finite.",
                hint="Nothing was averaged over them. Leave out the documents: --exclude-nonfinite.",
            )
    return sorted(found, key=lambda item: item.place)


def _add_up(table: pa.Table, keys: list[str], measures: Sequence[str]) -> pa.Table:
    sums = [(name, "sum") for name in measures]
    added = table.group_by(keys, use_threads=False).aggregate([*sums, ([], "count_all")])
    return added.rename_columns([*keys, *measures, "n_rows"])


def _measured(row: int, lists: pa.Table, measures: Sequence[str]) -> Measured:
    def column(name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = lists[f"{name}_list"][row].values.to_numpy()
        return values

    order = np.argsort(column("document"))
    sums = np.stack([column(name).astype(np.float64) for name in measures], axis=1)[order]
    identity = {name: lists[name][row].as_py() for name in _IDENTITY}
    return Measured(
        **identity, documents=column("document")[order], counts=column("n_rows")[order], sums=sums
    )


def intervention_columns(measured: Sequence[Measured]) -> dict[str, pa.Array]:
    """Return the columns that say which interventions these are."""
    types = {"kind": pa.string(), "layer": pa.int32(), "span": pa.int32(), "schedule": pa.string()}
    types |= {"resumes_at": pa.int32()}
    return {name: pa.array([getattr(m, name) for m in measured], kind) for name, kind in types.items()}


def summarise_interventions(run: Run, options: NoOptions, inputs: Mapping[str, Input]) -> dict[str, pa.Table]:  # noqa: ARG001
    """Return ``intervention_summary``: a row for each intervention, means over its tokens.

    ``relative_accuracy`` is the accuracy divided by the unmodified model's at the same tokens. ``kl_noop_nats`` is
    what resuming at that boundary alone does, with nothing changed, in the few documents in which it is measured.
    The documents of all interventions are drawn again together, so that those of the same tokens vary as one.
    """
    measured = measure_interventions(run, inputs["interventions"], list(_MEASURES.values()))
    rows = [row for _, group in groupby(measured, lambda m: m.request) for row in _rows(run, list(group))]
    columns: dict[str, Any] = {**intervention_columns(measured)}
    for name in rows[0]:
        values = [row[name] for row in rows]
        columns[name] = values if name in ("reason", "note") else np.array(values)
    reason, note = columns.pop("reason"), columns.pop("note")
    columns |= {
        "positions": pa.array([m.positions for m in measured], pa.int32()),
        "is_resumed": np.array([m.is_resumed for m in measured]),
        "variant": [m.variant for m in measured],
        "reason": reason,
        "note": note,
    }
    return {INTERVENTION_SUMMARY_VIEWS[0]: tidy_table(run.run_id, columns, {})}


def _rows(run: Run, measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """Yield the means of some interventions that can be compared."""
    base = next((m for m in measured if m.kind == "none"), None)
    documents = np.unique(np.concatenate([m.documents for m in measured]))
    n_measures = len(_MEASURES)
    correct = list(_MEASURES).index("accuracy")
    # of each document: the sums, the tokens that they are over, and what the unmodified model has right there
    by_document = np.zeros((len(documents), len(measured), n_measures + 2))
    comparable = [base is not None and _is_at_same_tokens(m, base) for m in measured]
    for i, m in enumerate(measured):
        at = np.searchsorted(documents, m.documents)
        by_document[at, i, :n_measures] = m.sums
        by_document[at, i, -2] = m.counts
        if base is not None and comparable[i]:
            by_document[at, i, -1] = base.sums[np.isin(base.documents, m.documents), correct]

    def means(totals: Doubles) -> Doubles:
        """Return the means, the relative accuracy last: ``[…, intervention, measure]``."""
        relative = ratio(totals[..., correct], totals[..., -1])
        return np.concatenate(
            [ratio(totals[..., :n_measures], totals[..., -2:-1]), relative[..., None]], axis=-1
        )

    n_documents = np.array([len(m.documents) for m in measured])
    shown = means(by_document.sum(axis=0))
    resampled = bootstrap_sums(by_document.reshape(len(documents), -1))
    replicates = means(resampled.reshape(-1, *by_document.shape[1:]))
    lo, hi = percentile_interval(replicates, n_documents=n_documents[:, None])
    kl = list(_MEASURES).index("kl_nats")
    floors = {m.resumes_at: shown[i, kl] for i, m in enumerate(measured) if m.kind == "noop"}
    names = list(_MEASURES)
    names = [*names[: correct + 1], "relative_accuracy", *names[correct + 1 :]]
    places = [*range(correct + 1), n_measures, *range(correct + 1, n_measures)]
    for i, m in enumerate(measured):
        row: dict[str, Any] = {}
        for name, at in zip(names, places, strict=True):
            row |= {name: shown[i, at], f"{name}_lo": lo[i, at], f"{name}_hi": hi[i, at]}
        floor = floors.get(m.resumes_at, np.nan)
        yield row | {
            "n_tokens": m.counts.sum(),
            "n_documents": n_documents[i],
            "kl_noop_nats": floor,
            "reason": _reason(m, shown[i, -1], floor, is_comparable=comparable[i]),
            "note": _note(run.manifest.dtype, m, shown[i, kl], floor),
        }


def _is_at_same_tokens(measured: Measured, base: Measured) -> bool:
    """Tell whether the unmodified model was looked at at the tokens of an intervention, and no others there."""
    same = np.isin(base.documents, measured.documents)
    return np.array_equal(base.documents[same], measured.documents) and np.array_equal(
        base.counts[same], measured.counts
    )


def _reason(measured: Measured, relative: float, floor: float, *, is_comparable: bool) -> str | None:
    """Return why something of a row is NULL."""
    why = []
    if len(measured.documents) < 2:
        why.append("no intervals: the tokens are all of one document")
    if not is_comparable:
        why.append("no relative accuracy: the unmodified model was looked at at other tokens")
    elif np.isnan(relative):
        why.append("no relative accuracy: the unmodified model is right at no token")
    if np.isnan(floor):
        if not measured.is_resumed:
            why.append("no floor: all blocks were run, none of them behind a stored boundary")
        elif measured.kind == "none":
            why.append("no floor: the unmodified model is read off the last boundary")
        else:
            why.append(f"no floor: it was not measured at boundary {measured.resumes_at}")
    return "; ".join(why) or None


def _note(dtype: str, measured: Measured, kl: float, floor: float) -> str | None:
    """Return a warning where an effect is hardly more than what storing the residual stream does."""
    if measured.kind in ("none", "noop") or not floor > _FLOOR_SHARE * kl:
        return None
    where = "above the effect" if floor > kl else "not well below the effect"
    return f"the floor of a {dtype} lake, {floor:.2g} nats, is {where}"
