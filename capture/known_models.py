"""The shapes of the sixteen models of arXiv 2406.19384, so that what they cost can be planned offline."""

from __future__ import annotations

from ..catalog.shapes import ModelShape

__all__ = ["KNOWN_MODELS"]

# hub id: layers, d_model, heads, key-value heads, d_head, d_mlp, vocabulary (rows of the unembedding), context
_SIZES = {
    "EleutherAI/pythia-410m-deduped": (24, 1024, 16, 16, 64, 4096, 50304, 2048),
    "EleutherAI/pythia-1.4b-deduped": (24, 2048, 16, 16, 128, 8192, 50304, 2048),
    "EleutherAI/pythia-2.8b-deduped": (32, 2560, 32, 32, 80, 10240, 50304, 2048),
    "EleutherAI/pythia-6.9b-deduped": (32, 4096, 32, 32, 128, 16384, 50432, 2048),
    "openai-community/gpt2": (12, 768, 12, 12, 64, 3072, 50257, 1024),
    "openai-community/gpt2-medium": (24, 1024, 16, 16, 64, 4096, 50257, 1024),
    "openai-community/gpt2-large": (36, 1280, 20, 20, 64, 5120, 50257, 1024),
    "openai-community/gpt2-xl": (48, 1600, 25, 25, 64, 6400, 50257, 1024),
    "microsoft/phi-1": (24, 2048, 32, 32, 64, 8192, 51200, 2048),
    "microsoft/phi-1_5": (24, 2048, 32, 32, 64, 8192, 51200, 2048),
    "microsoft/phi-2": (32, 2560, 32, 32, 80, 10240, 51200, 2048),
    "Qwen/Qwen2.5-0.5B": (24, 896, 14, 2, 64, 4864, 151936, 32768),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 12, 2, 128, 8960, 151936, 131072),
    "Qwen/Qwen2.5-3B": (36, 2048, 16, 2, 128, 11008, 151936, 32768),
    "meta-llama/Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128256, 131072),
    "meta-llama/Llama-3.2-3B": (28, 3072, 24, 8, 128, 8192, 128256, 131072),
}
# organisation: family, block, norm, epsilon, activation, gated MLP, tied unembedding
_KINDS = {
    "EleutherAI": ("gpt_neox", "parallel", "layernorm", 1e-5, "gelu", False, False),
    "openai-community": ("gpt2", "sequential", "layernorm", 1e-5, "gelu_new", False, True),
    "microsoft": ("phi", "parallel", "layernorm", 1e-5, "gelu_new", False, False),
    "Qwen": ("qwen2", "sequential", "rmsnorm", 1e-6, "silu", True, True),
    "meta-llama": ("llama", "sequential", "rmsnorm", 1e-5, "silu", True, True),
}


def _shape(hub_id: str) -> ModelShape:
    family, block, norm, eps, act_fn, gated, tied = _KINDS[hub_id.partition("/")[0]]
    n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp, n_vocab, n_ctx = _SIZES[hub_id]
    return ModelShape(
        family=family, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=d_head,
        d_mlp=d_mlp, n_vocab=n_vocab, n_ctx=n_ctx, block=block, norm=norm, norm_eps=eps, act_fn=act_fn,  # type: ignore[arg-type]
        gated_mlp=gated, tied_unembed=tied,
    )  # fmt: skip


KNOWN_MODELS: dict[str, ModelShape] = {hub_id: _shape(hub_id) for hub_id in _SIZES}
"""Hub id → shape; GPT-2 also under its old short ids (``gpt2``, ``gpt2-xl``)."""

KNOWN_MODELS |= {
    hub_id.partition("/")[2]: shape
    for hub_id, shape in KNOWN_MODELS.items()
    if hub_id.startswith("openai-community/")
}
