"""The items of a wic run: pairs of sentences about a word, and the rows in which the word lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.errors import AnalysisError
from ..catalog.run import Run

__all__ = ["DEV_SPLITS", "HELD_OUT", "MIN_PER_CLASS", "WicItems", "choose_items", "hold_out_words"]

DEV_SPLITS = ("dev", "validation", "val")
"""What the split to test on is called: in WiC 1.0, on the hub, and elsewhere."""

MIN_PER_CLASS = 20
"""Items of each label that a split needs: an accuracy over fewer has a standard error above 0.08."""

HELD_OUT = 0.1
"""The share of the words of train on which C is chosen."""


@dataclass(frozen=True, slots=True)
class WicItems:
    """The pairs of sentences: those of train first, in each split in the order of its dataset."""

    labels: npt.NDArray[np.bool_]
    """``[item]``: whether the word means the same."""
    words: npt.NDArray[np.str_]
    """``[item]``: the word, as a dictionary has it."""
    spans: npt.NDArray[np.int64]
    """``[item, sentence, 2]``: the first row of the word, and the one after its last."""
    n_train: int
    n_left_out: int
    """Items of the two splits of which a sentence was refused or is excluded, or that have no label."""
    dev_split: str


def choose_items(run: Run, train: str, dev: str, *, pooling: Literal["last", "mean"]) -> WicItems:
    """Find the pairs of sentences of two splits; reads the documents table alone.

    Parameters
    ----------
    run : Run
        A run of the task wic.
    train, dev : str
        The splits; ``auto`` is the first of ``DEV_SPLITS`` there is.
    pooling : {'last', 'mean'}
        Whether the rows of a word are that of its last token, or those of all.

    Raises
    ------
    AnalysisError
        The run holds no wic documents, lacks a split, or has too few items of a label.
    """
    documents = run.documents.filter(pc.equal(run.documents["task"], "wic"))
    if not documents.num_rows:
        raise AnalysisError(
            f"Run {run.run_id} holds no documents of the task wic, but those of '{run.manifest.dataset}'.",
            hint="Capture them: layerlake capture LAKE --model … --task wic --split train=FILE,dev=FILE --for wic; "
            "or name the runs that hold them: --run RUN.",
        )
    splits = _choose_splits(run, documents, train, dev)
    sentences: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in documents.to_pylist():
        if row["split"] in splits:
            sentences.setdefault((row["split"], row["item"]), {})[row["role"]] = row
    whole = {
        place: (pair["sentence1"], pair["sentence2"])
        for place, pair in sentences.items()
        if all(_is_usable(run, pair.get(role)) for role in ("sentence1", "sentence2"))
    }
    places = sorted(whole, key=lambda place: (splits.index(place[0]), place[1]))
    labels = np.array([whole[place][0]["label"] == 1 for place in places], dtype=np.bool_)
    n_train = sum(split == splits[0] for split, _ in places)
    for split, own in zip(splits, (labels[:n_train], labels[n_train:]), strict=True):
        _require_both_labels(run, split, own)
    return WicItems(
        labels,
        np.array([whole[place][0]["word"] or "" for place in places]),
        np.array([[_span(row, pooling) for row in whole[place]] for place in places], dtype=np.int64),
        n_train,
        len(sentences) - len(whole),
        splits[1],
    )


def _is_usable(run: Run, row: Mapping[str, Any] | None) -> bool:
    if row is None or row["status"] == "refused" or row["document"] in run.excluded:
        return False
    return row["label"] is not None


def _span(row: Mapping[str, Any], pooling: str) -> tuple[int, int]:
    """Return the rows whose mean stands for the word."""
    start, end = row["row_start"] + row["span_start"], row["row_start"] + row["span_end"]
    return (end - 1 if pooling == "last" else start), end


def _choose_splits(run: Run, documents: pa.Table, train: str, dev: str) -> tuple[str, str]:
    """Return the names of the split to fit on and of that to report on."""
    held = sorted(name or "" for name in documents["split"].unique().to_pylist())
    wanted = (dev,) if dev != "auto" else DEV_SPLITS
    if train in wanted:
        raise AnalysisError(f"A probe is not to be tested on what it was fitted to, the split '{train}'.")
    found = next((name for name in wanted if name in held), None)
    if train in held and found is not None:
        return train, found
    missing = train if train not in held else "' or '".join(wanted)
    there = ", ".join(f"'{name}'" for name in held if name)
    raise AnalysisError(
        f"Run {run.run_id} holds no wic items of a split '{missing}'; "
        + (f"its splits are {there}." if there else "its items are of no named split."),
        hint="Capture both splits, whole, into one run: layerlake capture LAKE --model … --task wic --split "
        "train=FILE,dev=FILE --for wic" + ("; or name others: --train-split, --dev-split." if there else "."),
    )


def _require_both_labels(run: Run, split: str, labels: npt.NDArray[np.bool_]) -> None:
    n_same, n_items = int(labels.sum()), len(labels)
    if min(n_same, n_items - n_same) >= MIN_PER_CLASS:
        return
    if n_items and n_same in {0, n_items}:
        raise AnalysisError(
            f"All {n_items} wic items of the split '{split}' of run {run.run_id} have the label {int(n_same > 0)}.",
            hint="A probe needs both: check the column 'label' of the file that was captured.",
        )
    raise AnalysisError(
        f"The split '{split}' of run {run.run_id} has {n_items} wic items that can be used: {n_same} in which the "
        f"word means the same, and {n_items - n_same} in which it does not; {MIN_PER_CLASS} of each are needed.",
        hint="Capture more of them: without --max-tokens, or with a larger one.",
    )


def hold_out_words(run: Run, items: WicItems, n_seeds: int) -> npt.NDArray[np.bool_]:
    """Draw the tenth of the words of train on which C is chosen: ``[seed, item of train]``.

    Raises
    ------
    AnalysisError
        There is one word, or the others have one label.
    """
    from sklearn.model_selection import GroupShuffleSplit

    words, labels = items.words[: items.n_train], items.labels[: items.n_train]
    if len(np.unique(words)) < 2:
        raise AnalysisError(
            f"All {items.n_train} wic items to fit on of run {run.run_id} are about the word '{words[0]}'; C is "
            "chosen on other words than the probe is fitted to.",
            hint="Capture items of more words.",
        )
    held_out = np.zeros((n_seeds, items.n_train), dtype=np.bool_)
    for seed, held in enumerate(held_out):
        ((_, chosen),) = GroupShuffleSplit(1, test_size=HELD_OUT, random_state=seed).split(
            words, groups=words
        )
        held[chosen] = True
        if len(np.unique(labels[~held])) < 2:
            raise AnalysisError(
                f"With seed {seed}, the wic items of run {run.run_id} outside of the words on which C is chosen all "
                f"have the label {int(labels[~held][0])}.",
                hint="Capture items of more words.",
            )
    return held_out
