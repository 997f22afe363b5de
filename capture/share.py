"""Which partitions of a capture a writer takes: all of them, or every n-th."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from ..catalog.errors import PlanError

__all__ = ["Share", "place_on_machine"]


@dataclass(frozen=True, slots=True)
class Share:
    """The ``index``-th of ``count`` writers, counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise PlanError(
                f"There is no writer {self.index} of {self.count}.",
                hint="--partition i/n counts from 0: 0/4, 1/4, 2/4, 3/4.",
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"i/n"``.

        Raises
        ------
        PlanError
            It is not of this form, or i is not below n.

        Examples
        --------
        >>> Share.parse("2/8")
        Share(index=2, count=8)
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise PlanError(
                f"'{text}' does not say which writer this is.", hint="--partition i/n, from 0/n to n-1/n."
            )
        return cls(int(index), int(count))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the share of a process that torchrun started (``RANK``, ``WORLD_SIZE``); of any other, all."""
        if not _is_torchrun(environment):
            return cls()
        return cls(int(environment["RANK"]), int(environment["WORLD_SIZE"]))

    def takes(self, place: int) -> bool:
        """Tell whether this writer takes the partition at this place of the plan's work."""
        return place % self.count == self.index


def place_on_machine(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return which of its machine's processes this one is, if torchrun started it (``LOCAL_RANK``)."""
    return int(environment["LOCAL_RANK"]) if _is_torchrun(environment) else None


def _is_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment
