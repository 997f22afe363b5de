"""Corpora: text and tasks, as documents. Text is one document a row, or rows joined in full windows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..catalog.errors import CorpusError, did_you_mean
from .encoder import TextEncoder
from .placement import EncodedDocument
from .rows import Rows, open_rows
from .tasks import open_task

if TYPE_CHECKING:
    from .spec import CaptureSpec

__all__ = ["Corpus", "TextCorpus", "encode_corpus", "open_corpus"]


class Corpus(Protocol):
    """What can be read again and gives the same documents. Nothing is opened before it is read."""

    @property
    def description(self) -> str:
        """For people: the hub id or the file's name."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides which texts there are, in which order; part of the run's identity."""

    @property
    def bos_of_tokenizer(self) -> bool:
        """Whether documents begin with what the tokenizer itself puts in front (:func:`resolve_bos`)."""

    def units(self, encoder: TextEncoder, skip: int = 0) -> Iterator[tuple[EncodedDocument, ...]]:
        """Yield, in order, what is stored together or not at all, leaving out the first ``skip`` documents.

        What follows does not depend on what was left out. Documents that are refused are among them and count.
        """


@dataclass(frozen=True, slots=True)
class TextCorpus:
    """Texts, one a row."""

    rows: Rows
    text_column: str = "text"
    pack: bool = False
    """Whether texts are joined in windows of the context's length."""

    @property
    def description(self) -> str:
        """The dataset's."""
        return self.rows.description

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """That of the rows; the column, and whether they are joined."""
        packed = {"pack": "concat"} if self.pack else {}
        return {**self.rows.fingerprint, "text_column": self.text_column, **packed}

    @property
    def bos_of_tokenizer(self) -> bool:
        """Never: a text gets a BOS whether its tokenizer gives it one or not."""
        return False

    def texts(self, skip: int = 0) -> Iterator[tuple[str, str]]:
        """Yield ``(source, text)`` in order, leaving out the first ``skip``; a missing text is empty.

        Raises
        ------
        CorpusError
            A row cannot be read, there are none, there is no such column, or it does not hold text.
        """
        column, hint = self.text_column, "Name the column that holds the text: --text-column NAME."
        if column not in self.rows.columns:
            raise CorpusError(
                f"The dataset '{self.description}' has no column '{column}'; it has {', '.join(self.rows.columns)}."
                f"{did_you_mean(column, self.rows.columns)}",
                hint=hint,
            )
        for number, row in self.rows.read([column], skip):
            source, text = f"{self.description}#{number}", row[column]
            if not isinstance(text, str | None):
                raise CorpusError(
                    f"{source} holds a {type(text).__name__} in column '{column}', not text.", hint=hint
                )
            yield source, text or ""

    def units(self, encoder: TextEncoder, skip: int = 0) -> Iterator[tuple[EncodedDocument, ...]]:
        """Yield documents one by one (:meth:`Corpus.units`). Of windows, those left out are tokenised all the same."""
        if self.pack:
            return ((window,) for window in islice(self._windows(encoder), skip, None))
        return ((_cut(document, encoder.context),) for document in self._documents(encoder, skip))

    def _documents(self, encoder: TextEncoder, skip: int = 0) -> Iterator[EncodedDocument]:
        """Yield each text, uncut; one that is too short is refused."""
        for source, text in self.texts(skip):
            ids = encoder.encode(text, source)
            if len(ids) >= encoder.min_tokens:
                yield EncodedDocument((source,), ids, len(ids))
            else:
                reason = f"{len(ids)} tokens, fewer than --min-tokens {encoder.min_tokens}"
                yield EncodedDocument((source,), ids[:0], len(ids), reason)

    def _windows(self, encoder: TextEncoder) -> Iterator[EncodedDocument]:
        """Yield windows that are full, and refuse what is left at the end.

        A window begins with BOS; so does each text in it. A text too short to be stored is refused as it comes.
        """
        opening = encoder.with_bos([], self.description).tolist()
        window, sources = [*opening], list[str]()
        for document in self._documents(encoder):
            if document.refusal is not None:
                yield document
                continue
            ids = document.token_ids[0 if sources else len(opening) :]
            while len(ids):
                n_free = encoder.context - len(window)
                window += ids[:n_free].tolist()
                sources += document.sources
                ids = ids[n_free:]
                if len(window) == encoder.context:
                    yield EncodedDocument(tuple(sources), np.array(window, dtype=np.int32), len(window))
                    window, sources = [*opening], []
        if sources:
            reason = f"{len(window)} tokens left at the end, no full window of {encoder.context}"
            yield EncodedDocument(tuple(sources), np.zeros(0, dtype=np.int32), len(window), reason)


def _cut(document: EncodedDocument, context: int) -> EncodedDocument:
    return replace(document, token_ids=document.token_ids[:context])


def open_corpus(spec: CaptureSpec) -> Corpus:
    """Find the text or the task that a spec names. Digests local files, asks the hub for revisions, reads nothing.

    Raises
    ------
    CorpusError
        A dataset is not there, or cannot be fingerprinted (:func:`layerlake.capture.rows.open_rows`).
    """
    if spec.task is not None:
        return open_task(spec)
    if spec.dataset is None:
        raise CorpusError("There is no dataset to read.", hint="Name one: --dataset FILE_OR_ID.")
    return TextCorpus(
        open_rows(
            os.fspath(spec.dataset),
            config=spec.dataset_config,
            split=spec.split,
            revision=spec.dataset_revision,
            sample_by=spec.sample_by,
            shuffle_buffer=spec.shuffle_buffer or 0,
            seed=spec.seed or 0,
        ),
        spec.text_column or "text",
        spec.pack is not None,
    )


def encode_corpus(
    corpus: Corpus, encoder: TextEncoder, *, max_tokens: int | None = None, skip: int = 0
) -> Iterator[EncodedDocument]:
    """Yield the documents of a corpus, up to the last unit that fits ``max_tokens`` whole.

    Parameters
    ----------
    corpus : Corpus
        What to read.
    encoder : TextEncoder
        How to tokenise it.
    max_tokens : int or None
        The most tokens to store; None for all.
    skip : int
        Documents, refused ones included, that an earlier capture of the run has dealt with: where units end.

    Raises
    ------
    CorpusError
        The corpus cannot be read, is not what it is said to be, or the tokenizer is not the model's.
    """
    n_left = max_tokens
    for unit in corpus.units(encoder, skip):
        if n_left is not None:
            n_left -= sum(len(document.token_ids) for document in unit)
            if n_left < 0:
                return
        yield from unit
