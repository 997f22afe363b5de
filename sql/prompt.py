"""Statements answered one after the other: those of a text, or those that somebody types."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..catalog.errors import LayerLakeError
from ..catalog.findings import is_state_view
from .connection import Session
from .format import write_result
from .syntax import quoted
from .translation import translated

if TYPE_CHECKING:
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import History

__all__ = ["answer", "completer", "completions", "history_path", "read_and_answer", "statements"]

_BANNER = (
    "SQL over {lake}, read-only; a statement ends in ;\nSHOW ALL TABLES lists what there is, Ctrl-D leaves.\n"
)
_WORD = re.compile(r'^[\w-]+"?')  # from its end to its beginning; a run's id is quoted, and has a hyphen


def statements(session: Session, text: str) -> list[str]:
    """Return the statements of a text.

    Raises
    ------
    QueryError
        It is not SQL.
    """
    with translated():
        return [statement.query for statement in session.connection.extract_statements(text)]


def answer(session: Session, statement: str, kind: str, stream: IO[Any]) -> None:
    """Run one statement and write its result (:func:`layerlake.sql.write_result`); Ctrl-C stops it.

    Raises
    ------
    KeyboardInterrupt
        It was stopped.
    QueryError
        What it asks is wrong.
    """
    # In a thread of its own, for DuckDB holds the thread that it runs in, and signals reach the first one only.
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(lambda: write_result(session.sql(statement), kind, stream))
        try:
            running.result()
        except KeyboardInterrupt:
            while not running.done():  # more than once: it may have been between two queries
                session.connection.interrupt()
                wait([running], timeout=0.1)
            raise


def read_and_answer(session: Session, kind: str, stream: IO[Any], *, tell: Callable[[str], None]) -> None:
    """Read statements from the terminal and answer them, until the input ends (Ctrl-D).

    Lines belong together up to a ``;``. The arrow keys bring back what was typed before, in other sessions too; Tab
    completes keywords, relations, columns and functions. Ctrl-C drops the lines, or stops what runs.

    Parameters
    ----------
    session : Session
        What answers; it is kept for all of them.
    kind : str
        How results are written (:data:`layerlake.sql.FORMATS`).
    stream : file
        Where to.
    tell : callable
        Is told what else there is to say: errors, and their hints.
    """
    tell(_BANNER.format(lake=session.lake.url))
    for text in _typed(session):
        try:
            for statement in statements(session, text):
                answer(session, statement, kind, stream)
        except LayerLakeError as error:
            tell(f"error: {error}")
            if error.hint:
                tell(f"hint: {error.hint}")
        except KeyboardInterrupt:
            tell("interrupted")
        stream.flush()


def _typed(session: Session) -> Iterator[str]:
    """Yield what is typed, whole statements at a time."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @Condition
    def is_whole() -> bool:
        text = prompt.default_buffer.document.text.strip()
        return not text or text.endswith(";")

    @bindings.add("enter", filter=is_whole)
    def _accept(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    prompt: PromptSession[str] = PromptSession(
        "sql> ",
        multiline=True,  # Enter begins a new line, unless the statement is whole
        prompt_continuation="  .. ",
        key_bindings=bindings,
        history=_history(),
        completer=completer(session),
        complete_while_typing=False,
    )
    while True:
        try:
            text = prompt.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text.strip():
            yield text


def history_path() -> Path:
    """Return where the prompt keeps what was typed."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "layerlake" / "sql-history"


def _history() -> History:
    """Return the history of all sessions; that of this one alone if it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def completer(session: Session) -> WordCompleter:
    """Return what completes the word before the cursor, in any case."""
    from prompt_toolkit.completion import WordCompleter

    return WordCompleter(lambda: completions(session), ignore_case=True, pattern=_WORD)


def completions(session: Session) -> list[str]:
    """Return what Tab completes: keywords, functions, and the relations and columns of the chosen run and the lake."""
    if session.chosen is not None:
        session.register_run(session.chosen)
    known = """
        SELECT keyword_name FROM duckdb_keywords()
        UNION SELECT function_name FROM duckdb_functions() WHERE regexp_full_match(function_name, '[a-z]\\w+')
        UNION SELECT table_name FROM duckdb_columns() WHERE NOT internal
        UNION SELECT column_name FROM duckdb_columns() WHERE NOT internal"""
    words = {word for (word,) in session.connection.execute(known).fetchall()}
    views = {view for view in session.lake.store.list("findings") if not is_state_view(view)}
    runs = {quoted(run_id) for run_id in session.lake.store.list("runs")}
    return sorted(words | views | runs)
