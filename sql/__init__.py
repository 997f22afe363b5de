"""Sql reads the lake as rows: a DuckDB connection with one relation per table, site and analysis."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connection import connect, query
    from .format import FORMATS, format_result, write_result
    from .reads import Read, ReadLog

__all__ = ["FORMATS", "Read", "ReadLog", "connect", "format_result", "query", "write_result"]

# Looked up when first used: `import layerlake.sql` does not import duckdb.
_HOMES = {
    "FORMATS": "format",
    "Read": "reads",
    "ReadLog": "reads",
    "connect": "connection",
    "format_result": "format",
    "query": "connection",
    "write_result": "format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerlake.sql' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
