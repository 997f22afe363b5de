"""A model's weights are written chunk by chunk; ``model.json`` says that the rest is whole."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr

from layerlake.capture.model_store import has_model, weight_chunks, write_model
from layerlake.catalog import layout
from layerlake.catalog.layout import WeightSpec, weight_specs
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import VOCAB

Array = np.ndarray[Any, np.dtype[Any]]

SHAPE = ModelShape(
    family="gpt2", n_layers=2, d_model=3, n_heads=1, n_kv_heads=1, d_head=3, d_mlp=5, n_vocab=7, n_ctx=8,
    block="sequential", norm="layernorm", norm_eps=1e-5, act_fn="relu", gated_mlp=False, tied_unembed=True,
)  # fmt: skip


@pytest.fixture
def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    specs = weight_specs(SHAPE).items()
    return {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in specs}


def write(store: Store, weights: dict[str, Array]) -> None:
    write_model(
        store,
        "m",
        shape=SHAPE,
        card={"model": "m"},
        vocab=pa.table([[0], ["a"], [False]], schema=VOCAB),
        read_weight=lambda name, block: weights[name][block],
    )


def stored(store: Store, name: str) -> Array:
    return np.asarray(zarr.open_array(store.zarr_store("models/m/weights.zarr"), path=name, mode="r")[...])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize("chunk_nbytes", [40, 1 << 20])
def test_zarr_reads_what_was_written_block_by_block(
    store: Store, weights: dict[str, Array], chunk_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "WEIGHT_CHUNK_NBYTES", chunk_nbytes)
    write(store, weights)
    for name, values in weights.items():
        np.testing.assert_array_equal(stored(store, name), values, err_msg=name)
    chunks = sum(len(list(weight_chunks(spec))) for spec in weight_specs(SHAPE).values())
    names = [name for name, _ in store.walk("models/m/weights.zarr") if not name.endswith("zarr.json")]
    assert len(names) == chunks


def test_the_card_tells_each_object_from_the_others(
    store: Store, weights: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "WEIGHT_CHUNK_NBYTES", 40)
    write(store, weights)
    told = store.read_json("models/m/model.json")["crc32"]
    contents = {
        name.removeprefix("models/m/"): store.read(name)
        for name, _ in store.walk("models/m")
        if not name.endswith(".json")
    }
    assert told == {name: f"{zlib.crc32(content):08x}" for name, content in contents.items()}
    assert len(set(told.values())) == len(told) > 10


def test_chunks_tile_a_weight() -> None:
    spec = WeightSpec((5, 4), (2, 3))
    seen = np.zeros(spec.shape, dtype=int)
    for _, block in weight_chunks(spec):
        seen[block] += 1
    assert (seen == 1).all()
    assert [name for name, _ in weight_chunks(spec)] == [f"c/{i}/{j}" for i in range(3) for j in range(2)]


def test_a_model_is_there_once_its_card_is(
    store: Store, weights: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that died is completed by the next."""

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("layerlake.capture.model_store.to_parquet", die)
        with pytest.raises(KeyboardInterrupt):
            write(store, weights)
    assert not has_model(store, "m")
    write(store, weights)
    assert has_model(store, "m")
    assert store.read_json("models/m/model.json")["model"] == "m"
    np.testing.assert_array_equal(stored(store, "W_U"), weights["W_U"])


def test_another_writer_s_weights_are_not_taken_away(
    store: Store, weights: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two captures of one model: whoever writes ``model.json`` first must find all weights in place."""
    write(store, weights)
    present: list[bool] = []
    create = Store.write_json

    def watch(self: Store, name: str, value: Any, **options: Any) -> None:
        create(self, name, value, **options)
        present.append(all(store.exists(f"models/m/weights.zarr/{weight}/zarr.json") for weight in weights))

    monkeypatch.setattr(Store, "write_json", watch)
    write(store, weights)
    assert all(present)
    np.testing.assert_array_equal(stored(store, "W_out"), weights["W_out"])


def test_large_weights_are_cut_into_chunks_of_64_mebibytes() -> None:
    wide = dataclasses.replace(SHAPE, d_model=4096, d_mlp=16384, n_vocab=50304)
    for spec in weight_specs(wide).values():
        assert 4 * np.prod(spec.chunks) <= 64 << 20
