"""Tasks: datasets of questions with answers, as documents with a role, a label and the span that matters.

``wic`` asks whether a word means the same in two sentences. ``arc_easy``, ``hellaswag`` and ``lambada`` are scored by
the likelihood of a continuation, as lm-evaluation-harness scores them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalog.errors import CorpusError, PlanError, did_you_mean
from .encoder import TextEncoder
from .items import Item, Question, Span, WordPair
from .placement import EncodedDocument, Prompt
from .rows import Rows, open_rows

if TYPE_CHECKING:
    from .spec import CaptureSpec

__all__ = ["TASKS", "Task", "TaskCorpus", "open_task"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A task, and the columns in which datasets have its items."""

    name: str
    forms: Mapping[tuple[str, ...], Callable[[Row], Item]]
    """Columns → what reads an item from them; the first whose columns are all there is taken."""
    bos_of_tokenizer: bool
    """Whether documents begin with what the tokenizer itself begins a text with, as in lm-evaluation-harness (since
    0.4.10; before, with nothing): nothing for GPT-2, Pythia, Phi and Qwen, BOS for Llama."""


def _words_by_index(row: Row) -> WordPair:
    """Read an item of WiC 1.0: ``idx1`` and ``idx2`` count words between blanks."""
    sentences = _text(row, "sentence1"), _text(row, "sentence2")
    targets = _word_at(sentences[0], "idx1", row), _word_at(sentences[1], "idx2", row)
    return WordPair(_text(row, "word"), sentences, targets, _label(row, "label", 2))


def _word_at(sentence: str, column: str, row: Row) -> Span:
    words = list(re.finditer(r"\S+", sentence))
    index = row[column]
    if not isinstance(index, int) or not 0 <= index < len(words):
        raise ValueError(f"{column} is {index}, but the sentence has {len(words)} words")
    return words[index].span()


def _words_by_offset(row: Row) -> WordPair:
    """Read an item as SuperGLUE has it: ``start1`` … ``end2`` count characters."""
    sentences = _text(row, "sentence1"), _text(row, "sentence2")
    targets = []
    for number, sentence in enumerate(sentences, start=1):
        start, end = row[f"start{number}"], row[f"end{number}"]
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(sentence)):
            raise ValueError(
                f"start{number} and end{number} are {start} and {end}, but the sentence has {len(sentence)} characters"
            )
        targets.append((start, end))
    return WordPair(_text(row, "word"), sentences, (targets[0], targets[1]), _label(row, "label", 2))


def _arc(row: Row) -> Question:
    """Read an item as ``allenai/ai2_arc`` on the hub has it."""
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise ValueError("choices have no text and label")
    texts, names = _texts(choices, "text"), list(choices["label"])
    if len(texts) != len(names) or row["answerKey"] not in names:
        raise ValueError(f"answerKey is {row['answerKey']!r}, not one of {', '.join(map(str, names))}")
    return Question(f"Question: {_text(row, 'question')}\nAnswer:", texts, names.index(row["answerKey"]))


def _arc_formatted(row: Row) -> Question:
    """Read an item whose ``question`` is the whole prompt already."""
    choices = _texts(row, "choices")
    return Question(_text(row, "question"), choices, _label(row, "gold", len(choices)))


def _hellaswag(row: Row) -> Question:
    """Read an item of ``Rowan/hellaswag`` on the hub; clean it as lm-evaluation-harness (``hellaswag/utils.py``)."""
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    endings = tuple(_clean(ending) for ending in _texts(row, "endings"))
    return Question(_clean(context), endings, _label(row, "label", len(endings)))


