"""What is known of each row of a site without reading it: document, position, token, text, query, key."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.manifest import Partition
from ..catalog.run import Run

__all__ = ["PAIR_LABELS", "TOKEN_LABELS", "Labels"]

TOKEN_LABELS: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "document": pa.int64(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "text": pa.string(),
}
"""The columns that label a token row."""

PAIR_LABELS: dict[str, pa.DataType] = {"document": pa.int64(), "query": pa.int32(), "key": pa.int32()}
"""The columns that label a (query, key) pair."""

_PIECE_ROWS = 1 << 16


class Labels:
    """The labels of one run's rows; the token, document and vocabulary tables are read when first needed.

    Parameters
    ----------
    run : Run
        The snapshot that is read.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def tokens(self, start: int, stop: int, *, with_text: bool = True) -> pa.Table:
        """Return the labels of the stored tokens with ``start <= row < stop``, in order (``TOKEN_LABELS``)."""
        first, last = np.searchsorted(self._rows, (start, stop))
        return self._labelled(self.run.tokens.slice(first, last - first), with_text=with_text)

    def all_tokens(self) -> Iterator[pa.Table]:
        """Yield the labels of all tokens, some ten thousand at a time."""
        for first in range(0, self.run.tokens.num_rows, _PIECE_ROWS):
            yield self._labelled(self.run.tokens.slice(first, _PIECE_ROWS), with_text=True)

    def pairs(self, partition: Partition) -> pa.Table:
        """Return the labels of a partition's pairs, and each pair's place on the pair axis (``__index``).

        Memory: 24 bytes a pair. Packing: ``pair_start + query·(query+1)/2 + key``, 0 ≤ key ≤ query.
        """
        inside = pc.equal(self.run.stored_documents["partition"], partition.index)
        documents = self.run.stored_documents.filter(inside)
        number = documents["document"].to_numpy()
        lengths, starts = documents["n_tokens"].to_numpy(), documents["pair_start"].to_numpy()
        queries = [np.repeat(np.arange(n, dtype=np.int32), np.arange(1, n + 1)) for n in lengths]
        counts = [len(query) for query in queries]
        # within a document pairs are dense and query-major, so the key is the distance to the query's first pair
        within = [np.arange(n) for n in counts]
        keys = [
            pair - query.astype(np.int64) * (query + 1) // 2
            for pair, query in zip(within, queries, strict=True)
        ]
        index = [start + pair for start, pair in zip(starts, within, strict=True)]
        columns = [np.repeat(number, counts), np.concatenate(queries), np.concatenate(keys).astype(np.int32)]
        table = pa.table(dict(zip(PAIR_LABELS, columns, strict=True)))
        return table.append_column("__index", pa.array(np.concatenate(index)))

    def guarantee(self, partition: Partition) -> pc.Expression:
        """Return what is known of the documents of all rows of a partition (for ``dataset.possible``)."""
        first, last = self._document_bounds[partition.index]
        return (pc.field("document") >= first) & (pc.field("document") <= last)

    @cached_property
    def _document_bounds(self) -> dict[int, tuple[int, int]]:
        grouped = self.run.stored_documents.group_by("partition").aggregate([("document", "min_max")])
        bounds = zip(grouped["partition"].to_pylist(), grouped["document_min_max"].to_pylist(), strict=True)
        return {partition: (found["min"], found["max"]) for partition, found in bounds}

    @cached_property
    def _rows(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        # ascending: partitions are filled in order, and an extension begins at the next free one
        return np.asarray(self.run.tokens["row"])

    @cached_property
    def _vocab(self) -> tuple[pa.Array, pa.Array]:
        vocab = self.run.vocab.combine_chunks()
        return vocab["token_id"].combine_chunks(), vocab["text"].combine_chunks()

    def _labelled(self, tokens: pa.Table, *, with_text: bool) -> pa.Table:
        """Add the text; NULL for an id without one (the padding of an unembedding)."""
        if not with_text:
            return tokens
        ids, texts = self._vocab
        return tokens.append_column("text", texts.take(pc.index_in(tokens["token_id"].combine_chunks(), ids)))
