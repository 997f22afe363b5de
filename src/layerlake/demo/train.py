"""Train the two small models that ship with the package, on the standard library's own text.

``python -m layerlake.demo.train gpt2`` or ``neox`` (``make demo-models`` does both). Everything is
seeded and counted in steps; only the minutes depend on the machine. The log that it writes goes to ``docs/``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

from layerlake.demo.corpus import iter_documents

N_VOCAB = 4096
N_CTX = 256
BOS = "<|endoftext|>"
BATCH_WINDOWS = 16
SEED = 20240619


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 4096 tokens on the training part."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in iter_documents(held_out=False)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=N_CTX
    )


def encode_part(tokenizer: PreTrainedTokenizerFast, *, held_out: bool) -> np.ndarray:
    """Encode one part of the corpus as a single stream, BOS before each document: int64 ``[token]``."""
    bos = tokenizer.bos_token_id
    stream: list[int] = []
    for _, text in iter_documents(held_out=held_out):
        stream.append(bos)
        stream.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return np.asarray(stream, dtype=np.int64)


def model_config(kind: str, n_layers: int) -> Any:
    """Return the Hugging Face config of the sequential (``gpt2``) or the parallel (``neox``) model."""
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=N_VOCAB, n_positions=N_CTX, n_embd=128, n_layer=n_layers, n_head=8,
            bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
    return GPTNeoXConfig(
        vocab_size=N_VOCAB, max_position_embeddings=N_CTX, hidden_size=128,
        num_hidden_layers=n_layers, num_attention_heads=8, intermediate_size=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def optimizers(model: torch.nn.Module, *, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = ".h." in name or ".layers." in name
        (matrices if muon and in_block and parameter.ndim == 2 else others).append(parameter)
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    ]
    if matrices:
        result.append(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01))
    return result


def windows(stream: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    """Cut windows of BOS and the ``N_CTX`` tokens that follow each start: ``[window, N_CTX + 1]``."""
    cut = stream[starts[:, None] + np.arange(N_CTX + 1)]
    cut[:, 0] = 0
    return torch.from_numpy(cut)


@torch.inference_mode()
def evaluate(model: torch.nn.Module, stream: np.ndarray) -> dict[str, float]:
    """Loss and, if blocks are dropped by the caller, the same windows again: mean nats a token."""
    starts = np.arange(0, len(stream) - N_CTX - 1, N_CTX)[:96]
    total, hits = 0.0, []
    for batch in np.array_split(starts, max(1, len(starts) // 16)):
        ids = windows(stream, batch)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        hits.append(logits.argmax(-1))
    return {"loss_nats": total / (len(starts) * N_CTX), "top1": torch.cat(hits)}  # type: ignore[dict-item]


def drop_table(model: Any, stream: np.ndarray) -> dict[str, list[float]]:
    """Loss increase and top-1 agreement after dropping each layer, on the held-out windows."""
    stack = model.transformer if hasattr(model, "transformer") else model.gpt_neox
    name = "h" if hasattr(stack, "h") else "layers"
    blocks = getattr(stack, name)
    base = evaluate(model, stream)
    table: dict[str, list[float]] = {"loss_increase_nats": [], "top1_agreement": []}
    for layer in range(len(blocks)):
        setattr(stack, name, torch.nn.ModuleList(b for i, b in enumerate(blocks) if i != layer))
        model.config.num_hidden_layers = len(blocks) - 1
        dropped = evaluate(model, stream)
        table["loss_increase_nats"].append(round(dropped["loss_nats"] - base["loss_nats"], 3))
        agree = (dropped["top1"] == base["top1"]).float().mean().item()  # type: ignore[attr-defined]
        table["top1_agreement"].append(round(agree, 3))
    setattr(stack, name, blocks)
    model.config.num_hidden_layers = len(blocks)
    return table


def unigram_entropy(train: np.ndarray, held_out: np.ndarray) -> float:
    """Cross-entropy of the held-out tokens under the training part's (add-one) unigram counts, nats."""
    counts = np.bincount(train, minlength=N_VOCAB) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def main() -> None:
    """Train one model and write its folder and its log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["gpt2", "neox"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--log", type=Path, required=True, help="JSON log")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--adamw", action="store_true", help="AdamW for everything instead of Muon for matrices"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = train_tokenizer()
    train = encode_part(tokenizer, held_out=False)
    held_out = encode_part(tokenizer, held_out=True)
    model: Any = AutoModelForCausalLM.from_config(
        model_config(options.kind, options.layers), attn_implementation="sdpa"
    )
    groups = optimizers(model, muon=not options.adamw)
    peaks = [group.param_groups[0]["lr"] for group in groups]
    warmup = 100
    history: list[dict[str, float]] = []
    began = time.perf_counter()
    running = 0.0
    for step in range(options.steps):
        progress = step / options.steps
        scale = min(1.0, (step + 1) / warmup, max(0.02, (1 - progress) / 0.4))
        for group, peak in zip(groups, peaks, strict=True):
            group.param_groups[0]["lr"] = peak * scale
        ids = windows(train, rng.integers(0, len(train) - N_CTX - 1, BATCH_WINDOWS))
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in groups:
            group.step()
            group.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            minutes = (time.perf_counter() - began) / 60
            rate = (step + 1) * BATCH_WINDOWS * N_CTX / minutes / 60
            history.append({"step": step + 1, "train_loss_nats": round(running, 3)})
            print(
                f"{options.kind} step {step + 1} loss {running:.3f} {minutes:.1f} min {rate:.0f} tok/s",
                flush=True,
            )

    model.eval()
    model = model.half().float()  # what ships is fp16: measure that
    result = {
        "model": options.kind,
        "n_layers": options.layers,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "seed": SEED,
        "steps": options.steps,
        "tokens_seen": options.steps * BATCH_WINDOWS * N_CTX,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "held_out_loss_nats": round(evaluate(model, held_out)["loss_nats"], 4),
        "unigram_nats": round(unigram_entropy(train, held_out), 4),
        "uniform_nats": round(math.log(N_VOCAB), 4),
        "drop": drop_table(model, held_out),
        "history": history,
    }
    model.half().save_pretrained(options.out, safe_serialization=True)
    tokenizer.save_pretrained(options.out)
    options.log.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "history"}, indent=1))


if __name__ == "__main__":
    main()
