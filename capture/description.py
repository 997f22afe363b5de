"""A model, described from its config and digests without loading weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalog.errors import ModelError
from ..catalog.layout import model_path
from ..catalog.shapes import ModelShape
from ..catalog.stores import Store
from .digests import digest_files, digest_tensors
from .extra import import_extra
from .frozen import digest_json
from .model_shape import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelDescription",
    "describe_model",
    "describe_shape",
    "first_line",
    "slug",
]

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
}  # fmt: skip
_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """What can be known of a model before its weights are loaded.

    Shape and special tokens come from the lake where it holds the model already, so that finding out that there
    is nothing to do imports neither transformers nor torch.
    """

    name: str
    """The hub id, or the folder's name."""
    location: str
    """What to open it by: the hub id or the local path; empty for a loaded model."""
    revision: str | None
    """The resolved hub revision."""
    digests: dict[str, str]
    """SHA-256 of weights, config and tokenizer."""
    tokenizer_source: str | PreTrainedTokenizerBase = field(repr=False)
    """The tokenizer, or what to open it by."""
    trust_remote_code: bool = False
    loaded: PreTrainedModel | None = field(default=None, repr=False)
    known: Mapping[str, Any] | None = field(default=None, repr=False)
    """``model.json`` of the lake, if it has one of these digests."""

    @property
    def model_id(self) -> str:
        """Slug of the name, and eight digits of the digest of weights, config and tokenizer."""
        return _model_id(self.name, self.digests)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape, from its config; what only the opened model tells is checked there.

        Raises
        ------
        ModelError
            transformers does not read the config, or it is not that of a causal language model.
        """
        if self.known is not None:
            return ModelShape.from_json(self.known["shape"])
        if self.loaded is not None:
            return shape_of(self.loaded.config)
        return shape_of(_open_config(self.location, self.revision, self.trust_remote_code))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises
        ------
        ModelError
            There is none.
        """
        revision = self.revision if self.tokenizer_source == self.location else None
        return _open_tokenizer(self.tokenizer_source, revision, self.trust_remote_code)

    @cached_property
    def special_ids(self) -> dict[str, int | None]:
        """The ids of the BOS and EOS tokens: ``bos``, ``eos``; ``start`` is BOS if a text is given one, else None."""
        if self.known is not None:
            return dict(self.known["special_ids"])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        named = {
            "bos": bos,
            "eos": eos,
            "start": bos if self.tokenizer("")["input_ids"][:1] == [bos] else None,
        }
        return {name: token if isinstance(token, int) else None for name, token in named.items()}

    def card(self) -> dict[str, Any]:
        """Return what ``model.json`` says."""
        return {
            "model_id": self.model_id,
            "model": self.name,
            "location": self.location,
            "revision": self.revision,
            "digests": self.digests,
            "special_ids": self.special_ids,
            "shape": self.shape.to_json(),
        }


def _model_id(name: str, digests: Mapping[str, str]) -> str:
    return f"{slug(name)}-{digest_json(dict(digests), 8)}"


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
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    store: Store | None = None,
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
    store : Store, optional
        A lake; if it holds this very model, nothing more is read.

    Raises
    ------
    ModelError
        The path does not exist; it is not a causal language model; it has no safetensors or no tokenizer.
    MissingExtra
        A package of the extra ``capture`` is not installed.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if isinstance(tokenizer, os.PathLike):
        tokenizer = os.fspath(tokenizer)
    if revision is not None and (not isinstance(model, str) or _is_folder(model)):
        raise ModelError(
            f"Only a model of the hub has a revision '{revision}'.", hint="Leave --revision out."
        )
    if not isinstance(model, str):
        if tokenizer is None:
            raise ModelError("A loaded model needs its tokenizer.", hint="Pass tokenizer=….")
        if not type(model).__name__.endswith(_CAUSAL):
            raise ModelError(f"{type(model).__name__} is not a causal language model.")
        name = model.config.name_or_path or type(model).__name__
        config = json.loads(model.config.to_json_string(use_diff=False))
        digests = {"weights": digest_tensors(model), "config": _config_digest(config)}
        description = ModelDescription(name, "", None, digests, tokenizer, trust_remote_code, loaded=model)
    elif _is_folder(model):
        path = Path(model).expanduser().resolve()
        digests = _folder_digests(path, trust_remote_code)
        description = ModelDescription(
            path.name, str(path), None, digests, tokenizer or str(path), trust_remote_code
        )
    else:
        digests, revision = _hub_digests(model, revision)
        if trust_remote_code:
            digests["code"] = revision  # whatever of it may run is that of this commit
        description = ModelDescription(model, model, revision, digests, tokenizer or model, trust_remote_code)
    digests["tokenizer"] = _tokenizer_digest(description)
    known_path = f"{model_path(description.model_id)}/model.json"
    if store is not None and store.exists(known_path):
        known = store.read_json(known_path)
        if known["digests"] != digests:
            raise ModelError(
                f"Two models have the id {description.model_id}: the one asked for and one in {store.url}."
            )
        return replace(description, known=known)
    # what is wrong with them is said before anything else is done
    _ = description.shape, description.tokenizer
    return description


