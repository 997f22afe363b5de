"""Plan a capture: from what was asked for to exactly what will be run and written, with its cost."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..catalog.errors import CorpusError, PlanError
from ..catalog.lake import check_creatable
from ..catalog.layout import Geometry, array_spec, itemsize, plan_geometry
from ..catalog.manifest import Manifest, read_manifest
from ..catalog.run import Run
from ..catalog.sites import SITES, parse_sites
from ..catalog.sizes import parse_count, parse_nbytes
from ..catalog.stores import Store
from ..catalog.tables import DOCUMENTS, TOKENS
from .corpus import Corpus, encode_corpus, open_corpus, resolve_bos
from .description import ModelDescription, describe_model, slug
from .frozen import FrozenPlan, PartitionWork, digest_json
from .model import require_compute_dtype
from .phases import read_open_capture
from .placement import EncodedDocument, Placement, batch_documents, place_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CapturePlan", "CaptureSpec", "SiteCost", "plan_capture"]

_DEFAULT_CONTEXT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """What to capture: one model, one corpus, some sites."""

    model: str | os.PathLike[str] | PreTrainedModel = field(repr=False)
    """A hub id, a local directory, or a model that is loaded already."""
    dataset: str | os.PathLike[str]
    """A dataset id of the hub, or a local txt, jsonl, parquet or arrow file."""
    sites: tuple[str, ...] | str = "all"
    """Site names, or ``"all"``."""
    max_tokens: int | str | None = None
    """Stop at the last whole document that fits; None takes the whole dataset."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    tokenizer: str | PreTrainedTokenizerBase | None = None
    """Another tokenizer than the model's own; needed for a loaded model."""
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    """The split of a hub dataset."""
    text_column: str | None = None
    """The column that holds the text; None is ``text``."""
    sample_by: str = "paragraph"
    """What is a document of a txt file: paragraph, line or file."""
    min_tokens: int = 3
    """Shorter documents are refused; BOS counts."""
    context: int | None = None
    """Longer documents are cut; None is the smaller of 512 and what the model can take. BOS counts."""
    bos: str = "auto"
    """``auto`` (the tokenizer's BOS, else EOS, else none), ``none``, or a token id."""
    dtype: str = "float16"
    """What is stored: float16, bfloat16 or float32."""
    compute_dtype: str = "float32"
    """What the model runs in."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``."""
    max_memory: int | str = "4GiB"
    """Bounds what the capture allocates beyond the loaded model; decides the size of a partition."""
    partition_tokens: int | None = None
    """Token rows of a partition; None lets ``max_memory`` decide."""
    batch_tokens: int = 4096
    """The most padded tokens of one forward."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(frozen=True, slots=True)
class SiteCost:
    """What a capture will write of one site."""

    site: str
    shape: tuple[int, ...]
    """The array after the capture, unwritten rows between partitions included."""
    chunks: tuple[int, ...]
    n_objects: int
    """Shards that this capture writes: one a layer and partition."""
    nbytes: int
    """Uncompressed bytes of the chunks that this capture writes."""


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """A capture, planned but not begun. ``frozen`` is None where the lake holds all of it already."""

    spec: CaptureSpec
    model: ModelDescription
    run_id: str
    manifest: Manifest
    """The run as it will be."""
    existing: Manifest | None
    """The run as it is; None where the capture begins it."""
    frozen: FrozenPlan | None
    documents: pa.Table
    """The document rows that the capture adds."""
    tokens: pa.Table
    """The token rows that the capture adds."""
    costs: tuple[SiteCost, ...]

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of all sites that this capture writes."""
        return sum(cost.nbytes for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's numbers."""
        manifest = self.manifest
        statuses = self.documents["status"].to_pylist()
        return {
            "run": self.run_id,
            "model": self.model.name,
            "dataset": manifest.dataset,
            "dtype": manifest.dtype,
            "context": manifest.geometry.context,
            "bos_token_id": manifest.bos_token_id,
            "documents_stored": statuses.count("stored") + statuses.count("cut"),
            "documents_cut": statuses.count("cut"),
            "documents_refused": statuses.count("refused"),
            "tokens": self.tokens.num_rows,
            "partitions": len(self.frozen.work) if self.frozen else 0,
            "partition_tokens": manifest.geometry.partition_tokens,
            "nbytes": self.nbytes,
            "sites": [dataclasses.asdict(cost) for cost in self.costs],
        }


def plan_capture(spec: CaptureSpec, lake: str | os.PathLike[str] | None = None) -> CapturePlan:
    """Plan a capture without writing anything and without loading weights.

    Tokenises the corpus up to ``max_tokens``; hashes local weight files.

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
    """
    sites = parse_sites(spec.sites)
    itemsize(spec.dtype)
    require_compute_dtype(spec.compute_dtype)
    _require_positive(spec)
    store = Store(lake) if lake is not None else None
    if store is not None:
        check_creatable(store)
    model = describe_model(
        spec.model, revision=spec.revision, tokenizer=spec.tokenizer, trust_remote_code=spec.trust_remote_code
    )
    corpus = open_corpus(
        os.fspath(spec.dataset),
        config=spec.dataset_config,
        split=spec.split,
        revision=spec.dataset_revision,
        text_column=spec.text_column,
        sample_by=spec.sample_by,
    )
    context = spec.context or min(_DEFAULT_CONTEXT, model.shape.n_ctx)
    if context > model.shape.n_ctx:
        raise PlanError(
            f"A context of {context} tokens is more than the {model.shape.n_ctx} that {model.name} takes."
        )
    bos = resolve_bos(spec.bos, model.tokenizer, model.shape.n_vocab)
    identity = _identity(spec, model, corpus, context, bos)
    run_id = f"{slug(model.name)}-{digest_json(identity, 8)}"

    opened = read_open_capture(store, run_id) if store else None
    existing = read_manifest(store, run_id) if store else None
    geometry = _geometry(spec, model, context, existing or (opened.manifest if opened else None))
    held = Run(store, existing) if store and existing else None
    encode = _encoder(spec, corpus, model, bos, context)
    placement = _place(encode, spec, geometry, held)
    n_threads = opened.n_threads if opened else _intra_op_threads()
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
    )
    manifest = _next_manifest(current, placement, sites)
    work = _work(spec, sites, held, placement)
    adds_documents = placement.documents.num_rows > 0
    return CapturePlan(
        spec=spec,
        model=model,
        run_id=run_id,
        manifest=manifest if work else current,
        existing=existing,
        frozen=FrozenPlan(manifest, work, adds_documents, n_threads) if work else None,
        documents=placement.documents,
        tokens=placement.tokens,
        costs=_costs(manifest, work),
    )


