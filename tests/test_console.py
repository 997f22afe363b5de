"""What the command line shows while it works."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from layerlake import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the console's clock shows, to be set."""
    now = [100.0]
    monkeypatch.setattr("layerlake.console.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a standard error that is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(console, "_STDERR", Console(file=stream, highlight=False, soft_wrap=True))
    return stream


def test_a_pipe_gets_a_line_a_tenth_with_rates_and_what_is_left(
    stderr: io.StringIO, clock: list[float]
) -> None:
    with console.show_capture("gpt2") as progress:
        progress("self-check", 0, 0)
        for done in range(0, 1001, 10):
            progress("capture", done, 1000, nbytes=done * 2_000_000, queued=3 if done < 1000 else 0)
            clock[0] += 0.1
    lines = stderr.getvalue().splitlines()
    assert lines[0] == "gpt2: self-check"
    assert len(lines) == 1 + 11  # 0 %, 10 %, … 100 %
    # 500 tokens in 5 s, each of 2 MB
    assert lines[6] == "gpt2: 500/1,000 tokens, 100 tok/s, 200 MB/s, 3 queued, 5 s left"
    assert lines[-1] == "gpt2: 1,000/1,000 tokens, 100 tok/s, 200 MB/s, 0 queued"


def test_what_an_earlier_process_did_counts_in_no_rate(stderr: io.StringIO, clock: list[float]) -> None:
    with console.show_capture("gpt2") as progress:
        progress("capture", 900, 1000)
        clock[0] += 1
        progress("capture", 1000, 1000, nbytes=5_000_000)
    assert "100 tok/s, 5 MB/s" in stderr.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "_STDERR", Console(file=stream, force_terminal=True, width=150))
    with console.show_capture("gpt2") as progress:
        progress("self-check", 0, 0)
        progress("capture", 500, 1000, nbytes=1_000_000, queued=2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "500/1,000 tokens" in shown
    assert "2 queued" in shown
