"""What is wrong with an object of a lake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Deviation", "Problem", "require"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One object that is not what it should be."""

    object: str
    """Its name in the lake."""
    what: str
    """What of it was looked at."""
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.object}: {self.what}: {self.found} instead of {self.expected}"


class Deviation(Exception):
    """Ends the examination of one object; becomes a :class:`Problem` where the object's name is known."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, _words(expected), _words(found)


def require(what: str, expected: Any, found: Any) -> None:
    """Raise :class:`Deviation` unless the two are equal."""
    if expected != found:
        raise Deviation(what, expected, found)


def _words(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
