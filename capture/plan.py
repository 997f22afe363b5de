"""Plan a capture: from what was asked for to exactly what will be run and written, with its cost."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..catalog.errors import CorruptRun, PlanError
from ..catalog.lake import check_creatable
from ..catalog.layout import LAKE_MARKER, Geometry, plan_geometry
from ..catalog.manifest import Manifest, Partition, read_manifest
from ..catalog.shapes import ModelShape
from ..catalog.sites import SITES, parse_analyses, parse_sites
from ..catalog.sizes import format_nbytes, parse_count, parse_nbytes
from ..catalog.stores import Store
from ..catalog.tables import DOCUMENTS, TOKENS
from .asked import Asked, runs_on_host
from .corpus import Corpus, encode_corpus, open_corpus
from .cost import SiteCost, cheapest_sites, count_requests, forward_flops, site_costs
from .description import ModelDescription, describe_model, describe_shape, slug
from .encoder import TextEncoder, resolve_bos
from .extra import import_extra
from .frozen import FrozenPlan, digest_json
from .known_models import KNOWN_MODELS
from .ledgers import pending_work
from .memory import MemoryPlan, plan_memory
from .missing import lacking_sites, next_manifest, partition_work, place_missing
from .model_shape import shape_of
from .model_store import has_model
from .phases import open_elsewhere, read_capture_tables, read_open_capture
from .placement import EncodedDocument, Placement, place_documents
from .spec import CaptureSpec, complete_spec

__all__ = ["CapturePlan", "choose_geometry", "plan_capture", "plan_work"]

_DEFAULT_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """A capture, planned but not begun. ``frozen`` is None where the lake holds all of it already."""

    spec: CaptureSpec
    model: ModelDescription | None
    """None in a plan without a dataset, which needs only the model's shape."""
    manifest: Manifest
    """The run as it will be."""
    existing: Manifest | None
    """The run as it is; None where the capture begins it."""
    frozen: FrozenPlan | None
    documents: pa.Table
    """The document rows that the capture adds."""
    tokens: pa.Table
    """The token rows that the capture adds."""
    costs: tuple[SiteCost, ...] = ()
    memory: MemoryPlan | None = None
    n_requests: int = 0
    """Objects that one writer puts into the store, metadata included."""
    flops: int = 0
    """Floating-point operations of the forwards."""
    free_nbytes: int | None = None
    """Free space of a local lake."""
    partial_sites: tuple[str, ...] = ()
    """Sites of the run that this capture leaves out of the documents that it adds."""

    @property
    def run_id(self) -> str:
        """The run's id; empty in a plan without a dataset."""
        return self.manifest.run_id

    @property
    def nbytes(self) -> int:
        """Bytes of all sites that this capture writes (:class:`SiteCost`)."""
        return sum(cost.nbytes for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's numbers."""
        manifest, memory = self.manifest, self.memory
        statuses = self.documents["status"].to_pylist()
        return {
            "run": self.run_id or None,
            "model": manifest.model_name,
            "dataset": manifest.dataset,
            "dtype": manifest.dtype,
            "codec": manifest.codec,
            "context": manifest.geometry.context,
            "bos_token_id": manifest.bos_token_id,
            "documents_stored": statuses.count("stored") + statuses.count("cut"),
            "documents_cut": statuses.count("cut"),
            "documents_refused": statuses.count("refused"),
            "tokens": self.tokens.num_rows,
            "partitions": len(self.frozen.work) if self.frozen else 0,
            "partition_tokens": manifest.geometry.partition_tokens,
            "batch_tokens": memory.batch_tokens if memory else None,
            "nbytes": self.nbytes,
            "objects": sum(cost.n_objects for cost in self.costs),
            "put_requests": self.n_requests,
            "peak_host_nbytes": memory.peak_nbytes if memory else None,
            "free_nbytes": self.free_nbytes,
            "flops": self.flops,
            "partial_sites": list(self.partial_sites),
            "sites": [dataclasses.asdict(cost) for cost in self.costs],
        }


def plan_capture(spec: CaptureSpec, lake: str | os.PathLike[str] | None = None) -> CapturePlan:
    """Plan a capture without writing anything and without loading weights.

    Hashes local weight files (a large one once), and tokenises the corpus up to ``max_tokens``. Where the lake
    has answered the same request before, or a capture that does is open, the corpus is not read.

    Parameters
    ----------
    spec : CaptureSpec
        What to capture.
    lake : str or path, optional
        The lake it is for: what a run there holds already is not captured again.

    Raises
    ------
    ModelError, CorpusError, SiteNotFound, PlanError
        What was asked for cannot be done; nothing was written.
    CaptureInProgress
        A different capture of the same run is open.
    """
    spec = complete_spec(spec)
    store = Store(lake) if lake is not None else None
    if store is not None:
        check_creatable(store)
    if spec.dataset is None and spec.task is None:
        return _plan_full_windows(spec, store)
    model = describe_model(
        spec.model,
        revision=spec.revision,
        tokenizer=spec.tokenizer,
        trust_remote_code=spec.trust_remote_code,
        store=store,
    )
    corpus = open_corpus(spec)
    context = _context(spec, model.shape, model.name)
    bos = resolve_bos(spec.bos, model.special_ids, model.shape.n_vocab, of_tokenizer=corpus.bos_of_tokenizer)
    identity = _identity(spec, model, corpus, context, bos)
    run_id = f"{slug(model.name)}-{digest_json(identity, 8)}"
    existing = read_manifest(store, run_id) if store else None
    if existing is not None and existing.identity != identity:
        raise CorruptRun(
            f"Run {run_id} is of another model, text or numerics than what is asked for now.",
            hint=f"Is it damaged? layerlake verify {store.url if store else 'LAKE'} --run {run_id}",
        )
    sites = _sites(spec, model.shape, context)
    asked = Asked(spec=spec, sites=sites, store=store, model=model, existing=existing)

    if existing is not None and asked.is_answered:
        _require_run_s_own(spec, existing)
        return _nothing_to_do(asked, existing)
    opened = read_open_capture(store, run_id) if store else None
    if store is not None and opened is not None:
        if opened.request != asked.request:
            raise open_elsewhere(store, run_id, opened.capture_id)
        _require_run_s_own(spec, opened.manifest)
        return _priced(asked, opened, *read_capture_tables(store, opened))

    def encode(skip: int, budget: int | None) -> list[EncodedDocument]:
        encoder = TextEncoder(model.tokenizer, bos, context, spec.min_tokens or 1, model.shape.n_vocab)
        return list(encode_corpus(corpus, encoder, max_tokens=budget, skip=skip))

    geometry = choose_geometry(spec, model.shape, context, existing)
    placement = place_missing(encode, asked.max_tokens, geometry, asked.held)
    current = existing or Manifest(
        run_id=run_id,
        model_id=model.model_id,
        model_name=model.name,
        shape=model.shape,
        identity=identity,
        dataset=corpus.description,
        geometry=geometry,
        dtype=spec.dtype,
        bos_token_id=bos,
        codec=spec.codec or "none",
    )
    return plan_work(asked, current, placement)


def _nothing_to_do(asked: Asked, manifest: Manifest) -> CapturePlan:
    documents, tokens = DOCUMENTS.empty_table(), TOKENS.empty_table()
    return CapturePlan(asked.spec, asked.model, manifest, asked.existing, None, documents, tokens)


def _sites(spec: CaptureSpec, shape: ModelShape, context: int) -> tuple[str, ...]:
    if spec.analyses is not None:
        return cheapest_sites(parse_analyses(spec.analyses), shape, context=context, dtype=spec.dtype)
    return parse_sites("all" if spec.sites is None else spec.sites)


def _plan_full_windows(spec: CaptureSpec, store: Store | None) -> CapturePlan:
    """Plan for a corpus that is not there: full windows, as many as ``max_tokens`` asks for."""
    if spec.max_tokens is None:
        raise PlanError(
            "Without a dataset there is no saying how many tokens there are.",
            hint="Give --max-tokens, or --dataset.",
        )
    if not isinstance(spec.model, str | os.PathLike):
        name, shape = type(spec.model).__name__, shape_of(spec.model.config)
    else:
        name = os.fspath(spec.model)
        shape = KNOWN_MODELS.get(name) or describe_shape(
            name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    context = _context(spec, shape, name)
    asked = Asked(spec=spec, sites=_sites(spec, shape, context), store=store)
    n_windows = parse_count(spec.max_tokens) // context
    if not n_windows:
        raise PlanError(f"--max-tokens {spec.max_tokens} is less than one window of {context} tokens.")
    window = EncodedDocument(("",), np.zeros(context, dtype=np.int32), context)
    geometry = choose_geometry(spec, shape, context, None)
    current = Manifest(
        run_id="",
        model_id="",
        model_name=name,
        shape=shape,
        identity={},
        dataset="full windows",
        geometry=geometry,
        dtype=spec.dtype,
        bos_token_id=None,
        codec=spec.codec or "none",
    )
    return plan_work(asked, current, place_documents([window] * n_windows, geometry))


def plan_work(asked: Asked, current: Manifest, placement: Placement) -> CapturePlan:
    """Plan what is missing of these documents and sites."""
    lacking = lacking_sites(asked.sites, asked.held, placement)
    if not lacking:
        return _nothing_to_do(asked, current)
    if asked.max_tokens is not None and current.n_tokens > asked.max_tokens:
        raise PlanError(
            f"Run {current.run_id} has {current.n_tokens:,} tokens, more than --max-tokens {asked.max_tokens}, and a "
            "site is captured of all of them.",
            hint="Leave --max-tokens out, or give at least as many.",
        )
    manifest = next_manifest(current, placement, asked.sites)
    batch_tokens = min(asked.spec.batch_tokens, asked.memory(manifest).batch_tokens)
    work = partition_work(lacking, asked.held, placement, batch_tokens)
    adds_documents = placement.documents.num_rows > 0
    frozen = FrozenPlan(
        manifest, work, adds_documents, _intra_op_threads() if asked.model else 0, asked.request
    )
    return _priced(asked, frozen, placement.documents, placement.tokens)


def _priced(asked: Asked, frozen: FrozenPlan, documents: pa.Table, tokens: pa.Table) -> CapturePlan:
    """Return the plan with what it costs; raise PlanError if what is lacking does not fit the disk.

    How far compression reaches is not known before, so that compressed captures are not refused.
    """
    manifest, store, held = frozen.manifest, asked.store, asked.held
    costs = site_costs(manifest, frozen.work)
    # others, or an earlier attempt, may have written some of it
    lacking = pending_work(store, frozen) if store and manifest.run_id else frozen.work
    needed = sum(cost.nbytes for cost in site_costs(manifest, lacking))
    free = store.free_nbytes() if store else None
    if store is not None and free is not None and needed > free and manifest.codec == "none":
        raise PlanError(
            f"The capture needs {format_nbytes(needed)}, and '{store.url}' has {format_nbytes(free)} left.",
            hint="Capture fewer tokens (--max-tokens) or sites (--sites, --for), or elsewhere.",
        )
    lengths: dict[int, int] = {}
    for table in (documents, *([held.documents] if held else [])):
        columns = (table[name].to_pylist() for name in ("document", "n_tokens"))
        lengths |= dict(zip(*columns, strict=True))
    left_out = [s for s in manifest.sites if held and s not in asked.sites] if frozen.adds_documents else []
    return CapturePlan(
        spec=asked.spec,
        model=asked.model,
        manifest=manifest,
        existing=asked.existing,
        frozen=frozen,
        documents=documents,
        tokens=tokens,
        costs=costs,
        memory=asked.memory(manifest),
        n_requests=count_requests(
            manifest,
            frozen.work,
            adds_documents=frozen.adds_documents,
            has_lake=store is not None and store.exists(LAKE_MARKER),
            has_model=store is not None
            and asked.model is not None
            and has_model(store, asked.model.model_id),
        ),
        flops=forward_flops(
            manifest.shape, (lengths[n] for work in frozen.work for batch in work.batches for n in batch)
        ),
        free_nbytes=free,
        partial_sites=tuple(left_out),
    )


def _context(spec: CaptureSpec, shape: ModelShape, name: str) -> int:
    context = spec.context or (min(_DEFAULT_CONTEXT, shape.n_ctx) if spec.task is None else shape.n_ctx)
    if context > shape.n_ctx:
        raise PlanError(
            f"A context of {context} tokens is more than the {shape.n_ctx} that {name} takes.",
            hint=f"--context {shape.n_ctx}, which also wins over a preset's.",
        )
    return context


def _require_run_s_own(spec: CaptureSpec, begun: Manifest) -> None:
    """Raise PlanError if the spec asks for another geometry or codec than the run was begun with."""
    fixed = begun.geometry.partition_tokens
    if spec.partition_tokens not in (None, fixed):
        raise PlanError(
            f"Run {begun.run_id} has partitions of {fixed} tokens, not {spec.partition_tokens}.",
            hint="Leave --partition-tokens out: a run keeps the geometry of its first capture.",
        )
    if spec.codec not in (None, begun.codec):
        raise PlanError(
            f"Run {begun.run_id} is stored with codec {begun.codec}, not {spec.codec}.",
            hint="Leave --codec out: a run keeps the codec of its first capture.",
        )


def _identity(
    spec: CaptureSpec, model: ModelDescription, corpus: Corpus, context: int, bos: int | None
) -> dict[str, Any]:
    """Return what makes a run this run. Sites and extent are not in it."""
    return {
        **model.digests,
        "numerics": {"compute_dtype": spec.compute_dtype, "dtype": spec.dtype, "attention": "eager"},
        "corpus": {**corpus.fingerprint, "min_tokens": spec.min_tokens, "context": context, "bos": bos},
    }


def choose_geometry(spec: CaptureSpec, shape: ModelShape, context: int, begun: Manifest | None) -> Geometry:
    """Take the geometry of the run's first capture, or choose one."""
    if begun is not None:
        _require_run_s_own(spec, begun)
        return begun.geometry

    def choose(partition_tokens: int | None) -> Geometry:
        return plan_geometry(
            shape,
            context=context,
            dtype=spec.dtype,
            max_memory=parse_nbytes(spec.max_memory),
            partition_tokens=partition_tokens,
        )

    geometry = choose(spec.partition_tokens)
    if spec.partition_tokens is None:
        # what the model takes beside the partitions weighs where memory is scarce
        while geometry.partition_tokens >= 2 * context and not _fits(spec, shape, geometry):
            geometry = choose(geometry.partition_tokens // 2)
    return geometry


def _fits(spec: CaptureSpec, shape: ModelShape, geometry: Geometry) -> bool:
    """Tell whether a full partition of all sites fits into the memory, with the smallest batches at least."""
    n_windows = geometry.partition_tokens // geometry.context
    full = Partition(0, geometry.partition_tokens, geometry.partition_pairs, n_windows)
    try:
        plan_memory(
            shape,
            geometry,
            (full,),
            sites=SITES,
            dtype=spec.dtype,
            compute_dtype=spec.compute_dtype,
            batch_tokens=geometry.context,
            max_memory=spec.max_memory,
            n_tokens=0,
            n_documents=0,
            on_host=runs_on_host(spec.device),
            is_local=True,
        )
    except PlanError:
        return False
    return True


def _intra_op_threads() -> int:
    n_threads: int = import_extra("torch").get_num_threads()
    return n_threads
