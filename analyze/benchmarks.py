"""Benchmarks under interventions: LAMBADA, ARC-Easy and HellaSwag from the likelihoods of answers.

After arXiv 2406.19384, Figures 15 and 16; scored as lm-evaluation-harness does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from .inputs import Input, NoOptions
from .intervals import standard_error
from .intervention_summary import Measured, intervention_columns, measure_interventions
from .statistic import tidy_table

__all__ = ["BENCHMARKS_VERSION", "BENCHMARKS_VIEWS", "SCORED_TASKS", "score_benchmarks"]

BENCHMARKS_VERSION = 2
BENCHMARKS_VIEWS = ("benchmarks",)

SCORED_TASKS = ("lambada", "arc_easy", "hellaswag")
"""Those whose items are scored by the likelihoods of answers."""

_SCORES = ("acc", "acc_norm", "item_loss_nats")

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Items:
    """The items of one split of a task."""

    task: str
    split: str | None
    documents: Ints
    """Of each answer: ``[item, choice]``, refused ones included, -1 behind an item's last choice."""
    labels: Ints
    """The number of each item's right choice; 0 where there is but one continuation."""


@dataclass(frozen=True, slots=True)
class _Answers:
    """What each document's answer is, by the number of the document."""

    n_tokens: Ints
    """0 where it is refused."""
    n_chars: Doubles


def score_benchmarks(run: Run, options: NoOptions, inputs: Mapping[str, Input]) -> dict[str, pa.Table]:  # noqa: ARG001
    """Return ``benchmarks``: a row for each intervention and split.

    An item counts if all tokens of all its answers were looked at; the others are ``n_left_out``. ``acc``: the
    continuation is what the model would have said, token by token (lambada), or the right choice has the highest
    summed log-probability; ``acc_norm``: the highest a character of the choice. ``item_loss_nats``: the mean over items
    of a continuation's negative log-likelihood, and ``perplexity`` its exponential. Standard errors are those of a mean
    over items. ``kl_noop_nats`` is what resuming at that boundary alone does, at the beginnings of a few documents.

    Raises
    ------
    AnalysisError
        The run is of no task that is scored by likelihoods, or has no rows.
    """
    documents = run.documents
    task = next((name for name in SCORED_TASKS if name in pc.unique(documents["task"]).to_pylist()), None)
    if task is None:
        raise AnalysisError(
            f"Run {run.run_id} is of none of the tasks {', '.join(SCORED_TASKS)}: it has no answers to score.",
            hint="Capture one: layerlake capture LAKE … --task lambada --dataset FILE",
        )
    whole = measure_interventions(run, inputs["interventions"], ["loss_nats", "correct", "kl_nats"])
    measured = [m for m in whole if m.kind != "noop"]  # whose tokens are not the answers'
    floors = {
        (m.request, m.resumes_at): m.sums[:, 2].sum() / m.counts.sum() for m in whole if m.kind == "noop"
    }
    floor = [np.nan if m.kind == "none" else floors.get((m.request, m.resumes_at), np.nan) for m in measured]
    answers = _answers(documents)
    splits = _items(task, documents)
    rows = [_score(items, m, answers) for items in splits for m in measured]
    if not any(row["n_items"] for row in rows):
        raise AnalysisError(
            f"Run {run.run_id} has no item all of whose answers were looked at.",
            hint=f"Look at more documents: layerlake intervene LAKE --run {run.run_id} …",
        )
    columns: dict[str, Any] = {
        "task": task,
        "split": pa.array([row["split"] for row in rows], pa.string()),
        **intervention_columns(measured * len(splits)),
        **{name: np.array([row[name] for row in rows]) for name in ("n_items", "n_left_out")},
    }
    for name in _SCORES:
        columns |= {key: np.array([row[key] for row in rows]) for key in (name, f"{name}_stderr")}
    columns |= {
        "perplexity": np.array([row["perplexity"] for row in rows]),
        "kl_noop_nats": np.array(floor * len(splits)),
        "is_resumed": np.array([m.is_resumed for m in measured * len(splits)]),
        "variant": [m.variant for m in measured * len(splits)],
        "reason": [row["reason"] for row in rows],
    }
    return {BENCHMARKS_VIEWS[0]: tidy_table(run.run_id, columns, {})}


