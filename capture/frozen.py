"""The frozen plan: all that the writers of a capture must agree on, fixed before the first of them starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

from ..catalog.manifest import Manifest

__all__ = ["FrozenPlan", "PartitionWork", "digest_json"]


def digest_json(value: Any, length: int = 16) -> str:
    """Return the first hex digits of the SHA-256 of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True, slots=True)
class PartitionWork:
    """What one partition still needs."""

    index: int
    sites: tuple[str, ...]
    """The sites to capture; on an extension, only those that the partition lacks."""
    batches: tuple[tuple[int, ...], ...]
    """Document numbers, batch by batch; part of the plan because results depend on it in the last bit."""


@dataclass(frozen=True, slots=True)
class FrozenPlan:
    """A capture that has been planned: the manifest it leads to, and the work in between."""

    manifest: Manifest
    """What finalise will commit, less the parts of this capture; ``number`` is that of the snapshot it extends."""
    work: tuple[PartitionWork, ...]
    adds_documents: bool
    """Whether this capture adds documents and tokens, or only sites to those that are there."""
    n_threads: int
    """Intra-op threads of every writer; results differ between 1 and 2 threads."""
    request: dict[str, Any]
    """What was asked for beyond the run's identity: ``sites`` and ``max_tokens``. Whoever asks for the same joins."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that any partition needs, sorted by name."""
        return tuple(sorted({site for work in self.work for site in work.sites}))

    @property
    def part(self) -> str:
        """The name of this capture's part in every table that it adds to."""
        return f"part-{self.capture_id}"

    @property
    def capture_id(self) -> str:
        """The digest of the run, its geometry, the sites and the extents: never of time, chance or place."""
        run = [self.manifest.run_id, self.manifest.number, self.manifest.geometry.to_json()]
        extents = [[w.index, list(w.sites), [list(b) for b in w.batches]] for w in self.work]
        return digest_json([*run, extents, self.n_threads])

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        work = [{"index": w.index, "sites": w.sites, "batches": w.batches} for w in self.work]
        return {
            "manifest": self.manifest.to_json(),
            "work": work,
            "adds_documents": self.adds_documents,
            "n_threads": self.n_threads,
            "request": self.request,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Rebuild a plan from :meth:`to_json`."""
        work = tuple(
            PartitionWork(w["index"], tuple(w["sites"]), tuple(tuple(b) for b in w["batches"]))
            for w in value["work"]
        )
        manifest = Manifest.from_json(value["manifest"])
        return cls(manifest, work, value["adds_documents"], value["n_threads"], value["request"])
