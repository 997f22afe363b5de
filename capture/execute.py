"""Carry out a plan on this machine: init, its share of the partitions, finalise; after a crash, go on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from ..catalog.errors import CaptureInProgress, CaptureUnfinished, CorruptRun, PlanError
from ..catalog.lake import create_lake
from ..catalog.manifest import Manifest
from ..catalog.run import Run
from ..catalog.schedules import parse_schedule
from ..catalog.stores import Store
from ..console import CaptureProgress, silent
from .blocks import run_schedule
from .frozen import FrozenPlan, PartitionWork
from .hooks import Forward, run_whole
from .ledgers import is_open, pending_work, withdraw_disputed
from .memory import MemoryPlan, plan_memory
from .model import OpenModel, open_model
from .model_store import has_model, write_model
from .partition import PlacedDocument, place_tokens
from .phases import await_plan, finalise_capture, init_capture, release_committed
from .plan import CapturePlan, plan_capture
from .selfcheck import check_model
from .share import Share
from .spec import CaptureSpec
from .vocabulary import vocab_table
from .worker import Outcome, Worker

__all__ = [
    "capture_run",
    "execute_plan",
    "finalise_plan",
    "numerics",
    "placed_documents",
    "share_out_memory",
    "write_share",
]

_MAX_ROUNDS = 3
"""How often partitions that two writers wrote differently are written again."""


def capture_run(
    lake: str | os.PathLike[str], spec: CaptureSpec, *, progress: CaptureProgress = silent
) -> Run:
    """Run a model over a corpus and store the sites asked for; what the lake holds already is not run again.

    Parameters
    ----------
    lake : str or path
        The lake's path or URL; made if need be.
    spec : CaptureSpec
        What to capture. ``spec.model`` may be a Hugging Face model that is loaded already.
    progress : callable, optional
        Is told how far it has come.

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
    while True:
        run = execute_plan(plan_capture(spec, lake), lake, progress=progress).run
        if run is not None:
            return run
        # another writer, on an unlike machine, has just withdrawn a partition that this one took for written


def execute_plan(
    plan: CapturePlan,
    lake: str | os.PathLike[str],
    *,
    share: Share | None = None,
    model: OpenModel | None = None,
    progress: CaptureProgress = silent,
) -> Outcome:
    """Carry out a plan, or one writer's share of it; whoever finds all partitions written commits the run.

    With nothing to do, only open the run.

    Parameters
    ----------
    plan : CapturePlan
        See :func:`plan_capture`.
    lake : str or path
        The lake that it was planned for.
    share : Share, optional
        The partitions that this writer takes; all of them if None.
    model : OpenModel, optional
        The plan's model, if it is open already.
    progress : callable, optional
        Is told how far it has come.

    Raises
    ------
    PlanError, SelfCheckFailed, CaptureInProgress, OverflowInCapture
        As :func:`capture_run`.
    """
    frozen, store = plan.frozen, Store(lake)
    if plan.existing is not None:
        release_committed(store, plan.run_id)
    if frozen is None:
        return Outcome(Run(store, plan.manifest))
    if plan.model is None:
        raise PlanError("There is no text to capture.", hint="Give --dataset.")
    if model is None:
        model = open_model(plan.model, device=plan.spec.device, compute_dtype=plan.spec.compute_dtype)
    documents, on_host = placed_documents(plan, store), model.device.type == "cpu"
    memory = share_out_memory(plan, frozen, documents, on_host=on_host, is_local=store.is_local)
    first = [documents[number].token_ids.tolist() for number in frozen.work[0].batches[0]]
    progress("self-check", 0, 0)
    with numerics(frozen.n_threads):
        checks = check_model(model, first, frozen.sites, compute_dtype=plan.spec.compute_dtype)

    create_lake(lake)
    begun = _begin(plan, lake, store)
    if begun.frozen is None or begun.model is None:
        return Outcome(Run(store, begun.manifest))
    if begun is not plan:  # another writer's plan, which may have been made on another machine
        plan, frozen = begun, begun.frozen
        documents = placed_documents(plan, store)
        memory = share_out_memory(plan, frozen, documents, on_host=on_host, is_local=store.is_local)
    # after the run is reserved: nobody collects the model of an open capture
    if not has_model(store, begun.model.model_id):
        write_model(
            store,
            begun.model.model_id,
            shape=model.shape,
            card=begun.model.card() | {"shape": model.shape.to_json()},
            vocab=vocab_table(begun.model),
            read_weight=model.weight,
        )
    worker = Worker(
        store=store,
        frozen=frozen,
        model=model,
        documents=documents,
        memory=memory,
        provenance=_provenance(plan, model, checks),
        overflow=plan.spec.overflow,
        forward=_forward(frozen.manifest, model),
        progress=progress,
    )
    with numerics(frozen.n_threads):
        committed = write_share(store, frozen, share or Share(), worker.write)
    if committed is None:
        worker.outcome.n_pending = len(pending_work(store, frozen))
    else:
        worker.outcome.run = Run(store, committed)
    return worker.outcome


