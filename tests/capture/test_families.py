"""What is stored equals what plain Hugging Face computes, document by document and without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from layerlake.capture.execute import capture_run
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES

if TYPE_CHECKING:
    from .conftest import Captured

Array = np.ndarray[Any, np.dtype[Any]]

ARRAYS = [name for name, site in SITES.items() if site.is_array]
TOLERANCE = 5e-6
"""Relative to the largest value: Hugging Face in float32 is as far from Hugging Face in float64."""


def relative_error(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def stored(run: Run, site: str) -> Array:
    values: Array = getattr(run, site).to_numpy()
    return values


@pytest.mark.parametrize("site", ARRAYS)
def test_a_site_equals_what_hugging_face_computes(captured: Captured, site: str) -> None:
    values = stored(captured.run, site)
    for layer, expected in enumerate(captured.expected[site]):
        assert relative_error(values[layer], expected) < TOLERANCE, f"{site} {layer}"


def test_the_run_has_several_partitions_and_padded_batches(captured: Captured) -> None:
    """Otherwise the comparisons above would show less than they say."""
    manifest = captured.run.manifest
    assert len(manifest.partitions) >= 3
    assert (manifest.n_documents, manifest.n_refused) == (11, 1)
    assert manifest.n_cut >= 1
    assert len(set(captured.run.stored_documents["n_tokens"].to_pylist())) >= 4


def test_the_last_boundary_is_before_the_final_norm(captured: Captured) -> None:
    last = stored(captured.run, "resid")[-1]
    normed = captured.expected["last_hidden_state"][0]
    assert relative_error(last, normed) > 0.1
    norm = {
        "gpt2": "transformer.ln_f", "gpt_neo": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
        "phi": "model.final_layernorm", "llama": "model.norm", "qwen2": "model.norm",
    }[captured.family]  # fmt: skip
    with torch.inference_mode():
        found = captured.model.get_submodule(norm)(torch.from_numpy(last)).numpy()
    assert relative_error(found, normed) < TOLERANCE


def test_the_residual_stream_adds_up(captured: Captured) -> None:
    resid, attn, mlp = (stored(captured.run, site) for site in ("resid", "attn_out", "mlp_out"))
    assert relative_error(resid[:-1] + attn + mlp, resid[1:]) < TOLERANCE


def test_the_neurons_times_the_output_weight_are_the_mlp_s_output(captured: Captured) -> None:
    run = captured.run
    rebuilt = stored(run, "mlp_post") @ run.weight("W_out") + run.weight("b_out")[:, None]
    assert relative_error(rebuilt, stored(run, "mlp_out")) < TOLERANCE


def test_the_stored_weights_make_the_model_s_logits(captured: Captured) -> None:
    run, shape = captured.run, captured.run.shape
    x = stored(run, "resid")[-1].astype(np.float64)
    if shape.norm == "layernorm":
        x -= x.mean(axis=-1, keepdims=True)
    x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + shape.norm_eps)
    x = x * run.weight("ln_final.w") + run.weight("ln_final.b")
    logits = x @ run.weight("W_U") + run.weight("b_U")
    assert relative_error(logits, captured.expected["logits"][0]) < TOLERANCE


def test_pattern_rows_sum_to_1_and_local_layers_look_back_four_tokens(captured: Captured) -> None:
    for document in captured.run.stored_documents["document"].to_pylist():
        for layer in range(captured.run.shape.n_layers):
            weights = captured.run.attention(document, layer).to_numpy()
            np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
            far = np.tril(weights, -4)
            is_local = captured.family == "gpt_neo" and layer % 2 == 1
            assert (far.max() > 0) != is_local


def test_the_shape_is_that_of_the_model(captured: Captured) -> None:
    shape, config = captured.run.shape, captured.model.config
    assert shape.family == captured.family
    assert shape.block == ("parallel" if captured.family in {"gpt_neox", "phi"} else "sequential")
    assert shape.gated_mlp == (captured.family in {"llama", "qwen2"})
    assert (shape.norm == "rmsnorm") == (captured.family in {"llama", "qwen2"})
    assert shape.n_kv_heads == {"llama": 2, "qwen2": 1}.get(captured.family, 4)
    assert (shape.n_layers, shape.d_model, shape.n_vocab) == (
        config.num_hidden_layers, config.hidden_size, config.vocab_size,
    )  # fmt: skip
    assert shape.d_mlp == captured.expected["mlp_post"].shape[-1]
    assert shape.tied_unembed == (captured.family in {"gpt2", "qwen2", "gpt_neo"})


def test_the_tables_say_which_tokens_are_stored(
    captured: Captured, model_path: Callable[[str], Path], text_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(captured.family))
    run, paragraphs = captured.run, text_path.read_text().split("\n\n")
    tokens, vocab = run.tokens.to_pylist(), {v["token_id"]: v for v in run.vocab.to_pylist()}
    for row in run.documents.to_pylist():
        ids = [0, *tokenizer(paragraphs[row["document"]], add_special_tokens=False)["input_ids"]]
        found = [t["token_id"] for t in tokens if t["document"] == row["document"]]
        context = captured.run.shape.n_ctx
        status = "refused" if len(ids) < 3 else "cut" if len(ids) > context else "stored"
        assert row["status"] == status
        assert found == ([] if status == "refused" else ids[:context])
        assert row["n_source_tokens"] == len(ids)
        text = "".join(vocab[i]["text"] for i in found[1:])
        assert paragraphs[row["document"]].startswith(text)
    assert vocab[0]["is_special"]
    assert [v["is_special"] for v in vocab.values()].count(True) == 1
    assert run.manifest.bos_token_id == 0


def test_a_loaded_model_gives_the_same_values_and_stays_as_it_was(
    captured: Captured,
    tmp_path: Path,
    model_path: Callable[[str], Path],
    make_spec: Callable[..., CaptureSpec],
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(captured.family))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(captured.family)).train()
    names, attention = list(model.state_dict()), model.config._attn_implementation  # noqa: SLF001
    specials = tokenizer.special_tokens_map, tokenizer.padding_side
    spec = make_spec(model=model, tokenizer=tokenizer)
    run = capture_run(tmp_path / "lake", spec)
    for site in ARRAYS:
        np.testing.assert_array_equal(stored(run, site), stored(captured.run, site))
    for weight in ("W_U", "b_U", "ln_final.w", "ln_final.b", "W_out", "b_out"):
        np.testing.assert_array_equal(run.weight(weight), captured.run.weight(weight))
    assert run.vocab == captured.run.vocab

    assert list(model.state_dict()) == names
    assert model.training
    assert model.config._attn_implementation == attention  # noqa: SLF001
    assert (tokenizer.special_tokens_map, tokenizer.padding_side) == specials
    again = capture_run(tmp_path / "lake", spec)
    assert (again.run_id, again.manifest.number) == (run.run_id, 1)
