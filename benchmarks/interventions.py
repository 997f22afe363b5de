"""Interventions that resume against reruns, in one process: seconds, as ratios. All drops and swaps over 1024 tokens.

Against the same batched code that begins at the embedding (``--no-resume``), against that with the unmodified model
rerun for every schedule, and against the loop that people run today: one document at a time, and beside each
intervened forward an unmodified one. There a drop zeroes what attention and MLP give, and a swap exchanges two layers'
weights in the state dict, with or without building the model anew for it.

``python benchmarks/interventions.py`` (about ten minutes on two cores; one on a GPU); ``--smoke`` runs tiny models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from capture import random_model
from layerlake import CaptureSpec, Run, capture_run
from layerlake.capture.intervene import execute_interventions
from layerlake.capture.interventions import InterventionPlan, InterventionSpec, plan_intervention
from layerlake.capture.memory import PeakMemory
from layerlake.capture.model import OpenModel, open_model
from layerlake.catalog.interventions import INTERVENTIONS
from layerlake.catalog.schedules import count_blocks
from layerlake.catalog.tables import read_parts
from layerlake.demo.corpus import iter_documents
from layerlake.demo.tour import demo_model_path

Rows = dict[tuple[str, int], np.ndarray[Any, Any]]
SHAPES = {
    "GPT-2 small": {},
    "deep": {"n_layer": 36, "n_embd": 384, "n_head": 6, "vocab_size": 4096},
}
TINY = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 4096}


def flops(config: GPT2Config, n_blocks: int, n_unembeds: int, context: int) -> float:
    """Return FLOP a token: matrix products, and attention over the causal mean of the keys."""
    block = 24 * config.n_embd**2 + 2 * config.n_embd * (context + 1)
    return n_blocks * block + n_unembeds * 2 * config.n_embd * config.vocab_size


def timed(plan: InterventionPlan, model: OpenModel) -> tuple[float, Rows]:
    """Carry out a plan in a lake that holds nothing of it, and return its seconds and its divergences."""
    plan.run.store.delete("findings")
    began = time.perf_counter()
    execute_interventions(plan, model=model)
    seconds = time.perf_counter() - began
    parts = plan.finding("interventions").parts()
    table = read_parts(plan.run.store, [part.path for part in parts]).select(INTERVENTIONS.names).to_pandas()
    groups = table[table["kind"].isin(["drop", "swap"])].sort_values(["document", "position"])
    return seconds, {
        (kind, int(layer)): rows["kl_nats"].to_numpy()
        for (kind, layer), rows in groups.groupby(["kind", "layer"])
    }


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Run the whole model over one document, as the script does: with its cache."""
    found: torch.Tensor = model(ids[None]).logits[0].float()
    return found


def divergence(normal: torch.Tensor, intervened: torch.Tensor) -> Iterator[float]:
    """Yield KL(normal ‖ intervened) and what else the script measures, at the evaluation positions."""
    log_p, log_q = (each[1:-1].log_softmax(-1) for each in (normal, intervened))
    (log_q.exp().clamp(min=1e-9) * log_q.exp().clamp(min=1e-9).log2()).sum(-1)
    log_q.argmax(-1) == log_p.argmax(-1)  # noqa: B015  # its cost is what counts
    yield from (log_p.exp() * (log_p - log_q)).sum(-1).tolist()


def swap_weights(model: Any, layer: int) -> dict[str, torch.Tensor]:
    """Return the state dict with two layers' weights exchanged."""
    names = {
        f"transformer.h.{a}.": f"transformer.h.{b}." for a, b in ((layer, layer + 1), (layer + 1, layer))
    }
    swapped = {}
    for name, value in model.state_dict().items():
        prefix = next((each for each in names if name.startswith(each)), "")
        swapped[names.get(prefix, "") + name.removeprefix(prefix)] = value.clone()
    return swapped


@contextmanager
def zeroed(block: Any) -> Iterator[None]:
    """Let a block's attention and MLP give zeros."""

    def zeros(_: Any, __: Any, out: Any) -> Any:
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

    hooks = [part.register_forward_hook(zeros) for part in (block.attn, block.mlp)]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def exchanged(blocks: Any, layer: int) -> Iterator[None]:
    """Let two neighbours run in each other's place."""
    blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]
    yield
    blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]


def rebuilt(model: Any, layer: int) -> Any:
    """Build the model anew, with two layers' weights exchanged."""
    swapped = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    swapped.load_state_dict(swap_weights(model, layer))
    return swapped


@torch.inference_mode()
def loop(model: Any, documents: list[torch.Tensor], *, rebuilds: bool) -> tuple[float, Rows]:
    """Run the authors' loop: for every layer and document the unmodified model and the intervened one."""
    began, found, blocks = time.perf_counter(), Rows(), model.transformer.h

    def compare(other: Any, intervention: Callable[[], AbstractContextManager[None]]) -> np.ndarray[Any, Any]:
        values: list[float] = []
        for ids in documents:
            normal = logits(model, ids)
            with intervention():
                values += divergence(normal, logits(other, ids))
        return np.array(values)

    for layer in range(len(blocks)):
        found["drop", layer] = compare(model, partial(zeroed, blocks[layer]))
    for layer in range(len(blocks) - 1):
        found["swap", layer] = (
            compare(rebuilt(model, layer), nullcontext)
            if rebuilds
            else compare(model, partial(exchanged, blocks, layer))
        )
    return time.perf_counter() - began, found


