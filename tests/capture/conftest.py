"""Tiny seeded models of six families, a tokenizer trained on the spot, and plain Hugging Face as the oracle."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from layerlake.capture.execute import capture_run
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.run import Run

Array = np.ndarray[Any, np.dtype[Any]]

CONTEXT = 48
"""What the models can take; the longest paragraph of the text is longer."""

_SENTENCE = "the quick fox number {} sees the lazy dog {}. "
_LENGTHS = (1, 3, 0, 2, 1, 9, 2, 1, 4, 2, 1, 3)
"""Sentences of each paragraph; 0 stands for one that is too short to be stored."""

PARAGRAPHS = [
    "".join(_SENTENCE.format(i, 7 * i + j) for j in range(n)).strip() or "a" for i, n in enumerate(_LENGTHS)
]


@dataclass(frozen=True)
class Family:
    """How a family is built, and where Hugging Face keeps the parts that an oracle needs."""

    config: Callable[[int], transformers.PretrainedConfig]
    blocks: str
    attention: str
    projection: str
    """The output projection of a block's MLP: what it is given are the neurons."""
    final_norm: str


_SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAMILIES = {
    "gpt2": Family(
        lambda n_vocab: transformers.GPT2Config(
            vocab_size=n_vocab, n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=0,
            eos_token_id=0, tie_word_embeddings=True,
        ),
        "transformer.h", "attn", "mlp.c_proj", "transformer.ln_f",
    ),
    "gpt_neox": Family(  # parallel; the unembedding has more rows than the tokenizer has tokens
        lambda n_vocab: transformers.GPTNeoXConfig(
            vocab_size=n_vocab + 8, hidden_size=32, num_hidden_layers=3, intermediate_size=80, **_SIZES
        ),
        "gpt_neox.layers", "attention", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm",
    ),
    "phi": Family(  # parallel with one norm; the unembedding has a bias
        lambda n_vocab: transformers.PhiConfig(
            vocab_size=n_vocab, hidden_size=32, num_hidden_layers=2, intermediate_size=72, **_SIZES
        ),
        "model.layers", "self_attn", "mlp.fc2", "model.final_layernorm",
    ),
    "llama": Family(
        lambda n_vocab: transformers.LlamaConfig(
            vocab_size=n_vocab, hidden_size=32, num_hidden_layers=3, intermediate_size=56,
            num_key_value_heads=2, rms_norm_eps=1e-3, **_SIZES,
        ),
        "model.layers", "self_attn", "mlp.down_proj", "model.norm",
    ),
    "qwen2": Family(  # d_mlp = d_model: no shape tells a weight from its transpose
        lambda n_vocab: transformers.Qwen2Config(
            vocab_size=n_vocab, hidden_size=32, num_hidden_layers=2, intermediate_size=32,
            num_key_value_heads=1, tie_word_embeddings=True, **_SIZES,
        ),
        "model.layers", "self_attn", "mlp.down_proj", "model.norm",
    ),
    "gpt_neo": Family(  # every second layer looks back over four tokens only
        lambda n_vocab: transformers.GPTNeoConfig(
            vocab_size=n_vocab, hidden_size=32, num_layers=4, num_heads=4, window_size=4,
            attention_types=[[["global", "local"], 2]], max_position_embeddings=CONTEXT,
            bos_token_id=0, eos_token_id=0,
        ),
        "transformer.h", "attn", "mlp.c_proj", "transformer.ln_f",
    ),
}  # fmt: skip


def build_tokenizer(**special: str | None) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE on the text; token 0 is ``<|end|>``."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PARAGRAPHS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other longer than these models compute, where other processes take the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a BOS token, made in Python: it has no name that it could be loaded by."""
    return build_tokenizer(bos_token="<|end|>", eos_token="<|end|>")  # noqa: S106  # no password


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., transformers.PreTrainedTokenizerFast]:
    """Train the tokenizer with other special tokens: ``make_tokenizer(eos_token="<|end|>")``."""
    return build_tokenizer


@pytest.fixture(scope="session")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve paragraphs: one too short to be stored, one longer than the context."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


