"""An open model: a TransformerBridge, whose hooks see everything, and the Hugging Face model inside."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..catalog.errors import AdapterMismatch, MissingExtra, ModelError
from ..catalog.shapes import ModelShape
from .description import ModelDescription, first_line
from .share import place_on_machine

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

__all__ = ["OpenModel", "choose_device", "open_model", "require_compute_dtype"]

_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(slots=True)
class OpenModel:
    """A model ready to run: the bridge, whose hooks see it, and the Hugging Face model inside."""

    bridge: TransformerBridge
    shape: ModelShape
    device: torch.device

    @property
    def body(self) -> torch.nn.Module:
        """The model without its LM head: running it costs no unembedding."""
        body: torch.nn.Module = self.bridge.original_model.base_model  # type: ignore[assignment]
        return body

    def hook_point(self, name: str) -> Any:
        """Return a hook point by TransformerLens's name.

        Raises
        ------
        AdapterMismatch
            The bridge of this architecture has no such hook.
        """
        try:
            return self.bridge.hook_dict[name]
        except KeyError:
            raise AdapterMismatch(
                f"TransformerLens has no hook '{name}' for {self.shape.family} models.",
                hint="Leave that site out with --sites.",
            ) from None

    def weight(self, name: str, block: tuple[slice, ...]) -> npt.NDArray[np.float32]:
        """Return a block of a weight that the analyses need, by the names of ``Run.weight``: raw, float32.

        Copies that block from the device, and nothing else. Biases that the model does not have are zeros.
        """
        if name in ("W_U", "b_U"):
            unembed = _inner(self.bridge.unembed)
            if name == "W_U":
                return _float32(unembed.weight[block[1], block[0]]).T
            return _bias(unembed, self.shape.n_vocab)[block]
        if name in ("ln_final.w", "ln_final.b"):
            final = _inner(self.bridge.ln_final)
            return (
                _float32(final.weight)[block]
                if name == "ln_final.w"
                else _bias(final, self.shape.d_model)[block]
            )
        layers = range(*block[0].indices(self.shape.n_layers))
        projections = [self._output_projection(layer) for layer in layers]
        if name == "W_out":
            return np.stack([_in_by_out(p, self.shape.d_mlp, block[1:]) for p in projections])
        return np.stack([_bias(p, self.shape.d_model)[block[1]] for p in projections])

    def _output_projection(self, layer: int) -> Any:
        mlp = self.bridge.blocks[layer].mlp
        if not hasattr(mlp, "out"):
            raise AdapterMismatch(
                f"TransformerLens finds no single output weight in the MLPs of this {self.shape.family} model: "
                "mixtures of experts are not captured yet."
            )
        return _inner(mlp.out)


def _inner(component: Any) -> Any:
    """Return the Hugging Face module inside a bridge component."""
    return getattr(component, "original_component", component)


def _float32(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return values


def _bias(module: Any, length: int) -> npt.NDArray[np.float32]:
    bias = getattr(module, "bias", None)
    return np.zeros(length, np.float32) if bias is None else _float32(bias)


def _in_by_out(module: Any, d_in: int, block: tuple[slice, ...]) -> npt.NDArray[np.float32]:
    """Return a block of a projection as ``[in, out]``: Linear stores the transpose, GPT-2's Conv1D does not."""
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    if weight.shape[0] != d_in:
        raise AdapterMismatch(
            f"The MLP's output weight has shape {tuple(weight.shape)}; expected {d_in} rows."
        )
    return _float32(weight[block])


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence progress bars and advice of transformers and TransformerLens while a model loads."""
    import transformers

    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if was_enabled:
                transformers.utils.logging.enable_progress_bar()


def open_model(
    description: ModelDescription, *, device: str = "auto", compute_dtype: str = "float32"
) -> OpenModel:
    """Load the weights and open the model as a TransformerBridge, eager attention, unprocessed weights.

    Parameters
    ----------
    description : ModelDescription
        What to open. A loaded model stays as it is: its modules are copied, because TransformerLens
        rewires them, and share its weights where device and dtype are the ones asked for.
    device : str
        ``auto`` is CUDA if there is one, else the CPU. Of several processes that torchrun started on a machine,
        ``auto`` and ``cuda`` give each a device of its own, as far as there are enough.
    compute_dtype : str
        The dtype in which the model runs: float32, bfloat16 or float16.

    Raises
    ------
    ModelError
        TransformerLens cannot open the architecture, or the device is not there.
    AdapterMismatch
        What it opens is not shaped as the config says.
    """
    try:
        import torch
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise MissingExtra("transformer_lens", "capture") from error

    require_compute_dtype(compute_dtype)
    dtype: torch.dtype = getattr(torch, compute_dtype)
    chosen = choose_device(device)
    # The bridge wants a tokenizer, is never asked to tokenise, and changes the one it gets: give it a copy,
    # and one without BOS, because others are loaded anew by their name.
    spare = copy.deepcopy(description.tokenizer)
    spare.bos_token = None
    options: dict[str, Any] = {"device": chosen, "dtype": dtype, "tokenizer": spare}
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        location = description.location
        if description.loaded is not None:
            # The bridge reads the config by name even when it is given the model.
            options["hf_model"] = own = _own_copy(description.loaded, chosen, dtype)
            own.config.save_pretrained(folder)
            location = folder
        try:
            bridge = TransformerBridge.boot_transformers(
                location,
                revision=description.revision,
                trust_remote_code=description.trust_remote_code,
                **options,
            )
        except Exception as error:
            raise ModelError(
                f"TransformerLens cannot open '{description.name}': {first_line(error)}"
            ) from error
    bridge.eval()
    for block in bridge.blocks:
        block.attn.register_forward_hook(_drop_pattern)
    shape = _checked_shape(bridge, description.shape)
    return OpenModel(bridge, shape, chosen)


def _drop_pattern(attention: Any, *_: Any) -> None:
    """Let go of the pattern that some attention bridges keep until the next forward: a square a layer."""
    if getattr(attention, "_pattern", None) is not None:
        attention._pattern = None  # noqa: SLF001  # TransformerLens 4.3, joint_qkv_attention


def require_compute_dtype(name: str) -> None:
    """Raise ModelError unless a model can run in this dtype."""
    if name not in _COMPUTE_DTYPES:
        raise ModelError(
            f"The model cannot run in '{name}'.",
            hint=f"--compute-dtype is one of {', '.join(_COMPUTE_DTYPES)}.",
        )


def choose_device(name: str) -> torch.device:
    """Return the device of a name, with its number."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and (place := place_on_machine()) is not None:
        name = f"cuda:{place % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise ModelError(
            f"There is no device '{name}' here: {first_line(error)}",
            hint="--device auto, cpu, cuda or cuda:1.",
        ) from error


