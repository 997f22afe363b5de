"""What interventions look at, cut into what is stored together and what goes through the blocks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..catalog.errors import PlanError
from ..catalog.interventions import GrowingView
from ..catalog.mask import sample_positions
from ..catalog.run import Run
from ..catalog.schedules import Intervention, count_streams
from ..catalog.sizes import format_nbytes, parse_nbytes
from .memory import OVERHEAD_NBYTES, forward_nbytes
from .model import choose_device
from .outcomes import baseline_nbytes

__all__ = ["MeasuredDocument", "Unit", "plan_batches"]

_ROW_NBYTES = 512
"""A row of a table on its way: in Arrow, put together, and in Parquet."""

_MAX_BATCH_TOKENS = 4096

_READING_COPIES = 3
"""A boundary on its way from the lake: as it lies there, in order, and padded."""


@dataclass(frozen=True, slots=True)
class MeasuredDocument:
    """A document, and the positions at which the model is looked at."""

    number: int
    token_ids: npt.NDArray[np.int32]
    row_start: int
    positions: npt.NDArray[np.int64]
    """Each has a next token."""

    def beginning(self, n_tokens: int) -> MeasuredDocument:
        """Return its first tokens as a document, all of whose evaluation positions are looked at."""
        ids = self.token_ids[:n_tokens]
        return MeasuredDocument(
            self.number, ids, self.row_start, sample_positions(self.number, len(ids), None)
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """Documents of one partition on which the same interventions are missing: what is stored together."""

    view: GrowingView
    batches: tuple[tuple[MeasuredDocument, ...], ...]
    """What goes through the blocks together."""
    interventions: tuple[Intervention, ...]

    @property
    def documents(self) -> tuple[MeasuredDocument, ...]:
        """All of them, in order."""
        return tuple(sorted((d for batch in self.batches for d in batch), key=lambda d: d.number))

    @property
    def is_main(self) -> bool:
        """Whether schedules are measured here, and not cosines, nor the floor, where nothing is changed."""
        is_floor = all(intervention.kind == "noop" for intervention in self.interventions)
        return self.view == "interventions" and not is_floor

    @property
    def n_tokens(self) -> int:
        """Tokens of the documents."""
        return sum(len(document.token_ids) for batch in self.batches for document in batch)


def plan_batches(
    run: Run,
    documents: Sequence[MeasuredDocument],
    interventions: Sequence[Intervention],
    *,
    device: str,
    max_memory: int | str,
) -> tuple[tuple[MeasuredDocument, ...], ...]:
    """Return documents in batches that fit into the memory, those of like length together.

    Raises
    ------
    PlanError
        A document by itself does not.
    """
    limit, shape = parse_nbytes(max_memory), run.shape
    compute_dtype = run.manifest.identity["numerics"]["compute_dtype"]
    stream_nbytes = shape.d_model * (4 if compute_dtype == "float32" else 2)
    n_streams = 1 + max(_READING_COPIES, count_streams(interventions))  # the embedding beside them
    n_rows = sum(len(document.positions) for document in documents) * len(interventions)
    kind = choose_device(device).type

    def nbytes(batch: Sequence[MeasuredDocument]) -> int:
        longest = max(len(document.token_ids) for document in batch)
        tokens, positions = longest * len(batch), sum(len(document.positions) for document in batch)
        return (
            OVERHEAD_NBYTES
            + forward_nbytes(shape, longest, tokens, compute_dtype)
            + n_streams * tokens * stream_nbytes
            + baseline_nbytes(positions, shape.n_vocab, kind)
            + _ROW_NBYTES * n_rows
        )

    batches: list[tuple[MeasuredDocument, ...]] = []
    for document in sorted(documents, key=lambda document: len(document.token_ids)):
        if nbytes([document]) > limit:
            raise PlanError(
                f"Document {document.number} of {len(document.token_ids)} tokens needs "
                f"{format_nbytes(nbytes([document]))}, more than --max-memory {format_nbytes(limit)}.",
                hint="Give more.",
            )
        longer = (*batches[-1], document) if batches else (document,)
        if batches and len(longer) * len(document.token_ids) <= _MAX_BATCH_TOKENS and nbytes(longer) <= limit:
            batches[-1] = longer
        else:
            batches.append((document,))
    return tuple(batches)
