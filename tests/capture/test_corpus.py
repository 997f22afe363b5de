"""Text becomes documents: every one stored, cut, or refused with the reason; as windows too, and in any steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from layerlake.capture.corpus import TextCorpus, encode_corpus, open_corpus
from layerlake.capture.encoder import TextEncoder
from layerlake.capture.execute import capture_run
from layerlake.capture.placement import EncodedDocument
from layerlake.capture.plan import plan_capture
from layerlake.capture.rows import Rows, open_rows
from layerlake.capture.spec import CaptureSpec, complete_spec
from layerlake.catalog.errors import CorpusError, PlanError

BOS = 0
Encode = Callable[..., list[EncodedDocument]]


class Characters:
    """Stands for a tokenizer: a character is a token, its number that of the character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class Texts:
    """Stands for a streaming dataset with the column ``text``."""

    column_names = ("text",)

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def skip(self, n: int) -> Texts:
        return Texts(self.texts[n:])

    def __iter__(self) -> Any:
        return ({"text": text} for text in self.texts)


def corpus_of(texts: Sequence[str], *, pack: bool = False, shuffle_buffer: int = 0) -> TextCorpus:
    return TextCorpus(Rows("t", {}, lambda: Texts(texts), shuffle_buffer, seed=1), pack=pack)


def encode(
    corpus: TextCorpus,
    *,
    bos: int | None = BOS,
    context: int = 100,
    min_tokens: int = 3,
    **extent: Any,
) -> list[EncodedDocument]:
    characters: Any = Characters()
    return list(encode_corpus(corpus, TextEncoder(characters, bos, context, min_tokens, 400), **extent))


def shown(documents: Sequence[EncodedDocument]) -> list[tuple[str, str, str | None]]:
    """Sources, tokens (BOS as |) and refusal."""
    return [
        (
            " ".join(document.sources),
            "".join(chr(token or ord("|")) for token in document.token_ids),
            document.refusal,
        )
        for document in documents
    ]


FIVE = corpus_of(["aaaaa", "", "bb", "cccccccc", "d", "eeeeee"])


def test_bos_counts() -> None:
    documents = encode(FIVE)
    assert [len(d.token_ids) for d in documents] == [6, 0, 3, 9, 0, 7]
    assert all(d.token_ids[0] == BOS for d in documents if d.refusal is None)
    assert [d.n_source_tokens for d in documents] == [6, 1, 3, 9, 2, 7]
    assert [len(d.token_ids) for d in encode(FIVE, bos=None)] == [5, 0, 0, 8, 0, 6]
    assert [d.sources for d in documents] == [(f"t#{i}",) for i in range(6)]


def test_short_texts_are_refused_with_the_reason() -> None:
    assert encode(FIVE)[4].refusal == "2 tokens, fewer than --min-tokens 3"
    assert [d.refusal is None for d in encode(FIVE, min_tokens=7)] == [False, False, False, True, False, True]


def test_long_texts_are_cut() -> None:
    documents = encode(FIVE, context=7)
    assert [len(d.token_ids) for d in documents] == [6, 0, 3, 7, 0, 7]
    assert documents[3].n_source_tokens == 9


@pytest.mark.parametrize(
    ("max_tokens", "n_documents"),
    [(5, 0), (6, 2), (8, 2), (9, 3), (17, 3), (18, 5), (24, 5), (25, 6), (99, 6)],
)
def test_max_tokens_stops_at_the_last_whole_document(max_tokens: int, n_documents: int) -> None:
    documents = encode(FIVE, max_tokens=max_tokens)
    assert len(documents) == n_documents
    assert sum(len(d.token_ids) for d in documents) <= max_tokens