def _own_copy(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Copy a model's modules; its tensors are shared where they are on the device and, parameters, in the dtype."""
    parameters = [p for p in model.parameters() if p.dtype == dtype or not p.is_floating_point()]
    shared = {id(t): t for t in (*parameters, *model.buffers()) if t.device == device}
    own: PreTrainedModel = copy.deepcopy(model, shared)
    # As in a saved model: the bridge finds its adapter by it.
    own.config.architectures = [type(model).__name__]
    own.eval().to(device)
    for parameter in own.parameters():  # buffers, such as rotary frequencies, keep their precision
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return own


def _checked_shape(bridge: TransformerBridge, shape: ModelShape) -> ModelShape:
    """Hold the shape that the config gave against the opened model, and fill in what only that knows."""
    found = {
        "n_layers": len(bridge.blocks),
        "d_model": _inner(bridge.unembed).weight.shape[1],
        "n_vocab": _inner(bridge.unembed).weight.shape[0],
        "block": "sequential" if "blocks.0.hook_resid_mid" in bridge.hook_dict else "parallel",
    }
    wrong = {
        name: (getattr(shape, name), value) for name, value in found.items() if getattr(shape, name) != value
    }
    if wrong:
        raise AdapterMismatch(
            "The opened model contradicts its config: "
            + ", ".join(f"{name} is {value}, not {given}" for name, (given, value) in wrong.items())
        )
    return dataclasses.replace(shape, gated_mlp="blocks.0.mlp.gate.hook_out" in bridge.hook_dict)
