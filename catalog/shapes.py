"""The shape of a model: every number that decides what a capture stores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

__all__ = ["ModelShape"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes and the block structure of a causal language model."""

    family: str
    """The Hugging Face ``model_type``: gpt2, gpt_neox, llama, …"""
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    """Key-value heads; equal to ``n_heads`` without grouped-query attention."""
    d_head: int
    d_mlp: int
    n_vocab: int
    """Rows of the unembedding, padding included."""
    n_ctx: int
    """The longest context, in tokens."""
    block: Literal["sequential", "parallel"]
    """Parallel: attention and MLP read the same residual, so there is no ``resid_mid``."""
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    act_fn: str
    gated_mlp: bool
    """SwiGLU and its kin: ``mlp_post`` is act(gate)·up."""
    tied_unembed: bool
    """Whether the unembedding is the transposed embedding."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Rebuild a shape from :meth:`to_json`; fields added by later versions are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: item for name, item in value.items() if name in known})
