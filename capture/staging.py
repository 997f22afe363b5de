"""From the device to the host: on CUDA through a ring of pinned slots, filled while the model runs on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ..catalog.layout import n_pairs
from .hooks import unpad

if TYPE_CHECKING:
    import torch

__all__ = ["Deliver", "Staging", "as_numpy", "as_tensor"]

Deliver = Callable[["list[torch.Tensor]", "bool | None"], None]
"""Takes a value on the host, document by document, and whether all of it is finite; None where nobody has looked.

A document is ``[token, width]``, which may still be cast; a pattern ``[head, query, key]``, or ``[head, pair]`` where
it was packed on the device; band sums ``[head, query set, sum]``.
"""

Rows = Literal["token", "pair", "document"]


def as_numpy(value: torch.Tensor) -> npt.NDArray[Any]:
    """Return a host tensor as numpy, without a copy; bfloat16, which numpy lacks, as its bits."""
    import torch

    if value.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = value.view(torch.int16).numpy().view(np.uint16)
        return bits
    values: npt.NDArray[Any] = value.numpy()
    return values


def as_tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array as a host tensor, without a copy; uint16 as the bits of bfloat16."""
    import torch

    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _split_padded(values: torch.Tensor, rows: Rows, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of each document of a padded batch."""
    if rows == "document":
        return list(values)
    if rows == "pair":
        return [values[i, :, :n, :n] for i, n in enumerate(lengths)]
    return [values[i, :n] for i, n in enumerate(lengths)]


def _split_flat(values: torch.Tensor, rows: Rows, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of each document of what :func:`unpad` made."""
    if rows == "document":
        return list(values)
    if rows == "pair":
        return list(values.split([n_pairs(n) for n in lengths], dim=1))
    return list(values.split(list(lengths)))


@dataclass(frozen=True, slots=True)
class _Slot:
    """Pinned memory for one value."""

    value: torch.Tensor
    """uint8 ``[nbytes]``"""
    is_finite: torch.Tensor
    """bool ``[]``"""


class Staging:
    """Hands values on to the host, in order.

    On the CPU a value is handed on at once. On CUDA it is copied into a pinned slot on a stream of its own, and
    a thread hands it on when it has arrived; with all slots taken :meth:`put` waits, and so does the model.

    Parameters
    ----------
    device : torch.device
        Where the values are.
    slot_nbytes : int
        What the largest value takes.
    n_slots : int
        The slots of the ring.
    on_failure : callable, optional
        Told, in the thread, what was raised there: the model may be waiting for values that now never come.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        slot_nbytes: int,
        n_slots: int,
        on_failure: Callable[[BaseException], None] = lambda error: None,  # noqa: ARG005  # its keyword
    ) -> None:
        self.waited_s = 0.0
        """Seconds for which the model has waited for a free slot, or for the last values to arrive."""
        self._is_direct = device.type != "cuda"
        self._scratch: torch.Tensor | None = None
        self._failure: BaseException | None = None
        self._on_failure = on_failure
        if self._is_direct:
            return
        import torch

        self._stream = torch.cuda.Stream(device)
        self._free: queue.Queue[_Slot] = queue.Queue()
        for _ in range(n_slots):
            value = torch.empty(slot_nbytes, dtype=torch.uint8, pin_memory=True)
            self._free.put(_Slot(value, torch.empty((), dtype=torch.bool, pin_memory=True)))
        self._coming: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._hand_on, name="staging", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_direct:
            self._coming.put(None)
            self._thread.join()

    def _cast_pattern(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a pattern on the CPU in another dtype, good until the next call.

        Always in the same memory: fresh memory costs a page fault for every 4 KiB.
        """
        import torch

        if value.dtype == dtype:
            return value
        if self._scratch is None or self._scratch.numel() < value.numel() or self._scratch.dtype != dtype:
            self._scratch = None  # before the larger one is made
            self._scratch = torch.empty(value.numel(), dtype=dtype)
        return self._scratch[: value.numel()].view(value.shape).copy_(value)

    def put(
        self, value: torch.Tensor, rows: Rows, lengths: Sequence[int], deliver: Deliver, *, dtype: torch.dtype
    ) -> None:
        """Take a value off its device. What ``deliver`` raises is raised here, on CUDA by a later call.

        On CUDA it is cast, and padding and future keys stay behind; on the CPU leaving them out, and casting tokens,
        is left to whoever copies.

        Parameters
        ----------
        value : torch.Tensor
            ``[batch, position, width]``, ``[batch, head, query, key]`` where ``rows`` is ``pair``, or one item a
            document.
        rows : ``token``, ``pair`` or ``document``
            What the site's rows are.
        lengths : sequence of int
            Tokens of each document of the batch.
        deliver : callable
            Called once; the memory is taken back when it returns.
        dtype : torch.dtype
            The stored one.
        """
        import torch

        if self._is_direct:
            # a triangle is copied query by query, and a cast of so few values at a time is slow
            shown = self._cast_pattern(value, dtype) if rows == "pair" else value
            deliver(_split_padded(shown, rows, lengths), None)
            return
        self._raise_failure()
        value = value.to(dtype)
        flat = value if rows == "document" else unpad(value, lengths)
        low, high = torch.aminmax(flat)
        is_finite = low.isfinite() & high.isfinite()
        began = time.perf_counter()
        slot = self._free.get()
        self.waited_s += time.perf_counter() - began
        shown = slot.value[: flat.nbytes].view(flat.dtype).view(flat.shape)
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(self._stream):
            shown.copy_(flat, non_blocking=True)
            slot.is_finite.copy_(is_finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        for tensor in (flat, is_finite):  # their memory must not be given to others before it is copied
            tensor.record_stream(self._stream)

        def arrive() -> None:
            try:
                if self._failure is None:
                    event.synchronize()
                    deliver(_split_flat(shown, rows, lengths), bool(slot.is_finite))
            finally:
                self._free.put(slot)

        self._coming.put(arrive)

    def then(self, function: Callable[[], None]) -> None:
        """Call a function once everything that was put before has been handed on; do not wait for it."""
        if self._is_direct:
            function()
            return

        def call() -> None:
            if self._failure is None:
                function()

        self._coming.put(call)

    def drain(self) -> None:
        """Wait until everything that was put has been handed on."""
        if not self._is_direct:
            began = time.perf_counter()
            self._coming.join()
            self.waited_s += time.perf_counter() - began
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _hand_on(self) -> None:
        while (function := self._coming.get()) is not None:
            try:
                function()
            except BaseException as error:  # noqa: BLE001  # raised where the model runs
                self._failure = self._failure or error
                self._on_failure(error)
            finally:
                self._coming.task_done()
