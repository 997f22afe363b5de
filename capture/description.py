"""A model, described from its config and digests without loading weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..catalog.errors import MissingExtra, ModelError
from ..catalog.shapes import ModelShape
from ..catalog.tables import VOCAB
from .corpus import file_digest
from .frozen import digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelDescription", "describe_model", "first_line", "slug", "vocab_table"]

_PARALLEL_FAMILIES = {"phi", "gptj", "codegen", "cohere", "cohere2"}
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What can be known of a model before its weights are loaded."""

    name: str
    """The hub id, or the folder's name."""
    location: str
    """What to open it by: the hub id or the local path; empty for a loaded model."""
    revision: str | None
    """The resolved hub revision."""
    shape: ModelShape
    digests: dict[str, str]
    """SHA-256 of weights, config and tokenizer."""
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool = False
    loaded: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def model_id(self) -> str:
        """Slug of the name, and eight digits of the digest of weights, config and tokenizer."""
        return f"{slug(self.name)}-{digest_json(self.digests, 8)}"

    def card(self) -> dict[str, Any]:
        """Return what ``model.json`` says."""
        return {
            "model_id": self.model_id,
            "model": self.name,
            "location": self.location,
            "revision": self.revision,
            "digests": self.digests,
            "shape": self.shape.to_json(),
        }


def slug(name: str) -> str:
    """Return the last part of a model's name in lower case, as it stands in ids.

    Examples
    --------
    >>> slug("EleutherAI/pythia-410m-deduped")
    'pythia-410m-deduped'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-.") or "model"


def describe_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    revision: str | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> ModelDescription:
    """Describe a causal language model: shape, digests, tokenizer. Loads no weights; hashes local ones.

    Parameters
    ----------
    model : str, path or PreTrainedModel
        A local directory, a hub id, or a model that is loaded already.
    revision : str, optional
        Branch, tag or commit of a hub id.
    tokenizer : str or PreTrainedTokenizerBase, optional
        A tokenizer other than the model's own; needed for a loaded model.
    trust_remote_code : bool
        Run code that comes with the model.

    Raises
    ------
    ModelError
        The path does not exist; it is not a causal language model; it has no safetensors or no tokenizer.
    MissingExtra
        transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "capture") from error

    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str):
        if tokenizer is None:
            raise ModelError("A loaded model needs its tokenizer.", hint="Pass tokenizer=….")
        location, name, config = "", model.config.name_or_path or type(model).__name__, model.config
        digests = {"weights": _tensor_digest(model)}
        loaded: PreTrainedModel | None = model
        if not type(model).__name__.endswith(_CAUSAL):
            raise ModelError(f"{type(model).__name__} is not a causal language model.")
    else:
        loaded, location = None, model
        path = Path(model).expanduser()
        is_local = path.is_dir()
        if not is_local and (path.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1):
            raise ModelError(
                f"The model directory '{model}' does not exist."
                if not path.exists()
                else f"'{model}' is a file, not a model directory.",
                hint="Give a directory with config.json and *.safetensors, or a hub id such as openai-community/gpt2.",
            )
        if is_local:
            location = str(path.resolve())
            name, digests = path.resolve().name, {"weights": _folder_digest(path)}
        else:
            name = model
            digests, revision = _hub_digest(model, revision)
        try:
            config = transformers.AutoConfig.from_pretrained(
                location, revision=revision, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise ModelError(
                f"'{model}' has no config that transformers reads: {first_line(error)}"
            ) from error
        known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
        # BERT and its kin could be opened as causal models: what the weights were saved from decides.
        saved_from = config.architectures or []
        if not known or (saved_from and not any(name.endswith(_CAUSAL) for name in saved_from)):
            what = ", ".join(saved_from) or config.model_type
            raise ModelError(f"'{model}' is not a causal language model (it is {what}).")
    opened = _open_tokenizer(tokenizer if tokenizer is not None else location, revision, trust_remote_code)
    digests["config"] = digest_json(
        {
            k: v
            for k, v in json.loads(config.to_json_string(use_diff=False)).items()
            if k not in _VOLATILE_CONFIG
        },
        64,
    )
    digests["tokenizer"] = _tokenizer_digest(opened)
    return ModelDescription(
        name, location, revision, _shape_of(config), digests, opened, trust_remote_code, loaded
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an error of another package says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _folder_digest(path: Path) -> str:
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").exists():
        raise ModelError(f"'{path}' is not a model directory: it has no config.json.")
    if not files:
        raise ModelError(
            f"'{path}' has no *.safetensors.",
            hint="layerlake loads no pickles; convert: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…).",
        )
    return digest_json([[file.name, file_digest(file)] for file in files], 64)


def _hub_digest(model: str, revision: str | None) -> tuple[dict[str, str], str]:
    """Digest the weight files from the hub's metadata, which holds their SHA-256, without fetching them."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except Exception as error:
        raise ModelError(
            f"The model '{model}' is neither a local directory nor on the hub: {first_line(error)}",
            hint="Check the name, the network, and HF_TOKEN for gated models.",
        ) from error
    files = sorted(
        (file.rfilename, file.lfs.sha256)
        for file in info.siblings or ()
        if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename and file.lfs
    )
    if not files or info.sha is None:
        raise ModelError(f"The model '{model}' has no *.safetensors on the hub; layerlake loads no pickles.")
    return {"weights": digest_json([list(file) for file in files], 64)}, info.sha


def _tensor_digest(model: PreTrainedModel) -> str:
    """Digest a loaded model's parameters and buffers by name, shape and bits."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _open_tokenizer(
    source: str | PreTrainedTokenizerBase, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    import transformers

    if not isinstance(source, str):
        return source
    try:
        opened: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"'{source}' has no tokenizer that transformers reads: {first_line(error)}",
            hint="Name another: --tokenizer PATH_OR_ID.",
        ) from error
    if set(opened.get_vocab().values()) <= set(opened.all_special_ids):
        # transformers makes an empty one of the model's family where there are no files.
        raise ModelError(f"'{source}' has no tokenizer.", hint="Name another: --tokenizer PATH_OR_ID.")
    return opened


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return digest_json([content, specials], 64)


def _shape_of(config: Any) -> ModelShape:
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


def vocab_table(description: ModelDescription) -> pa.Table:
    """Return the text of every token id that the tokenizer knows (``tables.VOCAB``).

    The text is that of the id decoded alone; a leading blank is kept, a part of a UTF-8 character shows as �.
    """
    tokenizer = description.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i < description.shape.n_vocab)
    texts = [_token_text(tokenizer, i) for i in ids]
    return pa.table([ids, texts, [i in special for i in ids]], schema=VOCAB)


def _token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Decode one id. SentencePiece drops a leading blank when it decodes alone, so its piece is read instead."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(piece, str) and piece.startswith("▁"):
        return piece.replace("▁", " ")
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
