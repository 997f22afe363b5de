"""The tables of a run and of a model: Parquet parts, named by the manifest.

``documents``
    One row a document, refused ones included: a text, a window of several, or a prompt of a task.
``tokens``
    One row a stored token. ``row`` is its place on the token axis of every site.
``vocab``
    One row a token id of the model.
``attn_band``
    One row a document, layer, head and set of queries: sums of attention (:mod:`layerlake.catalog.bands`).
    Not a table of parts: one object a partition, as of any other site.
``objects``
    One row a written object of a site, with its length and checksum.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .bands import MAX_DISTANCE, N_SUMS, QUERIES, band_counts
from .errors import CorruptRun, decoding
from .seal import SEAL_FIELD, UNSEALED, is_intact, seal
from .stores import Store

__all__ = [
    "ATTN_BAND",
    "DOCUMENTS",
    "OBJECTS",
    "TOKENS",
    "VOCAB",
    "attn_band_sums",
    "attn_band_table",
    "read_part",
    "read_parts",
    "to_parquet",
]

DOCUMENTS = pa.schema(
    [
        pa.field("document", pa.int64(), nullable=False),  # number of the document, from 0
        pa.field("status", pa.string(), nullable=False),  # stored | cut | refused
        pa.field("reason", pa.string()),  # why it was cut or refused
        pa.field("sources", pa.list_(pa.string()), nullable=False),  # where in the dataset it came from
        pa.field("n_tokens", pa.int32(), nullable=False),  # stored tokens, BOS included
        pa.field("n_source_tokens", pa.int32(), nullable=False),  # before cutting, BOS included
        pa.field("partition", pa.int32()),
        pa.field("row_start", pa.int64()),
        pa.field("pair_start", pa.int64()),
        # of task data, NULL for plain text
        pa.field("task", pa.string()),
        pa.field("split", pa.string()),
        pa.field("item", pa.int64()),  # number of the row in its dataset, from 0
        pa.field("role", pa.string()),  # sentence1, sentence2; choice0, …; continuation
        pa.field(
            "label", pa.int32()
        ),  # of the item: same sense (1) or not, or the number of the right choice
        pa.field("word", pa.string()),  # the word in question, as a dictionary has it
        pa.field("span_start", pa.int32()),  # first position of the word or the continuation,
        pa.field("span_end", pa.int32()),  # and the one after its last
        pa.field("span_chars", pa.int32()),  # its characters, without the blank in front of a continuation
    ]
)
TOKENS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("document", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
    ]
)
VOCAB = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
    ]
)
ATTN_BAND = pa.schema(
    [
        pa.field("document", pa.int64(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("head", pa.int32(), nullable=False),
        pa.field("queries", pa.string(), nullable=False),  # all | late, which is t ≥ 17
        # by distance, 0 … 16
        pa.field("distance_sums", pa.list_(pa.float32(), MAX_DISTANCE + 1), nullable=False),
        pa.field("distance_counts", pa.list_(pa.int32(), MAX_DISTANCE + 1), nullable=False),
        pa.field("bos_sum", pa.float32(), nullable=False),
        pa.field("bos_count", pa.int32(), nullable=False),
    ]
)
OBJECTS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),  # inside the run's folder
        pa.field("site", pa.string(), nullable=False),
        pa.field("layer", pa.int32()),  # NULL where all layers are in one object (attn_band)
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("crc32", pa.string(), nullable=False),  # not crc32c: see capture.writer
    ]
)


def attn_band_table(
    documents: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], sums: npt.NDArray[np.float32]
) -> pa.Table:
    """Return band sums as rows (:data:`ATTN_BAND`), sorted as given by document, layer, head, queries.

    Parameters
    ----------
    documents, lengths : int64 ``[document]``
        The documents' numbers and their tokens.
    sums : float32 ``[document, layer, head, query set, sum]``
        As :func:`layerlake.catalog.bands.band_sums` has them, layer by layer.
    """
    places = np.indices(sums.shape[:-1]).reshape(sums.ndim - 1, -1)  # [place, row]
    document, layer, head, query_set = places
    counts = band_counts(lengths)[document, query_set].astype(np.int32)
    flat = sums.reshape(-1, N_SUMS)
    columns = {
        "document": documents[document],
        "layer": layer.astype(np.int32),
        "head": head.astype(np.int32),
        "queries": pa.DictionaryArray.from_arrays(query_set, list(QUERIES)).cast(pa.string()),
        "distance_sums": _lists(flat[:, :-1]),
        "distance_counts": _lists(counts[:, :-1]),
        "bos_sum": flat[:, -1],
        "bos_count": counts[:, -1],
    }
    return pa.table(columns, schema=ATTN_BAND)


def attn_band_sums(table: pa.Table, n_layers: int, n_heads: int) -> npt.NDArray[np.float32]:
    """Return the sums in whole documents' rows: float32 ``[document, layer, head, query set, sum]``."""
    table = table.combine_chunks()
    distances = table["distance_sums"].combine_chunks().flatten().to_numpy().reshape(-1, MAX_DISTANCE + 1)
    sums: npt.NDArray[np.float32] = np.column_stack([distances, table["bos_sum"].to_numpy()])
    return sums.reshape(-1, n_layers, n_heads, len(QUERIES), N_SUMS)


