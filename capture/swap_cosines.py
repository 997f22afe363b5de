"""How like what attention and MLP give stays when two neighbouring layers change places (arXiv 2406.19384, A.4).

F_l being block l, and c_l what its attention or its MLP gives: the unmodified model has c_l(x_l) and c_l+1(x_l+1); the
swapped one runs block l+1 on x_l, then block l on x̃ = x_l + F_l+1(x_l). Two blocks a swap, and no other is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.interventions import SWAP_COSINE_DOCUMENTS
from ..catalog.schedules import Intervention, Step
from .batches import Batch
from .hooks import Take, listen
from .interventions import InterventionPlan

if TYPE_CHECKING:
    import torch

__all__ = ["compare_swaps"]

Outputs = dict[str, "torch.Tensor"]
"""What a layer's components give: ``[token, d_model]`` each."""

_COMPONENTS = ("attn", "mlp")
_KINDS = {
    "self_earlier": ("earlier", "above"),
    "self_later": ("later", "below"),
    "index_earlier": ("earlier", "below"),
    "index_later": ("later", "above"),
    "adjacent": ("below", "above"),
}
"""What is compared: ``below`` and ``above`` are layers l and l+1 in the unmodified model, ``earlier`` is layer l+1
moved before l, and ``later`` is layer l moved behind."""


def compare_swaps(
    plan: InterventionPlan, batch: Batch, swaps: Iterable[Intervention]
) -> Iterator[tuple[Intervention, pa.Table]]:
    """Yield the cosines of each swap, summed over each document: ``SWAP_COSINE_DOCUMENTS``."""
    unmodified: dict[int, Outputs] = {}
    for swap in swaps:
        layer = swap.layer
        assert layer is not None  # noqa: S101  # a swap has one
        for near in (layer, layer + 1):
            if near not in unmodified:
                unmodified[near] = _unmodified(plan, batch, near)
        between, earlier = _observe(batch, layer + 1, batch.stored(layer))
        _, later = _observe(batch, layer, between)
        vectors = {
            "below": unmodified.pop(layer),
            "above": unmodified[layer + 1],
            "earlier": earlier,
            "later": later,
        }
        yield swap, pa.concat_tables(_tables(plan, batch, layer, vectors))


def _tables(
    plan: InterventionPlan, batch: Batch, layer: int, vectors: Mapping[str, Outputs]
) -> Iterator[pa.Table]:
    """Yield the rows of each component and kind."""
    is_centred = plan.run.shape.norm == "layernorm"
    same = {"run": plan.run.run_id, "layer": layer, "centred": is_centred}
    same |= plan.params("swap_cosine_documents")
    for component in _COMPONENTS:
        for kind, pair in _KINDS.items():
            a, b = (vectors[name][component] for name in pair)
            cosines = _cosines(a, b, is_centred=is_centred)
            yield _table(batch, cosines, same | {"component": component, "kind": kind})


def _unmodified(plan: InterventionPlan, batch: Batch, layer: int) -> Outputs:
    """Return what a layer's components give in the unmodified model: from the lake if it is there."""
    if plan.has_outputs:
        return {name: batch.stored_at_positions(f"{name}_out", layer) for name in _COMPONENTS}
    return _observe(batch, layer, batch.stored(layer))[1]


def _observe(batch: Batch, layer: int, residual: torch.Tensor) -> tuple[torch.Tensor, Outputs]:
    """Run a block; return what is behind it, and what its components give at the positions that are looked at."""
    model, seen = batch.blocks.model, Outputs()

    def take(component: str) -> Take:
        return lambda value: seen.update({component: batch.at_positions(value)})

    with listen(model, {(f"{name}_out", layer): take(name) for name in _COMPONENTS}):
        out = batch.blocks.run(Step(layer), residual)
    return out, seen


def _table(batch: Batch, cosines: npt.NDArray[np.float64], same: Mapping[str, Any]) -> pa.Table:
    """Return a row a document: ``SWAP_COSINE_DOCUMENTS``."""
    n_documents, is_zero = len(batch.documents), np.isnan(cosines)
    columns: dict[str, Any] = {"document": [document.number for document in batch.documents]}
    for name, weights in (
        ("n_tokens", ~is_zero),
        ("n_zero", is_zero),
        ("sum_cosine", np.where(is_zero, 0, cosines)),
    ):
        columns[name] = np.bincount(batch.number_in_batch, weights, n_documents)
    columns |= {name: [value] * n_documents for name, value in same.items()}
    schema = SWAP_COSINE_DOCUMENTS
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in schema], schema=schema)


def _cosines(a: torch.Tensor, b: torch.Tensor, *, is_centred: bool) -> npt.NDArray[np.float64]:
    """Return the cosine of each row of one with that of the other, NaN where one is zero: ``[token]``."""
    x, y = (value.double().cpu().numpy() for value in (a, b))
    if is_centred:  # the model's norms never see the mean
        x, y = (value - value.mean(axis=1, keepdims=True) for value in (x, y))
    lengths = np.sqrt(np.vecdot(x, x) * np.vecdot(y, y))
    cosines = np.full(len(x), np.nan)
    np.divide(np.vecdot(x, y), lengths, out=cosines, where=lengths > 0)
    return cosines
