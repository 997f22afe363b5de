"""One process that writes partitions: the model in front, the pipeline behind it, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..catalog.errors import PlanError
from ..catalog.run import Run
from ..catalog.stores import Store
from ..console import CaptureProgress, silent
from .frozen import FrozenPlan, PartitionWork
from .hooks import Forward, run_whole
from .ledgers import begin_attempt, is_wanted, pending_work, write_ledger
from .memory import N_SLOTS, MemoryPlan, PeakMemory, keep_freed
from .model import OpenModel
from .partition import Overflow, PartitionBuffer, PlacedDocument, run_batch
from .pipeline import Pipeline
from .staging import Staging

__all__ = ["Outcome", "Worker"]


@dataclass(slots=True)
class Outcome:
    """What an execution did."""

    run: Run | None = None
    """The run, opened; None where partitions are left to other writers."""
    n_pending: int = 0
    """Partitions that are left to other writers."""
    n_tokens: int = 0
    """Tokens that went through the model here."""
    n_objects: int = 0
    nbytes: int = 0
    """Objects of sites that were stored here, and their bytes."""
    seconds: float = 0.0
    """From the first forward to the last object stored."""
    waited_s: float = 0.0
    """Of these, seconds for which the model waited for the store."""
    peak_nbytes: int | None = None
    """The most host memory in that time, beyond what was taken before; None where the system does not tell."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """site → values stored here that are not finite."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers."""
        return {
            "run": self.run.run_id if self.run else None,
            "partitions_left": self.n_pending,
            "tokens": self.n_tokens,
            "objects": self.n_objects,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.n_tokens / self.seconds, 1) if self.seconds else None,
            "waited_seconds": round(self.waited_s, 3),
            "peak_host_nbytes": self.peak_nbytes,
            "nonfinite": self.nonfinite,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One process that writes partitions of a capture, with the model open and the capture begun."""

    store: Store
    frozen: FrozenPlan
    model: OpenModel
    documents: dict[int, PlacedDocument]
    memory: MemoryPlan
    provenance: dict[str, Any] = field(default_factory=dict)
    """What is worth knowing of this process and is not identity: versions, device, self-check."""
    overflow: Overflow = "stop"
    forward: Forward = run_whole
    progress: CaptureProgress = silent
    outcome: Outcome = field(default_factory=Outcome)

    def write(self, mine: Sequence[PartitionWork]) -> None:
        """Compute and store those of the given partitions that are not stored yet.

        Raises
        ------
        PlanError
            The device has too little memory for a batch.
        OverflowInCapture
            A value is not finite.
        """
        import torch

        try:
            self._write(mine)
        except torch.OutOfMemoryError as error:
            raise PlanError(
                f"{self.model.device} has too little memory for batches of {self.memory.batch_tokens} tokens.",
                hint="Remove the capture (layerlake gc --older-than 0h LAKE), and begin it anew with a smaller "
                "--batch-tokens, a shorter --context or --compute-dtype bfloat16.",
            ) from error

    def _write(self, mine: Sequence[PartitionWork]) -> None:
        keep_freed()
        manifest, outcome = self.frozen.manifest, self.outcome
        lengths = {p.index: p.n_rows for p in manifest.partitions}
        total = sum(lengths[work.index] for work in mine)
        indices = {work.index for work in mine}
        todo = [work for work in pending_work(self.store, self.frozen) if work.index in indices]
        done = total - sum(lengths[work.index] for work in todo)
        attempts: dict[int, int] = {}
        began = time.perf_counter()
        with (
            PeakMemory() as peak,
            Pipeline(
                self.store,
                manifest,
                budget_nbytes=self.memory.budget_nbytes,
                n_threads=self.memory.write_threads,
                is_wanted=lambda index: is_wanted(self.store, self.frozen, index),
                finish=lambda buffer, records: self._finish(buffer, records, attempts[buffer.work.index]),
            ) as pipeline,
            Staging(
                self.model.device,
                slot_nbytes=self.memory.slot_nbytes,
                n_slots=N_SLOTS,
                on_failure=pipeline.fail,
            ) as staging,
        ):
            for work in todo:
                pipeline.begin()
                if not is_wanted(self.store, self.frozen, work.index):
                    pipeline.skip()
                    continue
                attempts[work.index] = begin_attempt(self.store, self.frozen, work.index)
                buffer = PartitionBuffer(manifest, work, self.documents)
                for batch in work.batches:
                    self.progress(
                        "capture", done, total, nbytes=pipeline.nbytes_written, queued=pipeline.n_queued
                    )
                    nbytes = buffer.nbytes([self.documents[number] for number in batch])
                    pipeline.reserve(nbytes)
                    peak.trim_above(self.memory.max_nbytes - nbytes - self.memory.ahead_nbytes)
                    run_batch(
                        self.model, buffer, batch, staging, overflow=self.overflow, forward=self.forward
                    )
                    done += sum(self.documents[number].n_tokens for number in batch)
                staging.then(lambda buffer=buffer: pipeline.write(buffer))  # type: ignore[misc]
                outcome.n_tokens += lengths[work.index]
            staging.drain()
        outcome.seconds += time.perf_counter() - began
        outcome.waited_s += pipeline.waited_s + staging.waited_s
        outcome.nbytes += pipeline.nbytes_written
        if peak.nbytes is not None:
            outcome.peak_nbytes = max(peak.nbytes, outcome.peak_nbytes or 0)
        self.progress("capture", done, total, nbytes=pipeline.nbytes_written)

    def _finish(self, buffer: PartitionBuffer, records: list[dict[str, Any]], attempt: int) -> None:
        write_ledger(
            self.store, self.frozen, buffer.work.index, records,
            attempt=attempt, nonfinite=buffer.nonfinite, writer=self.provenance,
        )  # fmt: skip
        self.outcome.n_objects += len(records)
        for site, n in buffer.nonfinite.items():
            self.outcome.nonfinite[site] = self.outcome.nonfinite.get(site, 0) + n
