"""Identities that the captured values must satisfy, checked on the first batch before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..catalog.errors import AdapterMismatch, OverflowInCapture, SelfCheckFailed
from ..catalog.layout import n_pairs, weight_specs
from ..catalog.shapes import ModelShape
from ..catalog.sites import SITES
from .hooks import Take, hook_name, listen, pad, unpad
from .model_store import weight_chunks

if TYPE_CHECKING:
    import torch

    from .model import OpenModel

__all__ = ["check_model"]

Array = npt.NDArray[np.float32]

_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Allowed error relative to the largest value compared, by compute dtype."""

_MAX_DOCUMENTS = 2
_MAX_TOKENS = 128
_MAX_LOGITS = 16


def check_model(
    model: OpenModel, batch: Sequence[Sequence[int]], sites: Sequence[str], *, compute_dtype: str
) -> dict[str, float]:
    """Check the identities on the first documents of a batch and return each one's relative error.

    Three forwards of at most two documents of 128 tokens. Holds the values of one layer at a time, one block of a
    weight, and the residuals of one document.

    Parameters
    ----------
    model : OpenModel
        The model as it will run.
    batch : sequence of sequence of int
        Token ids of some documents; the beginnings of the first two are used.
    sites : sequence of str
        The sites to be captured; identities that need others of the residual's parts are checked anyway.
    compute_dtype : str
        Decides the tolerance.

    Raises
    ------
    SelfCheckFailed
        An identity does not hold; the message names it with its error and its tolerance.
    OverflowInCapture
        A value is not finite in what the model computes in.
    """
    ids = [list(document[:_MAX_TOKENS]) for document in batch[:_MAX_DOCUMENTS]]
    wanted = [
        site for site in ("resid", "attn_out", "mlp_out", "mlp_post", "pattern") if _wanted(site, sites)
    ]
    layers = _LayerCheck(model, [len(document) for document in ids])
    _run(model, ids, wanted, layers.take)
    errors = {"padded = unpadded": _padding_error(model, ids[0])}  # first: it breaks the others too
    errors |= {identity: error.relative for identity, error in layers.errors.items()}
    errors |= {"unembed(norm(resid[L])) = logits": _logits_error(model, ids[0])}
    tolerance = _TOLERANCE[compute_dtype]
    for identity, error in errors.items():
        if not error <= tolerance:
            raise SelfCheckFailed(
                f"'{identity}' does not hold for this {model.shape.family} model: relative error {error:.2e}, "
                f"tolerance {tolerance:.0e}. Nothing was written.",
                hint="The architecture is not one that layerlake understands yet; please report it with the config.",
            )
    return errors


def _wanted(site: str, sites: Sequence[str]) -> bool:
    # The residual's own parts are cheap; patterns and neurons are looked at only if they will be stored.
    return (
        site in sites or site not in ("mlp_post", "pattern") or (site == "pattern" and "attn_band" in sites)
    )


@dataclass(slots=True)
class _Error:
    """The largest difference seen, and the largest value that was compared."""

    difference: float = 0.0
    scale: float = 1e-30

    def compare(self, found: Array, expected: Array) -> None:
        difference = float(np.abs(found - expected).max())
        self.difference = difference if np.isnan(difference) else max(self.difference, difference)
        self.scale = max(self.scale, float(np.abs(found).max()))

    @property
    def relative(self) -> float:
        return self.difference / self.scale


class _LayerCheck:
    """Checks a layer's values against each other as soon as they are all there, and lets go of them."""

    def __init__(self, model: OpenModel, lengths: Sequence[int]) -> None:
        self.errors: dict[str, _Error] = {}
        self._model, self._lengths = model, lengths
        self._held: dict[tuple[str, int], Array] = {}

    def take(self, site: str, layer: int, value: Array) -> None:
        """Take one site and layer: ``[token, width]``, or ``[head, pair]``."""
        if site == "pattern":
            error = self.errors.setdefault("pattern rows sum to 1", _Error(scale=1.0))
            error.difference = max(error.difference, _row_sum_error(value, self._lengths))
            return
        self._held[site, layer] = value
        if site == "mlp_out" and ("mlp_post", layer) in self._held:
            self._check_neurons(layer)
        if site == "resid" and layer:
            before = self._held.pop(("resid", layer - 1))
            parts = [self._held.pop((part, layer - 1)) for part in ("attn_out", "mlp_out")]
            error = self.errors.setdefault("resid_post = resid_pre + attn_out + mlp_out", _Error())
            error.compare(value, before + parts[0] + parts[1])

    def _check_neurons(self, layer: int) -> None:
        neurons = self._held.pop(("mlp_post", layer))
        spec = weight_specs(self._model.shape)["W_out"]
        everything = slice(None)
        rebuilt = self._model.weight("b_out", (slice(layer, layer + 1), everything))
        for _, (_, rows, columns) in weight_chunks(replace(spec, shape=(1, *spec.shape[1:]))):
            block = self._model.weight("W_out", (slice(layer, layer + 1), rows, columns))
            rebuilt = rebuilt + neurons[:, rows] @ block[0]
        error = self.errors.setdefault("mlp_post · W_out + b_out = mlp_out", _Error())
        error.compare(self._held["mlp_out", layer], rebuilt)