def _require_positive(spec: CaptureSpec) -> None:
    parse_nbytes(spec.max_memory)
    for name in ("min_tokens", "context", "partition_tokens", "batch_tokens"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise PlanError(f"--{name.replace('_', '-')} must be positive, not {value}.")


def _identity(
    spec: CaptureSpec, model: ModelDescription, corpus: Corpus, context: int, bos: int | None
) -> dict[str, Any]:
    """Return what makes a run this run. Sites and extent are not in it."""
    return {
        **model.digests,
        "numerics": {"compute_dtype": spec.compute_dtype, "dtype": spec.dtype, "attention": "eager"},
        "corpus": {**corpus.fingerprint, "min_tokens": spec.min_tokens, "context": context, "bos": bos},
    }


def _geometry(spec: CaptureSpec, model: ModelDescription, context: int, begun: Manifest | None) -> Geometry:
    """Take the geometry of the run's first capture, finished or open, or choose one."""
    if begun is None:
        return plan_geometry(
            model.shape,
            context=context,
            dtype=spec.dtype,
            max_memory=parse_nbytes(spec.max_memory),
            partition_tokens=spec.partition_tokens,
        )
    fixed = begun.geometry.partition_tokens
    if spec.partition_tokens not in (None, fixed):
        raise PlanError(
            f"Run {begun.run_id} has partitions of {fixed} tokens, not {spec.partition_tokens}.",
            hint="Leave --partition-tokens out: a run keeps the geometry of its first capture.",
        )
    return begun.geometry


def _encoder(
    spec: CaptureSpec, corpus: Corpus, model: ModelDescription, bos: int | None, context: int
) -> Callable[[int, int | None], list[EncodedDocument]]:
    def encode(skip: int, budget: int | None) -> list[EncodedDocument]:
        encoded = encode_corpus(
            corpus,
            model.tokenizer,
            bos=bos,
            context=context,
            min_tokens=spec.min_tokens,
            max_tokens=budget,
            n_vocab=model.shape.n_vocab,
            skip=skip,
        )
        return list(encoded)

    return encode


def _place(
    encode: Callable[[int, int | None], list[EncodedDocument]],
    spec: CaptureSpec,
    geometry: Geometry,
    held: Run | None,
) -> Placement:
    """Tokenise and place the documents that the run does not have yet."""
    budget = None if spec.max_tokens is None else parse_count(spec.max_tokens)
    if held is None:
        encoded = encode(0, budget)
        if not any(item.refusal is None for item in encoded):
            raise _nothing_to_store(encoded, budget)
        return place_documents(encoded, geometry)
    n_input = held.documents.num_rows
    left = None if budget is None else budget - held.n_tokens
    encoded = encode(n_input, left) if left is None or left > 0 else []
    if not any(item.refusal is None for item in encoded):
        return Placement(DOCUMENTS.empty_table(), TOKENS.empty_table(), ())
    following = 1 + max(partition.index for partition in held.manifest.partitions)
    return place_documents(encoded, geometry, first_document=n_input, first_partition=following)


def _nothing_to_store(encoded: list[EncodedDocument], budget: int | None) -> CorpusError:
    if encoded:
        return CorpusError(
            f"None of the {len(encoded)} documents can be stored; the first: {encoded[0].refusal}.",
            hint="Lower --min-tokens, or look at --text-column and --sample-by.",
        )
    if budget is not None:
        return CorpusError(f"Not even the first document fits into --max-tokens {budget}.")
    return CorpusError("The dataset is empty.")


def _next_manifest(manifest: Manifest, placement: Placement, sites: tuple[str, ...]) -> Manifest:
    """Return the snapshot after the capture, but for the parts and the entry that finalise adds."""
    statuses = placement.documents["status"].to_pylist()
    partitions = manifest.partitions + placement.partitions
    everywhere = tuple(partition.index for partition in partitions)
    held = {name: everywhere if name in sites else manifest.sites.get(name, ()) for name in SITES}
    return dataclasses.replace(
        manifest,
        n_documents=manifest.n_documents + len(statuses) - statuses.count("refused"),
        n_cut=manifest.n_cut + statuses.count("cut"),
        n_refused=manifest.n_refused + statuses.count("refused"),
        n_tokens=manifest.n_tokens + placement.tokens.num_rows,
        partitions=partitions,
        sites={name: indices for name, indices in held.items() if indices},
    )


def _work(
    spec: CaptureSpec, sites: tuple[str, ...], held: Run | None, placement: Placement
) -> tuple[PartitionWork, ...]:
    """Return, for each partition that lacks something, the sites it lacks and its batches."""
    lacking: dict[int, tuple[str, ...]] = {}
    tables = [placement.documents]
    if held is not None:
        for partition in held.manifest.partitions:
            missing = tuple(s for s in sites if partition.index not in held.manifest.sites.get(s, ()))
            if missing:
                lacking[partition.index] = missing
        tables.append(held.documents)
    lacking |= {partition.index: sites for partition in placement.partitions}
    members: dict[int, list[tuple[int, int]]] = {index: [] for index in lacking}
    for table in tables:
        columns = (table[name].to_pylist() for name in ("partition", "document", "n_tokens"))
        for partition_index, document, n_tokens in zip(*columns, strict=True):
            if partition_index in members:
                members[partition_index].append((document, n_tokens))
    return tuple(
        PartitionWork(
            index,
            lacking[index],
            batch_documents(
                [d for d, _ in members[index]], [n for _, n in members[index]], spec.batch_tokens
            ),
        )
        for index in sorted(lacking)
    )


def _costs(manifest: Manifest, work: tuple[PartitionWork, ...]) -> tuple[SiteCost, ...]:
    """Count objects and uncompressed bytes; a partly filled partition writes only the chunks it touches."""
    used = {partition.index: partition for partition in manifest.partitions}
    room = 1 + max(used)
    costs = []
    for name in (s for s in SITES if any(s in w.sites for w in work)):
        site = SITES[name]
        spec = array_spec(site, manifest.shape, manifest.geometry, dtype=manifest.dtype, n_partitions=room)
        chunk, n_layers = manifest.geometry.chunk_rows[name], site.n_layers(manifest.shape)
        width, value = site.width(manifest.shape), itemsize(manifest.dtype)
        rows = [
            used[w.index].n_pairs if site.rows == "pair" else used[w.index].n_rows
            for w in work
            if name in w.sites
        ]
        written = sum(-(-n // chunk) * chunk for n in rows)
        costs.append(
            SiteCost(name, spec.shape, spec.chunks, len(rows) * n_layers, written * n_layers * width * value)
        )
    return tuple(costs)


def _intra_op_threads() -> int:
    import torch

    return torch.get_num_threads()