def test_texts_are_joined_in_full_windows() -> None:
    texts = ["abcd", "efg", "hijklmnop", "q", "rst"]
    assert shown(encode(corpus_of(texts, pack=True), context=6)) == [
        ("t#0 t#1", "|abcd|", None),  # the BOS of the next text ends the window
        ("t#1 t#2", "|efg|h", None),
        ("t#2", "|ijklm", None),
        ("t#3", "", "2 tokens, fewer than --min-tokens 3"),
        ("t#2 t#4", "|nop|r", None),
        ("t#4", "", "3 tokens left at the end, no full window of 6"),
    ]
    assert shown(encode(corpus_of(texts, pack=True), context=6, bos=None, min_tokens=2)) == [
        ("t#0 t#1", "abcdef", None),
        ("t#1 t#2", "ghijkl", None),
        ("t#3", "", "1 tokens, fewer than --min-tokens 2"),
        ("t#2 t#4", "mnoprs", None),
        ("t#4", "", "1 tokens left at the end, no full window of 6"),
    ]
    # a text that ends with its window leaves no seam, and nothing to refuse
    assert shown(encode(corpus_of(["abcde", "fghij"], pack=True), context=6)) == [
        ("t#0", "|abcde", None),
        ("t#1", "|fghij", None),
    ]


TEXTS = st.lists(st.text("abcdefg", max_size=12), max_size=12)


@given(TEXTS, st.integers(2, 9), st.booleans())
def test_windows_hold_every_token_once(texts: list[str], context: int, has_bos: bool) -> None:
    """Written out token by token: what the windows hold, and from where."""
    bos = BOS if has_bos else None
    opening = [bos] if bos is not None else []
    documents = encode(corpus_of(texts, pack=True), context=context, bos=bos, min_tokens=2)
    expected, window, sources = [], list(opening), set[str]()
    for number, text in enumerate(texts):
        tokens = [*opening, *map(ord, text)]
        if len(tokens) < 2:
            continue
        for token in tokens if sources else tokens[len(opening) :]:
            window.append(token)
            sources.add(f"t#{number}")
            if len(window) == context:
                expected.append((window, sources))
                window, sources = list(opening), set()
    windows = [document for document in documents if document.refusal is None]
    assert [(d.token_ids.tolist(), set(d.sources)) for d in windows] == expected
    assert all(d.n_source_tokens == context for d in windows)

    # and what is not in them is accounted for: too short, or left over at the end
    refused = [document for document in documents if document.refusal is not None]
    short = [f"t#{i}" for i, text in enumerate(texts) if len(opening) + len(text) < 2]
    assert [d.sources for d in refused if "min-tokens" in str(d.refusal)] == [(source,) for source in short]
    left = [d for d in refused if "left at the end" in str(d.refusal)]
    assert [(set(d.sources), d.n_source_tokens) for d in left] == (
        [(sources, len(window))] if sources else []
    )
    assert left == documents[len(documents) - len(left) :]
    assert len(windows) + len(short) + len(left) == len(documents)
    assert all(not len(document.token_ids) for document in refused)


@given(
    TEXTS,
    st.booleans(),
    st.integers(0, 5),
    st.integers(2, 9),
    st.lists(st.integers(0, 100), max_size=4),
)
def test_any_steps_give_the_documents_of_one_go(
    texts: list[str], pack: bool, shuffle_buffer: int, context: int, limits: list[int]
) -> None:
    """As a run is extended: each step skips the document rows that are there, and has what is left of the budget."""
    corpus = corpus_of(texts, pack=pack, shuffle_buffer=shuffle_buffer)
    whole = shown(encode(corpus, context=context))
    for skip in range(len(whole) + 2):
        assert shown(encode(corpus, context=context, skip=skip)) == whole[skip:]
    there: list[EncodedDocument] = []
    for limit in [*sorted(limits), None]:
        left = None if limit is None else limit - sum(len(d.token_ids) for d in there)
        there += encode(corpus, context=context, max_tokens=left, skip=len(there))
        assert limit is None or shown(there) == shown(encode(corpus, context=context, max_tokens=limit))
    assert shown(there) == whole


