"""The items of tasks, and the documents they become: a role, tokens, and the span that matters.

A document of a :class:`WordPair` is a sentence, with BOS as any text has it, and its span is the word. A document of
a :class:`Question` is the context with one continuation, tokenised as lm-evaluation-harness does
(``HFLM._encode_pair`` and ``_loglikelihood_tokens``), and its span is the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .encoder import TextEncoder

__all__ = ["Draft", "Item", "Question", "Span", "WordPair"]

Span = tuple[int, int]
"""Half-open."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A document before it is known whether its whole item can be stored."""

    role: str
    token_ids: npt.NDArray[np.int32]
    """Cut to the context."""
    n_source_tokens: int
    span: Span
    """Positions in ``token_ids``, half-open."""
    span_chars: int
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class WordPair:
    """An item of WiC: a word in two sentences."""

    word: str
    """The lemma."""
    sentences: tuple[str, str]
    targets: tuple[Span, Span]
    """The word's characters in each sentence, half-open."""
    label: int
    """1 where it means the same in both."""

    @property
    def n_documents(self) -> int:
        """One a sentence."""
        return 2

    def drafts(self, encoder: TextEncoder, source: str) -> Iterator[Draft]:
        """Yield the two sentences; the span are the tokens that overlap the word."""
        for number, (sentence, target) in enumerate(zip(self.sentences, self.targets, strict=True), start=1):
            encoded = encoder.tokenizer(
                sentence, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            full = encoder.with_bos(encoded["input_ids"], source)
            n_before = len(full) - len(encoded["input_ids"])
            start, end = target
            inside = [
                i for i, (a, b) in enumerate(encoded["offset_mapping"], n_before) if a < end and b > start
            ]
            span = (inside[0], inside[-1] + 1) if inside else (0, 0)
            refusal = None
            if not inside:
                refusal = f"no token of it overlaps '{sentence[start:end]}'"
            elif span[1] > encoder.context:
                refusal = f"'{sentence[start:end]}' ends at token {span[1]}, beyond the context of {encoder.context}"
            yield Draft(f"sentence{number}", full[: encoder.context], len(full), span, end - start, refusal)


@dataclass(frozen=True, slots=True)
class Question:
    """A context with the continuations whose likelihoods are compared, or with the one that is asked for."""

    context: str
    choices: tuple[str, ...]
    """Without the blank that joins them to the context."""
    label: int | None = None
    """The number of the right choice; None where there is but one."""

    @property
    def n_documents(self) -> int:
        """One a choice."""
        return len(self.choices)

    def drafts(self, encoder: TextEncoder, source: str) -> Iterator[Draft]:
        """Yield the context with each choice; what does not fit is cut off at the left.

        The continuation is what the tokens of the whole have beyond as many as the context alone has, put behind
        those of the context; blanks at the end of the context belong to the continuation. The last token, which
        lm-evaluation-harness does not feed to the model, is stored too: what is cut is cut by one token more.
        """
        context = self.context.rstrip()
        blanks = self.context[len(context) :]
        before = encoder.encode(context, source)
        n_context = len(before)
        for number, choice in enumerate(self.choices):
            joined = encoder.encode(f"{context}{blanks} {choice}", source)
            whole = np.concatenate([before, joined[n_context:]])
            n_cut = max(0, len(whole) - encoder.context)
            span = (n_context - n_cut, len(whole) - n_cut)
            n_continuation = len(whole) - n_context
            refusal = None
            if n_continuation < 1:
                refusal = "its continuation is no token of its own"
            elif n_context < 1:
                refusal = "no token stands before its continuation"
            elif span[0] < 1:
                refusal = (
                    f"its continuation of {n_continuation} tokens fills the context of {encoder.context}"
                )
            role = "continuation" if self.label is None else f"choice{number}"
            yield Draft(role, whole[n_cut:], len(whole), span, len(choice), refusal)


Item = WordPair | Question
