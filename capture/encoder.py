"""From text to token ids, with what begins a document in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..catalog.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextEncoder", "resolve_bos"]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer, and what limits a document."""

    tokenizer: PreTrainedTokenizerBase
    """Called without special tokens; BOS is put in front here."""
    bos: int | None
    """See :func:`resolve_bos`."""
    context: int
    """The most tokens of a document, BOS included."""
    min_tokens: int
    """The fewest tokens of a text, BOS included."""
    n_vocab: int
    """The model's embeddings; a token beyond them is an error."""

    def encode(self, text: str, source: str) -> npt.NDArray[np.int32]:
        """Return the token ids of a text, BOS in front, uncut; ``source`` is for the error.

        Raises
        ------
        CorpusError
            A token id is not in the model's vocabulary: the tokenizer is not this model's.
        """
        return self.with_bos(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], source
        )

    def with_bos(self, ids: Sequence[int], source: str) -> npt.NDArray[np.int32]:
        """Return token ids with BOS in front; raise as :meth:`encode` does."""
        full = np.asarray(ids if self.bos is None else [self.bos, *ids], dtype=np.int32)
        if full.size and int(full.max()) >= self.n_vocab:
            raise CorpusError(
                f"{source} has token id {int(full.max())}, but the model has {self.n_vocab} tokens: "
                "the tokenizer does not belong to the model."
            )
        return full


def resolve_bos(
    choice: str, special_ids: Mapping[str, int | None], n_vocab: int, *, of_tokenizer: bool = False
) -> int | None:
    """Return the token that begins every document, or None.

    Parameters
    ----------
    choice : str
        ``auto``; ``none``, which is none; or a number, which is that id.
    special_ids : mapping
        ``ModelDescription.special_ids``.
    n_vocab : int
        The model's embeddings.
    of_tokenizer : bool
        Whether ``auto`` is what the tokenizer itself puts in front of a text, which may be nothing; else it is the
        tokenizer's BOS, else its EOS, else nothing.

    Raises
    ------
    CorpusError
        The choice is none of these, or the id is not in the vocabulary.
    """
    if choice == "none":
        return None
    if choice == "auto":
        # Some tokenizers name a special token that the model has no embedding for (id = n_vocab).
        named = [special_ids[name] for name in (["start"] if of_tokenizer else ["bos", "eos"])]
        return next((token for token in named if token is not None and token < n_vocab), None)
    if not choice.isdecimal() or int(choice) >= n_vocab:
        raise CorpusError(f"'{choice}' is not a BOS.", hint=f"--bos auto, none, or an id below {n_vocab}.")
    return int(choice)