def close(found: Rows, expected: Rows) -> float:
    """Return the largest difference of two sets of divergences, relative to 1 nat or more."""
    return max(
        float((np.abs(found[key] - expected[key]) / np.maximum(1, expected[key])).max()) for key in expected
    )


def run_shape(name: str, size: dict[str, int], *, device: str, is_smoke: bool) -> None:
    """Print one model's table."""
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **size)
    model = random_model(config)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("stdlib-gpt2"))
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "text.jsonl"
        texts = [text for _, text in iter_documents(held_out=True) if len(text) > 8000][:2]
        dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        context = 64 if is_smoke else 512
        run = capture_run(
            Path(folder) / "lake",
            CaptureSpec(
                model=model, tokenizer=tokenizer, dataset=str(dataset), sites="resid", dtype="float32",
                context=context, device=device,
            ),
        )  # fmt: skip
        measure_run(name, run, model, config, InterventionSpec(
            drop="all", swap="all", model=model, tokenizer=tokenizer, device=device
        ))  # fmt: skip


def measure_run(name: str, run: Run, model: Any, config: GPT2Config, spec: InterventionSpec) -> None:
    """Time every contestant on a run, make sure that they agree, and print the ratios."""
    resumed = plan_intervention(run, spec)
    whole = plan_intervention(run, replace(spec, resume=False))
    few, few_whole = (plan_intervention(run, replace(each.spec, positions=64)) for each in (resumed, whole))
    token_ids = torch.tensor(run.tokens["token_id"].to_pylist())
    lengths = run.stored_documents["n_tokens"].to_pylist()
    device = torch.empty(0, device=spec.device if spec.device != "auto" else None).device
    documents = [part.to(device) for part in token_ids.split(lengths)]
    model, opened = model.to(device), open_model(resumed.model, device=str(device))
    timed(resumed, opened)  # warms up
    with PeakMemory() as peak:
        seconds, found = timed(resumed, opened)
    whole_seconds, whole_found = timed(whole, opened)
    few_seconds, _ = timed(few, opened)
    few_whole_seconds, _ = timed(few_whole, opened)
    began = time.perf_counter()
    with torch.inference_mode():
        for ids in documents:
            logits(model, ids)
    forward_seconds = time.perf_counter() - began
    loop_seconds, loop_found = loop(model, documents, rebuilds=False)
    rebuilt_seconds, rebuilt_found = loop(model, documents, rebuilds=True)

    n_schedules = len(resumed.interventions)
    n_blocks, n_whole = (count_blocks(resumed.interventions, is_resumed=each) for each in (True, False))
    expected = flops(config, n_whole, n_schedules, max(lengths)) / flops(
        config, n_blocks, n_schedules, max(lengths)
    )
    rerun_seconds = whole_seconds + (n_schedules - 2) * forward_seconds
    errors = [close(found, each) for each in (whole_found, loop_found, rebuilt_found)]
    print(
        f"\n{name}: {config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}, {sum(lengths)} tokens, "
        f"{n_schedules - 1} schedules; {n_blocks} blocks a batch, {n_whole} without resuming; peak memory "
        f"{(peak.nbytes or 0) / 2**20:,.0f} MiB; {device}\n"
    )
    print("| contestant | seconds |\n|---|--:|")
    for label, value in {
        "resumed": seconds, "--no-resume": whole_seconds, "resumed, 64 positions": few_seconds,
        "--no-resume, 64 positions": few_whole_seconds, "the loop, swaps in place": loop_seconds,
        "the loop, swaps rebuild the model": rebuilt_seconds,
    }.items():  # fmt: skip
        print(f"| {label} | {value:.2f} |")
    print("\n| ratio | measured |\n|---|--:|")
    for label, text in {
        "--no-resume against resumed": f"{whole_seconds / seconds:.2f}",
        "the same in FLOP": f"{expected:.2f}",
        "share of the FLOP ratio that is reached": f"{whole_seconds / seconds / expected:.2f}",
        "the same with 64 positions": f"{few_whole_seconds / few_seconds:.2f}",
        "unmodified model rerun for every schedule, against resumed": f"{rerun_seconds / seconds:.2f}",
        "the loop against resumed": f"{loop_seconds / seconds:.2f}",
        "the loop that rebuilds, against resumed": f"{rebuilt_seconds / seconds:.2f}",
        "largest difference of any divergence, nats": f"{max(errors):.1e}",
    }.items():
        print(f"| {label} | {text} |")
    sys.stdout.flush()
    if max(errors) > 1e-4:
        raise SystemExit("the contestants do not agree")


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    options = parser.parse_args()
    shapes = {"tiny": TINY} if options.smoke else SHAPES
    for name, size in shapes.items():
        run_shape(name, size, device=options.device, is_smoke=options.smoke)


if __name__ == "__main__":
    main()
