"""Geometry and bytes: what the plan promises must fit, whatever the documents are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.catalog.errors import PlanError
from layerlake.catalog.layout import (
    Geometry,
    array_spec,
    attn_band_nbytes,
    bytes_per_token,
    itemsize,
    n_pairs,
    object_name,
    plan_geometry,
    shard_name,
)
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.sites import SITES

GPT2 = ModelShape(
    family="gpt2", n_layers=12, d_model=768, n_heads=12, n_kv_heads=12, d_head=64, d_mlp=3072, n_vocab=50257,
    n_ctx=1024, block="sequential", norm="layernorm", norm_eps=1e-5, act_fn="gelu_new", gated_mlp=False,
    tied_unembed=True,
)  # fmt: skip
PYTHIA = replace(
    GPT2, family="gpt_neox", n_layers=32, d_model=4096, n_heads=32, n_kv_heads=32, d_head=128, d_mlp=16384
)
LLAMA = replace(GPT2, family="llama", n_layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_mlp=8192)
TINY = replace(GPT2, n_layers=2, d_model=8, n_heads=2, d_head=4, d_mlp=16)

shapes = st.builds(
    lambda n_layers, n_heads, d_head, d_mlp: replace(
        GPT2, n_layers=n_layers, n_heads=n_heads, d_head=d_head, d_model=n_heads * d_head, d_mlp=d_mlp
    ),
    st.integers(1, 80),
    st.integers(1, 64),
    st.integers(1, 128),
    st.integers(1, 20000),
)


@pytest.mark.parametrize(
    ("shape", "resid", "one", "mlp_post", "pattern"),
    [  # by hand: fp16, a context of 512; the sites ×L, resid stream, mlp_post, pattern packed
        (GPT2, 19_968, 18_432, 73_728, 73_872),
        (PYTHIA, 270_336, 262_144, 1_048_576, 525_312),
        (LLAMA, 69_632, 65_536, 262_144, 262_656),
    ],
    ids=["gpt2", "pythia-6.9b", "Llama-3.2-1B"],
)
def test_bytes_per_token_are_those_of_the_table(
    shape: ModelShape, resid: int, one: int, mlp_post: int, pattern: int
) -> None:
    found = {name: bytes_per_token(shape, site, context=512, dtype="float16") for name, site in SITES.items()}
    assert found == {
        "resid": resid,
        "attn_out": one,
        "mlp_out": one,
        "mlp_post": mlp_post,
        "pattern": pattern,
        "attn_band": shape.n_layers * shape.n_heads * 2 * 18 * 4 / 512,
    }
    assert bytes_per_token(shape, SITES["resid"], context=512, dtype="float32") == 2 * resid


def test_memory_decides_how_many_tokens_a_partition_has() -> None:
    """204 kB a token (all sites): 2 GiB hold 10,518, hence 8192; 1 GiB holds 5259, hence 4096."""
    total = 19_968 + 2 * 18_432 + 73_728 + 73_872
    assert 8192 * total < 2**31 < 16384 * total
    at = [
        plan_geometry(GPT2, context=512, dtype="float16", max_memory=nbytes).partition_tokens
        for nbytes in (2**34, 2**32, 2**31)
    ]
    assert at == [8192, 8192, 4096]


@given(
    shape=shapes,
    context=st.integers(1, 10_000),
    dtype=st.sampled_from(["float16", "float32"]),
    max_memory=st.integers(0, 2**36),
)
def test_a_planned_geometry_holds_together(
    shape: ModelShape, context: int, dtype: str, max_memory: int
) -> None:
    arrays = {name: site for name, site in SITES.items() if site.is_array}
    total = sum(bytes_per_token(shape, site, context=context, dtype=dtype) for site in arrays.values())
    needed = 1 << (context - 1).bit_length()  # the least power of two that holds a document
    if needed > 8192 or needed * total > max(total, max_memory / 2):
        with pytest.raises(PlanError, match=f"smaller than the context of {context} ") as caught:
            plan_geometry(shape, context=context, dtype=dtype, max_memory=max_memory)
        assert f"--partition-tokens {needed}," in caught.value.hint
        plan_geometry(shape, context=context, dtype=dtype, max_memory=max_memory, partition_tokens=needed)
        return
    geometry = plan_geometry(shape, context=context, dtype=dtype, max_memory=max_memory)
    rows = geometry.partition_tokens
    assert rows & (rows - 1) == 0
    assert context <= rows <= 8192
    assert rows * total <= max_memory / 2 or rows == 1
    assert rows == 8192 or 2 * rows * total > max_memory / 2
    for name, site in arrays.items():
        of_partition, chunk = geometry.partition_rows(site), geometry.chunk_rows[name]
        assert of_partition % chunk == 0
        nbytes = chunk * itemsize(dtype) * (1 if site.rows == "pair" else site.width(shape))
        assert nbytes <= 2**20 or chunk % 2 == 1
        assert nbytes > 2**19 or chunk == of_partition
    assert Geometry.from_json(geometry.to_json()) == geometry


@given(data=st.data(), context=st.integers(1, 300), half_rows=st.integers(1, 600))
def test_pairs_suffice_for_any_documents(data: st.DataObject, context: int, half_rows: int) -> None:
    rows = max(2 * half_rows, context + context % 2)
    geometry = Geometry(rows, context, {})
    left, pairs = rows, 0
    for length in data.draw(st.lists(st.integers(1, context))):
        if length > left:
            break
        left, pairs = left - length, pairs + n_pairs(length)
    assert pairs <= geometry.partition_pairs


def test_full_windows_fill_rows_and_pairs_alike() -> None:
    geometry = Geometry(64, 16, {})
    assert 4 * n_pairs(16) == geometry.partition_pairs


def test_a_partition_smaller_than_the_context_is_refused_with_one_that_works() -> None:
    with pytest.raises(PlanError, match="smaller than the context of 300") as caught:
        plan_geometry(GPT2, context=300, dtype="float16", max_memory=2**20)
    assert "--partition-tokens 512" in caught.value.hint


def test_an_odd_partition_is_refused_where_pairs_would_be_halved() -> None:
    with pytest.raises(PlanError, match="no whole number of pairs"):
        plan_geometry(TINY, context=12, dtype="float16", max_memory=2**30, partition_tokens=15)
    assert plan_geometry(
        TINY, context=11, dtype="float16", max_memory=2**30, partition_tokens=15
    ).partition_pairs == (15 * 6)


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match="int8") as caught:
        itemsize("int8")
    assert "float16, bfloat16, float32" in caught.value.hint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_shard_is_one_partition_of_one_layer(dtype: str) -> None:
    geometry = plan_geometry(GPT2, context=512, dtype=dtype, max_memory=2**30)
    rows, pairs = geometry.partition_tokens, geometry.partition_pairs
    stored = "uint16" if dtype == "bfloat16" else dtype
    resid = array_spec(SITES["resid"], GPT2, geometry, dtype=dtype, n_partitions=3)
    assert (resid.shape, resid.shards, resid.dtype) == ((13, 3 * rows, 768), (1, rows, 768), stored)
    pattern = array_spec(SITES["pattern"], GPT2, geometry, dtype=dtype, n_partitions=3)
    assert (pattern.shape, pattern.shards) == ((12, 12, 3 * pairs), (1, 12, pairs))
    assert pattern.chunks == (1, 1, geometry.chunk_rows["pattern"])
    assert pattern.dimension_names == ("layer", "head", "pair")


def test_no_two_shards_share_a_name() -> None:
    names = [
        shard_name(site, layer, partition)
        for site in SITES.values()
        if site.is_array
        for layer in range(3)
        for partition in range(4)
    ]
    assert len(set(names)) == len(names)


def test_objects_lie_in_the_runs_folder() -> None:
    """Those of arrays by layer and partition; ``attn_band`` has all layers in one."""
    assert object_name(SITES["mlp_post"], 3, 7) == "activations.zarr/mlp_post/c/3/7/0"
    assert object_name(SITES["pattern"], 3, 7) == "activations.zarr/pattern/c/3/0/7"
    assert {object_name(SITES["attn_band"], layer, 7) for layer in range(4)} == {
        "attn_band/part-00000007.parquet"
    }


def test_bands_go_by_documents() -> None:
    assert attn_band_nbytes(GPT2, 10) == 10 * 12 * 12 * 2 * 18 * 4
    pattern = bytes_per_token(GPT2, SITES["pattern"], context=512, dtype="float16") * 512
    assert pattern / attn_band_nbytes(GPT2, 1) > 1000
