"""What a capture costs before it is run: bytes, objects, requests, floating-point operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..catalog.layout import (
    ArraySpec,
    array_spec,
    attn_band_nbytes,
    bytes_per_token,
    n_pairs,
    weight_specs,
)
from ..catalog.manifest import Manifest, Partition
from ..catalog.shapes import ModelShape
from ..catalog.sites import ANALYSIS_SITES, SITES, Site
from .frozen import PartitionWork
from .model_store import weight_chunks

__all__ = ["SiteCost", "cheapest_sites", "count_requests", "forward_flops", "shard_nbytes", "site_costs"]


@dataclass(frozen=True, slots=True)
class SiteCost:
    """What a capture will write of one site."""

    site: str
    shape: tuple[int, ...]
    """The array after the capture, unwritten rows between partitions included; rows and columns of a table."""
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    n_objects: int
    """Objects that this capture writes: one a layer and partition, of a table one a partition."""
    nbytes: int
    """Their bytes on disk: exact for arrays that are not compressed; else at most, and of a table about, as much."""


def shard_nbytes(site: Site, spec: ArraySpec, n_used: int) -> int:
    """Return the bytes of an uncompressed shard: used chunks with 4 bytes of checksum each, and the index.

    Parameters
    ----------
    site, spec : Site, ArraySpec
        The site's array.
    n_used : int
        Rows (tokens or pairs) that are used; only chunks that hold one of them are written.
    """
    axis = site.dims.index(site.rows)
    series = spec.shards[1] if site.rows == "pair" else 1
    chunk_values = spec.chunks[0] * spec.chunks[1] * spec.chunks[2]
    itemsize_nbytes = {"float16": 2, "uint16": 2, "float32": 4}[spec.dtype]
    n_written = series * -(-n_used // spec.chunks[axis])
    n_slots = series * (spec.shards[axis] // spec.chunks[axis])
    return n_written * (chunk_values * itemsize_nbytes + 4) + n_slots * 16 + 4


def site_costs(manifest: Manifest, work: Iterable[PartitionWork]) -> tuple[SiteCost, ...]:
    """Return what each site takes of what is to be written."""
    work = tuple(work)
    used = {partition.index: partition for partition in manifest.partitions}
    room = 1 + max(used, default=0)
    costs = []
    for name, site in SITES.items():
        parts = [used[item.index] for item in work if name in item.sites]
        if parts:
            cost = _array_cost if site.is_array else _table_cost
            costs.append(cost(manifest, site, parts, room))
    return tuple(costs)


def _array_cost(manifest: Manifest, site: Site, parts: Sequence[Partition], room: int) -> SiteCost:
    spec = array_spec(site, manifest.shape, manifest.geometry, dtype=manifest.dtype, n_partitions=room)
    n_layers = site.n_layers(manifest.shape)
    nbytes = sum(shard_nbytes(site, spec, p.n_pairs if site.rows == "pair" else p.n_rows) for p in parts)
    return SiteCost(
        site.name, spec.shape, spec.dtype, spec.chunks, spec.shards, len(parts) * n_layers, nbytes * n_layers
    )


def _table_cost(manifest: Manifest, site: Site, parts: Sequence[Partition], room: int) -> SiteCost:  # noqa: ARG001
    n_documents = sum(p.n_documents for p in parts)
    rows = n_documents * manifest.shape.n_layers * manifest.shape.n_heads * 2
    nbytes = attn_band_nbytes(manifest.shape, n_documents)
    return SiteCost(site.name, (rows, 8), "float32", (), (), len(parts), nbytes)


def cheapest_sites(
    analyses: Iterable[str], shape: ModelShape, *, context: int, dtype: str
) -> tuple[str, ...]:
    """Return the sites that answer all of some analyses and take the least space, never none.

    Parameters
    ----------
    analyses : iterable of str
        Names in :data:`layerlake.catalog.sites.ANALYSIS_SITES`.
    shape, context, dtype : ModelShape, int, str
        The model, the longest document in tokens, and what is stored.
    """

    def size(sites: Iterable[str]) -> float:
        return sum(bytes_per_token(shape, SITES[name], context=context, dtype=dtype) for name in sites)

    choices = itertools.product(*(ANALYSIS_SITES[name] for name in analyses))
    chosen = min((set().union(*choice) for choice in choices), key=size)
    # what asks for weights alone gets them with the smallest of the sites
    chosen = chosen or {min(SITES, key=lambda name: size([name]))}
    return tuple(name for name in SITES if name in chosen)


def count_requests(
    manifest: Manifest,
    work: Sequence[PartitionWork],
    *,
    adds_documents: bool,
    has_lake: bool,
    has_model: bool,
) -> int:
    """Return the objects that a capture by one writer puts into a store, those of zones, ledgers and log included.

    Reads, listings and deletions are not counted, nor that a large object may go to S3 in several parts.
    """
    sites = {name for item in work for name in item.sites}
    count = 0 if has_lake else 1  # layerlake.json
    if not has_model:
        chunks = sum(1 for spec in weight_specs(manifest.shape).values() for _ in weight_chunks(spec))
        # the group, each array's metadata, the chunks, the vocabulary, model.json
        count += 1 + len(weight_specs(manifest.shape)) + chunks + 2
    is_new = manifest.number == 0
    count += 2  # the reservation and the frozen plan
    count += 2 if adds_documents else 0  # documents, tokens
    # metadata: the group's once, that of arrays that are new or grow
    arrays = [name for name in manifest.sites if SITES[name].is_array]
    count += is_new + sum(1 for name in arrays if is_new or adds_documents or name in sites)
    count += sum(2 + _n_objects(manifest, item) for item in work)  # attempt, objects, ledger
    return count + 2  # the table of objects, the manifest


def _n_objects(manifest: Manifest, item: PartitionWork) -> int:
    # beside each shard, its zones
    return sum(2 * SITES[name].n_layers(manifest.shape) if SITES[name].is_array else 1 for name in item.sites)


def forward_flops(shape: ModelShape, lengths: Iterable[int]) -> int:
    """Return the floating-point operations (two a multiply-add) of a forward without unembedding.

    Projections and the MLP, 2·P a token with P = 2·d·H·d_head + 2·d·KV·d_head + (2 or 3)·d·f, and attention,
    4·H·d_head for each pair of a query and a key that it sees; norms, softmax and activations are left out.
    """
    d, width = shape.d_model, shape.n_heads * shape.d_head
    parameters = 2 * d * width + 2 * d * shape.n_kv_heads * shape.d_head
    parameters += (3 if shape.gated_mlp else 2) * d * shape.d_mlp
    return sum(shape.n_layers * (2 * parameters * n + 4 * width * n_pairs(n)) for n in lengths)
