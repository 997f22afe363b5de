"""A model's shape, read from its config."""

from __future__ import annotations

from typing import Any

from ..catalog.errors import ModelError
from ..catalog.shapes import ModelShape

__all__ = ["shape_of"]

_PARALLEL_FAMILIES = {"phi", "gptj", "codegen", "cohere", "cohere2"}


def shape_of(config: Any) -> ModelShape:
    """Read the shape from a config; transformers' attribute maps give most families the same names."""
    text = config.get_text_config()

    def first(*names: str, default: Any = None) -> Any:
        return next((v for n in names if (v := getattr(text, n, None)) is not None), default)

    def required(*names: str) -> Any:
        found = first(*names)
        if found is None:
            raise ModelError(
                f"The config of this {text.model_type} model does not say its {names[0]}, which layerlake needs."
            )
        return found

    d_model, n_heads = required("hidden_size"), required("num_attention_heads")
    rms_eps = first("rms_norm_eps")
    parallel = text.model_type in _PARALLEL_FAMILIES or bool(
        first("use_parallel_residual", "parallel_attn", default=False)
    )
    return ModelShape(
        family=text.model_type,
        n_layers=required("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=first("num_key_value_heads", default=n_heads),
        d_head=first("head_dim", default=d_model // n_heads),
        d_mlp=first("intermediate_size", "n_inner", "ffn_dim", default=4 * d_model),
        n_vocab=text.vocab_size,
        n_ctx=required("max_position_embeddings", "max_seq_len", "seq_length"),
        block="parallel" if parallel else "sequential",
        norm="rmsnorm" if rms_eps is not None else "layernorm",
        norm_eps=first("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", default=1e-5),
        act_fn=str(first("hidden_act", "activation_function", "hidden_activation", default="")),
        gated_mlp=rms_eps is not None,
        tied_unembed=bool(config.tie_word_embeddings),
    )
