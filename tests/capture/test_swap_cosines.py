"""Cosines of what swapped layers give, against plain Hugging Face with hooks, and their identities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from layerlake.capture.execute import capture_run
from layerlake.capture.intervene import execute_interventions
from layerlake.capture.interventions import InterventionSpec, plan_intervention
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.interventions import GrowingView
from layerlake.catalog.run import Run
from layerlake.catalog.tables import read_parts

MakeSpec = Callable[..., CaptureSpec]
MakeModel = Callable[..., transformers.PreTrainedModel]
HOMES = {
    "gpt2": ("transformer.h", "attn"),
    "gpt_neox": ("gpt_neox.layers", "attention"),
    "phi": ("model.layers", "self_attn"),
    "llama": ("model.layers", "self_attn"),
    "qwen2": ("model.layers", "self_attn"),
    "gpt_neo": ("transformer.h", "attn"),
}
ORDER = ["layer", "component", "kind", "document"]


def measure(run: Run, **options: Any) -> tuple[pd.DataFrame, int]:
    """The stored rows, and how many blocks were run for them."""
    plan = plan_intervention(run, InterventionSpec(swap_cosines="all", **options))
    n_blocks = execute_interventions(plan).n_blocks
    view: GrowingView = "swap_cosine_documents"
    parts = plan.finding(view).parts()
    table = read_parts(run.store, [part.path for part in parts]).to_pandas()
    return table.sort_values(ORDER, ignore_index=True), n_blocks


def outputs(
    model: Any, family: str, ids: list[int], order: list[int]
) -> dict[tuple[str, int], np.ndarray[Any, Any]]:
    """What attention and MLP of each block give with the blocks in this order: (component, layer) → values."""
    path, attention = HOMES[family]
    parent, name = model.get_submodule(path.rsplit(".", 1)[0]), path.rsplit(".", 1)[1]
    blocks, seen = getattr(parent, name), {}

    def note(component: str, layer: int) -> Callable[..., None]:
        def keep(_module: Any, _given: Any, out: Any) -> None:
            seen[component, layer] = (out[0] if isinstance(out, tuple) else out)[0].double().numpy()

        return keep

    taps = [
        block.get_submodule(place).register_forward_hook(note(component, layer))
        for layer, block in enumerate(blocks)
        for component, place in (("attn", attention), ("mlp", "mlp"))
    ]
    setattr(parent, name, torch.nn.ModuleList([blocks[layer] for layer in order]))
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False)
    setattr(parent, name, blocks)
    for tap in taps:
        tap.remove()
    return seen


@pytest.mark.parametrize("family", list(HOMES))
def test_hugging_face_has_the_same(
    family: str, make_spec: MakeSpec, model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    run = capture_run(tmp_path, make_spec(family, sites="resid"))
    found, n_blocks = measure(run)
    n_layers, n_documents = run.shape.n_layers, len(run.stored_documents)
    assert len(found) == (n_layers - 1) * 2 * 5 * n_documents
    assert n_blocks == (2 * (n_layers - 1) + n_layers) * len(run.manifest.partitions)
    is_centred = run.shape.norm == "layernorm"
    assert (found["centred"] == is_centred).all()

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(family))
    document = int(found["document"].iloc[3])
    ids = run.tokens["token_id"].to_numpy()[run.tokens["document"].to_numpy() == document].tolist()
    normal = outputs(model, family, ids, list(range(n_layers)))
    for layer in range(n_layers - 1):
        order = list(range(n_layers))
        order[layer : layer + 2] = layer + 1, layer
        swapped = outputs(model, family, ids, order)
        for component in ("attn", "mlp"):
            below, above = normal[component, layer], normal[component, layer + 1]
            earlier, later = swapped[component, layer + 1], swapped[component, layer]
            pairs = {
                "self_earlier": (earlier, above), "self_later": (later, below), "adjacent": (below, above),
                "index_earlier": (earlier, below), "index_later": (later, above),
            }  # fmt: skip
            for kind, pair in pairs.items():
                a, b = (x[1:-1] - is_centred * x[1:-1].mean(axis=1, keepdims=True) for x in pair)
                cosines = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
                row = found[
                    (found["layer"] == layer) & (found["component"] == component)
                    & (found["kind"] == kind) & (found["document"] == document)
                ].iloc[0]  # fmt: skip
                assert (row["n_tokens"], row["n_zero"]) == (len(ids) - 2, 0)
                assert row["sum_cosine"] == pytest.approx(cosines.sum(), abs=1e-4 * len(ids))


def test_what_the_lake_holds_is_not_run(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Two blocks a swap, and the same cosines."""
    run = capture_run(tmp_path / "a", make_spec(sites="resid"))
    more = capture_run(tmp_path / "b", make_spec(sites="resid,attn_out,mlp_out"))
    (with_all, n_all), (with_two, n_two) = measure(run), measure(more)
    assert n_two == 2 * 2 * len(run.manifest.partitions)
    assert n_all == n_two + 3 * len(run.manifest.partitions)
    np.testing.assert_allclose(with_all["sum_cosine"], with_two["sum_cosine"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(with_all["n_tokens"], with_two["n_tokens"])


def test_only_what_is_missing_is_run(make_spec: MakeSpec, tmp_path: Path) -> None:
    run = capture_run(tmp_path, make_spec(sites="resid"))
    few, _ = measure(run, max_documents=3)
    every, n_blocks = measure(run)
    assert n_blocks > 0
    assert not every.duplicated(ORDER).any()
    assert len(every.merge(few)) == len(few)
    again, n_blocks = measure(run)
    assert n_blocks == 0
    pd.testing.assert_frame_equal(again, every)


def run_of(
    model: Any, tokenizer: Any, make_spec: MakeSpec, tmp_path: Path
) -> dict[tuple[str, str], dict[str, float]]:
    """Component and kind → means of the swap of layers 0 and 1."""
    given = {"model": model, "tokenizer": tokenizer}
    found, _ = measure(capture_run(tmp_path, make_spec(sites="resid", **given)), **given)
    found = found[found["layer"] == 0]
    sums = found.groupby(["component", "kind"])[["sum_cosine", "n_tokens", "n_zero"]].sum()
    sums["cosine"] = sums["sum_cosine"] / sums["n_tokens"]
    means: Any = sums.to_dict("index")
    return dict(means)


def test_of_two_equal_blocks_each_gives_what_the_other_gave(
    make_spec: MakeSpec, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    model: Any = make_model("llama")
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    found = run_of(model, tokenizer, make_spec, tmp_path)
    for component in ("attn", "mlp"):
        assert found[component, "index_earlier"]["cosine"] == pytest.approx(1, abs=1e-6)
        assert found[component, "index_later"]["cosine"] == pytest.approx(1, abs=1e-6)
        assert found[component, "self_earlier"]["cosine"] < 0.999


def test_behind_a_block_that_adds_nothing_a_layer_is_itself(
    make_spec: MakeSpec, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    """And what it adds, which is zero, has no direction: that is counted, not averaged."""
    model: Any = make_model("llama")
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    found = run_of(model, tokenizer, make_spec, tmp_path)
    for component in ("attn", "mlp"):
        assert found[component, "self_earlier"]["cosine"] == pytest.approx(1, abs=1e-6)
        assert found[component, "self_earlier"]["n_zero"] == 0
        for kind in ("self_later", "index_earlier", "index_later", "adjacent"):
            assert found[component, kind]["n_tokens"] == 0
            assert found[component, kind]["n_zero"] == found[component, "self_earlier"]["n_tokens"]
            assert found[component, kind]["sum_cosine"] == 0