def _forward(manifest: Manifest, model: OpenModel) -> Forward:
    """Return how a run's model is run: as it is, or its blocks in the run's own order."""
    if manifest.schedule is None:
        return run_whole
    return partial(run_schedule, steps=parse_schedule(manifest.schedule, model.shape.n_layers))


def _begin(plan: CapturePlan, lake: str | os.PathLike[str], store: Store) -> CapturePlan:
    """Begin a plan's capture, or join one that was asked for the same; return the plan that counts.

    Writers that start at the same moment on unlike machines plan alike but for their threads: one of them reserves
    the run, and the others take its plan. A plan without work if the capture is over.
    """
    if plan.frozen is None:
        return plan
    try:
        committed = init_capture(store, plan.frozen, documents=plan.documents, tokens=plan.tokens)
    except CaptureInProgress:
        if plan.manifest.schedule is not None or not await_plan(store, plan.frozen):
            raise
        return _begin(plan_capture(plan.spec, lake), lake, store)
    return plan if committed is None else replace(plan, manifest=committed, frozen=None)


@contextmanager
def numerics(n_threads: int) -> Iterator[None]:
    """Compute on so many threads, and without TF32: float32 means float32 on every device."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(n_threads)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def write_share(
    store: Store, frozen: FrozenPlan, share: Share, write: Callable[[Sequence[PartitionWork]], None]
) -> Manifest | None:
    """Have a writer's partitions written, and commit the run if they were the last.

    Parameters
    ----------
    store, frozen : Store, FrozenPlan
        The capture, which is begun.
    share : Share
        The partitions that this writer takes.
    write : callable
        Writes those of some partitions that are not written yet.

    Returns
    -------
    Manifest or None
        The run; None where partitions are left to other writers.

    Raises
    ------
    CorruptRun
        Writers on unlike machines go on writing the same partition differently.
    """
    mine = [work for place, work in enumerate(frozen.work) if share.takes(place)]
    disputed: list[int] = []
    for _ in range(_MAX_ROUNDS):
        write(mine)
        if pending_work(store, frozen) and is_open(store, frozen):
            return None
        disputed = withdraw_disputed(store, frozen)
        if not disputed:
            try:
                return finalise_capture(store, frozen)
            except CaptureUnfinished:  # another writer has withdrawn one since, and writes it again
                return None
        mine = [work for work in frozen.work if work.index in disputed]
    raise CorruptRun(
        f"Writers of run {frozen.manifest.run_id} go on writing partitions {', '.join(map(str, disputed))} "
        "differently.",
        hint="Let one writer at a time write a partition (--partition i/n).",
    )


def finalise_plan(plan: CapturePlan, lake: str | os.PathLike[str]) -> Run:
    """Commit a capture whose partitions are all written; loads no model.

    Raises
    ------
    CaptureUnfinished
        A partition is not written, or two writers have written one differently, so that it has to be written again.
    """
    store = Store(lake)
    if plan.frozen is None:
        release_committed(store, plan.run_id)
        return Run(store, plan.manifest)
    if not is_open(store, plan.frozen):
        raise CaptureUnfinished(
            f"No capture of run {plan.run_id} is open.", hint="Begin it: the same command without --finalise."
        )
    withdraw_disputed(store, plan.frozen)
    return Run(store, finalise_capture(store, plan.frozen))


def share_out_memory(
    plan: CapturePlan,
    frozen: FrozenPlan,
    documents: dict[int, PlacedDocument],
    *,
    on_host: bool,
    is_local: bool,
) -> MemoryPlan:
    """Plan the memory for the batches that are frozen, on the device that is there."""
    batches = [
        [documents[number].n_tokens for number in batch] for work in frozen.work for batch in work.batches
    ]
    padded = max(max(lengths) * len(lengths) for lengths in batches)
    memory = plan_memory(
        frozen.manifest.shape,
        frozen.manifest.geometry,
        frozen.manifest.partitions,
        sites=frozen.sites,
        dtype=frozen.manifest.dtype,
        compute_dtype=plan.spec.compute_dtype,
        batch_tokens=padded,
        max_memory=plan.spec.max_memory,
        n_tokens=sum(document.n_tokens for document in documents.values()),
        n_documents=len(documents),
        on_host=on_host,
        is_local=is_local,
    )
    if memory.batch_tokens < padded:
        raise PlanError(
            f"The capture was planned with batches of {padded} tokens, which do not fit into --max-memory here.",
            hint="Give all writers of a capture the same --max-memory, and as much as the first had.",
        )
    return memory


def placed_documents(plan: CapturePlan, store: Store | None) -> dict[int, PlacedDocument]:
    """Return the documents of all partitions that have work, from the plan and from the run it extends."""
    tables = [(plan.documents, plan.tokens)]
    if plan.existing is not None and store is not None:
        held = Run(store, plan.existing)
        tables.append((held.documents, held.tokens))
    return {number: placed for table in tables for number, placed in place_tokens(*table).items()}


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
