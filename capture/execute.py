"""Carry out a plan on this machine: init, every partition, finalise; after a crash, go on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from ..catalog.lake import create_lake
from ..catalog.run import Run
from ..catalog.stores import Store
from .description import vocab_table
from .frozen import FrozenPlan
from .model import OpenModel, open_model
from .model_store import write_model
from .partition import PlacedDocument, run_partition
from .phases import (
    begin_attempt,
    finalise_capture,
    init_capture,
    pending_work,
    release_committed,
    write_ledger,
)
from .plan import CapturePlan, CaptureSpec, plan_capture
from .selfcheck import check_model
from .writer import write_partition

__all__ = ["capture_run", "execute_plan", "place_tokens"]

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, tokens done and tokens in all."""


def _silent(phase: str, done: int, total: int) -> None:
    """Show no progress."""


def capture_run(lake: str | os.PathLike[str], spec: CaptureSpec, *, progress: Progress = _silent) -> Run:
    """Run a model over a corpus and store the sites asked for; what the lake holds already is not run again.

    Parameters
    ----------
    lake : str or path
        The lake's path or URL; made if need be.
    spec : CaptureSpec
        What to capture. ``spec.model`` may be a Hugging Face model that is loaded already.
    progress : callable, optional
        Called with a phase, tokens done and tokens in all.

    Returns
    -------
    Run
        The run, opened.

    Raises
    ------
    PlanError
        What was asked for cannot be done (see :func:`plan_capture`); nothing was written.
    SelfCheckFailed
        The model's values do not satisfy the identities; nothing was written.
    CaptureInProgress
        Another capture of this run is open.
    OverflowInCapture
        A value does not fit the stored dtype; the capture stays open.
    """
    return execute_plan(plan_capture(spec, lake), lake, progress=progress)


def execute_plan(plan: CapturePlan, lake: str | os.PathLike[str], *, progress: Progress = _silent) -> Run:
    """Carry out a plan (see :func:`capture_run`); with nothing to do, only open the run."""
    frozen = plan.frozen
    if plan.existing is not None:
        release_committed(Store(lake), plan.run_id)
    if frozen is None:
        return Run(Store(lake), plan.manifest)
    import torch

    torch.set_num_threads(frozen.n_threads)
    model = open_model(plan.model, device=plan.spec.device, compute_dtype=plan.spec.compute_dtype)
    documents = _documents(plan, lake)
    first = [documents[number].token_ids.tolist() for number in frozen.work[0].batches[0]]
    sites = sorted({site for work in frozen.work for site in work.sites})
    progress("self-check", 0, 0)
    checks = check_model(model, first, sites, compute_dtype=plan.spec.compute_dtype)

    store = create_lake(lake)
    write_model(
        store,
        plan.model.model_id,
        card=plan.model.card() | {"shape": model.shape.to_json()},
        vocab=vocab_table(plan.model),
        weights=dict(model.weights()),
    )
    init_capture(store, frozen, documents=plan.documents, tokens=plan.tokens)
    _run_partitions(store, frozen, model, documents, progress)
    manifest = finalise_capture(store, frozen, provenance=_provenance(plan, model, checks))
    return Run(store, manifest)


def _run_partitions(
    store: Store,
    frozen: FrozenPlan,
    model: OpenModel,
    documents: dict[int, PlacedDocument],
    progress: Progress,
) -> None:
    lengths = {p.index: p.n_rows for p in frozen.manifest.partitions}
    total = sum(lengths[work.index] for work in frozen.work)
    pending = pending_work(store, frozen)
    done = total - sum(lengths[work.index] for work in pending)
    for work in pending:
        begin_attempt(store, frozen, work.index)

        def on_batch(n_tokens: int) -> None:
            nonlocal done
            done += n_tokens
            progress("capture", done, total)

        progress("capture", done, total)
        buffer = run_partition(model, frozen.manifest, work, documents, on_batch=on_batch)
        objects = write_partition(store, frozen.manifest, work.index, buffer.arrays)
        write_ledger(store, frozen, work.index, objects)


def _documents(plan: CapturePlan, lake: str | os.PathLike[str]) -> dict[int, PlacedDocument]:
    """Return the documents of all partitions that have work, from the plan and from the run it extends."""
    tables = [(plan.documents, plan.tokens)]
    if plan.existing is not None:
        held = Run(Store(lake), plan.existing)
        tables.append((held.documents, held.tokens))
    return {number: placed for table in tables for number, placed in place_tokens(*table).items()}


def place_tokens(documents: pa.Table, tokens: pa.Table) -> dict[int, PlacedDocument]:
    """Return each stored document's tokens and place, by its number."""
    token_ids, document = tokens["token_id"].to_numpy(), tokens["document"].to_numpy()
    # Tokens stand in the order of their documents.
    numbers, starts, counts = np.unique(document, return_index=True, return_counts=True)
    spans = zip(starts.tolist(), counts.tolist(), strict=True)
    ids = {
        number: token_ids[start : start + count]
        for number, (start, count) in zip(numbers.tolist(), spans, strict=True)
    }
    return {
        row["document"]: PlacedDocument(ids[row["document"]], row["row_start"], row["pair_start"])
        for row in documents.to_pylist()
        if row["status"] != "refused"
    }


def _provenance(plan: CapturePlan, model: OpenModel, checks: dict[str, float]) -> dict[str, Any]:
    packages = ("layerlake", "torch", "transformers", "transformer_lens", "zarr", "numpy")
    return {
        "device": str(model.device),
        "machine": platform.platform(),
        "threads": plan.frozen.n_threads if plan.frozen else 0,
        "batch_tokens": plan.spec.batch_tokens,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "self_check": {identity: float(f"{error:.3g}") for identity, error in checks.items()},
    }
