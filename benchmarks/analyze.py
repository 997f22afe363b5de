"""The analyses against the products that they cannot do without, and against what people run today, as ratios.

Everything in one process, on a lake with a random model of GPT-2 small's shape:

lens
    against the bare float32 products of every boundary's tokens with the unembedding.
neurons
    against the bare float32 products of the output vectors (of two layers) with the unembedding.
cka
    13 × 13 boundaries, 1024 samples in batches of 128, against torch_cka's algorithm (two Gram matrices and three
    products for each pair and batch), and against exact unbiased CKA computed pair by pair over all samples.

``python benchmarks/analyze.py`` (about five minutes on two cores); ``--smoke`` takes a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config

from capture import measure, random_model
from layerlake import CaptureSpec, Run, capture_run
from layerlake.analyze.cka import hsic_matrix, normalised
from layerlake.analyze.lens import LensOptions, LensStatistic
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic
from layerlake.analyze.reduce import reduce_statistic
from layerlake.demo.corpus import iter_documents
from layerlake.demo.tour import demo_model_path

Floats = np.ndarray[Any, np.dtype[np.float32]]

_COLUMNS = 4096
"""Of the vocabulary at a time in a bare product: large enough for full speed."""


def multiply(left: Floats, right: Floats) -> None:
    """Compute a product block by block, and keep nothing of it."""
    out = np.empty((len(left), _COLUMNS), dtype=np.float32)
    for start in range(0, right.shape[1], _COLUMNS):
        block = right[:, start : start + _COLUMNS]
        np.matmul(left, block, out=out[:, : block.shape[1]])


def torch_cka(features: Floats, batch: int) -> torch.Tensor:
    """Do what torch_cka does: for every batch and pair HSIC(K, K), HSIC(K, L) and HSIC(L, L), all from scratch."""
    n_boundaries, n_samples, _ = features.shape
    sums = torch.zeros(3, n_boundaries, n_boundaries)
    for start in range(0, n_samples, batch):
        x = [torch.from_numpy(layer[start : start + batch]) for layer in features]
        x = [layer - layer.mean(dim=0) for layer in x]
        for i in range(n_boundaries):
            for j in range(n_boundaries):
                for term, (a, b) in enumerate(((i, i), (i, j), (j, j))):
                    sums[term, i, j] += hsic_of_pair(x[a], x[b])
    found: torch.Tensor = sums[1] / (sums[0] * sums[2]).sqrt()
    return found


def hsic_of_pair(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased HSIC of one pair, as torch_cka's ``_HSIC``."""
    n = len(x)
    ones = torch.ones(n, 1)
    gram_x, gram_y = x @ x.T, y @ y.T
    gram_x.fill_diagonal_(0.0)
    gram_y.fill_diagonal_(0.0)
    product = gram_x @ gram_y
    found = product.trace() + (ones.T @ gram_x @ ones @ ones.T @ gram_y @ ones) / ((n - 1) * (n - 2))
    found -= 2 * (ones.T @ product @ ones) / (n - 2)
    return float(found / (n * (n - 3)))


def exact_cka(features: Floats) -> torch.Tensor:
    """All samples as one batch, pair by pair."""
    x = [torch.from_numpy(layer) for layer in features]
    x = [layer - layer.mean(dim=0) for layer in x]
    hsic = torch.tensor([[hsic_of_pair(a, b) for b in x] for a in x])
    own = hsic.diagonal()
    found: torch.Tensor = hsic / (own[:, None] * own[None, :]).sqrt()
    return found


def our_cka(features: Floats, batch: int) -> np.ndarray[Any, Any]:
    """Apply the estimator of ``layerlake analyze cka``; one batch where ``batch`` is all samples."""
    batches = range(0, features.shape[1], batch)
    return normalised(np.mean([hsic_matrix(list(features[:, i : i + batch])) for i in batches], axis=0))


def make_run(folder: Path, *, smoke: bool, n_documents: int) -> Run:
    """Capture the residual stream of a random model."""
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 4096} if smoke else {}
    texts = [text for _, text in iter_documents(held_out=True) if len(text) > 8000][:n_documents]
    dataset = folder / "text.jsonl"
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = CaptureSpec(
        model=random_model(GPT2Config(bos_token_id=0, eos_token_id=0, **size)),
        tokenizer=AutoTokenizer.from_pretrained(demo_model_path("stdlib-gpt2")),
        dataset=str(dataset), sites="resid", context=256,
    )  # fmt: skip
    return capture_run(folder / "lake", spec)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once")
    options = parser.parse_args()
    n_documents, repeats = (2, 1) if options.smoke else (options.documents, options.repeats)
    folder = Path(tempfile.mkdtemp())
    run = make_run(folder, smoke=options.smoke, n_documents=n_documents)
    lens = LensStatistic.open(run, LensOptions(tokens="all"))
    neurons = replace(NeuronStatistic.open(run, NeuronOptions(columns="all")), n_layers=2)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((len(lens.tokens), run.shape.d_model + 1), dtype=np.float32)
    outputs = rng.standard_normal((2 * run.shape.d_mlp, run.shape.d_model), dtype=np.float32)
    n_samples, batch = (64, 16) if options.smoke else (1024, 128)
    size = (run.shape.n_layers + 1, n_samples, run.shape.d_model)
    features = rng.standard_normal(size, dtype=np.float32) + rng.standard_normal(size[1:], dtype=np.float32)

    def products_of_lens() -> None:
        for _ in range(lens.n_boundaries):
            multiply(tokens, lens.readout.unembed)

    np.testing.assert_allclose(our_cka(features, batch), torch_cka(features, batch), atol=1e-4)
    median = measure(
        {
            "lens": lambda _: lens.finalise(reduce_statistic(lens, run)),
            "lens, one thread": lambda _: reduce_statistic(lens, run, scheduler="synchronous"),
            "lens, products": lambda _: products_of_lens(),
            "neurons": lambda _: neurons.finalise(reduce_statistic(neurons, run)),
            "neurons, products": lambda _: multiply(outputs, neurons.unembed),
            "cka": lambda _: our_cka(features, batch),
            "cka, torch_cka": lambda _: torch_cka(features, batch),
            "cka, exact": lambda _: our_cka(features, n_samples),
            "cka, exact pairwise": lambda _: exact_cka(features),
        },
        repeats,
    )
    shutil.rmtree(folder)
    print(f"{len(tokens)} tokens, {size[0]} boundaries of {size[2]}, {run.shape.n_vocab} tokens of vocabulary, "
          f"{os.cpu_count()} cores\n")  # fmt: skip
    print("| contestant | seconds |\n|---|--:|")
    for name, seconds in median.items():
        print(f"| {name} | {seconds:.3f} |")
    print("\n| ratio | measured |\n|---|--:|")
    for label, above, below in (
        ("lens against its products", "lens", "lens, products"),
        ("lens, one thread against two", "lens, one thread", "lens"),
        ("neurons against their products", "neurons", "neurons, products"),
        ("torch_cka's algorithm against cka", "cka, torch_cka", "cka"),
        ("exact pairwise CKA against cka", "cka, exact pairwise", "cka"),
        ("exact pairwise CKA against cka of all samples at once", "cka, exact pairwise", "cka, exact"),
    ):
        print(f"| {label} | {median[above] / median[below]:.2f} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
