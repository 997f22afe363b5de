"""A model whose captured values break an identity is refused by the identity's name, before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformer_lens.hook_points import HookPoint

from layerlake.capture import hooks, model, model_shape, selfcheck
from layerlake.capture.description import describe_model
from layerlake.capture.execute import capture_run
from layerlake.capture.hooks import hook_name
from layerlake.capture.model import OpenModel, open_model
from layerlake.capture.selfcheck import check_model
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import AdapterMismatch, OverflowInCapture, SelfCheckFailed
from layerlake.catalog.shapes import ModelShape

ADDS = "resid_post = resid_pre"
LOGITS = "= logits"
NEURONS = "W_out"
ROWS = "rows sum to 1"
PADDED = "padded = unpadded"


def _listen_elsewhere(site: str, elsewhere: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Take a site's values at another hook."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        def name(asked: str, layer: int, shape: ModelShape) -> str:
            return elsewhere.format(layer) if asked == site else hook_name(asked, layer, shape)

        for module in (hooks, selfcheck):
            patch.setattr(module, "hook_name", name)

    return sabotage


def _normed_last_boundary(patch: pytest.MonkeyPatch) -> None:
    def name(site: str, layer: int, shape: ModelShape) -> str:
        is_last = site == "resid" and layer == shape.n_layers
        return "ln_final.hook_out" if is_last else hook_name(site, layer, shape)

    patch.setattr(hooks, "hook_name", name)


def _transposed_output_weight(patch: pytest.MonkeyPatch) -> None:
    right = model._in_by_out  # noqa: SLF001
    patch.setattr(model, "_in_by_out", lambda module, d_in, block: right(module, d_in, block).T)


def _change_weight(name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def sabotage(patch: pytest.MonkeyPatch) -> None:
        right = OpenModel.weight

        def weight(self: OpenModel, asked: str, block: tuple[slice, ...]) -> Any:
            value = right(self, asked, block)
            return change(value) if asked == name else value

        patch.setattr(OpenModel, "weight", weight)

    return sabotage


def _pad_on_the_left(patch: pytest.MonkeyPatch) -> None:
    def pad(batch: Sequence[Sequence[int]], *, device: torch.device) -> torch.Tensor:
        longest = max(map(len, batch))
        return torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in batch], device=device)

    def unpad(value: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        if value.ndim == 3:
            return torch.cat([value[i, -n:] for i, n in enumerate(lengths)])
        rows = [torch.tril_indices(n, n) for n in lengths]
        return torch.cat([value[i, :, -n:, -n:][:, *rows[i]] for i, n in enumerate(lengths)], dim=1)

    patch.setattr(selfcheck, "pad", pad)
    patch.setattr(selfcheck, "unpad", unpad)


SABOTAGE: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "the last boundary is taken after the final norm": ("gpt2", ADDS, _normed_last_boundary),
    "so is a llama's": ("llama", ADDS, _normed_last_boundary),
    "attn_out is the MLP's": ("phi", ADDS, _listen_elsewhere("attn_out", "blocks.{}.hook_mlp_out")),
    "mlp_out is what the MLP reads": ("gpt2", ADDS, _listen_elsewhere("mlp_out", "blocks.{}.ln2.hook_out")),
    "neurons are taken before the activation": (
        "gpt2", NEURONS, _listen_elsewhere("mlp_post", "blocks.{}.mlp.hook_pre"),
    ),
    "W_out is transposed": ("qwen2", NEURONS, _transposed_output_weight),
    "W_out's bias is forgotten": ("gpt_neo", NEURONS, _change_weight("b_out", np.zeros_like)),
    "the pattern is taken before the softmax": (
        "gpt2", ROWS, _listen_elsewhere("pattern", "blocks.{}.attn.hook_attn_scores"),
    ),
    "the final norm's gain is forgotten": ("llama", LOGITS, _change_weight("ln_final.w", np.ones_like)),
    "the final norm's bias is forgotten": ("gpt_neox", LOGITS, _change_weight("ln_final.b", np.zeros_like)),
    "the unembedding's bias is forgotten": ("phi", LOGITS, _change_weight("b_U", np.zeros_like)),
    "the vocabulary is shuffled": ("gpt2", LOGITS, _change_weight("W_U", lambda w: np.roll(w, 1, axis=1))),
    "padding is on the left": ("gpt2", PADDED, _pad_on_the_left),
}  # fmt: skip


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_broken_identity_is_named_and_nothing_is_written(
    case: str, make_spec: Callable[..., CaptureSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, identity, sabotage = SABOTAGE[case]
    sabotage(monkeypatch)
    with pytest.raises(SelfCheckFailed) as caught:
        capture_run(tmp_path / "lake", make_spec(family))
    quoted = str(caught.value).split("'")[1]
    assert identity in quoted
    assert family in str(caught.value)
    assert "tolerance" in str(caught.value)
    assert not (tmp_path / "lake").exists()


@pytest.fixture(scope="module")
def opened(model_path: Callable[[str], Path]) -> OpenModel:
    return open_model(describe_model(model_path("gpt2")), device="cpu")


def test_the_errors_of_a_sound_model_are_rounding(opened: OpenModel) -> None:
    batch = [list(range(1, 48)), list(range(50, 60))]
    errors = check_model(opened, batch, ["pattern", "mlp_post"], compute_dtype="float32")
    assert len(errors) == 5
    assert 0 < max(errors.values()) < 1e-5


def test_neurons_and_patterns_are_checked_only_where_they_will_be_stored(opened: OpenModel) -> None:
    errors = check_model(opened, [[1, 2, 3]], ["resid"], compute_dtype="float32")
    assert len(errors) == 3


@pytest.mark.parametrize("length", [1, 2, 47, 48])
def test_documents_of_every_length_can_be_checked(opened: OpenModel, length: int) -> None:
    """48 is the model's context: there is no room to pad."""
    check_model(opened, [list(range(length))], ["resid", "pattern"], compute_dtype="float32")


