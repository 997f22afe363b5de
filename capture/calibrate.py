"""How long a capture will take on this machine, from one batch of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..catalog.errors import PlanError
from ..catalog.manifest import Manifest
from ..catalog.stores import Store
from .cost import forward_flops
from .description import describe_model
from .execute import numerics, placed_documents, share_out_memory
from .frozen import FrozenPlan, PartitionWork
from .memory import N_SLOTS
from .model import OpenModel, open_model
from .partition import PartitionBuffer, PlacedDocument, place_tokens, run_batch
from .placement import EncodedDocument, place_documents
from .plan import CapturePlan
from .staging import Staging
from .writer import object_keys, write_object

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, and what follows from it."""

    tokens_per_second: float
    """Through the model, and from there to host memory as it is stored."""
    encode_nbytes_per_second: float
    """By one encoder thread: laid out, compressed if asked, with checksums; the store's own speed apart."""
    seconds: float
    """For the whole plan: what the model takes, or the encoders if they are slower."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers."""
        return {
            "calibrated_tokens_per_second": round(self.tokens_per_second, 1),
            "calibrated_encode_nbytes_per_second": round(self.encode_nbytes_per_second),
            "seconds": round(self.seconds, 1),
        }


class _Nowhere(Store):
    """A store that keeps nothing."""

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        pass


def calibrate(plan: CapturePlan, lake: str | os.PathLike[str] | None = None) -> Calibration:
    """Capture one batch of a plan twice, time the second, and say how long the whole will take.

    The batch is from the middle of the first partition's, where documents are neither the longest nor the shortest.
    Nothing is written. Costs loading the weights, and the two batches.

    Parameters
    ----------
    plan : CapturePlan
        With or without a dataset.
    lake : str or path, optional
        The lake that it was planned for.

    Raises
    ------
    PlanError
        There is nothing left to capture.
    ModelError
        The model cannot be opened.
    """
    frozen, spec = plan.frozen, plan.spec
    if frozen is None:
        raise PlanError("There is nothing left to capture, and so nothing to calibrate.")
    description = plan.model or describe_model(
        spec.model, revision=spec.revision, tokenizer=spec.tokenizer, trust_remote_code=spec.trust_remote_code
    )
    model = open_model(description, device=spec.device, compute_dtype=spec.compute_dtype)
    store = Store(lake) if lake is not None else None
    documents, on_host = placed_documents(plan, store), model.device.type == "cpu"
    memory = share_out_memory(
        plan, frozen, documents, on_host=on_host, is_local=store is None or store.is_local
    )
    batches = frozen.work[0].batches
    sample = [documents[number] for number in batches[len(batches) // 2]]
    manifest, work, placed = _place_alone(sample, frozen)
    with (
        numerics(frozen.n_threads or os.cpu_count() or 1),
        Staging(model.device, slot_nbytes=memory.slot_nbytes, n_slots=N_SLOTS) as staging,
    ):
        _run(model, PartitionBuffer(manifest, work, placed), staging)
        buffer = PartitionBuffer(manifest, work, placed)
        forward_s = _run(model, buffer, staging)
    began = time.perf_counter()
    keys = object_keys(manifest, work.sites)
    nbytes = sum(write_object(_Nowhere("memory://nowhere"), manifest, buffer, *key)["nbytes"] for key in keys)
    encode_s = time.perf_counter() - began

    lengths = [document.n_tokens for document in sample]
    forward_total_s = forward_s * plan.flops / forward_flops(manifest.shape, lengths)
    encode_total_s = encode_s * plan.nbytes / nbytes / memory.write_threads
    # on the CPU the model and the encoders share the cores; beside an accelerator the slower of the two counts
    seconds = forward_total_s + encode_total_s if on_host else max(forward_total_s, encode_total_s)
    return Calibration(sum(lengths) / forward_s, nbytes / encode_s, seconds)


def _run(model: OpenModel, buffer: PartitionBuffer, staging: Staging) -> float:
    """Run the one batch of a buffer, and return the seconds until its values are on the host."""
    began = time.perf_counter()
    run_batch(model, buffer, buffer.work.batches[0], staging, overflow="keep")
    staging.drain()
    return time.perf_counter() - began


def _place_alone(
    sample: Sequence[PlacedDocument], frozen: FrozenPlan
) -> tuple[Manifest, PartitionWork, dict[int, PlacedDocument]]:
    """Place some documents as the only ones of a partition, which has all sites that any partition needs."""
    encoded = [EncodedDocument((), document.token_ids, document.n_tokens) for document in sample]
    placement = place_documents(encoded, frozen.manifest.geometry)
    placed = place_tokens(placement.documents, placement.tokens)
    manifest = replace(frozen.manifest, partitions=placement.partitions)
    return manifest, PartitionWork(0, frozen.sites, (tuple(placed),)), placed
