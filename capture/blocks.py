"""A model's blocks, one by one, in any order, on residual streams from anywhere.

What a block is given beside the residual stream (masks, rotary angles, positions) depends on the shape of the batch
alone. So the model is run once with blocks that only note it, which costs an embedding; then each block is called as
the model itself would call it, bit for bit. Key-value caches stay off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..catalog.errors import AdapterMismatch
from ..catalog.schedules import Step
from .hooks import Take, hook_name, listen

if TYPE_CHECKING:
    import torch

    from .model import OpenModel

__all__ = ["FAMILIES", "Blocks", "require_family", "run_schedule"]

FAMILIES = ("gpt2", "gpt_neox", "phi", "llama", "qwen2", "gpt_neo")
"""The families whose blocks may be run by themselves: tried, and equal to the whole model bit for bit."""


def require_family(family: str) -> None:
    """Raise AdapterMismatch unless the blocks of a family may be run by themselves."""
    if family not in FAMILIES:
        raise AdapterMismatch(
            f"The blocks of {family} models are not known to run by themselves, so nothing can be dropped or swapped.",
            hint=f"Interventions are for {', '.join(FAMILIES)}.",
        )


class Blocks:
    """The blocks of an open model, for batches of one shape at a time.

    Parameters
    ----------
    model : OpenModel
        The model.
    trim : callable, optional
        Is called between batches and behind every block: what those have let go of may be given back to the system.

    Raises
    ------
    AdapterMismatch
        The family is not one of :data:`FAMILIES`.

    Attributes
    ----------
    n_executed : int
        How many blocks were run so far.
    """

    def __init__(self, model: OpenModel, *, trim: Callable[[], None] = lambda: None) -> None:
        require_family(model.shape.family)
        self.model = model
        self.trim = trim
        self.n_executed = 0
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def prepare(self, ids: torch.Tensor) -> torch.Tensor:
        """Note what the blocks are given for batches of this shape, and return the embedding.

        Parameters
        ----------
        ids : torch.Tensor
            int64 ``[batch, position]``.

        Returns
        -------
        torch.Tensor
            x_0, ``[batch, position, d_model]``.
        """
        self.trim()
        streams: list[torch.Tensor] = []
        self._given = []

        def note(residual: torch.Tensor, *args: Any, **options: Any) -> Any:
            streams.append(residual)
            self._given.append((args, options))
            return (residual, None) if self.model.shape.family == "gpt_neo" else residual

        with _replaced_forwards(self.model.bridge.blocks, note):
            self.model.body(ids, use_cache=False)
        return streams[0]

    def run(self, step: Step, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream behind a step: ``[batch, position, d_model]``, as is what it is given."""
        self.n_executed += step.n_blocks
        if step.is_stale:
            with ExitStack() as stack:
                for name in "kv":
                    point = self.model.hook_point(f"blocks.{step.layer}.attn.hook_{name}")
                    stack.enter_context(_hooked(point, _repeat_first()))
                return self._call(step.layer, self._call(step.layer, residual))
        if step.without:
            point = self.model.hook_point(hook_name(f"{step.without}_out", step.layer, self.model.shape))
            with _hooked(point, _nothing):
                return self._call(step.layer, residual)
        return self._call(step.layer, residual)

    def _call(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        args, options = self._given[layer]
        out = self.model.bridge.blocks[layer](residual, *args, **options)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        self.trim()
        return found

    def norm(self, residual: torch.Tensor) -> torch.Tensor:
        """Apply the final norm: ``[..., d_model]``."""
        normed: torch.Tensor = self.model.bridge.ln_final(residual)
        return normed

    def unembed(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the logits: float32 ``[..., vocabulary]``."""
        logits: torch.Tensor = self.model.bridge.unembed(normed)
        return logits.float()


def run_schedule(
    model: OpenModel, ids: torch.Tensor, takers: Mapping[tuple[str, int], Take], *, steps: Sequence[Step]
) -> None:
    """Run a model's blocks in another order; layer i of what is shown is the i-th step. See :data:`Forward`."""
    blocks = Blocks(model)
    residual = blocks.prepare(ids)
    for place, step in enumerate(steps):
        if ("resid", place) in takers:
            takers["resid", place](residual)
        here = {
            (site, step.layer): take
            for (site, layer), take in takers.items()
            if layer == place and site != "resid"
        }
        with listen(model, here):
            residual = blocks.run(step, residual)
    if ("resid", len(steps)) in takers:
        takers["resid", len(steps)](residual)


@contextmanager
def _replaced_forwards(blocks: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let another function run in place of each of some modules."""
    try:
        for block in blocks:
            vars(block)["forward"] = forward  # an attribute set on a bridge lands on the module inside
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)  # the class's own shows again


def _nothing(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001  # TransformerLens passes it by name
    return value.new_zeros(value.shape)


def _repeat_first() -> Callable[..., Any]:
    """Return what lets a hook point give again what it gave first."""
    first: list[Any] = []

    def give(value: Any, hook: Any) -> Any:  # noqa: ARG001  # TransformerLens passes it by name
        if not first:
            first.append(value)
        return first[0]

    return give


@contextmanager
def _hooked(point: Any, function: Callable[..., Any]) -> Iterator[None]:
    point.add_hook(function, prepend=True)  # who listens there hears what came of it
    try:
        yield
    finally:
        point.remove_hooks("fwd")
