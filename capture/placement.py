"""Where each document goes: whole into one partition, in order; and in which batch it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.layout import Geometry, n_pairs
from ..catalog.manifest import Partition
from ..catalog.tables import DOCUMENTS, TOKENS

__all__ = ["EncodedDocument", "Placement", "batch_documents", "place_documents"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a document is in a task."""

    task: str
    split: str | None
    item: int
    """The number of the item's row in its dataset."""
    role: str
    """``sentence1``, ``sentence2``; ``choice0`` …; ``continuation``."""
    label: int | None
    """The item's: whether a word means the same (1), or the number of the right choice."""
    word: str | None
    """The word in question, as a dictionary has it."""
    span: tuple[int, int] | None
    """The positions of the word or the continuation in the stored tokens, half-open; None if refused."""
    span_chars: int
    """The characters that the span stands for, without the blank that joins a continuation to its context."""

    def columns(self) -> dict[str, object]:
        """Return its columns of ``tables.DOCUMENTS``."""
        start, end = self.span or (None, None)
        return {
            "task": self.task,
            "split": self.split,
            "item": self.item,
            "role": self.role,
            "label": self.label,
            "word": self.word,
            "span_start": start,
            "span_end": end,
            "span_chars": self.span_chars,
        }


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One document after tokenisation."""

    sources: tuple[str, ...]
    """Where in the dataset it came from: one row, or the rows that are joined in a window."""
    token_ids: npt.NDArray[np.int32]
    """The tokens to store, BOS included, cut to the context; empty if refused."""
    n_source_tokens: int
    """Tokens before cutting, BOS included."""
    refusal: str | None = None
    """Why it is not stored."""
    prompt: Prompt | None = None
    """What it is in a task; None for plain text."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Documents with their places."""

    documents: pa.Table
    tokens: pa.Table
    partitions: tuple[Partition, ...]


def place_documents(
    encoded: Sequence[EncodedDocument],
    geometry: Geometry,
    *,
    first_document: int = 0,
    first_partition: int = 0,
) -> Placement:
    """Give every document its rows and pairs, filling partitions in order.

    Parameters
    ----------
    encoded : sequence of EncodedDocument
        The documents in order.
    geometry : Geometry
        The run's.
    first_document, first_partition : int
        Where to go on counting; a partly filled partition of an earlier capture stays as it is.
    """
    rows: list[dict[str, object]] = []
    partitions: list[Partition] = []
    index, n_rows, pairs, n_documents = first_partition, 0, 0, 0
    stored: list[tuple[int, int, npt.NDArray[np.int32]]] = []
    for document, item in enumerate(encoded, start=first_document):
        row: dict[str, object] = {
            "document": document,
            "status": "stored",
            "reason": item.refusal,
            "sources": item.sources,
            "n_tokens": len(item.token_ids),
            "n_source_tokens": item.n_source_tokens,
            **(item.prompt.columns() if item.prompt else {}),
        }
        if item.refusal is not None:
            rows.append(row | {"status": "refused", "n_tokens": 0})
            continue
        n = len(item.token_ids)
        if n < item.n_source_tokens:
            row |= {"status": "cut", "reason": f"{item.n_source_tokens} tokens cut to the context of {n}"}
        if n_rows + n > geometry.partition_tokens:
            partitions.append(Partition(index, n_rows, pairs, n_documents))
            index, n_rows, pairs, n_documents = index + 1, 0, 0, 0
        row_start = index * geometry.partition_tokens + n_rows
        rows.append(
            row
            | {
                "partition": index,
                "row_start": row_start,
                "pair_start": index * geometry.partition_pairs + pairs,
            }
        )
        stored.append((document, row_start, item.token_ids))
        n_rows, pairs, n_documents = n_rows + n, pairs + n_pairs(n), n_documents + 1
    if n_documents:
        partitions.append(Partition(index, n_rows, pairs, n_documents))
    return Placement(pa.Table.from_pylist(rows, DOCUMENTS), _token_table(stored), tuple(partitions))


def _token_table(stored: Sequence[tuple[int, int, npt.NDArray[np.int32]]]) -> pa.Table:
    if not stored:
        return TOKENS.empty_table()
    columns = [
        np.concatenate([np.arange(row, row + len(ids), dtype=np.int64) for _, row, ids in stored]),
        np.concatenate([np.full(len(ids), document, dtype=np.int64) for document, _, ids in stored]),
        np.concatenate([np.arange(len(ids), dtype=np.int32) for _, _, ids in stored]),
        np.concatenate([ids for _, _, ids in stored]),
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=TOKENS)


def batch_documents(
    documents: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Group documents of like length into batches of at most ``batch_tokens`` padded tokens, longest first.

    A document longer than ``batch_tokens`` gets a batch of its own.

    Examples
    --------
    >>> batch_documents([0, 1, 2, 3], [5, 9, 4, 8], batch_tokens=18)
    ((1, 3), (0, 2))
    """
    order = sorted(range(len(documents)), key=lambda i: (-lengths[i], documents[i]))
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(documents[i])
    return tuple(tuple(batch) for batch in batches)
