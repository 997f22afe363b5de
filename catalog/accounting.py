"""Row accounting: every document stored, cut or refused exactly once, and every row in exactly one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .inspection import open_sealed_parquet
from .manifest import Manifest, Partition
from .problem import Deviation, require
from .shapes import ModelShape

__all__ = ["DocumentPart", "read_document_part", "verify_attn_band", "verify_token_part"]

Ints = npt.NDArray[np.int64]

_N_DISTANCES = 17
_LATE = 17


@dataclass(frozen=True, slots=True)
class DocumentPart:
    """The documents that one capture added, of which those that have rows are listed, in order."""

    numbers: Ints
    lengths: Ints
    """Tokens of each."""
    partitions: Ints
    row_starts: Ints
    n_all: int
    """Documents, refused ones included."""
    n_cut: int
    n_refused: int

    def of_partition(self, index: int) -> tuple[Ints, Ints]:
        """Return numbers and lengths of the documents in a partition."""
        inside = self.partitions == index
        return self.numbers[inside], self.lengths[inside]


def read_document_part(content: bytes, manifest: Manifest, first: int | None) -> DocumentPart:
    """Hold a part of the table ``documents`` against the manifest.

    Parameters
    ----------
    content : bytes
        The part.
    manifest : Manifest
        The run.
    first : int, optional
        The number that its first document should have; None if that is not known.

    Raises
    ------
    Deviation
        A document is numbered, placed or counted otherwise than it should be.
    """
    columns = ["document", "status", "n_tokens", "n_source_tokens", "partition", "row_start", "pair_start"]
    table = open_sealed_parquet(content).read(columns=columns)
    numbers = _ints(table["document"])
    start = first if first is not None else int(numbers[0]) if len(numbers) else 0
    _require_equal("number of the document", np.arange(start, start + len(numbers)), numbers)
    is_refused, is_cut = (
        pc.equal(table["status"], status).to_numpy(zero_copy_only=False) for status in ("refused", "cut")
    )
    known = pc.is_in(table["status"], pa.array(["stored", "cut", "refused"])).to_numpy(zero_copy_only=False)
    require("documents that are neither stored, cut nor refused", 0, int((~known).sum()))
    refused = table.filter(pa.array(is_refused))
    require("tokens of refused documents", 0, int(_ints(refused["n_tokens"]).sum()))
    places = [refused[name].null_count for name in ("partition", "row_start", "pair_start")]
    require("refused documents without a place", [refused.num_rows] * 3, places)
    table = table.filter(pa.array(~is_refused))
    lengths = _ints(table["n_tokens"])
    too_long = int(((lengths < 1) | (lengths > manifest.geometry.context)).sum())
    require("documents without a token, or longer than the context", 0, too_long)
    _require_equal("document that is cut", lengths < _ints(table["n_source_tokens"]), is_cut[~is_refused])
    part = DocumentPart(
        numbers[~is_refused], lengths, _ints(table["partition"]), _ints(table["row_start"]),
        n_all=len(numbers), n_cut=int(is_cut.sum()), n_refused=int(is_refused.sum()),
    )  # fmt: skip
    _verify_places(part, _ints(table["pair_start"]), manifest)
    return part


def _verify_places(part: DocumentPart, pair_starts: Ints, manifest: Manifest) -> None:
    """Raise Deviation unless the documents lie end to end in their partitions, and fill them as the manifest says."""
    known = {partition.index: partition for partition in manifest.partitions}
    geometry = manifest.geometry
    require("partitions in order", sorted(part.partitions.tolist()), part.partitions.tolist())
    rows, pairs = part.lengths, part.lengths * (part.lengths + 1) // 2
    indices, firsts, members = np.unique(part.partitions, return_index=True, return_inverse=True)
    n_pairs = geometry.partition_tokens * (geometry.context + 1) // 2
    for what, sizes, capacity, starts in (
        ("first row of the document", rows, geometry.partition_tokens, part.row_starts),
        ("first pair of the document", pairs, n_pairs, pair_starts),
    ):
        before = np.cumsum(sizes) - sizes
        _require_equal(what, part.partitions * capacity + before - before[firsts][members], starts)
    for place, index in enumerate(indices.tolist()):
        inside = members == place
        held = Partition(index, int(rows[inside].sum()), int(pairs[inside].sum()), int(inside.sum()))
        require(f"partition {index}", known.get(index, "none of this number"), held)
        require(f"partition {index} within its capacity", True, held.n_rows <= geometry.partition_tokens)


def verify_token_part(content: bytes, part: DocumentPart, shape: ModelShape) -> int:
    """Hold a part of the table ``tokens`` against the documents of the same capture, and return its rows.

    Raises
    ------
    Deviation
        A row is missing, one too many, or not where its document says.
    """
    ends = np.cumsum(part.lengths)
    file = open_sealed_parquet(content)
    require("tokens of the documents", int(part.lengths.sum()), file.metadata.num_rows)
    n_rows = 0
    for batch in file.iter_batches(columns=["row", "document", "position", "token_id"]):
        place = np.arange(n_rows, n_rows + batch.num_rows)
        document = np.searchsorted(ends, place, side="right")
        position = place - (ends - part.lengths)[document]
        _require_equal("row of the token", part.row_starts[document] + position, _ints(batch["row"]))
        _require_equal("document of the token", part.numbers[document], _ints(batch["document"]))
        _require_equal("position of the token", position, _ints(batch["position"]))
        token_ids = _ints(batch["token_id"])
        strange = int(((token_ids < 0) | (token_ids >= shape.n_vocab)).sum())
        require("tokens that the model does not have", 0, strange)
        n_rows += batch.num_rows
    return n_rows


def verify_attn_band(content: bytes, numbers: Ints, lengths: Ints, shape: ModelShape) -> int:
    """Hold one partition of ``attn_band`` against its documents, and return how many sums are not finite.

    Raises
    ------
    Deviation
        A row is missing, one too many or of another document, or counts other queries than there are.
    """
    table = open_sealed_parquet(content).read()
    sizes = (len(numbers), shape.n_layers, shape.n_heads, 2)
    require("rows (document, layer, head, queries)", int(np.prod(sizes)), table.num_rows)
    document, layer, head, is_late = (axis.reshape(-1) for axis in np.indices(sizes))
    _require_equal("document", numbers[document], _ints(table["document"]))
    _require_equal("layer", layer, _ints(table["layer"]))
    _require_equal("head", head, _ints(table["head"]))
    _require_equal("queries", np.array(["all", "late"], object)[is_late], table["queries"].to_numpy())
    # the queries t of a document of n tokens that have a token at distance k: k … n-1; late ones: 17 … n-1
    first = np.where(is_late[:, None], _LATE, np.arange(_N_DISTANCES))
    n_tokens = lengths[document]
    counts = np.maximum(n_tokens[:, None] - first, 0)
    _require_equal("distance_counts", counts, _lists(table["distance_counts"]))
    bos_counts = np.maximum(n_tokens - np.where(is_late, _LATE, 1), 0)
    _require_equal("bos_count", bos_counts, _ints(table["bos_count"]))
    sums = _lists(table["distance_sums"]), table["bos_sum"].to_numpy()
    return sum(int((~np.isfinite(values)).sum()) for values in sums)


def _ints(column: Any) -> Ints:
    if column.null_count:
        raise Deviation("empty cells", 0, column.null_count)
    values: Ints = (
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    )
    return values.astype(np.int64, copy=False)


def _lists(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return lists of 17 as ``[row, distance]``."""
    values: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, _N_DISTANCES)


def _require_equal(what: str, expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
    """Raise Deviation that tells of the first row that differs."""
    if expected.shape != found.shape:
        raise Deviation(f"rows of {what}", expected.shape, found.shape)
    differs = (expected != found).reshape(len(found), -1).any(axis=1) if len(found) else np.zeros(0, bool)
    if differs.any():
        row = int(np.argmax(differs))
        raise Deviation(f"{what} in row {row}", expected[row], found[row])
