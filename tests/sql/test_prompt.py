"""The prompt: what is typed, and what comes back."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.sql import Session
from layerlake.sql.prompt import answer, completer, completions, history_path, read_and_answer, statements

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range % 7 = b.range % 11"


@pytest.fixture
def session(tiny_lake: Lake) -> Session:
    return Session(tiny_lake)


@pytest.fixture
def keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    """Keys to be typed; the user's state is in a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def type_in(session: Session, keyboard: PipeInput, keys: str, kind: str = "csv") -> tuple[str, str]:
    """Type some keys and leave; return the results, and what else was said."""
    keyboard.send_text(keys + CTRL_D)
    stream, told = io.StringIO(), list[str]()
    read_and_answer(session, kind, stream, tell=told.append)
    return stream.getvalue(), "\n".join(told[1:])


def test_a_statement_goes_on_until_its_semicolon(session: Session, keyboard: PipeInput) -> None:
    results, told = type_in(session, keyboard, "SELECT 1\rAS one;\rSELECT 2 AS two; SELECT 3 AS three;\r")
    assert results == "one\n1\ntwo\n2\nthree\n3\n"
    assert told == ""


def test_after_a_mistake_it_goes_on(session: Session, keyboard: PipeInput) -> None:
    keys = "SELECT nosuch FROM tokens;\rFROM residd;\rDROP TABLE x;\rSELEC;\rSELECT 1 AS one;\r"
    results, told = type_in(session, keyboard, keys)
    assert results == "one\n1\n"
    assert 'column "nosuch" not found' in told
    assert "hint: Relations are: " in told
    assert "DROP is not a read" in told
    assert "syntax error" in told
    assert "Traceback" not in told


def test_a_failure_while_rows_are_fetched_is_told_too(session: Session, keyboard: PipeInput) -> None:
    results, told = type_in(session, keyboard, "SELECT lens_top(vec) FROM mlp_post;\rSELECT 1 AS one;\r")
    assert "vectors of 8; this one has 16" in told
    assert results.endswith("one\n1\n")


def test_ctrl_c_drops_the_lines(session: Session, keyboard: PipeInput) -> None:
    results, _ = type_in(session, keyboard, f"SELECT nosuch\r{CTRL_C}SELECT 1 AS one;\r")
    assert results == "one\n1\n"


def test_results_come_in_the_format_that_was_asked_for(session: Session, keyboard: PipeInput) -> None:
    assert type_in(session, keyboard, "SELECT 1 AS one;\r", "json")[0] == '[\n{"one": 1}\n]\n'


def test_what_was_typed_comes_back_in_the_next_session(tiny_lake: Lake, keyboard: PipeInput) -> None:
    type_in(Session(tiny_lake), keyboard, "SELECT 1\rAS one;\r")
    assert "AS one;" in history_path().read_text()
    results, _ = type_in(Session(tiny_lake), keyboard, f"{UP}{UP}\r")
    assert results == "one\n1\n"


def test_a_history_that_cannot_be_written_is_no_obstacle(
    session: Session, keyboard: PipeInput, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("a file, where a folder is wanted")
    assert type_in(session, keyboard, "SELECT 1 AS one;\r")[0] == "one\n1\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("FROM all_d", ["all_documents"]),
        ("SELECT BOUN", ["boundary"]),
        ("SELECT norm(ve", ["vec"]),
        ("SELECT lens_to", ["lens_top"]),
        ('SELECT 1 FROM "tin', ['"tiny-a0fac236"']),
    ],
)
def test_tab_completes_the_word_before_the_cursor(session: Session, typed: str, completed: list[str]) -> None:
    found = completer(session).get_completions(Document(typed), CompleteEvent(completion_requested=True))
    assert set(completed).issubset({each.text for each in found})


def test_completions_are_keywords_functions_relations_columns_and_runs(session: Session) -> None:
    found = completions(session)
    assert {"select", "lens_top", "norm", "array_inner_product", "resid", "runs", "boundary"}.issubset(found)
    assert f'"{session.chosen}"' in found
    assert not any(" of " in name for name in found)


def test_statements_are_cut_where_duckdb_cuts_them(session: Session) -> None:
    first, second = statements(session, "SELECT ';' AS a; -- ;\nFROM runs SELECT 1 AS b")
    assert [session.sql(text).columns for text in (first, second)] == [["a"], ["b"]]
    with pytest.raises(QueryError, match="syntax error"):
        statements(session, "SELECT FROM WHERE")


def test_ctrl_c_stops_a_query_and_the_connection_goes_on(session: Session) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        answer(session, ENDLESS, "csv", io.StringIO())
    assert time.monotonic() - began < 20
    stream = io.StringIO()
    answer(session, "SELECT 1 AS one", "csv", stream)
    assert stream.getvalue() == "one\n1\n"


def test_ctrl_c_during_a_query_comes_back_to_the_prompt(session: Session, keyboard: PipeInput) -> None:
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    results, told = type_in(session, keyboard, f"{ENDLESS};\rSELECT 1 AS one;\r")
    assert told == "interrupted"
    assert results.endswith("one\n1\n")
