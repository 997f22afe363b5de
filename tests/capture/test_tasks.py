"""Items of tasks become documents: all of an item or none, each with the span that matters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, processors

from layerlake.capture.corpus import encode_corpus, open_corpus
from layerlake.capture.encoder import TextEncoder
from layerlake.capture.execute import capture_run
from layerlake.capture.placement import EncodedDocument, Prompt
from layerlake.capture.plan import plan_capture
from layerlake.capture.rows import Rows
from layerlake.capture.spec import CaptureSpec
from layerlake.capture.tasks import TASKS, TaskCorpus
from layerlake.catalog.errors import CorpusError, PlanError
from layerlake.lake import open_lake

DATA = Path(os.environ.get("LAYERLAKE_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="the real tasks are not here: put them into ../shared/data, or say where with LAYERLAKE_SHARED_DATA",
)
FILES = {"arc_easy": "arc_easy_test", "hellaswag": "hellaswag_val_1000", "lambada": "lambada_openai"}
CONTEXT = 48

Tokenizer = transformers.PreTrainedTokenizerFast
Row = Mapping[str, Any]

WIC: list[dict[str, Any]] = [
    {"word": "fox", "sentence1": "the quick foxes see", "sentence2": "a fox!", "idx1": 2, "idx2": 1, "label": True},
    {"word": "dog", "sentence1": "dog", "sentence2": "lazy dogs", "idx1": 0, "idx2": 1, "label": "0"},
    {"word": "see", "sentence1": "he sees  it", "sentence2": "the sea saw", "idx1": 1, "idx2": 2, "label": 0},
]  # fmt: skip
ARC: list[dict[str, Any]] = [
    {"question": "What is quick?", "choices": {"text": ["the fox", "a dog", "no"], "label": ["A", "B", "C"]},
     "answerKey": "B"},
    {"question": "How many dogs?", "choices": {"text": ["7", "12"], "label": ["1", "2"]}, "answerKey": "1"},
]  # fmt: skip


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_task(task: str, **options: Any) -> TaskCorpus:
    corpus = open_corpus(CaptureSpec(model="m", task=task, **options))
    assert isinstance(corpus, TaskCorpus)
    return corpus


def encode(
    corpus: TaskCorpus, tokenizer: Tokenizer, bos: int | None = 0, *, context: int = CONTEXT, **extent: Any
) -> list[EncodedDocument]:
    return list(encode_corpus(corpus, TextEncoder(tokenizer, bos, context, 1, 1 << 17), **extent))


def prompt(document: EncodedDocument) -> Prompt:
    assert document.prompt is not None
    return document.prompt


def span_text(document: EncodedDocument, tokenizer: Tokenizer) -> str:
    start, end = prompt(document).span or (0, 0)
    return str(tokenizer.decode(document.token_ids[start:end]))


def by_offset(row: Row) -> dict[str, Any]:
    """The same item as SuperGLUE has it: the word's place in characters."""
    given_ = {name: row[name] for name in ("word", "sentence1", "sentence2", "label")}
    for number in (1, 2):
        place = 0
        for index, word in enumerate(row[f"sentence{number}"].split()):
            place = row[f"sentence{number}"].index(word, place)
            if index == row[f"idx{number}"]:
                given_ |= {f"start{number}": place, f"end{number}": place + len(word)}
            place += len(word)
    return given_


def test_wic_in_both_forms(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = open_task("wic", dataset=write(tmp_path / "wic.jsonl", WIC))
    documents = encode(one, tokenizer)
    columns = [prompt(d).columns() for d in documents]
    assert [(c["item"], c["role"], c["label"], c["word"], c["split"], c["task"]) for c in columns] == [
        (0, "sentence1", 1, "fox", None, "wic"),
        (0, "sentence2", 1, "fox", None, "wic"),
        (1, "sentence1", 0, "dog", None, "wic"),
        (1, "sentence2", 0, "dog", None, "wic"),
        (2, "sentence1", 0, "see", None, "wic"),
        (2, "sentence2", 0, "see", None, "wic"),
    ]
    # the word is in the span, and what else a token of it holds; "fox!" is one word of the sentence
    texts = [span_text(d, tokenizer).strip() for d in documents]
    assert texts == ["foxes", "fox!", "dog", "dogs", "sees", "saw"]
    assert [c["span_chars"] for c in columns] == [5, 4, 3, 4, 4, 3]
    assert [tokenizer.decode(d.token_ids[1:]) for d in documents] == [
        row[f"sentence{n}"] for row in WIC for n in (1, 2)
    ]
    assert all(d.token_ids[0] == 0 for d in documents)
    assert [d.sources for d in documents] == [(f"wic.jsonl#{i // 2}",) for i in range(6)]

    other = open_task("wic", dataset=write(tmp_path / "super.jsonl", [by_offset(row) for row in WIC]))
    again = encode(other, tokenizer)
    assert [prompt(d) for d in again] == [prompt(d) for d in documents]
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(again, documents, strict=True))
    assert one.fingerprint != other.fingerprint


