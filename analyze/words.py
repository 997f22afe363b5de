"""Words: where a run's text has words of so many tokens, and which of them to compare."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ..catalog.run import Run

__all__ = ["Words", "find_words", "pair_words"]

Ints = npt.NDArray[np.int64]

_WORD = re.compile(r"[a-z]+")  # ASCII


@dataclass(frozen=True, slots=True)
class Words:
    """Words in a run's documents, by document and position."""

    documents: Ints
    positions: Ints
    """Of each word's last token."""
    texts: npt.NDArray[Any]
    """str, without the blank in front."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, chosen: Ints) -> Words:
        return Words(self.documents[chosen], self.positions[chosen], self.texts[chosen])


def find_words(
    run: Run, n_tokens: Collection[int], *, n_before: int, min_position: int = 0
) -> dict[int, Words]:
    """Return the words that are a given number of tokens long, for each of these numbers.

    A word stands between white space. It counts where it is all lower-case ASCII letters, some tokens are
    exactly a blank and the word, and enough *kept* words come before it in its document: words that are all
    letters, and not all capitals, whatever stands between them. The last word of a document as long as the
    context does not count, for it may be cut. Special tokens are white space. A token without text, as an incomplete
    character may be, belongs to a word only inside it.

    Reads the token table and the vocabulary, nothing else: a second for a million tokens.

    Parameters
    ----------
    run : Run
        The run.
    n_tokens : collection of int
        The lengths to look for.
    n_before : int
        How many kept words come before the word.
    min_position : int
        The least position of a word's last token.
    """
    texts = _token_texts(run)
    table = run.tokens
    ids, positions = table["token_id"].to_numpy(), table["position"].to_numpy()
    documents = table["document"].to_numpy()
    found: dict[int, list[tuple[int, int, str]]] = {n: [] for n in n_tokens}
    for start, end in pairwise([*np.flatnonzero(positions == 0).tolist(), len(ids)]):
        pieces = texts[ids[start:end]].tolist()
        text = "".join(pieces)
        ends = list(accumulate(map(len, pieces)))
        with_text = [i for i, piece in enumerate(pieces) if piece]
        last_of = {ends[i]: i for i in with_text}
        first_of = {ends[i] - len(pieces[i]): i for i in with_text}
        end_counts = end - start < run.manifest.geometry.context
        n_kept = 0
        for match in re.finditer(r"\S+", text):
            word, (begin, stop) = match.group(), match.span()
            if n_kept >= n_before and _WORD.fullmatch(word) and text[begin - 1 : begin] == " ":
                first, last = first_of.get(begin - 1), last_of.get(stop)
                if first is not None and last is not None and (stop < len(text) or end_counts):
                    n = last - first + 1
                    if n in found and last >= min_position:
                        found[n].append((int(documents[start]), last, word))
            n_kept += word.isalpha() and not word.isupper()
    return {n: _words(places) for n, places in found.items()}


def _token_texts(run: Run) -> npt.NDArray[Any]:
    """Return the text of each token id: str ``[vocab]``."""
    vocab = run.vocab
    texts = np.full(run.shape.n_vocab, "\n", dtype=object)
    texts[vocab["token_id"].to_numpy()] = pc.if_else(vocab["is_special"], "\n", vocab["text"]).to_pylist()
    return texts


def _words(places: list[tuple[int, int, str]]) -> Words:
    documents, positions, texts = zip(*places, strict=True) if places else ((), (), ())
    return Words(np.array(documents, np.int64), np.array(positions, np.int64), np.array(texts, object))


def pair_words(
    words: Words, others: Words, *, n_pairs: int, per_word: int, per_document: int, min_gap: int, seed: int
) -> tuple[Words, Words]:
    """Return pairs of a word of one kind and one of the other, in like contexts.

    The words are taken in random order. The partner of each is the nearest one in its document, ``min_gap``
    tokens or more away; where the document has none left, the one at the nearest position of any document.
    Costs n_pairs passes over ``others``.

    Parameters
    ----------
    words, others : Words
        The two kinds.
    n_pairs : int
        The most pairs.
    per_word, per_document : int
        How often one word, and one document, may occur, in each kind.
    min_gap : int
        The least distance of two partners in one document, in tokens.
    seed : int
        Of the order.
    """
    vocabulary, word_ids = np.unique(others.texts.astype(str), return_inverse=True)
    by_word, by_document = np.zeros(len(vocabulary), np.int64), Counter[int]()
    seen_words, seen_documents = Counter[str](), Counter[int]()
    free = np.ones(len(others), dtype=bool)
    pairs: list[tuple[int, int]] = []
    for i in np.random.default_rng(seed).permutation(len(words)).tolist():
        if len(pairs) == n_pairs or not free.any():
            break
        document, position, text = int(words.documents[i]), int(words.positions[i]), words.texts[i]
        if seen_words[text] >= per_word or seen_documents[document] >= per_document:
            continue
        within = _within(others, document)
        gaps = np.abs(others.positions[within] - position)
        near = within.start + np.flatnonzero(free[within] & (gaps >= min_gap))
        near = near if len(near) else np.flatnonzero(free & (others.documents != document))
        if not len(near):
            continue
        partner = int(near[np.abs(others.positions[near] - position).argmin()])
        pairs.append((i, partner))
        seen_words[text] += 1
        seen_documents[document] += 1
        word, home = word_ids[partner], int(others.documents[partner])
        by_word[word] += 1
        by_document[home] += 1
        free[partner] = False
        if by_word[word] >= per_word:
            free[word_ids == word] = False
        if by_document[home] >= per_document:
            free[_within(others, home)] = False
    chosen = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return words[chosen[:, 0]], others[chosen[:, 1]]


def _within(words: Words, document: int) -> slice:
    """Return where the words of a document stand."""
    return slice(*np.searchsorted(words.documents, [document, document + 1]).tolist())
