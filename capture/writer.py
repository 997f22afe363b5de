"""Write one partition's objects. Knows arrays and objects, not models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..catalog.errors import CorruptRun
from ..catalog.layout import activations_path, array_spec, object_name, run_path, zones_name
from ..catalog.manifest import Manifest
from ..catalog.sites import SITES
from ..catalog.stores import Store
from ..catalog.tables import attn_band_table, to_parquet
from .metadata import GROUP, array_metadata
from .partition import PartitionBuffer
from .shard import crc32_of, encode_shard
from .zones import shard_zones

__all__ = ["create_arrays", "object_keys", "write_object", "write_partition"]

_CUT = ("data_type", "chunk_grid", "codecs", "dimension_names")
"""The fields of an array's metadata that a run keeps."""


def create_arrays(store: Store, manifest: Manifest) -> None:
    """Write the metadata of the Zarr arrays of all sites of a manifest, or let them grow; they are never shrunk.

    All arrays of a run have room for the same partitions, so that a shape never says which site holds what. Only
    ``zarr.json`` is written, whole: several writers may do it at once, and no chunk is touched.

    Raises
    ------
    CorruptRun
        An array of the run is not cut or encoded as its manifest says.
    """
    folder = activations_path(manifest.run_id)
    room = 1 + max(partition.index for partition in manifest.partitions)
    if not store.exists(f"{folder}/zarr.json"):
        store.write_json(f"{folder}/zarr.json", GROUP)
    for name in (name for name in manifest.sites if SITES[name].is_array):
        spec = array_spec(
            SITES[name], manifest.shape, manifest.geometry, dtype=manifest.dtype, n_partitions=room
        )
        path = f"{folder}/{name}/zarr.json"
        metadata = array_metadata(
            spec.shape,
            chunks=spec.chunks,
            shards=spec.shards,
            dtype=spec.dtype,
            codec=manifest.codec,
            dimension_names=spec.dimension_names,
            attributes={"dtype": manifest.dtype},
        )
        try:
            store.write_json(path, metadata, create=True)
        except FileExistsError:
            existing = store.read_json(path)
        else:
            continue
        grown = [max(pair) for pair in zip(existing["shape"], metadata["shape"], strict=True)]
        if any(existing[field] != metadata[field] for field in _CUT):
            if manifest.number:
                raise CorruptRun(
                    f"Array {name} of run {manifest.run_id} is not cut or encoded as the run's manifest says."
                )
            # a first capture that was given up left one of another geometry
            store.write_json(path, metadata)
        elif grown != existing["shape"]:
            store.write_json(path, existing | {"shape": grown})


def object_keys(manifest: Manifest, sites: tuple[str, ...]) -> list[tuple[str, int | None]]:
    """Return (site, layer) of each object of a partition; ``attn_band`` has all layers in one, layer None."""
    keys: list[tuple[str, int | None]] = []
    for name in sites:
        layers = range(SITES[name].n_layers(manifest.shape))
        keys += [(name, layer) for layer in layers] if SITES[name].is_array else [(name, None)]
    return keys


def write_object(
    store: Store, manifest: Manifest, buffer: PartitionBuffer, site: str, layer: int | None
) -> dict[str, Any]:
    """Encode and write one object of a partition, the zones of a shard beside it, and return its record.

    The record has the columns of ``tables.OBJECTS``, and under ``zones`` name, length and checksum of these.
    Without a codec the values are not copied. Chunks without a used row are not written.
    """
    index = buffer.work.index
    place = {"site": site, "layer": layer, "partition": index}
    if layer is None:
        name = object_name(SITES[site], 0, index)
        return place | _write(store, manifest, name, _table(manifest, buffer, site))
    record = _write(
        store, manifest, object_name(SITES[site], layer, index), _shard(manifest, buffer, site, layer)
    )
    zones = to_parquet(_zones(manifest, buffer, site, layer))
    written = _write(store, manifest, zones_name(SITES[site], layer, index), [memoryview(zones)])
    return place | record | {"zones": written}


def _write(store: Store, manifest: Manifest, name: str, pieces: Sequence[memoryview]) -> dict[str, Any]:
    """Write an object of a run from its pieces, and return its name, length and checksum.

    The checksum is CRC-32: the CRC-32C of bytes that carry their CRC-32C is the same for all bytes of that length, so
    that it would not tell one shard from another.
    """
    store.write(f"{run_path(manifest.run_id)}/{name}", *pieces)
    return {"name": name, "nbytes": sum(map(len, pieces)), "crc32": f"{crc32_of(pieces):08x}"}


def _shard(manifest: Manifest, buffer: PartitionBuffer, site: str, layer: int) -> list[memoryview]:
    values, is_pair = buffer.values[site, layer], SITES[site].rows == "pair"
    return encode_shard(
        values[:, :, None] if is_pair else values[None],
        chunk_rows=manifest.geometry.chunk_rows[site],
        n_used=_n_used(manifest, buffer, site),
        codec=manifest.codec,
    )


def _zones(manifest: Manifest, buffer: PartitionBuffer, site: str, layer: int) -> pa.Table:
    values, n_used = buffer.values[site, layer], _n_used(manifest, buffer, site)
    used = values[:, :n_used] if SITES[site].rows == "pair" else values[:n_used]
    return shard_zones(manifest, used, site=site, layer=layer, partition=buffer.work.index)


def _n_used(manifest: Manifest, buffer: PartitionBuffer, site: str) -> int:
    used = manifest.partition(buffer.work.index)
    return used.n_pairs if SITES[site].rows == "pair" else used.n_rows


def _table(manifest: Manifest, buffer: PartitionBuffer, site: str) -> list[memoryview]:
    layers = [buffer.values[site, layer] for layer in range(manifest.shape.n_layers)]
    numbers, lengths = (
        np.array([getattr(document, field) for document in buffer.documents.values()], dtype=np.int64)
        for field in ("number", "n_tokens")
    )
    return [memoryview(to_parquet(attn_band_table(numbers, lengths, np.stack(layers, axis=1))))]


def write_partition(store: Store, manifest: Manifest, buffer: PartitionBuffer) -> list[dict[str, Any]]:
    """Write all objects of a partition, one after the other, and return their records."""
    return [
        write_object(store, manifest, buffer, site, layer)
        for site, layer in object_keys(manifest, buffer.work.sites)
    ]
