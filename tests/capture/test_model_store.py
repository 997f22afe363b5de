"""A model is written once; ``model.json`` says that the rest is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr

from layerlake.capture.model_store import write_model
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import VOCAB

WEIGHTS = {
    "W_U": np.arange(12, dtype=np.float32).reshape(3, 4),
    "W_out": np.arange(30, dtype=np.float32).reshape(2, 5, 3),
}


def write(store: Store, weights: Any = WEIGHTS) -> None:
    vocab = pa.table([[0], ["a"], [False]], schema=VOCAB)
    write_model(store, "m", card={"model": "m"}, vocab=vocab, weights=weights)


def stored(store: Store, name: str) -> Any:
    return np.asarray(zarr.open_array(store.zarr_store("models/m/weights.zarr"), path=name, mode="r")[...])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_a_model_that_is_there_is_not_written_again(store: Store) -> None:
    write(store)
    before = {name: (store.local_path / name).stat().st_mtime_ns for name, _ in store.walk()}
    write(store, {"W_U": WEIGHTS["W_U"] + 1})
    assert {name: (store.local_path / name).stat().st_mtime_ns for name, _ in store.walk()} == before
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(stored(store, name), values)


def test_an_attempt_that_died_is_completed(store: Store) -> None:
    write(store, {"W_U": np.zeros((3, 4), np.float32)})
    store.delete("models/m/model.json")
    write(store)
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(stored(store, name), values)


def test_another_writer_s_weights_are_not_taken_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captures of one model: whoever writes ``model.json`` first must find all weights in place."""
    write(store)
    card = store.read("models/m/model.json")
    store.delete("models/m/model.json")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerlake.capture.model_store.to_parquet", die)
    with pytest.raises(KeyboardInterrupt):
        write(store, {"W_U": WEIGHTS["W_U"]})
    store.write("models/m/model.json", card)  # the other one ends
    np.testing.assert_array_equal(stored(store, "W_out"), WEIGHTS["W_out"])
