"""Commands: what to type for what the report shows."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from ..catalog.findings import FindingKey

__all__ = ["changed_options", "command", "sql_literal"]


def command(name: str, lake: str, *arguments: str, runs: Sequence[str] = ()) -> str:
    """Return a command that works as it stands; without runs it takes all."""
    words = ["layerlake", name, lake, *arguments, *(word for run in runs for word in ("--run", run))]
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    """Quote a word for the shell; one with apostrophes, as queries have, in double quotes where that is safe."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def changed_options(key: FindingKey) -> list[str]:
    """Return the options of ``layerlake analyze`` that give these parameters."""
    from .analyses import ANALYSES

    words = []
    for option in dataclasses.fields(ANALYSES[key.analysis].options):
        value, flag = key.params.get(option.name, option.default), option.name.replace("_", "-")
        if value == option.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return [*words, "--exclude-nonfinite"] if key.params.get("n_excluded") else words


def sql_literal(value: Any) -> str:
    """Return a value as SQL has it."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