def test_a_span_counts_bos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = open_task("wic", dataset=write(tmp_path / "w.jsonl", WIC))
    spans = [prompt(document).span or (0, 0) for document in encode(corpus, tokenizer, None)]
    assert [prompt(d).span for d in encode(corpus, tokenizer)] == [
        (start + 1, end + 1) for start, end in spans
    ]
    assert spans[2] == (0, len(tokenizer("dog")["input_ids"]))


def test_an_item_is_stored_whole_or_refused_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    beyond = {"sentence1": "!" * 9 + " fox", "idx1": 1}
    corpus = open_task("wic", dataset=write(tmp_path / "w.jsonl", [WIC[0], WIC[0] | beyond, WIC[2]]))
    documents = encode(corpus, tokenizer, context=10)
    assert [d.refusal is None for d in documents] == [True, True, False, False, True, True]
    end = 1 + len(tokenizer("!" * 9 + " fox")["input_ids"])
    reason = f"sentence1: 'fox' ends at token {end}, beyond the context of 10"
    assert [d.refusal for d in documents[2:4]] == [reason, reason]
    assert [prompt(d).span for d in documents[2:4]] == [None, None]
    assert all(not len(d.token_ids) for d in documents[2:4])
    assert [prompt(d).item for d in documents] == [0, 0, 1, 1, 2, 2]
    # what follows the word may be cut off
    late = {"sentence2": "a fox " + "!" * 20, "idx2": 1}
    corpus = open_task("wic", dataset=write(tmp_path / "w.jsonl", [WIC[0] | late]))
    cut = encode(corpus, tokenizer, context=10)[1]
    assert (len(cut.token_ids), cut.refusal, span_text(cut, tokenizer).strip()) == (10, None, "fox")
    assert cut.n_source_tokens > 20