def test_every_row_is_a_document_whatever_the_order(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + i) * (i + 1)}) + "\n" for i in range(20)))
    corpus = TextCorpus(open_rows(str(path), shuffle_buffer=6, seed=3))
    documents = encode(corpus, context=12)
    assert sorted(d.sources[0] for d in documents) == sorted(f"t.jsonl#{i}" for i in range(20))
    for document in documents:
        number = int(document.sources[0].rpartition("#")[2])
        assert document.n_source_tokens == number + 2
        assert document.token_ids.tolist() == ([BOS] + [97 + number] * min(11, number + 1) if number else [])
    assert [d.sources for d in encode(corpus, context=12, skip=7)] == [d.sources for d in documents[7:]]


def test_a_missing_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n{"text": null}\n{"more": 1}\n')
    corpus = TextCorpus(open_rows(str(tmp_path / "t.jsonl")))
    assert [text for _, text in corpus.texts()] == ["abc", "", ""]


def test_a_missing_column_lists_the_columns(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 0, "body": "a"}\n')
    rows = open_rows(str(tmp_path / "t.jsonl"))
    with pytest.raises(CorpusError, match="no column 'text'; it has id, body") as caught:
        next(TextCorpus(rows).texts())
    assert "--text-column" in caught.value.hint
    with pytest.raises(CorpusError, match=r"Did you mean 'body'\?"):
        next(TextCorpus(rows, "bodyy").texts())


@pytest.mark.parametrize(("column", "held"), [("id", "int"), ("words", "list")])
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, column: str, held: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 0, "words": ["a", "b"], "body": "a"}\n')
    with pytest.raises(CorpusError, match=f"t.jsonl#0 holds a {held} in column '{column}'"):
        next(TextCorpus(open_rows(str(tmp_path / "t.jsonl")), column).texts())


def test_a_spec_s_options_reach_the_documents(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "!" * i, "body": "?" * i}) + "\n" for i in range(9)))

    def lengths(**options: Any) -> list[int]:
        corpus = open_corpus(CaptureSpec(model="m", dataset=path, **options))
        encoder = TextEncoder(tokenizer, BOS, 8, 2, 400)
        return [document.n_source_tokens for document in encode_corpus(corpus, encoder)]

    assert lengths() == [1, 2, 3, 4, 5, 6, 7, 8, 9] == lengths(text_column="body")
    shuffled = lengths(shuffle_buffer=4, seed=2)
    assert sorted(shuffled) == lengths() != shuffled != lengths(shuffle_buffer=4)
    # 36 tokens of text and 7 BOS between them, in windows that have room for 7; the text of none is refused
    assert lengths(pack="concat") == [1, *[8] * 6, 1 + 43 - 42]


def test_every_option_that_decides_what_documents_there_are_is_in_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "body": "b"}\n')

    def fingerprint(**options: Any) -> str:
        return json.dumps(
            open_corpus(CaptureSpec(model="m", dataset=path, **options)).fingerprint, sort_keys=True
        )

    different: list[dict[str, Any]] = [
        {},
        {"text_column": "body"},
        {"pack": "concat"},
        {"shuffle_buffer": 5},
        {"shuffle_buffer": 6},
        {"shuffle_buffer": 5, "seed": 1},
        {"shuffle_buffer": 5, "pack": "concat"},
    ]
    assert len({fingerprint(**options) for options in different}) == len(different)
    assert fingerprint(text_column="text", shuffle_buffer=0) == fingerprint()


def spec(**options: Any) -> CaptureSpec:
    return complete_spec(CaptureSpec(model="m", **options))


