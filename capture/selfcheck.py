"""Identities that the captured values must satisfy, checked on the first batch before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..catalog.errors import AdapterMismatch, SelfCheckFailed
from ..catalog.layout import n_pairs
from ..catalog.shapes import ModelShape
from ..catalog.sites import SITES
from .hooks import hook_name, listen, pad, unpad

if TYPE_CHECKING:
    import torch

    from .model import OpenModel

__all__ = ["check_model"]

Values = dict[str, npt.NDArray[np.float32]]

_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Allowed error relative to the largest value compared, by compute dtype."""

_MAX_DOCUMENTS = 2


def check_model(
    model: OpenModel, batch: Sequence[Sequence[int]], sites: Sequence[str], *, compute_dtype: str
) -> dict[str, float]:
    """Check the identities on the first documents of a batch and return each one's relative error.

    Parameters
    ----------
    model : OpenModel
        The model as it will run.
    batch : sequence of sequence of int
        Token ids of some documents; the first two are used.
    sites : sequence of str
        The sites to be captured; identities that need others of the residual's parts are checked anyway.
    compute_dtype : str
        Decides the tolerance.

    Raises
    ------
    SelfCheckFailed
        An identity does not hold; the message names it with its error and its tolerance.
    """
    ids = [list(document) for document in batch[:_MAX_DOCUMENTS]]
    names = [site for site in ("resid", "attn_out", "mlp_out", "mlp_post", "pattern") if _wanted(site, sites)]
    values, logits = _run(model, ids, names, with_logits=True)
    weights = dict(model.weights())
    resid = values["resid"]
    errors = {
        "resid_post = resid_pre + attn_out + mlp_out": _error(
            resid[1:], resid[:-1] + values["attn_out"] + values["mlp_out"]
        ),
        "unembed(norm(resid[L])) = logits": _error(_unembed(resid[-1], weights, model), logits),
        "padded = unpadded": _padding_error(model, ids[0], resid[:, : len(ids[0])]),
    }
    if "mlp_post" in values:
        rebuilt = np.einsum("ltf,lfd->ltd", values["mlp_post"], weights["W_out"]) + weights["b_out"][:, None]
        errors["mlp_post · W_out + b_out = mlp_out"] = _error(values["mlp_out"], rebuilt)
    if "pattern" in values:
        errors["pattern rows sum to 1"] = _row_sum_error(
            values["pattern"], [len(document) for document in ids]
        )
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
    return site in sites or site not in ("mlp_post", "pattern")


def _run(
    model: OpenModel, ids: Sequence[Sequence[int]], sites: Sequence[str], *, with_logits: bool = False
) -> tuple[Values, npt.NDArray[np.float32]]:
    """Run documents and return each site as ``[layer, token, width]`` (``[layer, head, pair]``), and the logits."""
    import torch

    lengths = [len(document) for document in ids]
    kept: dict[str, torch.Tensor] = {}
    wanted = {
        site: [
            hook_name(site, layer, model.shape) for layer in range(model.shape.n_layers + (site == "resid"))
        ]
        for site in sites
    }
    observers = {
        name: (lambda value, name=name: kept.__setitem__(name, unpad(value, lengths)))
        for names in wanted.values()
        for name in names
    }
    padded = pad(ids, device=model.device)
    with torch.inference_mode(), listen(model, observers):
        if with_logits:
            logits = unpad(model.bridge.original_model(padded, use_cache=False).logits, lengths)
        else:
            model.body(padded, use_cache=False)
            logits = torch.zeros(0)
    _require_shapes(kept, wanted, model.shape, lengths)
    values = {site: np.stack([_numpy(kept[name]) for name in names]) for site, names in wanted.items()}
    return values, _numpy(logits)


def _require_shapes(
    kept: dict[str, torch.Tensor],
    wanted: dict[str, list[str]],
    shape: ModelShape,
    lengths: Sequence[int],
) -> None:
    """Raise AdapterMismatch unless every hook was called with a value of its site's shape."""
    for site, names in wanted.items():
        width, is_pair = SITES[site].width(shape), SITES[site].rows == "pair"
        expected = (width, sum(map(n_pairs, lengths))) if is_pair else (sum(lengths), width)
        for name in names:
            found = tuple(kept[name].shape) if name in kept else None
            if found != expected:
                what = f"gives values of shape {found}, not {expected}" if found else "is never called"
                raise AdapterMismatch(
                    f"TransformerLens's hook '{name}' {what} in this {shape.family} model.",
                    hint=f"Leave {site} out with --sites.",
                )


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = tensor.float().cpu().numpy()
    return values


def _error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / max(1e-30, float(np.abs(found).max())))


def _unembed(x: npt.NDArray[np.float32], weights: Values, model: OpenModel) -> npt.NDArray[np.float32]:
    """Apply the stored final norm and unembedding, as the analyses will: ``[token, vocab]``."""
    if model.shape.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.shape.norm_eps)
    normed = x / scale * weights["ln_final.w"] + weights["ln_final.b"]
    logits: npt.NDArray[np.float32] = normed @ weights["W_U"] + weights["b_U"]
    return logits


def _padding_error(model: OpenModel, ids: Sequence[int], padded: npt.NDArray[np.float32]) -> float:
    """Compare a document run alone with the same document among padding (made longer where nothing pads it)."""
    room = model.shape.n_ctx - len(ids)
    if room == 0:
        ids, padded = ids[:-1], padded[:, : len(ids) - 1]
    alone, _ = _run(model, [ids], ["resid"])
    beside, _ = _run(model, [ids, [*ids, ids[-1]]], ["resid"])
    return max(_error(alone["resid"], padded), _error(alone["resid"], beside["resid"][:, : len(ids)]))


def _row_sum_error(packed: npt.NDArray[np.float32], lengths: Sequence[int]) -> float:
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
