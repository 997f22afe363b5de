"""Write a model's part of the lake: its card, its vocabulary, and the weights that the analyses need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.layout import WeightSpec, model_path, weight_specs
from ..catalog.shapes import ModelShape
from ..catalog.stores import Store
from ..catalog.tables import to_parquet
from .metadata import GROUP, array_metadata
from .shard import crc32_of, seal

__all__ = ["ReadWeight", "has_model", "weight_chunks", "write_model"]

ReadWeight = Callable[[str, tuple[slice, ...]], npt.NDArray[np.float32]]
"""Returns a block of a weight, float32."""


def has_model(store: Store, model_id: str) -> bool:
    """Tell whether the lake holds a model whole."""
    return store.exists(f"{model_path(model_id)}/model.json")


def weight_chunks(spec: WeightSpec) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """Yield the name of each chunk of a weight, and the block that it holds."""
    counts = [range(-(-length // chunk)) for length, chunk in zip(spec.shape, spec.chunks, strict=True)]
    for place in itertools.product(*counts):
        block = tuple(
            slice(i * chunk, min((i + 1) * chunk, length))
            for i, chunk, length in zip(place, spec.chunks, spec.shape, strict=True)
        )
        yield "/".join(["c", *map(str, place)]), block


def write_model(
    store: Store,
    model_id: str,
    *,
    shape: ModelShape,
    card: Mapping[str, Any],
    vocab: pa.Table,
    read_weight: ReadWeight,
) -> None:
    """Write a model; ``model.json`` comes last and says that the rest is whole.

    Its field ``crc32`` holds the CRC-32 of the vocabulary's object and of each chunk of a weight, by name in the
    model's folder: each chunk's own checksum does not tell it from another. Nothing is deleted, and equal models give
    equal bytes, so that several may write the same model at once. Holds two chunks of at most 64 MiB.

    Parameters
    ----------
    store : Store
        The lake.
    model_id : str
        Slug and digest of weights, config and tokenizer.
    shape : ModelShape
        Says which weights there are (:func:`layerlake.catalog.layout.weight_specs`).
    card : mapping
        What ``model.json`` says: shape, digests, hub id and revision or local path.
    vocab : pa.Table
        ``tables.VOCAB``.
    read_weight : callable
        Returns a block of a weight, raw.
    """
    folder = model_path(model_id)
    crc32: dict[str, str] = {}

    def write(name: str, *pieces: bytes | memoryview) -> None:
        crc32[name] = f"{crc32_of(pieces):08x}"
        store.write(f"{folder}/{name}", *pieces)

    store.write_json(f"{folder}/weights.zarr/zarr.json", GROUP)
    for name, spec in weight_specs(shape).items():
        array = f"weights.zarr/{name}"
        store.write_json(
            f"{folder}/{array}/zarr.json", array_metadata(spec.shape, chunks=spec.chunks, dtype="float32")
        )
        for key, block in weight_chunks(spec):
            write(f"{array}/{key}", *_encode_chunk(read_weight(name, block), spec.chunks))
    write("vocab.parquet", to_parquet(vocab))
    store.write_json(f"{folder}/model.json", {**card, "crc32": crc32})


def _encode_chunk(block: npt.NDArray[np.float32], chunks: tuple[int, ...]) -> list[memoryview]:
    """Return the bytes of a chunk and their CRC-32C; one at the edge is filled up with zeros."""
    whole = np.zeros(chunks, dtype="<f4")
    whole[tuple(slice(length) for length in block.shape)] = block
    return seal(whole.reshape(-1).view(np.uint8))
