"""What the tests of analyses share: a small shape, and what a run really stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]


@pytest.fixture
def shape() -> ModelShape:
    """Two layers, two heads, LayerNorm; wide enough a vocabulary for two kinds of columns."""
    return ModelShape(
        family="gpt2", n_layers=2, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=16, n_vocab=24, n_ctx=64,
        block="sequential", norm="layernorm", norm_eps=1e-5, act_fn="gelu_new", gated_mlp=False, tied_unembed=False,
    )  # fmt: skip


@pytest.fixture
def stored() -> Callable[[Run, str], Array]:
    """Return ``[layer, token, width]`` float64 of a site, the tokens in the order of the token table."""

    def read(run: Run, site: str) -> Array:
        n = run.array(site).shape[0]
        parts = [np.stack([run.read(site, i, p) for i in range(n)]) for p in run.manifest.partitions]
        return np.concatenate(parts, axis=1).astype(np.float64)

    return read
