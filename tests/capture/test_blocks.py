"""Blocks run one by one, in any order, against Hugging Face's own model with its list of blocks rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from layerlake.capture.blocks import FAMILIES, Blocks, require_family
from layerlake.capture.description import describe_model
from layerlake.capture.model import open_model
from layerlake.catalog.errors import AdapterMismatch
from layerlake.catalog.schedules import Step, parse_schedule, plan_interventions

HOMES = {
    "gpt2": ("transformer.h", "attn"),
    "gpt_neox": ("gpt_neox.layers", "attention"),
    "phi": ("model.layers", "self_attn"),
    "llama": ("model.layers", "self_attn"),
    "qwen2": ("model.layers", "self_attn"),
    "gpt_neo": ("transformer.h", "attn"),
}
"""Where Hugging Face keeps the blocks, and attention in them."""

MakeModel = Callable[..., transformers.PreTrainedModel]
IDS = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(3))


@contextmanager
def in_order(model: Any, family: str, order: Sequence[int]) -> Iterator[None]:
    """Let a model have its blocks in another order."""
    path, name = HOMES[family][0].rsplit(".", 1)
    parent, config = model.get_submodule(path), model.config
    blocks, kinds = getattr(parent, name), getattr(config, "layer_types", None)
    n_layers = config.num_hidden_layers
    try:
        setattr(parent, name, torch.nn.ModuleList([blocks[layer] for layer in order]))
        config.num_hidden_layers = len(order)
        if kinds is not None:
            config.layer_types = [kinds[layer] for layer in order]
        yield
    finally:
        setattr(parent, name, blocks)
        config.num_hidden_layers = n_layers
        if kinds is not None:
            config.layer_types = kinds


def silence(_module: Any, _given: Any, out: Any) -> Any:
    """Let a component add nothing, biases included."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def expected(model: Any, family: str, steps: Sequence[Step], *, use_cache: bool = False) -> torch.Tensor:
    """The logits of Hugging Face's model with its blocks in the order of a schedule."""
    (home, attention), taps = HOMES[family], []
    blocks = model.get_submodule(home)
    for step in steps:
        if step.without:
            component = blocks[step.layer].get_submodule(attention if step.without == "attn" else "mlp")
            taps.append(component.register_forward_hook(silence))
    with in_order(model, family, [step.layer for step in steps]), torch.inference_mode():
        logits: torch.Tensor = model(IDS, use_cache=use_cache).logits
    for tap in taps:
        tap.remove()
    return logits


def run(blocks: Blocks, steps: Sequence[Step]) -> torch.Tensor:
    """The logits behind a schedule."""
    with torch.inference_mode():
        residual = blocks.prepare(IDS)
        for step in steps:
            residual = blocks.run(step, residual)
        return blocks.unembed(blocks.norm(residual))


