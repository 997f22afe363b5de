"""Capture against what people do today, in one process: tokens a second, as ratios.

Baselines, all with eager attention, on a random model of GPT-2 small's shape and 512-token documents:

a. Hugging Face without LM head, ``output_hidden_states=True``, and ``np.save`` (fp16) of every state;
b. TransformerLens ``run_with_cache`` of the same sites, and ``torch.save``;
c. a bare forward without LM head and without capture.

``python benchmarks/capture.py`` (about five minutes on two cores); ``--smoke`` runs a tiny model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from layerlake import CaptureSpec
from layerlake.capture.execute import share_out_memory
from layerlake.capture.hooks import pad
from layerlake.capture.model import OpenModel, open_model
from layerlake.capture.partition import place_tokens
from layerlake.capture.phases import init_capture
from layerlake.capture.plan import CapturePlan, plan_capture
from layerlake.capture.worker import Outcome, Worker
from layerlake.catalog.lake import create_lake
from layerlake.demo.corpus import iter_documents
from layerlake.demo.tour import demo_model_path


def random_model(config: GPT2Config) -> Any:
    """Return the model with seeded random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def capture_into(folder: Path, model: OpenModel, plan: CapturePlan) -> Outcome:
    """Run and write every partition, as ``layerlake capture`` does after its plan and self-check."""
    frozen = plan.frozen
    if frozen is None:
        raise SystemExit("nothing to capture")
    store = create_lake(folder / "lake")
    init_capture(store, frozen, documents=plan.documents, tokens=plan.tokens)
    documents = place_tokens(plan.documents, plan.tokens)
    memory = share_out_memory(plan, frozen, documents, on_host=model.device.type == "cpu", is_local=True)
    worker = Worker(store=store, frozen=frozen, model=model, documents=documents, memory=memory)
    worker.write(frozen.work)
    return worker.outcome


@torch.inference_mode()
def save_hidden_states(folder: Path, model: Any, batches: list[torch.Tensor]) -> None:
    """Baseline a."""
    for i, ids in enumerate(batches):
        states = model.transformer(ids, use_cache=False, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            np.save(folder / f"{i}-{layer}.npy", state.half().numpy())


@torch.inference_mode()
def save_cache(folder: Path, model: OpenModel, batches: list[torch.Tensor]) -> None:
    """Baseline b."""
    last = f"blocks.{model.shape.n_layers - 1}.hook_resid_post"  # with all resid_pre the states that a and resid keep
    for i, ids in enumerate(batches):
        _, cache = model.bridge.run_with_cache(
            ids, names_filter=lambda name: name.endswith("hook_resid_pre") or name == last
        )
        torch.save({name: value.half() for name, value in cache.items()}, folder / f"{i}.pt")


@torch.inference_mode()
def forward(_: Path, model: Any, batches: list[torch.Tensor]) -> None:
    """Baseline c."""
    for ids in batches:
        model.transformer(ids, use_cache=False)


def measure(contestants: dict[str, Callable[[Path], object]], repeats: int) -> dict[str, float]:
    """Return each contestant's median seconds; they take turns, so that a slow minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, contestant in contestants.items():
            folder = Path(tempfile.mkdtemp())
            began = time.perf_counter()
            contestant(folder)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
            shutil.rmtree(folder)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once")
    options = parser.parse_args()
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 4096} if options.smoke else {}
    documents, repeats = (2, 1) if options.smoke else (options.documents, options.repeats)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **size)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("stdlib-gpt2"))

    folder = Path(tempfile.mkdtemp())
    texts = [text for _, text in iter_documents(held_out=True) if len(text) > 8000][:documents]
    dataset = folder / "text.jsonl"
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = CaptureSpec(
        model=random_model(config), tokenizer=tokenizer, dataset=str(dataset), batch_tokens=2048
    )
    every, resid = (
        plan_capture(CaptureSpec(**{f: getattr(spec, f) for f in spec.__slots__} | {"sites": sites}))
        for sites in ("all", "resid")
    )
    opened, raw = open_model(every.model), random_model(config)
    placed = place_tokens(every.documents, every.tokens)
    work = every.frozen.work if every.frozen else ()
    batches = [
        pad([placed[i].token_ids.tolist() for i in batch], device=opened.device)
        for w in work
        for batch in w.batches
    ]
    n_tokens = every.tokens.num_rows
    median = measure(
        {
            "a": lambda at: save_hidden_states(at, raw, batches),
            "b": lambda at: save_cache(at, opened, batches),
            "c": lambda at: forward(at, raw, batches),
            "resid": lambda at: capture_into(at, opened, resid),
            "all": lambda at: capture_into(at, opened, every),
        },
        repeats,
    )
    shutil.rmtree(folder)
    print(
        f"{n_tokens} tokens, {config.n_layer} layers of {config.n_embd}, {torch.get_num_threads()} threads\n"
    )
    print("| contestant | tokens/s |\n|---|--:|")
    for name, label in {
        "a": "a. HF output_hidden_states + np.save", "b": "b. TransformerLens run_with_cache + torch.save",
        "c": "c. bare forward", "resid": "layerlake, resid", "all": "layerlake, all sites",
    }.items():  # fmt: skip
        print(f"| {label} | {n_tokens / median[name]:,.0f} |")
    print("\n| ratio | measured |\n|---|--:|")
    print(f"| resid against a | {median['a'] / median['resid']:.2f} |")
    print(f"| resid against b | {median['b'] / median['resid']:.2f} |")
    print(f"| all sites against c | {median['c'] / median['all']:.2f} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
