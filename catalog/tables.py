"""The tables of a run and of a model: Parquet parts, named by the manifest.

``documents``
    One row an input document, refused ones included.
``tokens``
    One row a stored token. ``row`` is its place on the token axis of every site.
``vocab``
    One row a token id of the model.
``objects``
    One row a written shard, with its length and checksum.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from .stores import Store

__all__ = ["DOCUMENTS", "OBJECTS", "TOKENS", "VOCAB", "read_parts", "to_parquet"]

DOCUMENTS = pa.schema(
    [
        pa.field("document", pa.int64(), nullable=False),  # number of the input document, from 0
        pa.field("status", pa.string(), nullable=False),  # stored | cut | refused
        pa.field("reason", pa.string()),  # why it was cut or refused
        pa.field("source", pa.string(), nullable=False),  # where in the dataset it came from
        pa.field("n_tokens", pa.int32(), nullable=False),  # stored tokens, BOS included
        pa.field("n_source_tokens", pa.int32(), nullable=False),  # before cutting, BOS included
        pa.field("partition", pa.int32()),
        pa.field("row_start", pa.int64()),
        pa.field("pair_start", pa.int64()),
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
OBJECTS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),  # inside activations.zarr
        pa.field("site", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("crc32", pa.string(), nullable=False),  # not crc32c: see capture.writer
    ]
)


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=1 << 16)
    return buffer.getvalue()


def read_parts(store: Store, names: Iterable[str], schema: pa.Schema | None = None) -> pa.Table:
    """Read Parquet parts as one table, in the order given; with ``schema``, no parts give an empty table."""
    tables = [pq.read_table(io.BytesIO(store.read(name))) for name in names]
    if not tables and schema is not None:
        return schema.empty_table()
    return pa.concat_tables(tables, promote_options="default")