def test_a_preset_stands_in_for_what_is_not_given() -> None:
    paper = {"min_tokens": 64, "context": 512, "shuffle_buffer": 10_000, "seed": 0, "max_tokens": 1_024_000}
    plain = spec(dataset="t.txt")
    assert (plain.min_tokens, plain.context, plain.shuffle_buffer, plain.max_tokens) == (3, None, None, None)
    # the preset is a name for its options and no more: spelt out, they are the same run
    assert spec(dataset="t.txt", preset="paper") == spec(dataset="t.txt", **paper)
    given_ones = {"context": 128, "seed": 4, "max_tokens": "20k"}
    assert spec(dataset="t.txt", preset="paper", **given_ones) == spec(dataset="t.txt", **paper | given_ones)
    assert spec(dataset="t.txt", preset="paper", shuffle_buffer=1).shuffle_buffer == 1
    once = spec(dataset="t.txt", preset="paper")
    assert complete_spec(once) == once


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"preset": "papper"}, "no preset 'papper'. Did you mean 'paper'?", "paper"),
        ({"pack": "cat"}, "no pack 'cat'", "concat"),
        ({"task": "wik"}, "no task 'wik'. Did you mean 'wic'?", "hellaswag, lambada"),
        (
            {"task": "wic", "pack": "concat"},
            "--pack is for text, and the items of wic are prompts",
            "or --task",
        ),
        ({"task": "wic", "preset": "paper"}, "--preset is for text", "or --task"),
        ({"task": "wic", "text_column": "a"}, "--text-column is for text", "or --task"),
        ({"task": "wic", "min_tokens": 5}, "--min-tokens is for text", "or --task"),
        (
            {"split": "train=a.jsonl"},
            "names the files of a task, and there is no --task",
            "--task is one of wic",
        ),
        ({"pack": "concat", "min_tokens": 1}, "cannot be packed", "2"),
        ({"pack": "concat", "context": 1}, "cannot be packed", "2"),
        ({"seed": 3}, "--seed 3 draws nothing", "--shuffle-buffer"),
        ({"shuffle_buffer": 0}, "--shuffle-buffer must be positive, not 0", ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(PlanError) as caught:
        spec(dataset="t.txt", **options)
    assert message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize("options", [{"shuffle_buffer": 4, "seed": 1}, {"pack": "concat"}, {"min_tokens": 4}])
def test_every_such_option_makes_another_run(
    make_spec: Callable[..., CaptureSpec], options: dict[str, Any]
) -> None:
    assert plan_capture(make_spec(**options)).run_id != plan_capture(make_spec()).run_id


def test_a_packed_run_in_a_lake_goes_on_where_it_stopped(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    run = None
    for max_tokens in (50, 100, None):
        run = capture_run(
            lake, make_spec(pack="concat", context=24, sites="resid", max_tokens=max_tokens, shuffle_buffer=5)
        )
    whole = capture_run(
        tmp_path / "whole", make_spec(pack="concat", context=24, sites="resid", shuffle_buffer=5)
    )
    assert run is not None
    assert run.run_id == whole.run_id
    assert len(run.manifest.captures) == 3
    told = ["document", "status", "reason", "sources", "n_tokens", "n_source_tokens"]
    assert run.documents.select(told) == whole.documents.select(told)
    assert run.tokens["token_id"] == whole.tokens["token_id"]
    rows = run.documents.to_pylist()
    assert {row["n_tokens"] for row in rows if row["status"] == "stored"} == {24}
    assert [row["reason"] for row in rows if row["status"] == "refused"] == [
        "2 tokens, fewer than --min-tokens 3",
        f"{rows[-1]['n_source_tokens']} tokens left at the end, no full window of 24",
    ]
    assert {source for row in rows for source in row["sources"]} == {f"text.txt#{i}" for i in range(12)}
    assert (
        plan_capture(make_spec(pack="concat", context=24, sites="resid", shuffle_buffer=5), lake).frozen
        is None
    )


def test_the_paper_s_preset_plans_without_text_too(make_spec: Callable[..., CaptureSpec]) -> None:
    with pytest.raises(PlanError, match="512 tokens is more than the 48") as caught:
        plan_capture(make_spec(preset="paper"))
    assert "--context 48" in caught.value.hint
    plan = plan_capture(CaptureSpec(model="openai-community/gpt2", preset="paper", sites="resid"))
    assert plan.tokens.num_rows == 2000 * 512
