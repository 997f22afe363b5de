"""Text through Hugging Face ``datasets``, turned into documents: tokenised, BOS in front, cut to the context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..catalog.errors import CorpusError, MissingExtra, did_you_mean
from .placement import EncodedDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Corpus", "encode_corpus", "file_digest", "open_corpus", "resolve_bos"]

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_SAMPLE_BY = {"paragraph": "paragraph", "line": "line", "file": "document"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """A source of texts that can be read again and gives the same."""

    description: str
    """For people: the hub id or the file's name."""
    fingerprint: dict[str, Any]
    """What decides which texts there are, in which order; part of the run's identity."""
    rows: Any
    """A ``datasets.IterableDataset`` with the text column."""
    text_column: str

    def texts(self, skip: int = 0) -> Iterator[tuple[str, str]]:
        """Yield ``(source, text)`` in order, leaving out the first ``skip``; a missing text is empty.

        Raises
        ------
        CorpusError
            A row cannot be read, or what it holds is not text.
        """
        for number, row in enumerate(self._readable(skip), start=skip):
            source, text = f"{self.description}#{number}", row[self.text_column]
            if not isinstance(text, str | None):
                raise CorpusError(
                    f"{source} holds a {type(text).__name__} in column '{self.text_column}', not text.",
                    hint="Name the column that holds the text: --text-column NAME.",
                )
            yield source, text or ""

    def _readable(self, skip: int) -> Iterator[dict[str, Any]]:
        """Yield rows; what goes wrong in the reading of them, at whichever row, is an error of the corpus."""
        try:
            yield from self.rows.skip(skip)
        except Exception as error:
            raise CorpusError(f"The dataset '{self.description}' cannot be read: {error}") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_corpus(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str | None = None,
    sample_by: str = "paragraph",
) -> Corpus:
    """Open a dataset of the hub, or a local txt, jsonl, parquet or arrow file.

    Raises
    ------
    CorpusError
        The path does not exist, its format is not known, there is no such text column, it has no
        rows, or (hub) its revision cannot be resolved: what cannot be fingerprinted is refused.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise CorpusError(
            f"'{dataset}' is a folder.", hint="Name one file in it, or the id of a dataset on the hub."
        )
    if path.exists():
        rows, fingerprint = _open_file(path, sample_by), {"sha256": file_digest(path)}
        description = path.name
        if path.suffix.lower() in {".txt", ".text", ".md"}:
            fingerprint["sample_by"] = sample_by
    elif path.suffix.lower() in _FORMATS or dataset.startswith(("/", ".", "~")):
        raise CorpusError(f"The dataset file '{dataset}' does not exist.")
    else:
        rows, fingerprint = _open_hub(dataset, config, split, revision)
        description = dataset
    column = _find_text_column(rows, description, text_column)
    return Corpus(description, fingerprint | {"text_column": column}, rows, column)


def _open_file(path: Path, sample_by: str) -> Any:
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise CorpusError(
            f"'{path}' is not a dataset file that layerlake reads.", hint=f"Formats: {', '.join(_FORMATS)}."
        )
    if path.stat().st_size == 0:
        raise CorpusError(f"The dataset '{path}' is empty.")
    options: dict[str, Any] = {}
    if kind == "text":
        if sample_by not in _SAMPLE_BY:
            raise CorpusError(
                f"A text cannot be split by '{sample_by}'.", hint="--sample-by paragraph, line or file."
            )
        options["sample_by"] = _SAMPLE_BY[sample_by]
    try:
        # By its builder, because load_dataset tells the hub of every file that it opens, local ones included.
        builder = import_module(f"datasets.packaged_modules.{kind}.{kind}")
        opened = getattr(builder, kind.capitalize())(data_files=str(path), **options)
        return opened.as_streaming_dataset(split="train")
    except ImportError as error:
        raise MissingExtra("datasets", "capture") from error
    except Exception as error:
        raise CorpusError(f"The dataset '{path}' cannot be read as {kind}: {error}") from error


def _open_hub(
    dataset: str, config: str | None, split: str, revision: str | None
) -> tuple[Any, dict[str, Any]]:
    import datasets
    from huggingface_hub import HfApi

    try:
        resolved = HfApi().dataset_info(dataset, revision=revision).sha
        rows = datasets.load_dataset(dataset, config, split=split, revision=resolved, streaming=True)
    except Exception as error:
        raise CorpusError(
            f"The dataset '{dataset}' is neither a local file nor can it be opened from the hub: "
            f"{str(error).splitlines()[0]}",
            hint="Give a local txt, jsonl, parquet or arrow file, or the id of a dataset (--dataset-config, --split).",
        ) from error
    return rows, {"hub": dataset, "revision": resolved, "config": config, "split": split}


def _find_text_column(rows: Any, description: str, asked: str | None) -> str:
    try:
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:
        raise CorpusError(f"The dataset '{description}' cannot be read: {error}") from error
    if not columns:
        raise CorpusError(f"The dataset '{description}' is empty.")
    column = asked or "text"
    if column not in columns:
        raise CorpusError(
            f"The dataset '{description}' has no column '{column}'; it has {', '.join(columns)}."
            f"{did_you_mean(column, columns)}",
            hint="Name the column that holds the text: --text-column NAME.",
        )
    return column


def resolve_bos(choice: str, tokenizer: PreTrainedTokenizerBase, n_vocab: int) -> int | None:
    """Return the token that begins every document, or None.

    ``auto`` takes the tokenizer's BOS, else its EOS, else none; ``none`` is none; a number is that id.

    Raises
    ------
    CorpusError
        The choice is none of these, or the id is not in the vocabulary.
    """
    if choice == "none":
        return None
    if choice == "auto":
        # Some tokenizers name a special token that the model has no embedding for (id = n_vocab).
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return next((token for token in named if isinstance(token, int) and token < n_vocab), None)
    if not choice.isdecimal() or int(choice) >= n_vocab:
        raise CorpusError(f"'{choice}' is not a BOS.", hint=f"--bos auto, none, or an id below {n_vocab}.")
    return int(choice)


def encode_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: int | None,
    context: int,
    min_tokens: int,
    max_tokens: int | None,
    n_vocab: int,
    skip: int = 0,
) -> Iterator[EncodedDocument]:
    """Tokenise the corpus document by document, up to the last whole one that fits ``max_tokens``.

    Parameters
    ----------
    corpus : Corpus
        The texts.
    tokenizer : PreTrainedTokenizerBase
        Called without special tokens; BOS is put in front here.
    bos : int or None
        See :func:`resolve_bos`.
    context, min_tokens : int
        Longer documents are cut, shorter ones refused; both count BOS.
    max_tokens : int or None
        The most tokens to store; None for all.
    n_vocab : int
        The model's embeddings; a token beyond them is an error.
    skip : int
        Input documents that an earlier capture of the run has dealt with.

    Raises
    ------
    CorpusError
        A token id is not in the model's vocabulary: the tokenizer is not this model's.
    """
    budget = max_tokens
    for source, text in corpus.texts(skip):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        full = np.asarray(ids if bos is None else [bos, *ids], dtype=np.int32)
        if full.size and int(full.max()) >= n_vocab:
            raise CorpusError(
                f"{source} has token id {int(full.max())}, but the model has {n_vocab} tokens: "
                "the tokenizer does not belong to the model."
            )
        if len(full) < min_tokens:
            reason = f"{len(full)} tokens, fewer than --min-tokens {min_tokens}"
            yield EncodedDocument(source, full[:0], len(full), reason)
            continue
        kept = full[:context]
        if budget is not None:
            if len(kept) > budget:
                return
            budget -= len(kept)
        yield EncodedDocument(source, kept, len(full))