def test_max_tokens_stops_at_the_last_whole_item(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = open_task("arc_easy", dataset=write(tmp_path / "a.jsonl", ARC))
    lengths = [len(d.token_ids) for d in encode(corpus, tokenizer)]
    assert len(lengths) == 5
    assert len(encode(corpus, tokenizer, max_tokens=sum(lengths[:3]) - 1)) == 0
    assert len(encode(corpus, tokenizer, max_tokens=sum(lengths[:3]))) == 3
    assert len(encode(corpus, tokenizer, max_tokens=sum(lengths) - 1)) == 3
    assert len(encode(corpus, tokenizer, max_tokens=sum(lengths))) == 5


def scored(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness: HFLM._encode_pair, with the tokenizer's own special tokens."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(context)["input_ids"]
    return before, whole[len(before) :]


@pytest.fixture(scope="module")
def framing(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    """Puts BOS in front of a text, as Llama's does."""
    made = make_tokenizer(bos_token="<|end|>")  # noqa: S106  # no password
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    return made


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Merges a letter with the blank behind it: the tokens of a context are no prefix of those of the whole."""
    characters = [*map(chr, range(33, 127)), "\n", "▁"]
    merged = [f"{letter}▁" for letter in characters]
    vocab = {token: number for number, token in enumerate(characters + merged)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(c, "▁") for c in characters]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return Tokenizer(tokenizer_object=backend)


LM_ROWS: dict[str, list[tuple[Row, str, list[str], int | None]]] = {
    "arc_easy": [
        (ARC[0], "Question: What is quick?\nAnswer:", ["the fox", "a dog", "no"], 1),
        (ARC[1], "Question: How many dogs?\nAnswer:", ["7", "12"], 0),
    ],
    "hellaswag": [
        (
            {"activity_label": "Foxes", "ctx_a": "[header] A fox  sees [title] a dog.", "ctx_b": "the DOG",
             "endings": ["runs [substeps] away. ", "a  [x] b"], "label": "1"},
            "Foxes: A fox sees. a dog. The dog", ["runs away.", "a  b"], 1,
        ),
        (
            {"activity_label": "Dogs", "ctx_a": "A dog", "ctx_b": "", "endings": ["a", "b", "c", "d"], "label": 0},
            "Dogs: A dog", ["a", "b", "c", "d"], 0,
        ),
    ],
    "lambada": [
        ({"context": "a fox sees the lazy", "continuation": "dog"}, "a fox sees the lazy", ["dog"], None),
        ({"context": "blanks stay \n", "continuation": " here"}, "blanks stay \n", ["here"], None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("task", LM_ROWS)
@pytest.mark.parametrize("kind", ["tokenizer", "framing", "merging"])
@pytest.mark.parametrize("context", [CONTEXT, 8])
def test_prompts_are_tokenised_as_lm_evaluation_harness_does(
    tmp_path: Path, request: pytest.FixtureRequest, task: str, kind: str, context: int
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    rows = [row for row, *_ in LM_ROWS[task]]
    corpus = open_task(task, dataset=write(tmp_path / "t.jsonl", rows))
    assert corpus.bos_of_tokenizer
    documents = iter(encode(corpus, tokenizer, 0 if kind == "framing" else None, context=context))
    for number, (_, text, choices, label) in enumerate(LM_ROWS[task]):
        expected = [scored(tokenizer, text, f" {choice}") for choice in choices]
        fits = all(len(continuation) < context for _, continuation in expected)
        for choice, (before, continuation) in enumerate(expected):
            document = next(documents)
            found = prompt(document)
            assert (found.item, found.label, found.word) == (number, label, None)
            assert found.role == ("continuation" if label is None else f"choice{choice}")
            assert found.span_chars == len(choices[choice])
            assert document.n_source_tokens == len(before) + len(continuation)
            if not fits:
                assert f"tokens fills the context of {context}" in str(document.refusal)
                continue
            assert document.refusal is None
            kept = [*before, *continuation][-context:]
            assert document.token_ids.tolist() == kept
            assert found.span == (len(kept) - len(continuation), len(kept))
    assert next(documents, None) is None


def test_text_that_merges_over_blanks_is_a_case_of_its_own(merging: Tokenizer) -> None:
    """Else the test above could not tell the rule from plain tokenisation of the whole."""
    for rows in LM_ROWS.values():
        for _, text, choices, _ in rows:
            before, continuation = scored(merging, text, f" {choices[0]}")
            assert before + continuation != merging(f"{text} {choices[0]}")["input_ids"]
            assert continuation


def test_the_same_items_in_the_forms_that_datasets_have(tmp_path: Path, tokenizer: Tokenizer) -> None:
    forms: dict[str, tuple[Row, Row]] = {
        "arc_easy": (ARC[0], {"question": "Question: What is quick?\nAnswer:", "choices": ["the fox", "a dog", "no"],
                              "gold": 1}),
        "hellaswag": (LM_ROWS["hellaswag"][0][0], {"ctx": "Foxes: A fox sees. a dog. The dog",
                                                   "endings": ["runs away.", "a  b"], "label": 1}),
        "lambada": ({"context": "a fox sees the lazy", "continuation": "dog"}, {"text": "a fox sees the lazy dog"}),
    }  # fmt: skip
    for task, rows in forms.items():
        one, other = (
            encode(open_task(task, dataset=write(tmp_path / f"{i}.jsonl", [row])), tokenizer, None)
            for i, row in enumerate(rows)
        )
        assert [prompt(d) for d in one] == [prompt(d) for d in other]
        assert [d.token_ids.tolist() for d in one] == [d.token_ids.tolist() for d in other]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("wic", WIC[0] | {"idx1": 4}, "idx1 is 4, but the sentence has 4 words"),
        ("wic", WIC[0] | {"idx2": -1}, "idx2 is -1, but the sentence has 2 words"),
        ("wic", WIC[0] | {"label": 2}, "label is 2, not a number from 0 to 1"),
        ("wic", WIC[0] | {"sentence2": None}, "sentence2 holds a NoneType, not text"),
        ("wic", by_offset(WIC[0]) | {"end1": 99}, "start1 and end1 are 10 and 99, but the sentence has 19"),
        ("wic", by_offset(WIC[0]) | {"label": -1}, "label is -1"),  # SuperGLUE's test split
        ("arc_easy", ARC[0] | {"answerKey": "E"}, "answerKey is 'E', not one of A, B, C"),
        ("arc_easy", ARC[0] | {"choices": ["a"]}, "choices have no text and label"),
        ("arc_easy", {"question": "q", "choices": ["a", "b"], "gold": 2}, "gold is 2, not a number from 0 to 1"),
        ("arc_easy", {"question": "q", "choices": [], "gold": 0}, "choices holds no list of texts"),
        ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": ""}, "label is '', not a number from 0 to 1"),
        ("hellaswag", {"ctx": "c", "endings": "a", "label": 0}, "endings holds no list of texts"),
        ("lambada", {"context": 3, "continuation": "a"}, "context holds a int, not text"),
    ],
)  # fmt: skip
def test_what_is_no_item_names_its_row(
    tmp_path: Path, tokenizer: Tokenizer, task: str, row: Row, message: str
) -> None:
    corpus = open_task(task, dataset=write(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(CorpusError) as caught:
        encode(corpus, tokenizer)
    assert str(caught.value).startswith(f"bad.jsonl#0 is no item of {task}: {message}")


def test_missing_columns_are_named_with_those_that_there_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {name: value for name, value in WIC[0].items() if name != "sentence2"} | {"sentense2": "a"}
    with pytest.raises(
        CorpusError, match=r"no column 'sentence2'; it has .*Did you mean 'sentense2'\?"
    ) as caught:
        encode(open_task("wic", dataset=write(tmp_path / "w.jsonl", [row])), tokenizer)
    assert "idx1, idx2, label; or word, sentence1, sentence2, start1" in caught.value.hint


def test_prompts_that_cannot_be_scored_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"context": "", "continuation": "dog"}, {"context": "a", "continuation": "!" * CONTEXT}]
    documents = encode(open_task("lambada", dataset=write(tmp_path / "l.jsonl", rows)), tokenizer, None)
    n_tokens = len(tokenizer(" " + "!" * CONTEXT)["input_ids"])
    assert documents[0].refusal == "continuation: no token stands before its continuation"
    assert (
        documents[1].refusal
        == f"continuation: its continuation of {n_tokens} tokens fills the context of {CONTEXT}"
    )
    assert len(encode(open_task("lambada", dataset=tmp_path / "l.jsonl"), tokenizer, 0)[0].token_ids) > 1


def test_splits_are_files_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, dev = write(tmp_path / "train.jsonl", WIC), write(tmp_path / "dev.jsonl", WIC[:1])
    corpus = open_task("wic", split=f"train={train}, dev={dev}")
    assert corpus.description == "wic: train.jsonl, dev.jsonl"
    found = [(prompt(d).split, prompt(d).item) for d in encode(corpus, tokenizer)]
    assert found == [("train", 0)] * 2 + [("train", 1)] * 2 + [("train", 2)] * 2 + [("dev", 0)] * 2
    turned = open_task("wic", split=f"dev={dev},train={train}")
    renamed = open_task("wic", split=f"train={train},test={dev}")
    prints = [json.dumps(c.fingerprint, sort_keys=True) for c in (corpus, turned, renamed)]
    assert len(set(prints)) == 3


def test_splits_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = "c0ffee"

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: Info)
    corpus = open_task("wic", dataset="some/glue", dataset_config="wic", split="train,validation")
    assert [(name, rows.fingerprint["split"]) for name, rows in corpus.splits] == [
        ("train", "train"), ("validation", "validation"),
    ]  # fmt: skip
    assert {rows.fingerprint["config"] for _, rows in corpus.splits} == {"wic"}
    assert [name for name, _ in open_task("wic", dataset="some/glue").splits] == ["train"]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({}, "there is no dataset", "--split train=FILE,dev=FILE"),
        ({"split": "train"}, "and 'train' names no files", "--dataset FILE"),
        ({"split": "train=a.jsonl,dev"}, "names no files", "--dataset FILE"),
        ({"split": "train=no.jsonl"}, "'no.jsonl' does not exist", ""),
        ({"split": "a=w.jsonl,a=w.jsonl"}, "names 'a' twice", ""),
        ({"dataset": "w.jsonl", "split": "dev"}, "is a file and has no split 'dev'", "--split dev=w.jsonl"),
        ({"dataset": "w.jsonl", "split": "dev=w.jsonl"}, "which?", "Leave --dataset out"),
        ({"dataset": "no.jsonl"}, "'no.jsonl' does not exist", ""),
    ],
)  # fmt: skip
def test_where_the_items_are_must_be_clear(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("w.jsonl"), WIC)
    with pytest.raises(PlanError) as caught:
        open_task("wic", **options)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_wic_needs_a_tokenizer_that_knows_its_characters(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(CorpusError, match="Slow is a slow tokenizer") as caught:
        encode(open_task("wic", dataset=write(tmp_path / "w.jsonl", WIC)), slow)
    assert "--tokenizer" in caught.value.hint


class Items:
    """Stands for a streaming dataset of arc_easy."""

    column_names = ("question", "choices", "gold")

    def __init__(self, n_choices: Sequence[int]) -> None:
        self.n_choices = n_choices

    def skip(self, n: int) -> Items:
        return Items(self.n_choices[n:])

    def __iter__(self) -> Any:
        return ({"question": "q" * (1 + n % 3), "choices": ["a"] * n, "gold": n - 1} for n in self.n_choices)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 4), max_size=6),
    st.lists(st.integers(1, 4), max_size=4),
    st.integers(0, 4),
    st.lists(st.integers(0, 60), max_size=3),
)
def test_any_steps_give_the_documents_of_one_go(
    tokenizer: Tokenizer, train: list[int], dev: list[int], shuffle_buffer: int, limits: list[int]
) -> None:
    splits = (
        ("train", Rows("train", {}, lambda: Items(train), shuffle_buffer)),
        ("dev", Rows("dev", {}, lambda: Items(dev), shuffle_buffer)),
    )
    corpus = TaskCorpus(TASKS["arc_easy"], splits)
    whole = [(prompt(d), d.token_ids.tolist()) for d in encode(corpus, tokenizer)]
    assert len(whole) == sum(train) + sum(dev)
    there: list[EncodedDocument] = []
    for limit in [*sorted(limits), None]:
        left = None if limit is None else limit - sum(len(d.token_ids) for d in there)
        there += encode(corpus, tokenizer, max_tokens=left, skip=len(there))
        assert [(prompt(d), d.token_ids.tolist()) for d in there] == whole[: len(there)]
    assert len(there) == len(whole)


def real_tokenizer(name: str) -> Tokenizer:
    opened = transformers.AutoTokenizer.from_pretrained(DATA / name)
    assert isinstance(opened, Tokenizer)
    return opened


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return real_tokenizer("tokenizers/gpt2")


@needs_data
@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/stories260k-llama"])
def test_every_word_of_wic_is_found(tmp_path: Path, name: str) -> None:
    """The tokens of the span decode to the word, with at most the blank in front."""
    tokenizer = real_tokenizer(name)
    train, dev = (DATA / "tasks" / f"wic_{split}.jsonl" for split in ("train", "dev"))
    items = {
        split: [json.loads(line) for line in path.read_text().splitlines()]
        for split, path in (("train", train), ("dev", dev))
    }
    super_dev = write(tmp_path / "dev.jsonl", [by_offset(row) for row in items["dev"]])
    bos = tokenizer.bos_token_id
    documents = encode(open_task("wic", split=f"train={train},dev={dev}"), tokenizer, bos, context=256)
    assert len(documents) == 2 * (5428 + 638)
    for document in documents:
        found = prompt(document)
        row = items[str(found.split)][found.item]
        number = int(found.role[-1])
        word = row[f"sentence{number}"].split()[row[f"idx{number}"]]
        assert document.refusal is None
        assert span_text(document, tokenizer).strip() == word
        assert (found.label, found.word, found.span_chars) == (int(row["label"]), row["word"], len(word))
    same = encode(open_task("wic", split=f"dev={super_dev}"), tokenizer, bos, context=256)
    assert [prompt(d) for d in same] == [prompt(d) for d in documents[2 * 5428 :]]


@needs_data
@pytest.mark.parametrize("task", FILES)
def test_real_prompts_are_those_of_lm_evaluation_harness(gpt2: Tokenizer, task: str) -> None:
    path = DATA / "tasks" / f"{FILES[task]}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {
        "arc_easy": ("question", "choices"),
        "hellaswag": ("ctx", "endings"),
        "lambada": ("context", "continuation"),
    }
    documents = encode(open_task(task, dataset=path), gpt2, None, context=128, max_tokens=60_000)
    assert len(documents) > 400
    n_cut = 0
    for document in documents:
        found = prompt(document)
        row = rows[found.item]
        context, choices = (row[key] for key in keys[task])
        choice = choices if task == "lambada" else choices[int(found.role.removeprefix("choice"))]
        before, continuation = scored(gpt2, context, f" {choice}")
        assert document.token_ids.tolist() == (before + continuation)[-128:]
        assert span_text(document, gpt2) == f" {choice}"
        assert found.label == (None if task == "lambada" else row["gold" if task == "arc_easy" else "label"])
        n_cut += document.n_source_tokens > 128
    assert n_cut > 0


def test_a_task_in_a_lake(make_spec: Callable[..., CaptureSpec], tmp_path: Path) -> None:
    """From the files to SQL: every document is there, with its role and the place of its word."""
    beyond = WIC[0] | {"sentence1": "! " * CONTEXT + "fox", "idx1": CONTEXT}
    train, dev = write(tmp_path / "train.jsonl", [*WIC, beyond]), write(tmp_path / "dev.jsonl", WIC[1:2])
    lake = tmp_path / "lake"

    def spec(**options: Any) -> CaptureSpec:
        return make_spec(dataset=None, task="wic", split=f"train={train},dev={dev}", sites="resid", **options)

    first = capture_run(lake, spec(max_tokens=30))
    run = capture_run(lake, spec())
    assert run.run_id == first.run_id
    assert 0 < first.manifest.n_documents < run.manifest.n_documents == 8
    assert first.manifest.n_documents % 2 == 0
    assert run.manifest.geometry.context == CONTEXT
    assert run.manifest.bos_token_id == 0
    assert run.manifest.dataset == "wic: train.jsonl, dev.jsonl"
    assert plan_capture(spec(), lake).frozen is None

    whole = capture_run(tmp_path / "whole", spec())
    assert whole.run_id == run.run_id
    told = ["document", "status", "sources", "n_tokens", "task", "split", "item", "role", "label", "word"]
    told += ["span_start", "span_end", "span_chars"]
    assert run.documents.select(told) == whole.documents.select(told)
    assert run.tokens["token_id"] == whole.tokens["token_id"]

    opened = open_lake(lake)
    rows = opened.sql("FROM all_documents ORDER BY document").to_arrow_table().select([*told, "reason"])
    assert rows.drop_columns("reason").to_pylist() == run.documents.select(told).to_pylist()
    assert [(row["split"], row["item"], row["role"], row["status"]) for row in rows.to_pylist()] == [
        (split, item, f"sentence{n}", "refused" if item == 3 else "stored")
        for split, item in (("train", 0), ("train", 1), ("train", 2), ("train", 3), ("dev", 0))
        for n in (1, 2)
    ]
    assert "beyond the context of 48" in rows["reason"][6].as_py()
    words = opened.sql(
        "SELECT document, string_agg(text, '' ORDER BY position) FROM documents JOIN tokens USING (document) "
        "WHERE position >= span_start AND position < span_end GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    assert [text.strip() for _, text in words] == [
        "foxes",
        "fox!",
        "dog",
        "dogs",
        "sees",
        "saw",
        "dog",
        "dogs",
    ]
    # the pairs that a probe reads: the state of each word's last token, side by side
    pairs = opened.sql(
        "SELECT d.split, d.item, d.label, count(*), count(r.vec) FROM documents d JOIN resid r "
        "ON r.document = d.document AND r.position = d.span_end - 1 "
        "WHERE boundary = 2 GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    assert pairs == [("dev", 0, 0, 2, 2), ("train", 0, 1, 2, 2), ("train", 1, 0, 2, 2), ("train", 2, 0, 2, 2)]


def test_prompts_get_the_bos_that_their_tokenizer_gives(
    make_spec: Callable[..., CaptureSpec],
    make_model: Callable[..., Any],
    framing: Tokenizer,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "arc.jsonl", ARC)

    def planned(**options: Any) -> Any:
        return plan_capture(make_spec(dataset=path, task="arc_easy", **options))

    plain, framed = planned(), planned(model=make_model("gpt2"), tokenizer=framing)
    assert plain.manifest.bos_token_id is None  # though the tokenizer has one
    assert framed.manifest.bos_token_id == 0
    assert framed.tokens.num_rows == plain.tokens.num_rows + 5
    assert planned(bos="0").tokens["token_id"] == framed.tokens["token_id"]
    assert planned(bos="0").run_id != plain.run_id
    assert plain.documents["role"].to_pylist() == ["choice0", "choice1", "choice2", "choice0", "choice1"]
    assert plan_capture(make_spec(dataset=path, text_column="question")).run_id != plain.run_id