def _clean(text: str) -> str:
    """Take out what WikiHow has left in a text."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag_cleaned(row: Row) -> Question:
    endings = _texts(row, "endings")
    return Question(_text(row, "ctx"), endings, _label(row, "label", len(endings)))


def _lambada(row: Row) -> Question:
    return Question(_text(row, "context"), (_text(row, "continuation").removeprefix(" "),))


def _lambada_text(row: Row) -> Question:
    """Read an item of ``EleutherAI/lambada_openai`` on the hub: the last word is the continuation."""
    context, _, word = _text(row, "text").rpartition(" ")
    return Question(context, (word,))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} holds a {type(value).__name__}, not text")
    return value


def _texts(row: Row, column: str) -> tuple[str, ...]:
    value = row[column]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{column} holds no list of texts")
    return tuple(value)


def _label(row: Row, column: str, n_labels: int) -> int:
    """Return a label: a number below ``n_labels``, also as text or as a truth value."""
    value = row[column]
    known = {str(number): number for number in range(n_labels)} | (
        {"False": 0, "True": 1} if n_labels == 2 else {}
    )
    if str(value) not in known:
        raise ValueError(f"{column} is {value!r}, not a number from 0 to {n_labels - 1}")
    return known[str(value)]


TASKS = {
    task.name: task
    for task in (
        Task(
            "wic",
            {
                ("word", "sentence1", "sentence2", "idx1", "idx2", "label"): _words_by_index,
                (
                    "word",
                    "sentence1",
                    "sentence2",
                    "start1",
                    "end1",
                    "start2",
                    "end2",
                    "label",
                ): _words_by_offset,
            },
            bos_of_tokenizer=False,
        ),
        Task(
            "arc_easy",
            {("question", "choices", "answerKey"): _arc, ("question", "choices", "gold"): _arc_formatted},
            bos_of_tokenizer=True,
        ),
        Task(
            "hellaswag",
            {
                ("activity_label", "ctx_a", "ctx_b", "endings", "label"): _hellaswag,
                ("ctx", "endings", "label"): _hellaswag_cleaned,
            },
            bos_of_tokenizer=True,
        ),
        Task(
            "lambada",
            {("context", "continuation"): _lambada, ("text",): _lambada_text},
            bos_of_tokenizer=True,
        ),
    )
}
"""The tasks by name."""


@dataclass(frozen=True, slots=True)
class TaskCorpus:
    """The items of a task, of one split after the other. All documents of an item are stored, or none."""

    task: Task
    splits: tuple[tuple[str | None, Rows], ...]

    @property
    def description(self) -> str:
        """The task and its datasets."""
        return f"{self.task.name}: {', '.join(rows.description for _, rows in self.splits)}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The task, and for each split its name and rows."""
        splits = [{"name": name, **rows.fingerprint} for name, rows in self.splits]
        return {"task": self.task.name, "splits": splits}

    @property
    def bos_of_tokenizer(self) -> bool:
        """See :attr:`Task.bos_of_tokenizer`."""
        return self.task.bos_of_tokenizer

    def units(self, encoder: TextEncoder, skip: int = 0) -> Iterator[tuple[EncodedDocument, ...]]:
        """Yield the documents of one item at a time (``Corpus.units``). What is skipped is read and not tokenised.

        Raises
        ------
        CorpusError
            A dataset lacks a column, an item is not one of the task, or (wic) the tokenizer cannot tell which
            characters a token stands for.
        """
        if self.task.name == "wic" and not encoder.tokenizer.is_fast:
            raise CorpusError(
                f"{type(encoder.tokenizer).__name__} is a slow tokenizer: it does not say which characters a token "
                "stands for, so the word of a wic item cannot be found.",
                hint="Use the model's fast tokenizer: --tokenizer PATH_OR_ID of a copy with tokenizer.json.",
            )
        for split, rows in self.splits:
            for number, source, item in self._items(rows):
                if skip > 0:
                    skip -= item.n_documents
                    continue
                yield tuple(self._documents(encoder, item, source, split, number))

    def _items(self, rows: Rows) -> Iterator[tuple[int, str, Item]]:
        columns = self._columns(rows)
        read = self.task.forms[columns]
        for number, row in rows.read(columns):
            source = f"{rows.description}#{number}"
            try:
                item = read(row)
            except ValueError as error:
                raise CorpusError(f"{source} is no item of {self.task.name}: {error}.") from error
            yield number, source, item

    def _columns(self, rows: Rows) -> tuple[str, ...]:
        """Return the columns of the first form that the rows have."""
        for columns in self.task.forms:
            if set(columns) <= set(rows.columns):
                return columns
        nearest = min(self.task.forms, key=lambda columns: len(set(columns) - set(rows.columns)))
        missing = [name for name in nearest if name not in rows.columns]
        raise CorpusError(
            f"The dataset '{rows.description}' has no column '{missing[0]}'; it has {', '.join(rows.columns)}."
            f"{did_you_mean(missing[0], rows.columns)}",
            hint=f"Items of {self.task.name} have the columns {'; or '.join(map(', '.join, self.task.forms))}.",
        )

    def _documents(
        self, encoder: TextEncoder, item: Item, source: str, split: str | None, number: int
    ) -> Iterator[EncodedDocument]:
        drafts = list(item.drafts(encoder, source))
        refusal = next((f"{draft.role}: {draft.refusal}" for draft in drafts if draft.refusal), None)
        for draft in drafts:
            prompt = Prompt(
                task=self.task.name,
                split=split,
                item=number,
                role=draft.role,
                label=item.label,
                word=item.word if isinstance(item, WordPair) else None,
                span=None if refusal else draft.span,
                span_chars=draft.span_chars,
            )
            ids = draft.token_ids[:0] if refusal else draft.token_ids
            yield EncodedDocument((source,), ids, draft.n_source_tokens, refusal, prompt)


