"""The ``zarr.json`` of arrays, rendered by Zarr itself in memory: what lies in a lake is written whole, by a Store."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from .shard import CODECS

__all__ = ["GROUP", "array_metadata"]

GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
"""The metadata of a group."""


def array_metadata(
    shape: tuple[int, ...],
    *,
    chunks: tuple[int, ...],
    dtype: str,
    shards: tuple[int, ...] | None = None,
    codec: str = "none",
    dimension_names: tuple[str, ...] | None = None,
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the metadata of an array whose chunks are compressed by ``codec``, if any, and carry a CRC-32C."""
    compressors: tuple[BloscCodec | Crc32cCodec, ...] = (Crc32cCodec(),)
    if codec != "none":
        blosc = BloscCodec(
            cname=codec,  # type: ignore[arg-type]  # our names are Blosc's
            clevel=CODECS[codec],
            shuffle="bitshuffle",
            typesize=np.dtype(dtype).itemsize,
        )
        compressors = (blosc, Crc32cCodec())
    array = zarr.create_array(
        MemoryStore(),
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=dtype,
        dimension_names=dimension_names,
        compressors=compressors,
        fill_value=0,
        attributes=attributes,
    )
    metadata: dict[str, Any] = json.loads(json.dumps(array.metadata.to_dict()))
    return metadata