def _answers(documents: pa.Table) -> _Answers:
    spans = [pc.fill_null(documents[f"span_{name}"], 0).to_numpy() for name in ("start", "end", "chars")]
    numbers = documents["document"].to_numpy()
    n_tokens, n_chars = np.zeros(numbers.max() + 1, dtype=np.int64), np.zeros(numbers.max() + 1)
    start, end, n_chars[numbers] = spans
    n_tokens[numbers] = end - start
    return _Answers(n_tokens, n_chars)


def _items(task: str, documents: pa.Table) -> list[_Items]:
    """Return the items of each split, in the order of the documents table."""
    members: dict[str | None, dict[int, dict[int, int]]] = {}
    labels: dict[str | None, dict[int, int]] = {}
    for row in documents.select(["document", "split", "item", "role", "label"]).to_pylist():
        split, item = row["split"], row["item"]
        choice = int(row["role"].removeprefix("choice")) if row["label"] is not None else 0
        members.setdefault(split, {}).setdefault(item, {})[choice] = row["document"]
        labels.setdefault(split, {})[item] = row["label"] or 0
    found = []
    for split, items in members.items():
        numbers = np.full((len(items), max(map(len, items.values()))), -1)
        for row, choices in zip(numbers, items.values(), strict=True):
            row[list(choices)] = list(choices.values())
        found.append(_Items(task, split, numbers, np.array(list(labels[split].values()))))
    return found


def _score(items: _Items, measured: Measured, answers: _Answers) -> dict[str, Any]:
    """Return what one intervention makes of one split."""
    n_seen = np.zeros(len(answers.n_tokens), dtype=np.int64)
    n_right, loss = np.zeros(len(n_seen)), np.full(len(n_seen), np.nan)
    n_seen[measured.documents] = measured.counts
    loss[measured.documents], n_right[measured.documents] = measured.sums[:, :2].T
    is_whole = (n_seen == answers.n_tokens) & (n_seen > 0)
    counts = (is_whole[items.documents] | (items.documents < 0)).all(axis=1)
    documents, labels = items.documents[counts], items.labels[counts]
    none = np.empty(0)
    if items.task == "lambada":
        first = documents[:, 0]
        acc, acc_norm, nats = n_right[first] == answers.n_tokens[first], none, loss[first]
    else:
        likelihood = np.where(documents < 0, -np.inf, -loss[documents])
        chars = answers.n_chars[documents]
        # a choice without characters cannot be chosen
        per_char = np.divide(likelihood, chars, out=np.full(chars.shape, -np.inf), where=chars > 0)
        acc, acc_norm, nats = likelihood.argmax(axis=1) == labels, per_char.argmax(axis=1) == labels, none
    n_items = len(documents)
    row: dict[str, Any] = {"split": items.split, "n_items": n_items, "n_left_out": len(counts) - n_items}
    for name, values in zip(_SCORES, (acc, acc_norm, nats), strict=True):
        row[name], row[f"{name}_stderr"] = _mean(values.astype(np.float64))
    perplexity = np.exp(row["item_loss_nats"])
    return row | {"perplexity": perplexity, "reason": _reason(items.task, n_items)}


def _mean(values: Doubles) -> tuple[float, float]:
    """Return the mean and its standard error."""
    mean = float(values.mean()) if len(values) else np.nan
    return mean, float(standard_error(values))


def _reason(task: str, n_items: int) -> str:
    """Return why something of a row is NULL."""
    why = (
        "no acc_norm: an item has but one continuation"
        if task == "lambada"
        else "no loss and no perplexity: of choices"
    )
    if n_items == 0:
        return "no score: of no item all answers were looked at"
    return why if n_items > 1 else f"{why}; no standard errors: it is one item"
