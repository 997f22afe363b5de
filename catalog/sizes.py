"""Quantities as people write them: ``20k`` tokens, ``4GiB``, ``24h``."""

from __future__ import annotations

import re
from decimal import Decimal

from .errors import PlanError

__all__ = ["format_nbytes", "parse_count", "parse_duration_s", "parse_nbytes"]

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_count(text: str | int) -> int:
    """Return a count; k, M and G (or B) are decimal.

    Raises
    ------
    PlanError
        The text is not a positive count.

    Examples
    --------
    >>> parse_count("20k"), parse_count("1.5M"), parse_count(7)
    (20000, 1500000, 7)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgb]?)", str(text).strip().lower())
    value = Decimal(found[1]) * _DECIMAL[found[2]] if found else Decimal(0)
    if value < 1 or value != int(value):
        raise PlanError(f"'{text}' is not a count.", hint="Write it as 20000, 20k or 1.5M.")
    return int(value)


def parse_nbytes(text: str | int) -> int:
    """Return a size in bytes; ``GiB`` is binary, ``GB`` decimal.

    Raises
    ------
    PlanError
        The text is not a size.

    Examples
    --------
    >>> parse_nbytes("4GiB"), parse_nbytes("2GB"), parse_nbytes(1024)
    (4294967296, 2000000000, 1024)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(text).strip().lower())
    if not found or (found[3] and not found[2]):
        raise PlanError(f"'{text}' is not a size.", hint="Write it as 4GiB, 500MB or a number of bytes.")
    unit = _BINARY[found[2]] if found[3] else 1000 ** " kmgt".index(found[2] or " ")
    return int(Decimal(found[1]) * unit)


def parse_duration_s(text: str) -> float:
    """Return a duration in seconds.

    Raises
    ------
    PlanError
        The text is not a duration.

    Examples
    --------
    >>> parse_duration_s("24h"), parse_duration_s("1.5m"), parse_duration_s("0s")
    (86400.0, 90.0, 0.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip().lower())
    if not found:
        raise PlanError(f"'{text}' is not a duration.", hint="Write it as 90s, 30m, 24h or 7d.")
    return float(found[1]) * _SECONDS[found[2]]


def format_nbytes(nbytes: float) -> str:
    """Return a size for people, in binary units.

    Examples
    --------
    >>> format_nbytes(0), format_nbytes(1536), format_nbytes(5 * 2**30)
    ('0 B', '1.5 KiB', '5.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
