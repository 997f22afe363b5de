"""Text from files of every kind becomes documents; what is no text is a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from layerlake.capture.corpus import encode_corpus, open_corpus, resolve_bos
from layerlake.capture.placement import EncodedDocument
from layerlake.catalog.errors import CorpusError

TEXTS = ["one fox", "two\nfoxes", "three lazy dogs"]


def texts(path: Path, **options: Any) -> list[str]:
    return [text for _, text in open_corpus(str(path), **options).texts()]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("paragraph", TEXTS),
        ("line", ["one fox", "", "two", "foxes", "", "three lazy dogs"]),
        ("file", ["one fox\n\ntwo\nfoxes\n\nthree lazy dogs"]),
    ],
)
def test_a_text_file_by_paragraph_line_or_file(tmp_path: Path, sample_by: str, expected: list[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(TEXTS))
    assert texts(path, sample_by=sample_by) == expected


def _write_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _write_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _write_lines(path: Path, table: pa.Table) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


WRITERS: dict[str, tuple[str, Callable[[Path, pa.Table], None]]] = {
    "jsonl": ("rows.jsonl", _write_lines),
    "parquet": ("rows.parquet", lambda path, table: pq.write_table(table, path)),
    "arrow-stream": ("rows.arrow", _write_stream),
    "arrow-file": ("rows.arrow", _write_file),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_s_rows_are_documents(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.table({"id": [0, 1, 2], "text": TEXTS, "body": ["a", None, "c"]}))
    assert texts(tmp_path / name) == TEXTS
    assert texts(tmp_path / name, text_column="body") == ["a", "", "c"]  # null is an empty text
    sources = [source for source, _ in open_corpus(str(tmp_path / name)).texts(skip=1)]
    assert sources == [f"{name}#1", f"{name}#2"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_column_lists_the_columns(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.table({"id": [0], "body": ["a"]}))
    with pytest.raises(CorpusError, match="no column 'text'; it has id, body") as caught:
        open_corpus(str(tmp_path / name))
    assert "--text-column" in caught.value.hint
    with pytest.raises(CorpusError, match=r"Did you mean 'body'\?"):
        open_corpus(str(tmp_path / name), text_column="bodyy")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.table({"id": [0], "words": [["a", "b"]], "body": ["a"]}))
    for column, held in (("id", "int"), ("words", "list")):
        with pytest.raises(CorpusError, match=f"holds a {held} in column '{column}'"):
            texts(tmp_path / name, text_column=column)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet", "empty.arrow"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CorpusError, match="is empty"):
        open_corpus(str(tmp_path / name))


def test_a_file_of_blank_lines_is_empty(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "blank.txt").write_text("\n\n\n\n")
    for name in ("blank.jsonl", "blank.txt"):
        with pytest.raises(CorpusError, match=r"is empty|cannot be read"):
            texts(tmp_path / name)


def test_what_is_not_utf_8_is_an_error_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà vu\n\nencore".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt' cannot be read.*utf-8"):
        open_corpus(str(tmp_path / "latin.txt"))


def test_a_fault_far_into_the_file_is_too(tmp_path: Path) -> None:
    """The first rows are fine, so that opening finds nothing wrong."""
    path = tmp_path / "long.txt"
    path.write_bytes(b"a fox and a dog\n" * 900_000 + b"\xff\n")  # datasets reads 10 MB at a time
    corpus = open_corpus(str(path), sample_by="line")
    with pytest.raises(CorpusError, match=r"long\.txt' cannot be read"):
        list(corpus.texts())


def test_broken_json_and_parquet_are_errors_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    for name in ("broken.jsonl", "broken.parquet"):
        with pytest.raises(CorpusError, match="cannot be read"):
            texts(tmp_path / name)


def test_folders_unknown_formats_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is a folder") as folder:
        open_corpus(str(tmp_path))
    assert "Name one file" in folder.value.hint
    (tmp_path / "text.docx").write_text("text")
    with pytest.raises(CorpusError, match="not a dataset file") as unknown:
        open_corpus(str(tmp_path / "text.docx"))
    assert ".jsonl" in unknown.value.hint
    for missing in (tmp_path / "no.txt", tmp_path / "nothing", Path("no.jsonl")):
        with pytest.raises(CorpusError, match="does not exist"):
            open_corpus(str(missing))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match="'sentence'") as split:
        open_corpus(str(tmp_path / "a.txt"), sample_by="sentence")
    assert "paragraph, line or file" in split.value.hint


def test_the_fingerprint_follows_the_content_and_every_option(tmp_path: Path) -> None:
    for name, content in (("a.txt", "x\n\ny"), ("b.txt", "x\n\ny"), ("c.txt", "x\n\nz")):
        (tmp_path / name).write_text(content)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "body": "b"}\n')

    def fingerprint(name: str, **options: Any) -> dict[str, Any]:
        return open_corpus(str(tmp_path / name), **options).fingerprint

    assert fingerprint("a.txt") == fingerprint("b.txt") != fingerprint("c.txt")
    assert fingerprint("a.txt") != fingerprint("a.txt", sample_by="line")
    assert fingerprint("a.jsonl") != fingerprint("a.jsonl", text_column="body")
    assert fingerprint("a.jsonl") == fingerprint("a.jsonl", text_column="text", sample_by="line")


@pytest.mark.parametrize(
    ("special", "choice", "bos"),
    [
        ({"bos_token": "<|end|>", "eos_token": "a"}, "auto", 0),
        ({"eos_token": "<|end|>"}, "auto", 0),
        ({}, "auto", None),
        ({"bos_token": "<|end|>"}, "none", None),
        ({"bos_token": "<|end|>"}, "7", 7),
        ({"bos_token": "<|beyond the model|>", "eos_token": "<|end|>"}, "auto", 0),
        ({"bos_token": "<|beyond the model|>"}, "auto", None),
    ],
)
def test_what_begins_a_document(
    make_tokenizer: Callable[..., transformers.PreTrainedTokenizerFast],
    special: dict[str, str],
    choice: str,
    bos: int | None,
) -> None:
    tokenizer = make_tokenizer(**special)
    assert resolve_bos(choice, tokenizer, n_vocab=300) == bos


@pytest.mark.parametrize("choice", ["300", "-1", "BOS", "", "1.5", "²"])
def test_what_cannot_begin_a_document_is_refused(
    tokenizer: transformers.PreTrainedTokenizerFast, choice: str
) -> None:
    with pytest.raises(CorpusError, match="is not a BOS") as caught:
        resolve_bos(choice, tokenizer, n_vocab=300)
    assert "below 300" in caught.value.hint


@pytest.fixture
def encode(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> Callable[..., list[EncodedDocument]]:
    """Encode paragraphs of 5, 0, 2, 8, 1 and 6 tokens (each "!" is one), BOS not counted."""
    lines = [json.dumps({"text": "!" * n}) for n in (5, 0, 2, 8, 1, 6)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(str(tmp_path / "t.jsonl"))

    def call(**options: Any) -> list[EncodedDocument]:
        given = {"bos": 0, "context": 100, "min_tokens": 3, "max_tokens": None, "n_vocab": 400}
        return list(encode_corpus(corpus, tokenizer, **given | options))

    return call


def test_bos_counts(encode: Callable[..., list[EncodedDocument]]) -> None:
    documents = encode()
    assert [len(d.token_ids) for d in documents] == [6, 0, 3, 9, 0, 7]
    assert all(d.token_ids[0] == 0 for d in documents if d.refusal is None)
    assert [d.n_source_tokens for d in documents] == [6, 1, 3, 9, 2, 7]
    assert [len(d.token_ids) for d in encode(bos=None)] == [5, 0, 0, 8, 0, 6]


def test_short_documents_are_refused_with_the_reason(encode: Callable[..., list[EncodedDocument]]) -> None:
    assert encode()[4].refusal == "2 tokens, fewer than --min-tokens 3"
    assert [d.refusal is None for d in encode(min_tokens=7)] == [False, False, False, True, False, True]


def test_long_documents_are_cut(encode: Callable[..., list[EncodedDocument]]) -> None:
    documents = encode(context=7)
    assert [len(d.token_ids) for d in documents] == [6, 0, 3, 7, 0, 7]
    assert documents[3].n_source_tokens == 9


@pytest.mark.parametrize(
    ("max_tokens", "n_documents"),
    [(5, 0), (6, 2), (8, 2), (9, 3), (17, 3), (18, 5), (24, 5), (25, 6), (99, 6)],
)
def test_max_tokens_stops_at_the_last_whole_document(
    encode: Callable[..., list[EncodedDocument]], max_tokens: int, n_documents: int
) -> None:
    documents = encode(max_tokens=max_tokens)
    assert len(documents) == n_documents
    assert sum(len(d.token_ids) for d in documents) <= max_tokens


def test_a_tokenizer_of_another_model_is_found_out(encode: Callable[..., list[EncodedDocument]]) -> None:
    with pytest.raises(CorpusError, match="the tokenizer does not belong to the model"):
        encode(n_vocab=1)


def test_a_local_file_is_nobody_else_s_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` counts the files it opens at its maker's; offline, that alone takes seconds."""
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **_: asked.append(given))
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a session"))
    (tmp_path / "text.txt").write_text("a fox\n\na dog")
    assert texts(tmp_path / "text.txt") == ["a fox", "a dog"]
    assert asked == []


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(
        CorpusError, match=r"neither a local file nor .* from the hub: no route to host$"
    ) as caught:
        open_corpus("roneneldan/TinyStories")
    assert "local txt" in caught.value.hint
