"""Documents of a run that go through blocks together, and their residual streams as the lake holds them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..catalog.errors import CorruptRun
from .hooks import pad
from .units import MeasuredDocument

if TYPE_CHECKING:
    import torch

    from ..catalog.run import Run
    from .blocks import Blocks

__all__ = ["Batch"]


class Batch:
    """Some documents, padded on the right.

    Parameters
    ----------
    run : Run
        Holds their residual streams.
    blocks : Blocks
        Is made ready for the batch.
    documents : sequence of MeasuredDocument
        The documents.

    Attributes
    ----------
    embedding : torch.Tensor
        x_0, ``[batch, position, d_model]``.
    targets : torch.Tensor
        What follows the positions that are looked at: int64 ``[token]``.
    """

    def __init__(self, run: Run, blocks: Blocks, documents: Sequence[MeasuredDocument]) -> None:
        import torch

        self.run, self.blocks, self.documents = run, blocks, documents
        ids = pad([document.token_ids.tolist() for document in documents], device=blocks.model.device)
        self.embedding = blocks.prepare(ids)
        places = np.stack([self.number_in_batch, self.positions])
        self._at = torch.from_numpy(places).to(ids.device)
        self.targets = ids[self._at[0], self._at[1] + 1]

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """The positions that are looked at, documents one after the other: ``[token]``."""
        return np.concatenate([document.positions for document in self.documents])

    @cached_property
    def number_in_batch(self) -> npt.NDArray[np.int64]:
        """Which of the batch's documents each of them is of: ``[token]``."""
        counts = [len(document.positions) for document in self.documents]
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Where each of them lies in the run: ``[token]``."""
        starts = np.array([document.row_start for document in self.documents], dtype=np.int64)
        rows: npt.NDArray[np.int64] = starts[self.number_in_batch] + self.positions
        return rows

    def at_positions(self, residual: torch.Tensor) -> torch.Tensor:
        """Return what a value is at the positions that are looked at: ``[token, d_model]``."""
        return residual[self._at[0], self._at[1]]

    def stored(self, layer: int, site: str = "resid") -> torch.Tensor:
        """Read a boundary, or a layer of another site: ``[batch, position, d_model]``, zeros behind a document's end.

        Raises
        ------
        CorruptRun
            It holds a value that is not finite.
        """
        lengths = np.array([len(document.token_ids) for document in self.documents])
        rows = [d.row_start + np.arange(n) for d, n in zip(self.documents, lengths, strict=True)]
        padded = np.zeros((len(lengths), max(lengths), self.run.shape.d_model), dtype=np.float32)
        padded[np.arange(max(lengths)) < lengths[:, None]] = self._read(site, layer, np.concatenate(rows))
        return self._on_device(padded)

    def stored_at_positions(self, site: str, layer: int) -> torch.Tensor:
        """Read a site where it is looked at: ``[token, d_model]``.

        Raises
        ------
        CorruptRun
            It holds a value that is not finite.
        """
        return self._on_device(self._read(site, layer, self.rows))

    def _on_device(self, values: npt.NDArray[np.float32]) -> torch.Tensor:
        import torch

        return torch.from_numpy(values).to(self.embedding.device, self.embedding.dtype)

    def _read(self, site: str, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        order = np.argsort(rows)
        found = self.run.read_rows(site, layer, rows[order])
        values = np.empty(found.shape, dtype=np.float32)
        values[order] = found
        if not np.isfinite(values).all():
            raise CorruptRun(
                f"{site} {layer} of run {self.run.run_id} holds values that are not finite: "
                "no model goes on from there.",
                hint="Begin at the embedding: --no-resume. Or capture in a dtype that holds them: --dtype float32.",
            )
        return values