def open_blocks(model: transformers.PreTrainedModel, tokenizer: Any) -> Blocks:
    return Blocks(open_model(describe_model(model, tokenizer=tokenizer), device="cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_schedule_is_what_hugging_face_makes_of_it(
    family: str, model_path: Callable[[str], Path]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(family), attn_implementation="eager")
    blocks = Blocks(open_model(describe_model(model_path(family)), device="cpu"))
    n_layers = model.config.num_hidden_layers
    identity = tuple(map(Step, range(n_layers)))
    last = n_layers - 1
    asked = plan_interventions(
        n_layers, drop="all", swap="all", repeat=[1, 2], ablate_attn="all", ablate_mlp="all",
        schedules=[f"{last},0", f"0,0,0,{last}(-mlp)"],
    )  # fmt: skip
    base = expected(model, family, identity)
    torch.testing.assert_close(run(blocks, identity), base, rtol=0, atol=2e-5)
    n_executed = blocks.n_executed
    for intervention in asked:
        wanted = expected(model, family, intervention.steps)
        torch.testing.assert_close(run(blocks, intervention.steps), wanted, rtol=0, atol=2e-5)
        assert (wanted - base).abs().max() > 0.01, intervention.name
    assert blocks.n_executed - n_executed == sum(len(i.steps) for i in asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_in_their_order_are_the_bridge_bit_for_bit(
    family: str, model_path: Callable[[str], Path]
) -> None:
    """And other schedules leave nothing behind in it."""
    model = open_model(describe_model(model_path(family)), device="cpu")
    blocks = Blocks(model)
    with torch.inference_mode():
        before = model.bridge(IDS)
        run(blocks, parse_schedule("1(stale),0(-attn),1(-mlp),0", model.shape.n_layers))
        found = run(blocks, [Step(layer) for layer in range(model.shape.n_layers)])
        assert torch.equal(model.bridge(IDS), before)
    assert torch.equal(found, before.float())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_a_stale_repeat_is_what_a_cache_makes_of_one(family: str, model_path: Callable[[str], Path]) -> None:
    """With its cache on, Hugging Face's model attends the second time to what the first run left there."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(family), attn_implementation="sdpa")
    blocks = Blocks(open_model(describe_model(model_path(family)), device="cpu"))
    for true, stale in zip(
        plan_interventions(2, repeat="1"), plan_interventions(2, repeat="1", stale_kv=True), strict=True
    ):
        without, with_cache = (expected(model, family, true.steps, use_cache=on) for on in (False, True))
        assert (without - with_cache).abs().max() > 0.01
        torch.testing.assert_close(run(blocks, stale.steps), with_cache, rtol=0, atol=1e-5)
        torch.testing.assert_close(run(blocks, true.steps), without, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_swap_equal_blocks_or_to_swap_twice_is_nothing(
    family: str, make_model: MakeModel, tokenizer: Any
) -> None:
    model = make_model(family)
    home: Any = model.get_submodule(HOMES[family][0])
    if family != "gpt_neo":  # whose neighbours look back differently far
        home[1].load_state_dict(home[0].state_dict())
        blocks = open_blocks(model, tokenizer)
        n_layers = model.config.num_hidden_layers
        identity = [Step(layer) for layer in range(n_layers)]
        (swap, *_) = plan_interventions(n_layers, swap="0")
        assert torch.equal(run(blocks, swap.steps), run(blocks, identity))
        twice = [swap.steps[swap.steps[i].layer] for i in range(n_layers)]
        assert twice == identity


@pytest.mark.parametrize("family", FAMILIES)
def test_to_drop_a_block_that_adds_nothing_is_nothing(
    family: str, make_model: MakeModel, tokenizer: Any
) -> None:
    """Nor is it to leave out its components; and what each of them adds is the rest of the other."""
    model = make_model(family)
    home: Any = model.get_submodule(HOMES[family][0])
    for name, parameter in home[1].named_parameters():
        is_output = any(
            part in name for part in ("c_proj", "out_proj", "o_proj", "down_proj", "fc2", "self_attn.dense")
        ) or name.startswith(("attention.dense", "mlp.dense_4h"))
        if is_output:
            parameter.data.zero_()
    blocks = open_blocks(model, tokenizer)
    n_layers = model.config.num_hidden_layers
    identity = run(blocks, [Step(layer) for layer in range(n_layers)])
    for intervention in plan_interventions(n_layers, drop="1", ablate_attn="1", ablate_mlp="1"):
        assert torch.equal(run(blocks, intervention.steps), identity)


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_in_parallel_blocks_the_ablations_add_up(family: str, model_path: Callable[[str], Path]) -> None:
    """(x + m) + (x + a) = x' + x: neither component sees the other."""
    blocks = Blocks(open_model(describe_model(model_path(family)), device="cpu"))
    with torch.inference_mode():
        x = blocks.prepare(IDS)
        whole, *parts = (blocks.run(Step(0, without), x) for without in ("", "attn", "mlp"))
    torch.testing.assert_close(sum(parts), whole + x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_sequential_blocks_the_mlp_sees_what_is_left(
    family: str, model_path: Callable[[str], Path]
) -> None:
    blocks = Blocks(open_model(describe_model(model_path(family)), device="cpu"))
    with torch.inference_mode():
        x = blocks.prepare(IDS)
        whole, *parts = (blocks.run(Step(0, without), x) for without in ("", "attn", "mlp"))
    assert (sum(parts) - whole - x).abs().max() > 0.01


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(AdapterMismatch, match="The blocks of mistral models are not known") as caught:
        require_family("mistral")
    assert "gpt2, gpt_neox, phi, llama, qwen2, gpt_neo" in caught.value.hint