def test_values_that_are_not_numbers_fail_the_check(
    make_model: Callable[..., Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_spec: Callable[..., CaptureSpec],
    tmp_path: Path,
) -> None:
    broken = make_model("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(
        OverflowInCapture, match=r"Site \w+ at layer 1 has \d+ values .* not finite"
    ) as caught:
        capture_run(tmp_path / "lake", make_spec(model=broken, tokenizer=tokenizer))
    assert "weights" in caught.value.hint
    assert not (tmp_path / "lake").exists()


def test_a_hook_that_transformer_lens_does_not_have_is_named(opened: OpenModel) -> None:
    with pytest.raises(AdapterMismatch, match=r"no hook 'blocks\.0\.nothing' for gpt2") as caught:
        opened.hook_point("blocks.0.nothing")
    assert "--sites" in caught.value.hint


def test_a_hook_of_another_shape_is_named(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _listen_elsewhere("mlp_post", "blocks.{}.ln2.hook_out")(monkeypatch)
    with pytest.raises(
        AdapterMismatch, match=r"ln2\.hook_out' gives values of shape .*32\), not .*128\)"
    ) as caught:
        capture_run(tmp_path / "lake", make_spec())
    assert "mlp_post" in caught.value.hint


def test_a_hook_that_is_never_called_is_named(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be with attention that makes no pattern."""
    _listen_elsewhere("pattern", "blocks.0.hook_nowhere")(monkeypatch)
    monkeypatch.setattr(OpenModel, "hook_point", _hook_point)
    with pytest.raises(AdapterMismatch, match=r"hook_nowhere' is never called"):
        capture_run(tmp_path / "lake", make_spec())


_right_hook_point = OpenModel.hook_point


def _hook_point(opened: OpenModel, name: str) -> Any:
    nowhere: Any = HookPoint
    return nowhere() if name == "blocks.0.hook_nowhere" else _right_hook_point(opened, name)


def test_a_config_that_contradicts_the_weights_is_refused(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_shape, "_PARALLEL_FAMILIES", {"gpt2"})
    with pytest.raises(AdapterMismatch, match="block is sequential, not parallel"):
        capture_run(tmp_path / "lake", make_spec())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_tolerance_follows_the_dtype_that_the_model_runs_in(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, dtype: str
) -> None:
    run = capture_run(tmp_path / "lake", make_spec(compute_dtype=dtype))
    errors = run.manifest.captures[0]["self_check"]
    assert 1e-4 < max(errors.values()) < 5e-2