def open_task(spec: CaptureSpec) -> TaskCorpus:
    """Find the datasets of a task: ``--dataset``, of the hub with its splits, or the files that ``--split`` names.

    Raises
    ------
    PlanError
        There is no saying which datasets the task has.
    CorpusError
        A dataset is not there, or cannot be fingerprinted.
    """
    return TaskCorpus(
        TASKS[spec.task or ""], tuple(_open_split(spec, *named) for named in _name_splits(spec))
    )


def _name_splits(spec: CaptureSpec) -> list[tuple[str | None, str]]:
    """Return the name and the dataset of every split."""
    parts = [part.strip() for part in spec.split.split(",")] if spec.split else []
    pairs = [part.partition("=") for part in parts]
    if spec.dataset is None:
        if not parts or not all(name and path for name, _, path in pairs):
            raise PlanError(
                f"The items of {spec.task} are nowhere: there is no dataset"
                + (f", and '{spec.split}' names no files." if parts else "."),
                hint="Name one file (--dataset FILE), one a split (--split train=FILE,dev=FILE), or a hub dataset.",
            )
        named: list[tuple[str | None, str]] = [(name, path) for name, _, path in pairs]
        missing = next((path for _, path in named if not Path(path).expanduser().exists()), None)
        if missing is not None:
            raise CorpusError(f"The dataset file '{missing}' does not exist.")
    else:
        dataset = os.fspath(spec.dataset)
        if any("=" in part for part in parts):
            raise PlanError(
                f"The items of {spec.task} are in '{dataset}' and in the files of --split {spec.split}: which?",
                hint="Leave --dataset out, or the files.",
            )
        if parts and Path(dataset).expanduser().exists():
            raise PlanError(
                f"'{dataset}' is a file and has no split '{spec.split}'.",
                hint=f"To call it so: --split {parts[0]}={dataset} without --dataset.",
            )
        is_file = Path(dataset).expanduser().exists()
        named = [(name, dataset) for name in parts] or [(None if is_file else "train", dataset)]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PlanError(f"--split {spec.split} names '{twice}' twice.")
    return named


def _open_split(spec: CaptureSpec, name: str | None, dataset: str) -> tuple[str | None, Rows]:
    rows = open_rows(
        dataset,
        config=spec.dataset_config,
        split=name if spec.dataset is not None else None,
        revision=spec.dataset_revision,
        sample_by=spec.sample_by,
        shuffle_buffer=spec.shuffle_buffer or 0,
        seed=spec.seed or 0,
    )
    return name, rows
