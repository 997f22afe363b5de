"""Rows from files of every kind, in an order that can be had again; what cannot be read is a clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.capture.rows import Rows, open_rows, shuffled
from layerlake.catalog.errors import CorpusError

TEXTS = ["one fox", "two\nfoxes", "three lazy dogs"]


def column(path: Path, name: str = "text", **options: Any) -> list[Any]:
    return [row[name] for _, row in open_rows(str(path), **options).read([name])]


class Numbers:
    """Stands for a streaming dataset: rows 0, 1, … in column ``n``."""

    column_names = ("n",)

    def __init__(self, n: int, first: int = 0) -> None:
        self.n, self.first = n, first

    def skip(self, n: int) -> Numbers:
        return Numbers(self.n, self.first + n)

    def __iter__(self) -> Any:
        return ({"n": number} for number in range(self.first, self.n))


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
    assert column(path, sample_by=sample_by) == expected


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
def test_a_table_s_rows_and_columns(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.table({"id": [0, 1, 2], "text": TEXTS, "body": ["a", None, "c"]}))
    rows = open_rows(str(tmp_path / name))
    assert rows.columns == ("id", "text", "body")
    assert rows.description == name
    expected = [{"text": text, "body": body} for text, body in zip(TEXTS, ["a", None, "c"], strict=True)]
    assert list(rows.read(["text", "body"])) == list(enumerate(expected))
    assert list(rows.read(["text", "body"], skip=1)) == list(enumerate(expected))[1:]


def test_a_column_that_a_row_lacks_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "more": 1}\n{"text": "b"}\n')
    assert column(tmp_path / "a.jsonl", "more") == [1, None]


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet", "empty.arrow"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CorpusError, match="is empty"):
        open_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["blank.jsonl", "blank.txt"])
def test_a_file_of_blank_lines_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n\n\n\n")
    with pytest.raises(CorpusError, match=r"is empty|cannot be read"):
        _ = open_rows(str(tmp_path / name)).columns


def test_what_is_not_utf_8_is_an_error_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà vu\n\nencore".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt' cannot be read.*utf-8"):
        column(tmp_path / "latin.txt")


def test_a_fault_far_into_the_file_is_too(tmp_path: Path) -> None:
    """The first rows are fine, so that opening finds nothing wrong."""
    path = tmp_path / "long.txt"
    path.write_bytes(b"a fox and a dog\n" * 900_000 + b"\xff\n")  # datasets reads 10 MB at a time
    read = open_rows(str(path), sample_by="line").read(["text"])
    assert next(read) == (0, {"text": "a fox and a dog"})
    with pytest.raises(CorpusError, match=r"long\.txt' cannot be read"):
        list(read)


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.jsonl", b'{"text": "a"}\n{"text": '), ("broken.parquet", b"PAR1 and nothing else")],
)
def test_broken_json_and_parquet_are_errors_of_the_corpus(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match="cannot be read"):
        column(tmp_path / name)


def test_folders_unknown_formats_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is a folder") as folder:
        open_rows(str(tmp_path))
    assert "Name one file" in folder.value.hint
    (tmp_path / "text.docx").write_text("text")
    with pytest.raises(CorpusError, match="not a dataset file") as unknown:
        open_rows(str(tmp_path / "text.docx"))
    assert ".jsonl" in unknown.value.hint
    for missing in (tmp_path / "no.txt", tmp_path / "nothing", Path("no.jsonl")):
        with pytest.raises(CorpusError, match="does not exist"):
            open_rows(str(missing))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match="'sentence'") as unit:
        open_rows(str(tmp_path / "a.txt"), sample_by="sentence")
    assert "paragraph, line or file" in unit.value.hint
    with pytest.raises(CorpusError, match="has no split 'test'") as split:
        open_rows(str(tmp_path / "a.txt"), split="test")
    assert "Leave --split out" in split.value.hint


def test_the_fingerprint_follows_the_content_and_every_option(tmp_path: Path) -> None:
    for name, content in (("a.txt", "x\n\ny"), ("b.txt", "x\n\ny"), ("c.txt", "x\n\nz")):
        (tmp_path / name).write_text(content)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "body": "b"}\n')

    def fingerprint(name: str, **options: Any) -> Any:
        return open_rows(str(tmp_path / name), **options).fingerprint

    assert fingerprint("a.txt") == fingerprint("b.txt") != fingerprint("c.txt")
    assert fingerprint("a.txt") != fingerprint("a.txt", sample_by="line")
    with pytest.raises(CorpusError, match="cannot be split by line"):
        fingerprint("a.jsonl", sample_by="line")
    orders = [{}, {"shuffle_buffer": 5}, {"shuffle_buffer": 6}, {"shuffle_buffer": 5, "seed": 1}]
    assert len({json.dumps(fingerprint("a.txt", **order), sort_keys=True) for order in orders}) == 4
    # a buffer of one row changes nothing, and neither does a seed without a shuffle
    assert fingerprint("a.txt") == fingerprint("a.txt", shuffle_buffer=1) == fingerprint("a.txt", seed=3)


@given(st.integers(0, 60), st.integers(2, 20), st.integers(0, 5))
def test_a_shuffle_loses_nothing_and_holds_no_more_than_it_may(n: int, buffer: int, seed: int) -> None:
    taken = 0

    def source() -> Any:
        nonlocal taken
        for number in range(n):
            taken += 1
            yield number

    order = []
    for given_out, number in enumerate(shuffled(source(), buffer, seed)):
        order.append(number)
        assert taken - given_out <= buffer + 1  # those held, and the one that has just come
    assert sorted(order) == list(range(n))
    assert order == list(shuffled(range(n), buffer, seed))
    assert all(number < place + buffer for place, number in enumerate(order))


def test_a_shuffle_s_order_never_changes() -> None:
    """It is part of what runs are: if this fails, runs that lie in lakes cannot be extended."""
    assert list(shuffled(range(12), 4, seed=7)) == [1, 0, 2, 5, 6, 4, 7, 8, 10, 9, 3, 11]


def test_every_seed_draws_another_order_and_every_row_moves() -> None:
    orders = [list(shuffled(range(50), 50, seed)) for seed in range(40)]
    assert len({tuple(order) for order in orders}) == 40
    mean_place = [sum(order.index(number) for order in orders) / 40 for number in (0, 25, 49)]
    assert all(14 < place < 35 for place in mean_place)  # 24.5 ± 5 standard errors


@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 3), st.integers(0, 45))
def test_rows_left_out_are_the_first_of_all(n: int, buffer: int, seed: int, skip: int) -> None:
    rows = Rows("numbers", {}, lambda: Numbers(n), buffer, seed)
    whole = list(rows.read(["n"]))
    assert list(rows.read(["n"], skip)) == whole[skip:]
    assert all(number == row["n"] for number, row in whole)  # the number is the dataset's, whatever the order


def test_a_file_is_shuffled_as_it_streams(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(9)))
    expected = [str(i) for i in shuffled(range(9), 4, 2)]
    assert column(path, shuffle_buffer=4, seed=2) == expected != [str(i) for i in range(9)]


def test_a_local_file_is_nobody_else_s_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` counts the files it opens at its maker's; offline, that alone takes seconds."""
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **_: asked.append(given))
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a session"))
    (tmp_path / "text.txt").write_text("a fox\n\na dog")
    assert column(tmp_path / "text.txt") == ["a fox", "a dog"]
    assert asked == []