def describe_shape(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of a local or hub model from its config alone.

    Raises
    ------
    ModelError
        There is no such model, or it is not a causal language model.
    """
    location = str(Path(model).expanduser()) if _is_folder(model) else model
    return shape_of(_open_config(location, revision, trust_remote_code))


def _is_folder(model: str) -> bool:
    """Tell a local directory from a hub id; raise ModelError for a path that is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return True
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(
            f"'{model}' is a file, not a model directory."
            if path.exists()
            else f"The model directory '{model}' does not exist.",
            hint="Give a directory with config.json and *.safetensors, or a hub id such as openai-community/gpt2.",
        )
    return False


def _open_config(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    transformers = import_extra("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"'{location}' has no config that transformers reads: {first_line(error)}"
        ) from error
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    # BERT and its kin could be opened as causal models: what the weights were saved from decides.
    saved_from = config.architectures or []
    if not known or (saved_from and not any(name.endswith(_CAUSAL) for name in saved_from)):
        what = ", ".join(saved_from) or config.model_type
        raise ModelError(f"'{location}' is not a causal language model (it is {what}).")
    return config


def first_line(error: Exception) -> str:
    """Return the first line of what an error of another package says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _folder_digests(path: Path, trust_remote_code: bool) -> dict[str, str]:
    """Digest the weights and the config of a local model, and its code if that may run."""
    files = list(path.glob("*.safetensors"))
    if not (path / "config.json").exists():
        raise ModelError(f"'{path}' is not a model directory: it has no config.json.")
    if not files:
        raise ModelError(
            f"'{path}' has no *.safetensors.",
            hint="layerlake loads no pickles; convert: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…).",
        )
    code = [*path.glob("*.py")] if trust_remote_code else []
    return {
        "weights": digest_files(files),
        "config": _config_file_digest(path / "config.json"),
        **({"code": digest_files(code)} if code else {}),
    }


def _hub_digests(model: str, revision: str | None) -> tuple[dict[str, str], str]:
    """Digest the weights of a hub model from the hub's metadata, which holds their SHA-256, without fetching them."""
    hub = import_extra("huggingface_hub")

    try:
        info = hub.HfApi().model_info(model, revision=revision, files_metadata=True)
    except Exception as error:
        raise ModelError(
            f"The model '{model}' is neither a local directory nor on the hub: {first_line(error)}",
            hint="Check the name, the network, and HF_TOKEN for gated models.",
        ) from error
    files = sorted(
        [file.rfilename, file.lfs.sha256 if file.lfs else file.blob_id]
        for file in info.siblings or ()
        if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
    )
    if not files or info.sha is None:
        raise ModelError(f"The model '{model}' has no *.safetensors on the hub; layerlake loads no pickles.")
    try:
        config = hub.hf_hub_download(model, "config.json", revision=info.sha)
    except Exception as error:
        raise ModelError(f"The config of '{model}' cannot be fetched: {first_line(error)}") from error
    return {"weights": digest_json(files, 64), "config": _config_file_digest(Path(config))}, info.sha


def _config_file_digest(path: Path) -> str:
    try:
        return _config_digest(json.loads(path.read_text()))
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON: {first_line(error)}") from error


def _config_digest(config: Mapping[str, Any]) -> str:
    """Digest what a config says, less what says nothing of the model; never what a library makes of it."""
    return digest_json({name: value for name, value in config.items() if name not in _VOLATILE_CONFIG}, 64)


def _open_tokenizer(
    source: str | PreTrainedTokenizerBase, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    if not isinstance(source, str):
        return source
    transformers = import_extra("transformers")
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


def _tokenizer_digest(description: ModelDescription) -> str:
    """Digest a tokenizer's files; of one that is open already, what it would save."""
    source = description.tokenizer_source
    if isinstance(source, str):
        folder = Path(source).expanduser()
        is_local = folder.is_dir()
        found = [*folder.iterdir()] if is_local else _fetch_tokenizer(source, description)
        files = [path for path in found if _is_tokenizer_file(path.name)]
        if not files:
            raise ModelError(f"'{source}' has no tokenizer.", hint="Name another: --tokenizer PATH_OR_ID.")
        return digest_files(files)
    backend = getattr(source, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(source.get_vocab().items()))
    return digest_json([content, [source.bos_token_id, source.eos_token_id]], 64)


def _is_tokenizer_file(name: str) -> bool:
    return (
        name in _TOKENIZER_FILES
        or fnmatch(name, "*.model")
        or fnmatch(name, "*.tiktoken")
        or fnmatch(name, "tokenization_*.py")
    )


def _fetch_tokenizer(source: str, description: ModelDescription) -> list[Path]:
    """Fetch a hub tokenizer's files, which are small; they are kept in the hub's own cache."""
    hub = import_extra("huggingface_hub")

    revision = description.revision if source == description.location else None
    try:
        info = hub.HfApi().model_info(source, revision=revision)
        names = [f.rfilename for f in info.siblings or () if _is_tokenizer_file(f.rfilename)]
        return [Path(hub.hf_hub_download(source, name, revision=info.sha)) for name in names]
    except Exception as error:
        raise ModelError(
            f"'{source}' has no tokenizer that can be fetched: {first_line(error)}",
            hint="Name another: --tokenizer PATH_OR_ID.",
        ) from error
