"""Inputs: what is known of a run already, for analyses that build on findings instead of on activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from ..catalog.findings import FindingKey
from ..catalog.layout import finding_path
from ..catalog.stores import Store
from ..catalog.tables import read_part

__all__ = ["Input", "NoOptions", "Scope"]

Scope = Literal["run", "model"]
"""Whose findings: the run's own, or what is stored of any run of the same model, as it is."""


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of an analysis that leaves nothing to choose."""


@dataclass(frozen=True, slots=True)
class Input:
    """The findings of one view that an analysis builds on; none of them is read before it is asked for."""

    store: Store
    view: str
    keys: tuple[FindingKey, ...]
    """In the order of their digests."""
    lacking: str = ""
    """Why there are none, where they could not be computed, and what would help."""

    @property
    def extent(self) -> dict[str, Any]:
        """What of it decides a result, for the memo key."""
        n_tokens = sum(int(extent["n_tokens"]) for key in self.keys for extent in key.extents.values())
        return {"n_tokens": n_tokens, "findings": [key.digest for key in self.keys]}

    def tables(self) -> Iterator[pa.Table]:
        """Read the tables, one at a time."""
        for key in self.keys:
            yield read_part(self.store, finding_path(self.view, key.digest)).replace_schema_metadata(None)