@pytest.mark.parametrize(
    ("said", "shown"), [("no route to host\nand more", "no route to host"), ("", "OSError")]
)
def test_a_hub_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError(said)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(CorpusError, match=rf"neither a local file nor .* from the hub: {shown}$") as caught:
        open_rows("roneneldan/TinyStories")
    assert "local txt" in caught.value.hint


def test_a_hub_dataset_streams_at_the_revision_that_it_is_known_by(monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = "c0ffee"

    opened: list[Any] = []

    def load_dataset(*given: Any, **options: Any) -> Numbers:
        opened.append((given, options))
        return Numbers(5)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: Info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = open_rows("some/corpus", config="en", revision="main", shuffle_buffer=3)
    assert rows.fingerprint == {
        "hub": "some/corpus", "revision": "c0ffee", "config": "en", "split": "train", "shuffle_buffer": 3, "seed": 0,
    }  # fmt: skip
    assert opened == []  # nothing is opened before it is read
    assert sorted(number for number, _ in rows.read(["n"])) == [0, 1, 2, 3, 4]
    assert opened == [(("some/corpus", "en"), {"split": "train", "revision": "c0ffee", "streaming": True})]


def test_planning_imports_no_library_that_reads(tmp_path: Path) -> None:
    """Finding out that there is nothing to do must be quick."""
    (tmp_path / "a.txt").write_text("text")
    code = (
        "import sys; from layerlake.capture import corpus, plan, rows; rows.open_rows('a.txt');"
        "print([name for name in ('datasets', 'transformers', 'torch') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"
