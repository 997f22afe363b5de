"""The text every Python installation carries: the standard library's source and its manual topics.

One document a source file or topic. A document belongs to the held-out part by the hash of its
name alone, so the split is the same on every machine and Python version, although the text itself
follows the installed Python.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["iter_documents", "iter_excerpts", "write_excerpts"]

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "idle_test", "pydoc_data"}
_HELD_OUT_EVERY = 16


def is_held_out(name: str) -> bool:
    """Tell whether the document of this name is kept out of training (one in sixteen)."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_EVERY == 0


def iter_documents(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` of the training part or of the held-out part, in a fixed order."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        if is_held_out(f"topic:{topic}") is held_out:
            yield f"topic:{topic}", text
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if _SKIPPED_FOLDERS.intersection(parts):
            continue
        name = "/".join(parts)
        if is_held_out(name) is held_out:
            yield name, path.read_text(encoding="utf-8", errors="replace")


def iter_excerpts(*, n_characters: int = 100, salt: str = "layerlake") -> Iterator[tuple[str, str]]:
    """Yield excerpts of the held-out part, each starting at a line, in an order that mixes the sources.

    Parameters
    ----------
    n_characters : int
        An excerpt goes on to the first line end after so many characters; trailing white space is left off,
        so that not every document ends in the same token.
    salt : str
        Another salt gives another order: excerpts are sorted by the salted hash of their name.
    """
    excerpts: list[tuple[str, str]] = []
    for name, text in iter_documents(held_out=True):
        if name.startswith("encodings/"):  # tables of characters
            continue
        start = 0
        while start + n_characters <= len(text):
            end = text.find("\n", start + n_characters)
            end = len(text) if end < 0 else end + 1
            excerpts.append((f"{name}@{start}", text[start:end].rstrip()))
            start = end
    excerpts.sort(key=lambda item: hashlib.sha256(f"{salt}:{item[0]}".encode()).digest())
    yield from excerpts


def write_excerpts(path: Path, *, n_documents: int) -> None:
    """Write the first ``n_documents`` held-out excerpts as JSON lines with columns ``source`` and ``text``."""
    with path.open("w", encoding="utf-8") as file:
        for _, (name, text) in zip(range(n_documents), iter_excerpts(), strict=False):
            file.write(json.dumps({"source": name, "text": text}) + "\n")
