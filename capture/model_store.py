"""Write a model's part of the lake: its card, its vocabulary, and the weights that the analyses need."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from ..catalog.layout import model_path
from ..catalog.stores import Store
from ..catalog.tables import to_parquet

__all__ = ["write_model"]


def write_model(
    store: Store,
    model_id: str,
    *,
    card: Mapping[str, Any],
    vocab: pa.Table,
    weights: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    """Write a model unless it is there already; ``model.json`` comes last and says that the rest is whole.

    Nothing is deleted, so that several may write the same model at once.

    Parameters
    ----------
    store : Store
        The lake.
    model_id : str
        Slug and digest of weights, config and tokenizer.
    card : mapping
        What ``model.json`` says: shape, digests, hub id and revision or local path.
    vocab : pa.Table
        ``tables.VOCAB``.
    weights : mapping
        The arrays of :meth:`Run.weight`, raw, float32. Arrays of three dimensions are chunked by their first.
    """
    folder = model_path(model_id)
    if store.exists(f"{folder}/model.json"):
        return
    group = zarr.open_group(store.zarr_store(f"{folder}/weights.zarr", read_only=False), mode="a")
    for name, values in weights.items():
        chunks = (1, *values.shape[1:]) if values.ndim == 3 else values.shape
        # One that is there is of an attempt that died, or of another capture of this model: the same numbers.
        with suppress(ContainsArrayError):
            group.create_array(
                name, shape=values.shape, chunks=chunks, dtype="float32", compressors=(Crc32cCodec(),)
            )
        zarr.open_array(group.store, path=name, mode="r+")[...] = values
    store.write(f"{folder}/vocab.parquet", to_parquet(vocab))
    store.write_json(f"{folder}/model.json", dict(card))