def build_model(name: str, n_vocab: int, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """Build a model of a family with random weights, norms and biases included: 1 and 0 would hide mistakes."""
    torch.manual_seed(seed)
    config = FAMILIES[name].config(n_vocab)
    for option, value in overrides.items():
        setattr(config, option, value)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    model.eval()
    return model


@pytest.fixture(scope="session")
def make_model(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> Callable[..., transformers.PreTrainedModel]:
    """Build a model in memory: ``make_model("gpt2", n_inner=32)``."""

    def make(name: str, **overrides: Any) -> transformers.PreTrainedModel:
        return build_model(name, len(tokenizer), **overrides)

    return make


@pytest.fixture(scope="session")
def model_path(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., transformers.PreTrainedModel],
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> Callable[[str], Path]:
    """The directory of a family's model: ``model_path("llama")``."""

    @cache
    def save(name: str) -> Path:
        path = tmp_path_factory.mktemp("models") / f"tiny-{name}"
        transformers.utils.logging.disable_progress_bar()
        make_model(name).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def make_spec(model_path: Callable[[str], Path], text_path: Path) -> Callable[..., CaptureSpec]:
    """Ask for a capture of a family's model over the text, float32, in partitions of 96 tokens."""

    def make(family: str = "gpt2", **options: Any) -> CaptureSpec:
        given: dict[str, Any] = {"dataset": text_path, "dtype": "float32", "partition_tokens": 96}
        if "model" not in options:
            given["model"] = model_path(family)
        return CaptureSpec(**given | {"batch_tokens": 128} | options)

    return make


@pytest.fixture(scope="session")
def slowed() -> ModuleType:
    """The script beside this file that captures in processes of their own: tests are no package."""
    spec = importlib.util.spec_from_file_location("slowed", Path(__file__).with_name("slowed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["slowed"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Captured:
    """A run of everything at float32, and the same values from Hugging Face alone."""

    family: str
    run: Run
    model: transformers.PreTrainedModel
    expected: dict[str, Array]
    """site → ``[layer, token, width]``, ``[layer, head, pair]``; ``logits`` and ``last_hidden_state`` too."""


@pytest.fixture(scope="session", params=list(FAMILIES))
def captured(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_spec: Callable[..., CaptureSpec],
    model_path: Callable[[str], Path],
) -> Captured:
    """One family's run and its oracle."""
    name: str = request.param
    lake = tmp_path_factory.mktemp("lakes") / name
    run = capture_run(lake, make_spec(name))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(name), attn_implementation="eager")
    return Captured(name, run, model.eval(), run_plainly(FAMILIES[name], model, run))


def run_plainly(family: Family, model: transformers.PreTrainedModel, run: Run) -> dict[str, Array]:
    """Run each stored document alone and unpadded through Hugging Face, with PyTorch's own hooks."""
    blocks = model.get_submodule(family.blocks)
    seen: dict[str, list[torch.Tensor]] = {}
    taps = [
        model.get_submodule(family.final_norm).register_forward_pre_hook(
            lambda _module, given: seen.setdefault("last", []).append(given[0])
        )
    ]
    for block in blocks.children():
        taps += [
            block.get_submodule(family.attention).register_forward_hook(
                lambda _module, _given, out: seen.setdefault("attn_out", []).append(out[0])
            ),
            block.get_submodule("mlp").register_forward_hook(
                lambda _module, _given, out: seen.setdefault("mlp_out", []).append(out)
            ),
            block.get_submodule(family.projection).register_forward_pre_hook(
                lambda _module, given: seen.setdefault("mlp_post", []).append(given[0])
            ),
        ]
    pieces: dict[str, list[torch.Tensor]] = {}
    tokens = run.tokens
    for document in run.stored_documents["document"].to_pylist():
        ids = tokens["token_id"].to_numpy()[tokens["document"].to_numpy() == document]
        seen.clear()
        with torch.inference_mode():
            out = model(
                torch.as_tensor(ids[None], dtype=torch.int64),
                output_hidden_states=True,
                output_attentions=True,
                use_cache=False,
            )
        rows, columns = torch.tril_indices(len(ids), len(ids))
        found = {
            "resid": torch.cat([*out.hidden_states[:-1], *seen["last"]]),
            "last_hidden_state": out.hidden_states[-1],
            "logits": out.logits,
            "pattern": torch.cat(out.attentions)[:, :, rows, columns],
            **{site: torch.cat(seen[site]) for site in ("attn_out", "mlp_out", "mlp_post")},
        }
        for site, value in found.items():
            pieces.setdefault(site, []).append(value)
    for tap in taps:
        tap.remove()
    return {
        site: torch.cat(parts, dim=2 if site == "pattern" else 1).numpy() for site, parts in pieces.items()
    }
