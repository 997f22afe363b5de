"""What is asked of a capture."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from ..catalog.errors import PlanError, did_you_mean
from ..catalog.layout import itemsize
from ..catalog.sites import parse_analyses, parse_sites
from ..catalog.sizes import parse_nbytes
from .model import require_compute_dtype
from .partition import Overflow
from .shard import CODECS
from .tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PRESETS", "CaptureSpec", "complete_spec", "require_valid"]

PRESETS: dict[str, dict[str, Any]] = {
    # 2000 sequences of 512 tokens: the million of https://arxiv.org/abs/2406.19384, with its documents fixed.
    "paper": {
        "min_tokens": 64,
        "context": 512,
        "shuffle_buffer": 10_000,
        "seed": 0,
        "max_tokens": 2000 * 512,
    },
}
"""What a preset puts where a spec says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """What to capture: one model, one corpus, some sites."""

    model: str | os.PathLike[str] | PreTrainedModel = field(repr=False)
    """A hub id, a local directory, or a model that is loaded already."""
    dataset: str | os.PathLike[str] | None = None
    """A dataset id of the hub, or a local txt, jsonl, parquet or arrow file. None is for plans only: full windows."""
    sites: tuple[str, ...] | str | None = None
    """Site names, or ``"all"``; None is what ``analyses`` need, and everything if that is None too."""
    analyses: tuple[str, ...] | str | None = None
    """Names of analyses: the cheapest sites that answer all of them are captured."""
    max_tokens: int | str | None = None
    """Stop at the last whole document that fits; None takes the whole dataset."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None
    """Another tokenizer than the model's own; needed for a loaded model."""
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    """The split of a hub dataset, ``train`` if None. With ``task``: several, or ``train=FILE,dev=FILE`` in place of a
    dataset."""
    shuffle_buffer: int | None = None
    """Draw the rows' order with so many of them held; None leaves it as it is."""
    seed: int | None = None
    """Of the shuffle; None is 0."""
    pack: str | None = None
    """``concat`` joins texts, BOS between them, in windows of the context's length, which are then the documents."""
    task: str | None = None
    """``wic``, ``arc_easy``, ``hellaswag``, ``lambada``: the dataset holds its items, and they become prompts."""
    preset: str | None = None
    """``paper``: what stands in for None in other fields (:data:`PRESETS`)."""
    text_column: str | None = None
    """The column that holds the text; None is ``text``."""
    sample_by: str = "paragraph"
    """What is a document of a txt file: paragraph, line or file."""
    min_tokens: int | None = None
    """Shorter texts are refused; None is 3. BOS counts."""
    context: int | None = None
    """Longer documents are cut; None is the smaller of 512 and what the model can take, and the latter in a task. BOS
    counts."""
    bos: str = "auto"
    """``auto`` (the tokenizer's BOS, else EOS, else none; in a task as that has it), ``none``, or a token id."""
    dtype: str = "float16"
    """What is stored: float16, bfloat16 or float32."""
    codec: str | None = None
    """How chunks are compressed: none, lz4 or zstd. None is ``none``, or what the run has already."""
    compute_dtype: str = "float32"
    """What the model runs in."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``."""
    max_memory: int | str = "4GiB"
    """Bounds what the capture allocates beyond the loaded model; decides the size of a partition."""
    partition_tokens: int | None = None
    """Token rows of a partition; None lets ``max_memory`` decide."""
    batch_tokens: int = 4096
    """The most padded tokens of one forward."""
    overflow: Overflow = "stop"
    """Whether a value that is not finite in the stored dtype is an error, or is kept and counted."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def complete_spec(spec: CaptureSpec) -> CaptureSpec:
    """Return a valid spec as it is meant: with its preset's options and the fewest tokens of a text.

    Raises
    ------
    PlanError
        An option is none, or contradicts another.
    """
    require_valid(spec)
    given = PRESETS[spec.preset] if spec.preset else {}
    chosen = {name: value for name, value in given.items() if getattr(spec, name) is None}
    if spec.task is None and spec.min_tokens is None:
        chosen = {"min_tokens": 3} | chosen
    return dataclasses.replace(spec, preset=None, **chosen)


def require_valid(spec: CaptureSpec) -> None:
    """Raise PlanError for an option that is none."""
    if spec.sites is not None:
        parse_sites(spec.sites)
    if spec.analyses is not None:
        parse_analyses(spec.analyses)
        if spec.sites is not None:
            raise PlanError("Sites were named, and analyses too.", hint="Give --sites or --for, not both.")
    itemsize(spec.dtype)
    require_compute_dtype(spec.compute_dtype)
    parse_nbytes(spec.max_memory)
    if spec.codec is not None and spec.codec not in CODECS:
        raise PlanError(f"There is no codec '{spec.codec}'.", hint=f"--codec is one of {', '.join(CODECS)}.")
    if spec.overflow not in get_args(Overflow):
        raise PlanError(
            f"'{spec.overflow}' is not what can be done about overflow.", hint="--overflow stop or keep."
        )
    for name in ("min_tokens", "context", "partition_tokens", "batch_tokens", "shuffle_buffer"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise PlanError(f"--{name.replace('_', '-')} must be positive, not {value}.")
    if spec.seed is not None and spec.seed < 0:
        raise PlanError(f"--seed must not be negative, as {spec.seed} is.")
    if not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", spec.device):
        raise PlanError(
            f"'{spec.device}' is not a device to capture on.", hint="--device auto, cpu, cuda or cuda:1."
        )
    _require_valid_corpus(spec)


def _require_valid_corpus(spec: CaptureSpec) -> None:
    """Raise PlanError where the options that say what the documents are contradict each other."""
    _require_known("preset", spec.preset, PRESETS)
    _require_known("pack", spec.pack, ("concat",))
    _require_known("task", spec.task, TASKS)
    if spec.task is not None:
        for name in ("pack", "preset", "text_column", "min_tokens"):
            if getattr(spec, name) is not None:
                raise PlanError(
                    f"--{name.replace('_', '-')} is for text, and the items of {spec.task} are prompts.",
                    hint="Leave it out, or --task.",
                )
    elif spec.split is not None and "=" in spec.split:
        raise PlanError(
            f"--split {spec.split} names the files of a task, and there is no --task.",
            hint=f"--task is one of {', '.join(TASKS)}; text comes from one --dataset.",
        )
    if spec.pack is not None and (spec.min_tokens == 1 or spec.context == 1):
        raise PlanError(
            "A window of one token, or a text of none, cannot be packed.", hint="From 2 on they can."
        )
    if spec.seed is not None and spec.shuffle_buffer is None and spec.preset is None:
        raise PlanError(
            f"--seed {spec.seed} draws nothing.", hint="Give --shuffle-buffer ROWS, or leave it out."
        )


def _require_known(option: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        raise PlanError(
            f"There is no {option} '{value}'.{did_you_mean(value, known)}",
            hint=f"--{option} is one of {', '.join(known)}.",
        )
