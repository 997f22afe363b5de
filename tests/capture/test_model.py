"""Models are described from their config, refused in words, and opened without touching what is the user's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from layerlake.capture.description import describe_model, slug
from layerlake.capture.digests import digest_files
from layerlake.capture.execute import capture_run
from layerlake.capture.model import open_model
from layerlake.capture.plan import plan_capture
from layerlake.capture.spec import CaptureSpec
from layerlake.capture.vocabulary import vocab_table
from layerlake.catalog.errors import AdapterMismatch, ModelError, SelfCheckFailed
from layerlake.catalog.stores import Store

MakeModel = Callable[..., Any]
Tokenizer = transformers.PreTrainedTokenizerFast


@pytest.fixture
def folder(model_path: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the GPT-2 model's directory, to be damaged."""
    return Path(shutil.copytree(model_path("gpt2"), tmp_path / "model"))


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "./none", "~/none-of-this", tmp_path / "none", "a/b/c"):
        with pytest.raises(ModelError, match="does not exist") as caught:
            describe_model(path)
        assert "hub id" in caught.value.hint


def test_a_file_is_no_model_directory(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        describe_model(folder / "config.json")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"has no \*.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_what_a_directory_lacks_is_said(folder: Path, remove: str, message: str) -> None:
    (folder / remove).unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=message):
        describe_model(folder)


def test_pickles_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as caught:
        describe_model(folder)
    assert "no pickles" in caught.value.hint


def test_another_tokenizer_may_be_named(folder: Path, model_path: Callable[[str], Path]) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    described = describe_model(folder, tokenizer=str(model_path("gpt2")))
    assert described.digests == describe_model(model_path("gpt2")).digests


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "vit"},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_what_is_no_causal_model_is_refused(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is not a causal language model") as caught:
        describe_model(folder)
    assert config.get("architectures", [config["model_type"]])[0] in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json' is not JSON"),
        ("{}", "no config that transformers reads"),
        ('{"model_type": "never-heard-of"}', "no config that transformers reads"),
    ],
)
def test_a_config_that_cannot_be_read(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        describe_model(folder)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2),
    ],
    ids=["bloom", "mamba"],
)
def test_a_config_without_the_sizes_of_a_shape(folder: Path, config: transformers.PretrainedConfig) -> None:
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=f"{config.model_type} model does not say its"):
        describe_model(folder)


def test_a_loaded_model_needs_a_tokenizer_and_an_lm_head(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="needs its tokenizer"):
        describe_model(make_model("gpt2"))
    bare = transformers.GPT2Model(make_model("gpt2").config)
    with pytest.raises(ModelError, match="GPT2Model is not a causal language model"):
        describe_model(bare, tokenizer=tokenizer)


def test_identity_follows_weights_config_and_tokenizer(
    folder: Path, model_path: Callable[[str], Path]
) -> None:
    original = describe_model(model_path("gpt2"))
    elsewhere = describe_model(folder)
    assert elsewhere.digests == original.digests
    config = json.loads((folder / "config.json").read_text())

    def changed(**values: Any) -> dict[str, str]:
        (folder / "config.json").write_text(json.dumps(config | values))
        return describe_model(folder).digests

    assert changed(dtype="bfloat16", transformers_version="0") == original.digests
    assert changed(layer_norm_epsilon=1e-3)["config"] != original.digests["config"]
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert changed()["weights"] != original.digests["weights"]


def test_a_loaded_model_s_digest_follows_its_numbers(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model("llama")
    before = describe_model(model, tokenizer=tokenizer)
    assert describe_model(make_model("llama"), tokenizer=tokenizer).digests == before.digests
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert describe_model(model, tokenizer=tokenizer).digests["weights"] != before.digests["weights"]


def test_the_tokenizer_stays_as_it_was_when_the_model_is_opened(
    make_model: MakeModel, make_tokenizer: Callable[..., Tokenizer]
) -> None:
    """TransformerLens adds an end-of-text token to a tokenizer that has none: it would become ours."""
    tokenizer = make_tokenizer()
    described = describe_model(make_model("gpt_neox"), tokenizer=tokenizer)  # rows to spare for a new token
    before = vocab_table(described)
    open_model(described, device="cpu")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, None, None)
    assert vocab_table(described) == before
    assert describe_model(make_model("gpt_neox"), tokenizer=tokenizer).digests == described.digests


