"""Zarr arrays read by hand: metadata, shards and chunks held against what a run or a model says of itself.

Written from the Zarr v3 specification, with numpy, Blosc and CRC-32C alone. It shares nothing with the writer; with the
reader (:mod:`.shards`), the cut of a shard, its index and the decoding of a chunk. Zarr itself, which gives zeros for a
chunk that is missing, is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .manifest import Manifest
from .problem import Deviation, require
from .shards import ABSENT, STORED, ShardCut, decode_chunk, parse_index, require_crc32c
from .sites import Site

__all__ = [
    "verify_array_metadata",
    "verify_group_metadata",
    "verify_shard",
    "verify_weight_chunk",
    "verify_weight_metadata",
]

Bits = npt.NDArray[np.unsignedinteger[Any]]

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
"""The exponent's bits; all of them are set in infinities and in what is not a number, and in nothing else."""


def verify_shard(content: bytes, cut: ShardCut, look: Callable[[Bits, int], None] = lambda *_: None) -> int:
    """Decode every chunk of a shard, and return how many used values are not finite.

    Parameters
    ----------
    content : bytes
        The shard.
    cut : ShardCut
        What it should be.
    look : callable, optional
        Is shown the bits of the used values of each chunk, in order, and how many of them are not finite.

    Raises
    ------
    Deviation
        Index or chunks are damaged, a chunk is missing or one too many, or an unused value is not zero.
    """
    bits_dtype = "<u4" if cut.dtype == "float32" else "<u2"
    exponent, n_nonfinite = _EXPONENT[cut.dtype], 0
    for number, values in _scan_chunks(content, cut):
        bits = values.reshape(-1).view(bits_dtype)
        n_used = min(cut.chunk_values, cut.n_values - number * cut.chunk_values)
        n_here = int(np.count_nonzero((bits[:n_used] & exponent) == exponent))
        n_nonfinite += n_here
        look(bits[:n_used], n_here)
        require(f"values of chunk {number} after the last document", 0, int(np.count_nonzero(bits[n_used:])))
    return n_nonfinite


def _scan_chunks(content: bytes, cut: ShardCut) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the number within its series and the values of each chunk, once its checksum is right."""
    view = np.frombuffer(content, dtype=np.uint8)
    body = len(content) - cut.index_nbytes
    if body < 0:
        raise Deviation("bytes of the shard", f"at least {cut.index_nbytes} for its index", len(content))
    index = parse_index(content[body:], cut)
    is_absent = (index == ABSENT).all(axis=-1)
    require("chunks of each series that are there", cut.n_used, _one((~is_absent).sum(axis=1)))
    require("chunks that are there without a used row", 0, int((~is_absent[:, cut.n_used :]).sum()))
    places = index[:, : cut.n_used].reshape(-1, 2)
    starts, lengths = (places[:, column].astype(object) for column in (0, 1))
    order = np.argsort(starts)
    ends = np.cumsum(lengths[order])
    require("start of each chunk", [0, *ends[:-1]], list(starts[order]))
    require("end of the last chunk", body, ends[-1] if len(ends) else 0)
    for place, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        series, number = divmod(place, cut.n_used)
        yield number, decode_chunk(view[start : start + length], cut, (series, number))


def _one(counts: npt.NDArray[Any]) -> int | list[int]:
    """Return the value that all have, or all of them."""
    return int(counts[0]) if len(set(counts.tolist())) == 1 else counts.tolist()


def verify_array_metadata(metadata: Mapping[str, Any], site: Site, manifest: Manifest) -> None:
    """Hold an array's ``zarr.json`` against the manifest; it may have room for more partitions.

    Raises
    ------
    Deviation
        The array is cut or encoded otherwise, or too small.
    """
    geometry, shape = manifest.geometry, manifest.shape
    n_layers = shape.n_layers + (site.axis == "boundary")
    chunk = geometry.chunk_rows[site.name]
    room = 1 + max(p.index for p in manifest.partitions)
    rows = geometry.partition_tokens
    if site.rows == "pair":
        rows = rows * (geometry.context + 1) // 2
        whole, shard, inner, axis = [n_layers, shape.n_heads], [1, shape.n_heads, rows], [1, 1, chunk], 2
    else:
        width = shape.d_mlp if site.width_name == "d_mlp" else shape.d_model
        whole, shard, inner, axis = [n_layers, width], [1, rows, width], [1, chunk, width], 1
    _require_array(metadata, STORED[manifest.dtype][0])
    found = list(metadata["shape"])
    length = found.pop(axis)
    require("shape without the long axis", whole, found)
    if length < room * rows or length % rows:
        raise Deviation("length of the long axis", f"a multiple of {rows}, at least {room * rows}", length)
    require("shape of a shard", shard, metadata["chunk_grid"]["configuration"]["chunk_shape"])
    require("dimension names", list(site.dims), metadata["dimension_names"])
    require("attribute dtype", manifest.dtype, metadata["attributes"].get("dtype"))
    require("codecs", ["sharding_indexed"], [codec["name"] for codec in metadata["codecs"]])
    sharding = metadata["codecs"][0]["configuration"]
    require("shape of a chunk", inner, sharding["chunk_shape"])
    require("place of the index", "end", sharding["index_location"])
    plain = ["bytes little", "crc32c"]
    require("codecs of the index", plain, _codec_names(sharding["index_codecs"]))
    blosc_names = [] if manifest.codec == "none" else [f"blosc {manifest.codec}"]
    require("codecs of a chunk", [plain[0], *blosc_names, plain[1]], _codec_names(sharding["codecs"]))


def verify_group_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise Deviation unless a ``zarr.json`` is that of a group."""
    require("zarr_format", 3, metadata["zarr_format"])
    require("node type", "group", metadata["node_type"])


def verify_weight_metadata(metadata: Mapping[str, Any], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Hold the ``zarr.json`` of a weight against its shape, and return the place of each chunk that must exist.

    Raises
    ------
    Deviation
        The weight has another shape, or is encoded otherwise.
    """
    _require_array(metadata, "float32")
    require("shape", list(shape), metadata["shape"])
    require("codecs", ["bytes little", "crc32c"], _codec_names(metadata["codecs"]))
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    counts = [math.ceil(length / size) for length, size in zip(shape, chunk, strict=True)]
    return [tuple(place) for place in np.ndindex(*counts)]


def verify_weight_chunk(content: bytes, chunk_shape: tuple[int, ...]) -> None:
    """Raise Deviation unless a chunk has its length and its checksum."""
    require("bytes", 4 * math.prod(chunk_shape) + 4, len(content))
    require_crc32c("chunk", np.frombuffer(content, dtype=np.uint8))


def _require_array(metadata: Mapping[str, Any], dtype: str) -> None:
    require("zarr_format", 3, metadata["zarr_format"])
    require("node type", "array", metadata["node_type"])
    require("data type", dtype, metadata["data_type"])
    require("chunk grid", "regular", metadata["chunk_grid"]["name"])
    encoding = metadata["chunk_key_encoding"]
    require("names of chunks", ("default", "/"), (encoding["name"], encoding["configuration"]["separator"]))
    require("fill value", 0, metadata["fill_value"])


def _codec_names(codecs: list[Mapping[str, Any]]) -> list[str]:
    """Return each codec's name with the setting that decides how it is decoded."""
    return [
        " ".join(
            filter(
                None, [codec["name"], *(codec.get("configuration", {}).get(k) for k in ("endian", "cname"))]
            )
        )
        for codec in codecs
    ]
