"""The relations of a run's schema: its documents, tokens and vocabulary, and one for every site it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from ..catalog.run import Run
from ..catalog.tables import ATTN_BAND, DOCUMENTS, VOCAB
from ..catalog.zones import has_zones
from .bands import band_scan
from .dataset import LazyDataset, table_scan
from .labels import TOKEN_LABELS, Labels
from .reads import ReadLog
from .scan import SITE_RELATIONS, SiteScan
from .zones import ZONE_ROWS, zone_scan

__all__ = ["RUN_RELATIONS", "run_relations", "site_scans"]

RUN_RELATIONS = ("documents", "all_documents", "tokens", "vocab", *SITE_RELATIONS, "attn_band", "zones")
"""Every name that a run's schema can have."""


def site_scans(run: Run, log: ReadLog | None = None) -> dict[str, SiteScan]:
    """Return the scans of the site relations that a run has, by name; ``log`` is told of every read of values."""
    labels = Labels(run)
    return {
        name: SiteScan(run, relation, labels, log)
        for name, relation in SITE_RELATIONS.items()
        if relation.exists_in(run)
    }


def run_relations(
    run: Run, scans: Mapping[str, SiteScan], log: ReadLog | None = None
) -> dict[str, LazyDataset]:
    """Return a run's relations by name. Nothing is read until a query scans one.

    ========================  ==========================================================================
    relation                  one row is
    ========================  ==========================================================================
    documents                 a stored document (status ``stored`` or ``cut``)
    all_documents             an input document, refused ones (with the reason) included
    tokens                    a stored token: row, document, position, token_id, text
    vocab                     a token id: token_id, text, is_special
    resid                     a token at a boundary: boundary, row, …, text, chunk, vec FLOAT[d_model]
    resid_pre, resid_mid, …   a token at a layer: layer, row, …, text, chunk, vec FLOAT[width]
    pattern                   a pair of tokens in a head: layer, head, document, query, key, value
    attn_band                 a document in a head: sums of attention near the diagonal (``tables.ATTN_BAND``)
    zones                     a chunk, or a unit in one: the least and the largest value (if all chunks have them)
    ========================  ==========================================================================

    Parameters
    ----------
    run : Run
        The snapshot that is read.
    scans : mapping
        The scans of its sites (:func:`site_scans`).
    log : ReadLog, optional
        Is told of every read of ``attn_band``.
    """
    labels = next((scan.labels for scan in scans.values()), None) or Labels(run)
    relations = {
        "documents": _table(DOCUMENTS, lambda: run.stored_documents),
        "all_documents": _table(DOCUMENTS, lambda: run.documents),
        "tokens": LazyDataset(pa.schema(TOKEN_LABELS.items()), table_scan(labels.all_tokens)),
        "vocab": _table(VOCAB, lambda: run.vocab),
    }
    relations |= {name: LazyDataset(scan.schema, scan.batches) for name, scan in scans.items()}
    if "attn_band" in run.sites:
        relations["attn_band"] = LazyDataset(ATTN_BAND, band_scan(run, labels, log))
    if has_zones(run.manifest):  # with some of them missing, a query would take their chunks for empty
        relations["zones"] = LazyDataset(ZONE_ROWS, zone_scan(run))
    return relations


def _table(schema: pa.Schema, read: Callable[[], pa.Table]) -> LazyDataset:
    def tables() -> Iterator[pa.Table]:
        yield read()

    return LazyDataset(schema, table_scan(tables))
