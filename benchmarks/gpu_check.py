"""Capture on a GPU: whether it is right, how fast it is, and how long the GPU waits.

A random model of 400 million parameters and GPT-2's shape, built from its config. Every value that a GPU captures
is held against the CPU's in float32; then capture is timed against a bare forward of the same batches.

``python benchmarks/gpu_check.py`` (minutes; needs CUDA, 16 GiB of GPU memory and 80 GB of disk).
``--smoke`` runs a tiny model, on the CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config

from capture import capture_into, random_model
from layerlake import CaptureSpec, Run, capture_run
from layerlake.capture.execute import place_tokens
from layerlake.capture.hooks import pad
from layerlake.capture.model import OpenModel, open_model
from layerlake.capture.plan import CapturePlan, plan_capture
from layerlake.catalog.tables import attn_band_sums
from layerlake.demo.corpus import iter_documents
from layerlake.demo.tour import demo_model_path

TOLERANCE = 2e-3
"""Allowed difference of stored float32 values from the CPU's, relative to the largest of the site and layer."""


def largest_difference(ours: Run, theirs: Run) -> dict[str, float]:
    """Return, for each site, the largest difference relative to the largest value of its layer."""
    worst: dict[str, float] = {}
    for site in (name for name in ours.sites if name != "attn_band"):
        for layer in range(ours.array(site).shape[0]):
            for partition in ours.manifest.partitions:
                a, b = (run.read(site, layer, partition).astype(np.float32) for run in (ours, theirs))
                worst[site] = max(worst.get(site, 0.0), relative_difference(a, b))
    shape = ours.shape
    sums = (attn_band_sums(run.attn_band, shape.n_layers, shape.n_heads) for run in (ours, theirs))
    return worst | {"attn_band": relative_difference(*sums)}


def relative_difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the largest difference as a share of the largest value."""
    return float(np.abs(a - b).max() / max(1e-30, float(np.abs(b).max())))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def forward_seconds(model: OpenModel, plan: CapturePlan) -> float:
    """Return the seconds of a bare forward of all batches, without capture and LM head."""
    placed = place_tokens(plan.documents, plan.tokens)
    batches = [
        pad([placed[i].token_ids.tolist() for i in batch], device=model.device)
        for work in (plan.frozen.work if plan.frozen else ())
        for batch in work.batches
    ]
    model.body(batches[0], use_cache=False)
    synchronise(model.device)
    began = time.perf_counter()
    for ids in batches:
        model.body(ids, use_cache=False)
    synchronise(model.device)
    return time.perf_counter() - began


def main() -> None:
    """Print what was found; exit 1 if the GPU's values are not the CPU's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the timed captures")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        sys.exit("There is no CUDA device here; --smoke runs a tiny model on the CPU.")
    size = {"n_layer": 24, "n_embd": 1152, "n_head": 18}  # 400 million without the embeddings, 440 with
    if options.smoke:
        size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 4096}
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **size)
    model = random_model(config)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("stdlib-gpt2"))
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        check(model, tokenizer, device, folder, 1_000 if options.smoke else options.tokens)
    finally:
        shutil.rmtree(folder)


def check(model: Any, tokenizer: Any, device: torch.device, folder: Path, n_tokens: int) -> None:
    """Compare, then time."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters / 1e6:.0f} million parameters on {name}, torch {torch.__version__}\n")
    texts = [text for _, text in iter_documents(held_out=True) if len(text) > 8000]
    dataset = folder / "text.jsonl"
    wanted = -(-n_tokens // 512)
    documents = (texts * (1 + wanted // len(texts)))[:wanted]
    # of all lengths at first, so that the comparison sees padding, and patterns of unequal documents in a batch
    documents = [texts[0][:n] for n in (40, 900, 300, 1200, 2000, 100)] + documents
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    def spec(**options: Any) -> CaptureSpec:
        return CaptureSpec(model=model, tokenizer=tokenizer, dataset=str(dataset), **options)

    small: dict[str, Any] = {"max_tokens": 1024, "dtype": "float32"}
    found = capture_run(folder / "device", spec(device=str(device), **small))
    expected = capture_run(folder / "cpu", spec(device="cpu", **small))
    differences = largest_difference(found, expected)
    print("| site | largest relative difference from the CPU |\n|---|--:|")
    for site, difference in differences.items():
        print(f"| {site} | {difference:.1e} |")
    is_right = all(difference <= TOLERANCE for difference in differences.values())

    ratios = []
    print(
        "\n| capture | bare forward, tokens/s | with capture | MB/s stored | model waited |\n|---|--:|--:|--:|--:|"
    )
    for compute_dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        for sites in ("resid", "resid,attn_out,mlp_out,mlp_post,attn_band", "all"):
            timed: dict[str, Any] = {"sites": sites, "compute_dtype": compute_dtype}
            plan = plan_capture(spec(device=str(device), max_memory="16GiB", batch_tokens=16384, **timed))
            opened = open_model(plan.model, device=str(device), compute_dtype=compute_dtype)
            bare = forward_seconds(opened, plan)
            outcome = capture_into(folder / "timed", opened, plan)
            shutil.rmtree(folder / "timed")
            ratios.append((f"{sites}, {compute_dtype}", bare / outcome.seconds))
            print(
                f"| {sites}, {compute_dtype} | {outcome.n_tokens / bare:,.0f} "
                f"| {outcome.n_tokens / outcome.seconds:,.0f} | {outcome.nbytes / outcome.seconds / 1e6:,.0f} "
                f"| {outcome.waited_s / outcome.seconds:.0%} |"
            )
            sys.stdout.flush()
    print("\n| ratio | measured |\n|---|--:|")
    for label, ratio in ratios:
        print(f"| {label}, against a bare forward | {ratio:.2f} |")
    if not is_right:
        sys.exit(f"The values differ from the CPU's by more than {TOLERANCE}.")


if __name__ == "__main__":
    main()
