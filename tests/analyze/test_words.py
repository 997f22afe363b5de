"""Words found in a run's text, against a slow reading of every prefix; and how they are paired."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerlake.analyze.words import Words, find_words, pair_words
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

VOCAB = ("<bos>", " ", " a", "b", "ing", " of", "\n", "\nc", " Of", " I", ".", "3", "é", " d e", "�", "")
few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def read_prefixes(texts: list[str], n: int, n_before: int, *, whole: bool) -> list[tuple[int, str]]:
    """Every (last token, word) of a document, each prompt read on its own."""
    found = []
    for last in range(n - 1, len(texts)):
        word = "".join(texts[last + 1 - n : last + 1])
        prompt, after = "".join(texts[: last + 1]), "".join(texts[last + 1 :])
        ends = re.match(r"\s", after) if after else whole
        before = prompt.removesuffix(word).split()
        kept = [w for w in before if all(c.isalpha() for c in w) and w != w.upper()]
        whole_pieces = texts[last + 1 - n] and texts[last]  # a word neither begins nor ends with nothing
        if re.fullmatch(" [a-z]+", word, re.ASCII) and whole_pieces and ends and len(kept) >= n_before:
            found.append((last, word[1:]))
    return found


@few
@given(
    documents=st.lists(
        st.lists(st.integers(1, len(VOCAB) - 1), min_size=2, max_size=14), min_size=1, max_size=6
    ),
    n_before=st.integers(0, 3),
)
def test_words_are_those_that_a_slow_reading_finds(
    make_run: Callable[..., Run], shape: ModelShape, tmp_path: Path, documents: list[list[int]], n_before: int
) -> None:
    ids = [[0, *document] for document in documents]
    run = make_run(
        url=tmp_path / uuid.uuid4().hex, shape=shape, lengths=[*map(len, ids)], context=12 + 3, sites=(),
        vocab=VOCAB, token_ids=np.concatenate(ids),
    )  # fmt: skip
    found = find_words(run, (1, 2, 3), n_before=n_before, min_position=2)
    for n, words in found.items():
        expected = [
            (document, last, word)
            for document, tokens in enumerate(ids)
            for last, word in read_prefixes(
                ["\n" if i == 0 else VOCAB[i] for i in tokens], n, n_before, whole=len(tokens) < 15
            )
            if last >= 2
        ]
        assert [*zip(words.documents, words.positions, words.texts, strict=True)] == expected


def test_the_rule_by_example(make_run: Callable[..., Run], shape: ModelShape) -> None:
    vocab = ["<bos>", " sub", "jo", "in", "er", " the", " head", "s", ",", "."]
    text = [0, 5, 1, 2, 3, 4, 5, 6, 6, 7, 6, 8, 6]  # the subjoiner the head heads head, head
    run = make_run(shape=shape, lengths=[13], context=16, vocab=vocab, token_ids=np.array(text))
    found = find_words(run, (1, 2, 4), n_before=0)
    assert {n: [*words.texts] for n, words in found.items()} == {
        4: ["subjoiner"],
        2: ["heads"],
        1: ["the", "the", "head", "head"],  # not "head,", which is no word of letters
    }
    assert found[4].positions.tolist() == [5]
    assert [len(words) for words in find_words(run, (1, 2, 4), n_before=4).values()] == [1, 1, 0]
    cut = make_run(
        url=run.store.url,
        name="cut",
        shape=shape,
        lengths=[13],
        context=13,
        vocab=vocab,
        token_ids=np.array(text),
    )
    assert [*find_words(cut, (1,), n_before=0)[1].texts] == ["the", "the", "head"]  # the last might be cut


def words_of(places: list[tuple[int, int, str]]) -> Words:
    places = sorted(set(places))
    documents, positions, texts = zip(*places, strict=True)
    return Words(np.array(documents), np.array(positions), np.array(texts, dtype=object))


places = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 60), st.sampled_from("abcdefghij")), min_size=1, max_size=60
)


@few
@given(
    places=places,
    others=places,
    per_word=st.integers(1, 3),
    per_document=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_pairs_keep_the_bounds_and_match(
    places: list[Any], others: list[Any], per_word: int, per_document: int, seed: int
) -> None:
    options: dict[str, Any] = {"per_word": per_word, "per_document": per_document, "min_gap": 4, "seed": seed}
    kinds = words_of(places), words_of(others)
    chosen = pair_words(*kinds, n_pairs=15, **options)
    a, b = chosen
    assert len(a) == len(b) <= 15
    for words, kind in zip(chosen, kinds, strict=True):
        assert max(Counter(words.texts).values(), default=0) <= per_word
        assert max(Counter(words.documents).values(), default=0) <= per_document
        picked = [*zip(words.documents, words.positions, words.texts, strict=True)]
        assert len(set(picked)) == len(picked)
        assert set(picked) <= {*zip(kind.documents, kind.positions, kind.texts, strict=True)}
    same = a.documents == b.documents
    assert (np.abs(a.positions - b.positions)[same] >= 4).all()
    fewer = pair_words(*kinds, n_pairs=5, **options)
    np.testing.assert_array_equal(
        fewer[1].positions, b.positions[:5]
    )  # in random order: any first ones will do


def test_a_partner_is_the_nearest_of_its_document_or_else_of_any() -> None:
    words = words_of([(0, 30, "x"), (2, 20, "y")])
    others = words_of([(0, 28, "a"), (0, 33, "b"), (0, 38, "c"), (0, 10, "d"), (1, 25, "e"), (1, 50, "f")])
    pairs = pair_words(words, others, n_pairs=9, per_word=1, per_document=5, min_gap=4, seed=0)
    partner = dict(zip(pairs[0].texts, pairs[1].texts, strict=True))
    assert partner == {"x": "c", "y": "e"}


def test_nothing_pairs_with_nothing() -> None:
    void = words_of([(0, 1, "a")])[np.array([], dtype=np.int64)]
    for kinds in ((void, void), (void, words_of([(0, 1, "a")])), (words_of([(0, 1, "a")]), void)):
        pairs = pair_words(*kinds, n_pairs=5, per_word=1, per_document=1, min_gap=0, seed=0)
        assert [*map(len, pairs)] == [0, 0]


def test_a_token_without_text_after_a_word_is_not_of_it(
    make_run: Callable[..., Run], shape: ModelShape
) -> None:
    vocab = ["<bos>", " a", "b", ""]
    run = make_run(shape=shape, lengths=[6], context=8, vocab=vocab, token_ids=np.array([0, 3, 1, 2, 3, 1]))
    found = find_words(run, (1, 2, 3), n_before=0)
    assert {n: (words.texts.tolist(), words.positions.tolist()) for n, words in found.items()} == {
        1: (["a"], [5]), 2: (["ab"], [3]), 3: ([], []),
    }  # fmt: skip


@pytest.mark.parametrize("missing", [3, 5])
def test_a_token_without_text_is_white_space(
    make_run: Callable[..., Run], shape: ModelShape, missing: int
) -> None:
    vocab = ["<bos>", " a", " b"]
    run = make_run(
        shape=replace(shape, n_vocab=8),
        lengths=[4],
        context=8,
        vocab=vocab,
        token_ids=np.array([0, 1, missing, 2]),
    )
    assert [*find_words(run, (1,), n_before=0)[1].texts] == ["a", "b"]
