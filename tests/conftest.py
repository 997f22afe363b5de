"""Runs made from numpy arrays, without a model: what the tests of catalog, sql and analyze stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from layerlake.capture.frozen import FrozenPlan, PartitionWork, digest_json
from layerlake.capture.ledgers import write_ledger
from layerlake.capture.model_store import write_model
from layerlake.capture.partition import PartitionBuffer, PlacedDocument
from layerlake.capture.phases import finalise_capture, init_capture
from layerlake.capture.placement import EncodedDocument, Prompt, place_documents
from layerlake.capture.staging import as_tensor
from layerlake.capture.writer import write_partition
from layerlake.catalog.bands import band_sums
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.layout import plan_geometry
from layerlake.catalog.manifest import Manifest
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.sites import SITES
from layerlake.catalog.tables import VOCAB

from .file_systems import counting, flaky, no_waiting, s3_server, s3_url, slow

__all__ = ["build_run", "counting", "flaky", "no_waiting", "s3_server", "s3_url", "slow"]

Array = np.ndarray[Any, np.dtype[Any]]

TINY = ModelShape(
    family="gpt2", n_layers=2, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=16, n_vocab=24, n_ctx=32,
    block="sequential", norm="layernorm", norm_eps=1e-5, act_fn="gelu_new", gated_mlp=False, tied_unembed=False,
)  # fmt: skip
"""A shape small enough to check by hand."""


def random_values(shape: ModelShape, n_tokens: int, lengths: Sequence[int], seed: int) -> dict[str, Array]:
    """Values that satisfy the identities: resid adds up, patterns are causal and sum to 1."""
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> Array:
        return rng.standard_normal(size).astype(np.float32)

    attn, mlp = (normal(shape.n_layers, n_tokens, shape.d_model) for _ in range(2))
    first = normal(1, n_tokens, shape.d_model)
    resid = np.concatenate([first, first + np.cumsum(attn + mlp, axis=0)])
    packed = []
    for n in lengths:
        logits = normal(shape.n_layers, shape.n_heads, n, n)
        weights = np.exp(logits) * np.tril(np.ones((n, n), dtype=np.float32))
        weights /= weights.sum(axis=-1, keepdims=True)
        packed.append(weights[:, :, *np.tril_indices(n)])
    return {
        "resid": resid,
        "attn_out": attn,
        "mlp_out": mlp,
        "mlp_post": normal(shape.n_layers, n_tokens, shape.d_mlp),
        "pattern": np.concatenate(packed, axis=-1),
    }


def random_weights(shape: ModelShape, seed: int) -> dict[str, Array]:
    """Weights of the sizes that the analyses read."""
    rng = np.random.default_rng(seed)
    sizes = {
        "W_U": (shape.d_model, shape.n_vocab),
        "b_U": (shape.n_vocab,),
        "ln_final.w": (shape.d_model,),
        "ln_final.b": (shape.d_model,),
        "W_out": (shape.n_layers, shape.d_mlp, shape.d_model),
        "b_out": (shape.n_layers, shape.d_model),
    }
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def build_run(
    url: str | Path,
    *,
    shape: ModelShape = TINY,
    lengths: Sequence[int] = (5, 9, 3, 12, 7),
    name: str = "tiny",
    dtype: str = "float32",
    codec: str = "none",
    partition_tokens: int = 16,
    context: int = 12,
    sites: Sequence[str] = tuple(SITES),
    values: Mapping[str, Array] | None = None,
    weights: Mapping[str, Array] | None = None,
    token_ids: Array | None = None,
    vocab: Sequence[str] | None = None,
    prompts: Sequence[Prompt] | None = None,
    seed: int = 0,
) -> Run:
    """Write a run of given values, through the writer that a capture uses.

    Parameters
    ----------
    url : str or path
        The lake; made if need be.
    values : mapping, optional
        site → ``[layer, token, width]`` or ``[layer, head, pair]``, documents one after the other without
        gaps; random where missing.
    weights : mapping, optional
        As :meth:`Run.weight` names them; random where missing.
    token_ids : array, optional
        int ``[token]``; random if None. Position 0 of each document gets token 0 when random.
    vocab : sequence of str, optional
        The text of each token id; "t0", "t1", … if None.
    prompts : sequence of Prompt, optional
        What each document is in a task; plain text if None.
    """
    store = create_lake(url)
    n_tokens = sum(lengths)
    arrays = random_values(shape, n_tokens, lengths, seed) | dict(values or {})
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if token_ids is None:
        token_ids = np.random.default_rng(seed).integers(1, shape.n_vocab, n_tokens)
        token_ids[starts[:-1]] = 0
    encoded = [
        EncodedDocument(
            (f"{name}:{i}",),
            token_ids[start : start + n].astype(np.int32),
            n,
            prompt=prompts[i] if prompts else None,
        )
        for i, (start, n) in enumerate(zip(starts, lengths, strict=False))
    ]
    geometry = plan_geometry(
        shape, context=context, dtype=dtype, max_memory=1 << 30, partition_tokens=partition_tokens
    )
    placed = place_documents(encoded, geometry)
    identity = {"name": name, "seed": seed, "dtype": dtype, "lengths": list(lengths)}
    model_id = f"{name}-{digest_json([shape.to_json(), seed], 8)}"
    texts = list(vocab) if vocab is not None else [f"t{i}" for i in range(shape.n_vocab)]
    given = random_weights(shape, seed) | dict(weights or {})
    write_model(
        store,
        model_id,
        shape=shape,
        card={"model_id": model_id, "model": name, "shape": shape.to_json()},
        vocab=pa.table([range(len(texts)), texts, [i == 0 for i in range(len(texts))]], schema=VOCAB),
        read_weight=lambda name, block: given[name][block],
    )
    partitions = tuple(p.index for p in placed.partitions)
    manifest = Manifest(
        run_id=f"{name}-{digest_json(identity, 8)}",
        model_id=model_id,
        model_name=name,
        shape=shape,
        identity=identity,
        dataset="synthetic",
        geometry=geometry,
        dtype=dtype,
        codec=codec,
        bos_token_id=0,
        n_documents=len(lengths),
        n_tokens=n_tokens,
        partitions=placed.partitions,
        sites=dict.fromkeys(sites, partitions),
    )
    work = tuple(PartitionWork(index, tuple(sites), ()) for index in partitions)
    plan = FrozenPlan(manifest, work, adds_documents=True, n_threads=1, request={})
    init_capture(store, plan, documents=placed.documents, tokens=placed.tokens)
    stored = [
        PlacedDocument(row["document"], document.token_ids, row["row_start"], row["pair_start"])
        for row, document in zip(placed.documents.to_pylist(), encoded, strict=True)
    ]
    for item in plan.work:
        inside = [d for d in stored if placed.documents["partition"][d.number].as_py() == item.index]
        batch = replace(item, batches=(tuple(document.number for document in inside),))
        buffer = PartitionBuffer(manifest, batch, {document.number: document for document in stored})
        for site, layer in buffer.values:
            picked = _pick(site, layer, arrays, lengths, batch.batches[0])
            if SITES[site].is_array:
                picked = [_encode(each, dtype) for each in picked]
            buffer.place(site, layer, inside, [as_tensor(each) for each in picked])
        write_ledger(store, plan, item.index, write_partition(store, manifest, buffer))
    return Run(store, finalise_capture(store, plan))


def _pick(
    site: str, layer: int, arrays: Mapping[str, Array], lengths: Sequence[int], numbers: Sequence[int]
) -> list[Array]:
    """Return one layer of each of some documents."""
    n_tokens = np.array(lengths)
    n_pairs = n_tokens * (n_tokens + 1) // 2
    if site == "attn_band":
        starts = np.cumsum(n_pairs) - n_pairs
        chosen = list(numbers)
        sums = band_sums(arrays["pattern"][layer], n_tokens[chosen], starts[chosen])
        return list(sums.astype(np.float32))
    n, axis = (n_pairs, 1) if SITES[site].rows == "pair" else (n_tokens, 0)
    whole = np.split(arrays[site][layer], np.cumsum(n)[:-1], axis=axis)
    return [whole[number] for number in numbers]


def _encode(values: Array, dtype: str) -> Array:
    """Cast to the stored dtype; bfloat16 by truncation, which is exact enough for a test."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Build runs in a lake under ``tmp_path`` (``make_run(url=…)`` for another place)."""

    def make(url: str | Path | None = None, **options: Any) -> Run:
        return build_run(url or tmp_path / "lake", **options)

    return make


@pytest.fixture
def tiny_lake(tmp_path: Path) -> Lake:
    """A lake with one tiny random run."""
    build_run(tmp_path / "lake")
    return Lake(tmp_path / "lake")