def test_padded_rows_of_the_unembedding_have_no_text(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    described = describe_model(make_model("gpt_neox"), tokenizer=tokenizer)
    assert described.shape.n_vocab == len(tokenizer) + 8
    assert vocab_table(described)["token_id"].to_pylist() == list(range(len(tokenizer)))


def test_sentencepiece_keeps_its_leading_blank(make_model: MakeModel) -> None:
    import tokenizers
    from tokenizers import decoders, models

    backend = tokenizers.Tokenizer(models.BPE(vocab={"<unk>": 0, "▁fox": 1, "dog": 2}, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(tokenizer_object=backend, unk_token="<unk>")  # noqa: S106  # no password
    described = describe_model(make_model("gpt2"), tokenizer=tokenizer)
    rows = vocab_table(described).to_pylist()
    assert [row["text"] for row in rows] == ["<unk>", " fox", "dog"]
    assert [row["is_special"] for row in rows] == [True, False, False]


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(make_model: MakeModel, tokenizer: Tokenizer, device: str) -> None:
    described = describe_model(make_model("gpt2"), tokenizer=tokenizer)
    with pytest.raises(ModelError, match=f"There is no device '{device}'") as caught:
        open_model(described, device=device)
    assert "auto" in caught.value.hint


def test_a_loaded_model_runs_in_the_dtype_asked_for_and_keeps_its_own(
    make_model: MakeModel, tokenizer: Tokenizer, model_path: Callable[[str], Path]
) -> None:
    """Parameters are cast; buffers, such as rotary frequencies, are not, as when it is opened by its path."""
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = open_model(describe_model(model, tokenizer=tokenizer), device="cpu", compute_dtype="bfloat16")
    opened = open_model(describe_model(model_path("llama")), device="cpu", compute_dtype="bfloat16")
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        one, two = (m.body(ids, use_cache=False).last_hidden_state for m in (loaded, opened))
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, two)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_a_copy_shares_the_weights(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    """Or a model that fills the machine could not be captured."""
    model = make_model("llama")
    opened = open_model(describe_model(model, tokenizer=tokenizer), device="cpu")
    own = {parameter.data_ptr() for parameter in opened.bridge.original_model.parameters()}
    assert own == {parameter.data_ptr() for parameter in model.parameters()}


def test_experts_are_refused_by_name(tokenizer: Tokenizer, text_path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=48, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(AdapterMismatch, match="mixtral"):
        capture_run(tmp_path / "lake", CaptureSpec(model=model, tokenizer=tokenizer, dataset=text_path))
    assert not (tmp_path / "lake").exists()


_OTHERS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "mistral": transformers.MistralConfig,
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
    "opt": transformers.OPTConfig,
    "gptj": transformers.GPTJConfig,
    "falcon": transformers.FalconConfig,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", _OTHERS)
def test_other_families_are_captured_right_or_refused_in_words(
    family: str, tokenizer: Tokenizer, text_path: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = _OTHERS[family](vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0)
    sizes = {
        "hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "n_layer": 2,
        "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "num_kv_heads": 4, "head_dim": 8,
        "intermediate_size": 48, "ffn_dim": 48, "max_position_embeddings": 48, "n_positions": 48,
        "rotary_dim": 4,
    }  # fmt: skip
    own = config.to_dict()
    given = {name: value for name, value in sizes.items() if name in own}
    if family in {"phi3", "opt"}:
        given |= {"num_key_value_heads": 4}
    config = _OTHERS[family](
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0, **given
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    spec = CaptureSpec(model=model, tokenizer=tokenizer, dataset=text_path, dtype="float32")
    if family.startswith("gemma"):
        with pytest.raises(SelfCheckFailed, match=f"for this {family} model"):
            capture_run(tmp_path / "lake", spec)
        assert not (tmp_path / "lake").exists()
        return
    run = capture_run(tmp_path / "lake", spec)
    ids = torch.from_numpy(run.tokens["token_id"].to_numpy()[run.tokens["document"].to_numpy() == 0].copy())
    with torch.inference_mode():
        states = model(ids[None].long(), output_hidden_states=True).hidden_states
    stored = run.resid.to_numpy()[:, : len(ids)]
    for boundary in range(run.shape.n_layers):
        np.testing.assert_allclose(stored[boundary], states[boundary][0].numpy(), atol=1e-5)


def test_plan_checks_what_it_can_before_weights_are_read(make_spec: Callable[..., CaptureSpec]) -> None:
    with pytest.raises(ModelError, match="cannot run in 'float64'") as caught:
        plan_capture(make_spec(compute_dtype="float64"))
    assert "--compute-dtype" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EleutherAI/pythia-410m", "pythia-410m"),
        ("My Model (v2)", "my-model-v2"),
        ("a/b/", "b"),
        ("ß", "model"),
    ],
)
def test_slugs(name: str, expected: str) -> None:
    assert slug(name) == expected


def _hub(**files: str | None) -> Callable[..., Any]:
    """The hub's answer about a model: its files, each with the SHA-256 that large ones have."""

    def model_info(*_: Any, **__: Any) -> Any:
        siblings = [
            SimpleNamespace(rfilename=name, lfs=sha and SimpleNamespace(sha256=sha))
            for name, sha in files.items()
        ]
        return SimpleNamespace(sha="0123abcd", siblings=siblings)

    return model_info


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(
        ModelError, match=r"neither a local directory nor on the hub: no route to host$"
    ) as caught:
        describe_model("openai-community/gpt2")
    assert "HF_TOKEN" in caught.value.hint


def test_a_hub_model_s_digest_is_of_its_weights_alone(
    monkeypatch: pytest.MonkeyPatch, model_path: Callable[[str], Path]
) -> None:
    """And nothing but the config is fetched for it."""

    def digest(**files: str | None) -> str:
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", _hub(**files))
        config = transformers.AutoConfig.from_pretrained(model_path("gpt2"))
        with monkeypatch.context() as patch:
            patch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
            patch.setattr(
                "huggingface_hub.hf_hub_download", lambda *_, **__: model_path("gpt2") / "config.json"
            )
            described = describe_model("somebody/gpt2", tokenizer=str(model_path("gpt2")))
        assert (described.name, described.revision) == ("somebody/gpt2", "0123abcd")
        assert described.model_id.startswith("gpt2-")
        return described.digests["weights"]

    plain = digest(**{"model.safetensors": "aa"})
    assert digest(**{"model.safetensors": "aa", "README.md": None, "onnx/model.safetensors": "ff"}) == plain
    assert digest(**{"model.safetensors": "bb"}) != plain
    with pytest.raises(ModelError, match=r"no \*\.safetensors on the hub"):
        digest(**{"pytorch_model.bin": "aa"})


def test_code_that_may_run_is_part_of_a_model_s_identity(
    tmp_path: Path, model_path: Callable[[str], Path]
) -> None:
    ids = []
    for code in ("x = 1", "x = 2"):
        folder = tmp_path / "model"
        shutil.copytree(model_path("gpt2"), folder, dirs_exist_ok=True)
        (folder / "modeling_x.py").write_text(code)
        ids.append([describe_model(folder, trust_remote_code=trusted).model_id for trusted in (False, True)])
    assert ids[0][0] == ids[1][0]
    assert ids[0][1] != ids[1][1]


def test_a_tokenizer_without_files_is_no_tokenizer(tmp_path: Path, model_path: Callable[[str], Path]) -> None:
    """Or all such tokenizers would be one."""
    for path in model_path("gpt2").iterdir():
        if path.name in {"config.json", "model.safetensors"}:
            shutil.copy(path, tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        describe_model(tmp_path)
    with pytest.raises(ValueError, match="no files to digest"):
        digest_files([])


def test_two_models_of_one_id_are_told_apart(tmp_path: Path, model_path: Callable[[str], Path]) -> None:
    store = Store(tmp_path)
    described = describe_model(model_path("gpt2"), store=store)
    card = described.card()
    store.write_json(f"models/{described.model_id}/model.json", card)
    assert describe_model(model_path("gpt2"), store=store).known == card
    store.write_json(f"models/{described.model_id}/model.json", card | {"digests": {"weights": "another"}})
    with pytest.raises(ModelError, match="Two models have the id"):
        describe_model(model_path("gpt2"), store=store)
