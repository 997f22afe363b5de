"""Write one partition: its shards, then its ledger. Knows arrays and objects, not models."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ..catalog.errors import CorruptRun
from ..catalog.layout import activations_path, array_spec, shard_name
from ..catalog.manifest import Manifest
from ..catalog.sites import SITES
from ..catalog.stores import Store
from .shard import encode_shard

__all__ = ["PartitionBuffer", "create_arrays", "write_partition"]

_WRITE_THREADS = 2


class PartitionBuffer:
    """One partition of some sites in memory, in the stored dtype, laid out as the shards are.

    The memory is virtual until it is filled: unused rows of a partition cost nothing.
    """

    def __init__(self, manifest: Manifest, sites: tuple[str, ...]) -> None:
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        """site → ``[layer, token, width]``, or ``[layer, head, pair]``; bfloat16 as its bits, uint16."""
        for name in sites:
            spec = array_spec(
                SITES[name], manifest.shape, manifest.geometry, dtype=manifest.dtype, n_partitions=1
            )
            self.arrays[name] = np.zeros(spec.shape, dtype=spec.dtype)


def create_arrays(store: Store, manifest: Manifest) -> None:
    """Create the Zarr arrays of all sites of a manifest, or grow them; they are never shrunk.

    All arrays of a run have room for the same partitions, so that a shape never says which site holds what.
    """
    zarr_store = store.zarr_store(activations_path(manifest.run_id), read_only=False)
    group = zarr.open_group(zarr_store, mode="a")
    room = 1 + max(partition.index for partition in manifest.partitions)
    for name in manifest.sites:
        spec = array_spec(
            SITES[name], manifest.shape, manifest.geometry, dtype=manifest.dtype, n_partitions=room
        )
        existing = group.get(name)
        fits = (
            isinstance(existing, zarr.Array)
            and existing.chunks == spec.chunks
            and existing.shards == spec.shards
        )
        if existing is not None and not fits and manifest.number:
            raise CorruptRun(f"Array {name} of run {manifest.run_id} is not cut as the run's manifest says.")
        if not fits:  # there is none, or a first capture that was given up left one of another geometry
            group.create_array(
                name,
                shape=spec.shape,
                chunks=spec.chunks,
                shards=spec.shards,
                dtype=spec.dtype,
                dimension_names=spec.dimension_names,
                compressors=(Crc32cCodec(),),
                fill_value=0,
                attributes={"dtype": manifest.dtype},
                overwrite=True,
            )
        elif isinstance(existing, zarr.Array) and any(
            have < need for have, need in zip(existing.shape, spec.shape, strict=True)
        ):
            existing.resize(tuple(map(max, existing.shape, spec.shape)))


def write_partition(
    store: Store, manifest: Manifest, partition: int, arrays: Mapping[str, npt.NDArray[Any]]
) -> list[dict[str, Any]]:
    """Write the shards of one partition and return a record of each object (``tables.OBJECTS``).

    An object's own checksum is CRC-32: the CRC-32C of bytes that carry their CRC-32C is the same for all
    bytes of that length, so that it would not tell one shard from another.

    Parameters
    ----------
    store : Store
        The lake's objects.
    manifest : Manifest
        The run, with the partition; its arrays exist.
    partition : int
        The partition's index.
    arrays : mapping
        site → the whole partition, as in :class:`PartitionBuffer`. Chunks without a used row are not written.
    """
    (used,) = (p for p in manifest.partitions if p.index == partition)

    def write(name: str, layer: int) -> dict[str, Any]:
        site, values = SITES[name], arrays[name][layer]
        is_pair = site.rows == "pair"
        shard = encode_shard(
            values[:, :, None] if is_pair else values[None],
            chunk_rows=manifest.geometry.chunk_rows[name],
            n_used=used.n_pairs if is_pair else used.n_rows,
        )
        key = shard_name(site, layer, partition)
        store.write(f"{activations_path(manifest.run_id)}/{key}", shard.data)
        return {
            "name": key, "site": name, "layer": layer, "partition": partition, "nbytes": len(shard),
            "crc32": f"{zlib.crc32(shard.data):08x}",
        }  # fmt: skip

    shards = [(name, layer) for name in arrays for layer in range(SITES[name].n_layers(manifest.shape))]
    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        return list(pool.map(lambda shard: write(*shard), shards))
