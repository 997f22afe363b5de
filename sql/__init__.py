"""Sql reads the lake as rows: a DuckDB connection with one relation per table, site and analysis."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connection import Session, connect, query
    from .explanation import Explanation, explain
    from .format import FORMATS, format_result, write_result
    from .prompt import answer, read_and_answer, statements
    from .reads import Read, ReadLog

__all__ = [
    "FORMATS",
    "Explanation",
    "Read",
    "ReadLog",
    "Session",
    "answer",
    "connect",
    "explain",
    "format_result",
    "query",
    "read_and_answer",
    "statements",
    "write_result",
]

# Looked up when first used: `import layerlake.sql` does not import duckdb.
_HOMES = {
    "FORMATS": "format",
    "Explanation": "explanation",
    "Read": "reads",
    "ReadLog": "reads",
    "Session": "connection",
    "answer": "prompt",
    "connect": "connection",
    "explain": "explanation",
    "format_result": "format",
    "query": "connection",
    "read_and_answer": "prompt",
    "statements": "prompt",
    "write_result": "format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerlake.sql' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
