"""Results as text or Parquet: a box or Markdown for people, the others for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..catalog.errors import QueryError, did_you_mean
from .syntax import quoted
from .translation import translated

if TYPE_CHECKING:
    import duckdb

__all__ = ["FORMATS", "format_result", "write_result"]

FORMATS = ("table", "csv", "json", "parquet", "markdown")
"""How a result can be written; all but Parquet are text."""

_BATCH_ROWS = 4096

_NUMBERS = {
    "tinyint", "smallint", "integer", "bigint", "hugeint", "utinyint", "usmallint", "uinteger", "ubigint", "uhugeint",
    "float", "double", "decimal",
}  # fmt: skip
_PLAIN_TYPES = {*_NUMBERS, "boolean", "varchar", "list", "array", "struct", "null"}
"""DuckDB's types that CSV and JSON can say; values of the others are written as DuckDB's own text."""


def format_result(relation: duckdb.DuckDBPyRelation, kind: str = "table", *, max_rows: int = 50) -> str:
    """Return a result as text; see :func:`write_result`, which does not hold all of it."""
    if kind == "parquet":
        raise QueryError(
            "Parquet is not text.", hint="Write it to a file: write_result(relation, 'parquet', file)."
        )
    stream = io.StringIO()
    write_result(relation, kind, stream, max_rows=max_rows)
    return stream.getvalue()


def write_result(
    relation: duckdb.DuckDBPyRelation, kind: str, stream: IO[Any], *, max_rows: int = 50
) -> None:
    """Run a query and write its rows: as text, ending in a newline, or as a Parquet file.

    All but ``table`` write all rows, as they come. In text, numbers are the shortest that read back as the same
    value in their own precision, vectors are lists (JSON lists inside a CSV or Markdown field).

    Parameters
    ----------
    relation : DuckDBPyRelation
        The query.
    kind : str
        ``table``: a box with the first rows, and a line that says how many there are. ``csv``: a header and
        a line for each row; NULL is an empty field. ``json``: one array of objects; NaN and the infinities,
        which JSON lacks, are null. ``parquet``: DuckDB's own types. ``markdown``: a table; NULL is an empty
        field, and a newline is a backslash and an n.
    stream : text file, or binary file for Parquet
        Where to.
    max_rows : int
        The rows of a box.

    Raises
    ------
    QueryError
        There is no such kind, Parquet has no such type, or the query fails as it runs.
    """
    if kind not in FORMATS:
        raise QueryError(
            f"A result cannot be written as '{kind}'.{did_you_mean(kind, FORMATS)}",
            hint=f"--format is one of {', '.join(FORMATS)}.",
        )
    with translated():
        if kind == "csv":
            _write_csv(relation, stream)
        elif kind == "json":
            _write_json(relation, stream)
        elif kind == "parquet":
            _write_parquet(relation, stream)
        elif kind == "markdown":
            _write_markdown(relation, stream)
        else:
            stream.write(_box(relation, max_rows).rstrip() + "\n")


def _box(relation: duckdb.DuckDBPyRelation, max_rows: int) -> str:
    if relation.columns == ["explain_key", "explain_value"]:
        return "\n".join(str(row[1]) for row in relation.fetchall())  # a plan is a drawing of its own
    return relation.preview(max_rows)


def _write_csv(relation: duckdb.DuckDBPyRelation, stream: IO[str]) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(relation.columns)
    for row in _rows(relation):
        writer.writerow(map(_field, row))


def _write_json(relation: duckdb.DuckDBPyRelation, stream: IO[str]) -> None:
    between = "["
    for row in _rows(relation):
        item = dict(zip(relation.columns, map(_finite, row), strict=True))
        stream.write(f"{between}\n{json.dumps(item, ensure_ascii=False, allow_nan=False)}")
        between = ","
    stream.write("[]\n" if between == "[" else "\n]\n")


def _write_parquet(relation: duckdb.DuckDBPyRelation, stream: IO[bytes]) -> None:
    reader = relation.to_arrow_reader(_BATCH_ROWS)
    try:
        with pq.ParquetWriter(stream, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
    except pa.ArrowNotImplementedError as error:
        raise QueryError(
            f"Parquet cannot hold this: {error}", hint="Cast the column: column::VARCHAR."
        ) from error


def _write_markdown(relation: duckdb.DuckDBPyRelation, stream: IO[str]) -> None:
    are_numbers = [kind.id in _NUMBERS for kind in relation.types]
    _write_line(stream, relation.columns)
    _write_line(stream, ["---:" if is_number else "---" for is_number in are_numbers])
    for row in _rows(relation):
        _write_line(stream, ["" if value is None else str(_field(value)) for value in row])


def _write_line(stream: IO[str], fields: Sequence[str]) -> None:
    escaped = (text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n") for text in fields)
    stream.write(f"| {' | '.join(escaped)} |\n")


def _field(value: Any) -> Any:
    """Return a plain value as a field of a line: what is no number or text is JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else value


def _rows(relation: duckdb.DuckDBPyRelation) -> Iterator[list[Any]]:
    """Yield the rows as plain values, a batch at a time."""
    if any(kind.id not in _PLAIN_TYPES for kind in relation.types):
        relation = relation.project(
            ", ".join(
                f"#{place} AS {quoted(name)}"
                if kind.id in _PLAIN_TYPES
                else f"#{place}::VARCHAR AS {quoted(name)}"
                for place, (name, kind) in enumerate(
                    zip(relation.columns, relation.types, strict=True), start=1
                )
            )
        )
    for batch in relation.to_arrow_reader(_BATCH_ROWS):
        columns = [[_plain(value, column.type) for value in column.to_pylist()] for column in batch.columns]
        yield from map(list, zip(*columns, strict=True))


def _plain(value: Any, kind: pa.DataType) -> Any:
    """Return a value as what JSON knows: a number, a bool, text, a list or an object."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(str(np.float32(value))) if kind == pa.float32() else value
    if isinstance(value, Decimal):  # an integer of 128 bits is a decimal in Arrow
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, kind.field(name).type) for name, item in value.items()}
    return str(value)


def _finite(value: Any) -> Any:
    """Return a plain value with null in place of the numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value
