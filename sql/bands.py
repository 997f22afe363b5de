"""``attn_band`` as rows: the partitions that can hold a row that is asked for, and of those the columns asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.run import Run
from ..catalog.tables import ATTN_BAND
from .dataset import Scan, possible
from .labels import Labels
from .reads import Read, ReadLog

__all__ = ["band_scan"]


def band_scan(run: Run, labels: Labels, log: ReadLog | None = None) -> Scan:
    """Return the scan of a run's ``attn_band`` (``tables.ATTN_BAND``), partition by partition.

    Reads one object for each partition whose documents may pass the filter, all layers at once, and decodes the
    columns that the query names. Memory: the rows of one partition that pass.

    Parameters
    ----------
    run : Run
        The snapshot that is read.
    labels : Labels
        Knows which documents a partition has.
    log : ReadLog, optional
        Is told of every read.
    """

    def scan(columns: Sequence[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        held = [p for p in run.manifest.partitions if p.index in run.manifest.sites["attn_band"]]
        for i in possible(where, ATTN_BAND, [labels.guarantee(p) for p in held]):
            if log is not None:
                log.reads.append(Read(run.run_id, "attn_band", None, None, held[i].index, (0,)))
            yield from run.read_attn_band(held[i], columns=columns, where=where).to_batches()

    return scan
