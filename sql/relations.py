"""The relations of a run's schema: its documents, tokens and vocabulary, and one for every site it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from ..catalog.run import Run
from ..catalog.tables import ATTN_BAND, DOCUMENTS, VOCAB
from .bands import band_scan
from .dataset import LazyDataset, table_scan
from .labels import TOKEN_LABELS, Labels
from .reads import ReadLog
from .scan import SITE_RELATIONS, SiteScan

__all__ = ["RUN_RELATIONS", "run_relations"]

RUN_RELATIONS = ("documents", "all_documents", "tokens", "vocab", *SITE_RELATIONS, "attn_band")
"""Every name that a run's schema can have."""


def run_relations(run: Run, log: ReadLog | None = None) -> dict[str, LazyDataset]:
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
    ========================  ==========================================================================

    Parameters
    ----------
    run : Run
        The snapshot that is read.
    log : ReadLog, optional
        Is told of every read of a site's values.
    """
    labels = Labels(run)
    relations = {
        "documents": _table(DOCUMENTS, lambda: run.stored_documents),
        "all_documents": _table(DOCUMENTS, lambda: run.documents),
        "tokens": LazyDataset(pa.schema(TOKEN_LABELS.items()), table_scan(labels.all_tokens)),
        "vocab": _table(VOCAB, lambda: run.vocab),
    }
    for name, relation in SITE_RELATIONS.items():
        if relation.exists_in(run):
            scan = SiteScan(run, relation, labels, log)
            relations[name] = LazyDataset(scan.schema, scan.batches)
    if "attn_band" in run.sites:
        relations["attn_band"] = LazyDataset(ATTN_BAND, band_scan(run, labels, log))
    return relations


def _table(schema: pa.Schema, read: Callable[[], pa.Table]) -> LazyDataset:
    def tables() -> Iterator[pa.Table]:
        yield read()

    return LazyDataset(schema, table_scan(tables))
