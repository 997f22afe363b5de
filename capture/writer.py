"""Write one partition: its shards, then its ledger. Knows arrays and objects, not models."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import WrapperStore

from ..catalog.errors import CorruptRun
from ..catalog.layout import activations_path, array_spec, shard_name
from ..catalog.manifest import Manifest
from ..catalog.sites import SITES
from ..catalog.stores import Store

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore
    from zarr.core.buffer import Buffer

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

    Parameters
    ----------
    store : Store
        The lake's objects.
    manifest : Manifest
        The run, with the partition's sites; its arrays exist.
    partition : int
        The partition's index.
    arrays : mapping
        site → the whole partition, as in :class:`PartitionBuffer`. Chunks of zeros are not written, unless
        the shard has no others.
    """
    recorder = _Recorder(store.zarr_store(activations_path(manifest.run_id), read_only=False))

    def write(name: str, layer: int) -> dict[str, Any]:
        site, array = SITES[name], zarr.open_array(recorder, path=name, mode="r+")
        rows = manifest.geometry.partition_rows(site)
        span = slice(partition * rows, (partition + 1) * rows)
        values = arrays[name][layer]
        if not values.any():  # zarr writes no chunk of zeros, and a missing shard means a loss
            array = array.with_config({"write_empty_chunks": True})
        if site.rows == "pair":
            array[layer, :, span] = values
        else:
            array[layer, span] = values
        key = shard_name(site, layer, partition)
        nbytes, crc = recorder.written[key]
        return {
            "name": key, "site": name, "layer": layer, "partition": partition, "nbytes": nbytes, "crc32c": crc,
        }  # fmt: skip

    shards = [(name, layer) for name in arrays for layer in range(SITES[name].n_layers(manifest.shape))]
    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        return list(pool.map(lambda shard: write(*shard), shards))


class _Recorder(WrapperStore["ZarrStore"]):
    """Passes everything on, and notes the length and the checksum of every object it writes."""

    def __init__(self, store: ZarrStore) -> None:
        super().__init__(store)
        self.written: dict[str, tuple[int, str]] = {}

    async def set(self, key: str, value: Buffer) -> None:
        content = value.to_bytes()
        self.written[key] = (len(content), f"{google_crc32c.value(content):08x}")
        await super().set(key, value)