def _run(
    model: OpenModel,
    ids: Sequence[Sequence[int]],
    sites: Sequence[str],
    take: Callable[[str, int, Array], None],
    *,
    with_logits: bool = False,
) -> Array:
    """Run documents, hand on each site and layer without padding, in float32, and return the logits if asked."""
    import torch

    lengths, seen = [len(document) for document in ids], set()

    def observer(site: str, layer: int) -> Take:
        def observe(value: torch.Tensor) -> None:
            seen.add((site, layer))
            flat = (
                _numpy(unpad(value, lengths))
                if value.ndim == (4 if site == "pattern" else 3)
                else _numpy(value)
            )
            _require_shape(flat.shape, site, layer, model.shape, lengths)
            _require_finite(flat, site, layer, str(value.dtype).removeprefix("torch."))
            take(site, layer, flat)

        return observe

    observers = {
        (site, layer): observer(site, layer)
        for site in sites
        for layer in range(SITES[site].n_layers(model.shape))
    }
    padded = pad(ids, device=model.device)
    logits = np.empty(0, dtype=np.float32)
    with torch.inference_mode(), listen(model, observers):
        if with_logits:
            logits = _numpy(unpad(model.bridge.original_model(padded, use_cache=False).logits, lengths))
        else:
            model.body(padded, use_cache=False)
    for site, layer in observers:
        if (site, layer) not in seen:
            _require_shape(None, site, layer, model.shape, lengths)
    return logits


def _require_shape(
    found: tuple[int, ...] | None, site: str, layer: int, shape: ModelShape, lengths: Sequence[int]
) -> None:
    """Raise AdapterMismatch unless a hook was called with a value of its site's shape."""
    width, is_pair = SITES[site].width(shape), SITES[site].rows == "pair"
    expected = (width, sum(map(n_pairs, lengths))) if is_pair else (sum(lengths), width)
    if found != expected:
        what = f"gives values of shape {found}, not {expected}" if found else "is never called"
        raise AdapterMismatch(
            f"TransformerLens's hook '{hook_name(site, layer, shape)}' {what} in this {shape.family} model.",
            hint=f"Leave {site} out with --sites.",
        )


def _require_finite(values: Array, site: str, layer: int, dtype: str) -> None:
    """Raise OverflowInCapture for what no identity can be checked of."""
    n_bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if n_bad:
        where = f"Site {site} at {SITES[site].axis} {layer}"
        mend = (
            "Run the model in --compute-dtype float32." if dtype != "float32" else "Look at weights and text."
        )
        raise OverflowInCapture(
            f"{where} has {n_bad} values in the first documents that are not finite, as computed in {dtype}. "
            "Nothing was written.",
            hint=mend,
        )


def _numpy(tensor: torch.Tensor) -> Array:
    values: Array = tensor.float().cpu().numpy()
    return values


def _logits_error(model: OpenModel, ids: Sequence[int]) -> float:
    """Compare the model's logits with the stored final norm and unembedding of the last boundary."""
    last: list[Array] = []
    error = _Error()
    logits = _run(
        model,
        [ids[:_MAX_LOGITS]],
        ["resid"],
        lambda _, layer, value: last.append(value) if layer == model.shape.n_layers else None,
        with_logits=True,
    )
    normed = _normed(last[0], model)
    for _, (rows, columns) in weight_chunks(weight_specs(model.shape)["W_U"]):
        rebuilt = normed @ model.weight("W_U", (rows, columns)) + model.weight("b_U", (columns,))
        error.compare(logits[:, columns], rebuilt)
    return error.relative


def _normed(x: Array, model: OpenModel) -> Array:
    """Apply the stored final norm, as the analyses will: ``[token, d_model]``."""
    if model.shape.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.shape.norm_eps)
    everything = (slice(None),)
    normed: Array = x / scale * model.weight("ln_final.w", everything) + model.weight(
        "ln_final.b", everything
    )
    return normed


def _padding_error(model: OpenModel, ids: Sequence[int]) -> float:
    """Compare a document run alone with the same document beside a longer one."""
    if len(ids) == model.shape.n_ctx:
        ids = ids[:-1]
    alone: list[Array] = []
    error = _Error()
    _run(model, [ids], ["resid"], lambda _, __, value: alone.append(value))
    _run(
        model,
        [ids, [*ids, ids[-1]]],
        ["resid"],
        lambda _, layer, value: error.compare(alone[layer], value[: len(ids)]),
    )
    return error.relative


def _row_sum_error(packed: Array, lengths: Sequence[int]) -> float:
    """Return the largest |Σ_k A[q, k] − 1| over all layers, heads and queries."""
    worst, start = 0.0, 0
    for n in lengths:
        starts = start + np.arange(n) * np.arange(1, n + 1) // 2
        sums = np.add.reduceat(packed, starts, axis=-1)[..., :n] if n else packed[..., :0]
        # reduceat lets the last row of a document run on into the next one: sum that one by itself
        sums[..., -1] = packed[..., starts[-1] : start + n * (n + 1) // 2].sum(axis=-1)
        worst = max(worst, float(np.abs(sums - 1).max()))
        start += n * (n + 1) // 2
    return worst