def _lists(values: npt.NDArray[np.generic]) -> pa.Array:
    """Return ``[row, item]`` as lists of fixed size."""
    items = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(items, values.shape[1])


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file, sealed; equal tables give equal bytes."""
    # measured numbers hardly ever repeat: a dictionary of them makes band sums half as large again, while their first
    # bytes are alike, and in zones, made of float16, their last
    is_measured = {_leaf(field): pa.types.is_floating(_item_type(field.type)) for field in table.schema}
    measured = [name for name, is_so in is_measured.items() if is_so]
    repeating = [name for name, is_so in is_measured.items() if not is_so]
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer, table.schema, compression="zstd", use_dictionary=repeating, use_byte_stream_split=measured
    ) as writer:
        writer.write_table(table, row_group_size=1 << 16)
        writer.add_key_value_metadata({SEAL_FIELD: UNSEALED})
    return seal(buffer.getvalue())


def _leaf(field: pa.Field) -> str:
    """Return the path of a column's values in a Parquet file."""
    return f"{field.name}.list.element" if _item_type(field.type) is not field.type else str(field.name)


def _item_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a list's items, and any other type as it is."""
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else kind


def read_parts(store: Store, names: Iterable[str], schema: pa.Schema | None = None) -> pa.Table:
    """Read Parquet parts as one table, in the order given; with ``schema``, no parts give an empty table.

    Raises
    ------
    CorruptRun
        A part is gone, or is not what was written.
    """
    tables = [read_part(store, name) for name in names]
    if not tables and schema is not None:
        return schema.empty_table()
    return pa.concat_tables(tables, promote_options="default")


def read_part(
    store: Store, name: str, *, columns: Sequence[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """Read one Parquet object, or some of its columns and rows.

    Raises
    ------
    CorruptRun
        It is gone, or is not what was written.
    """
    hint = f"See what else is damaged: layerlake verify {store.url}"
    try:
        content = store.read(name)
    except FileNotFoundError as error:
        raise CorruptRun(f"{store.url}/{name} is gone.", hint=hint) from error
    if not is_intact(content):  # Arrow reads past a changed value
        raise CorruptRun(f"{store.url}/{name} is not what was written: its checksum does not fit.", hint=hint)
    with decoding(f"{store.url}/{name}"):
        return pq.read_table(
            pa.BufferReader(content),
            columns=None if columns is None else list(columns),
            filters=where,
            pre_buffer=False,  # else a thread of Arrow's may hold the bytes when the interpreter has ended
        )
