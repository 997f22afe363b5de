"""What is asked of a capture, beside what there is already."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..catalog.manifest import Manifest
from ..catalog.run import Run
from ..catalog.sizes import parse_count
from ..catalog.stores import Store
from .description import ModelDescription
from .memory import MemoryPlan, plan_memory
from .spec import CaptureSpec

__all__ = ["Asked", "runs_on_host"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for, and what there is."""

    spec: CaptureSpec
    sites: tuple[str, ...]
    store: Store | None
    model: ModelDescription | None = None
    existing: Manifest | None = None

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that the run is to have; None for all of the text."""
        return None if self.spec.max_tokens is None else parse_count(self.spec.max_tokens)

    @property
    def request(self) -> dict[str, Any]:
        """What is asked for beyond the run's identity."""
        return {"sites": list(self.sites), "max_tokens": self.max_tokens}

    @property
    def is_answered(self) -> bool:
        """Whether all of the run has these sites, and it has the tokens, or a capture was asked for as many."""
        if self.existing is None:
            return False
        everywhere = {partition.index for partition in self.existing.partitions}
        if any(everywhere != set(self.existing.sites.get(site, ())) for site in self.sites):
            return False
        requests = [entry["request"] for entry in self.existing.captures if entry.get("request")]
        is_long_enough = self.max_tokens is not None and self.existing.n_tokens >= self.max_tokens
        return is_long_enough or any(request["max_tokens"] == self.max_tokens for request in requests)

    @cached_property
    def held(self) -> Run | None:
        """The run as it is, opened once: it keeps the tables that it has read."""
        return Run(self.store, self.existing) if self.store and self.existing else None

    def memory(self, manifest: Manifest) -> MemoryPlan:
        """Share out the memory."""
        return plan_memory(
            manifest.shape,
            manifest.geometry,
            manifest.partitions,
            sites=self.sites,
            dtype=manifest.dtype,
            compute_dtype=self.spec.compute_dtype,
            batch_tokens=max(self.spec.batch_tokens, manifest.geometry.context),
            max_memory=self.spec.max_memory,
            n_tokens=manifest.n_tokens,
            n_documents=manifest.n_documents + manifest.n_refused,
            on_host=runs_on_host(self.spec.device),
            is_local=self.store is None or self.store.is_local,
        )


def runs_on_host(device: str) -> bool:
    """Tell whether a device is the CPU; ``auto`` is an accelerator where there is one."""
    if device != "auto":
        return device.partition(":")[0] == "cpu"
    try:
        import torch
    except ImportError:
        return True
    return not torch.cuda.is_available()
