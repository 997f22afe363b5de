"""A lazy table in the form that DuckDB knows how to ask: a pyarrow Dataset without data of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from pyarrow import acero

__all__ = ["LazyDataset", "Scan", "filtered", "mentions", "possible", "table_scan"]

Scan = Callable[[Sequence[str], pc.Expression | None], Iterator[pa.RecordBatch]]
"""What a table does when it is read: ``(columns, where) -> batches``.

The batches hold just the columns, in that order, and just the rows for which the filter is true: DuckDB
leaves to the source whatever it pushes down, and does not look again. It pushes comparisons, IN-lists and
NULL tests of a column with constants, joined by AND, OR and NOT; it keeps what it cannot push.
"""


class LazyDataset(pads.Dataset):  # type: ignore[misc]  # pyarrow has no types
    """A schema, and a scan that runs once for every time that a query reads the table.

    There is no C++ dataset behind it (Lance and xarray-sql register theirs in the same way): DuckDB calls
    ``schema`` and ``scanner`` and nothing else, so nothing else is answered.

    Parameters
    ----------
    schema : pa.Schema
        The columns. No string views, for which DuckDB would push nothing down.
    scan : Scan
        Reads the rows.
    """

    def __init__(self, schema: pa.Schema, scan: Scan) -> None:
        self._columns = schema  # and no super().__init__(), which is closed to Python
        self._scan = scan

    @property
    def schema(self) -> pa.Schema:
        """The columns of the whole table."""
        return self._columns

    def scanner(
        self,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,  # noqa: A002  # pyarrow's name
        **_: Any,
    ) -> _Scanner:
        """Return the scan of some columns of the rows for which a filter is true; nothing is read yet."""
        chosen = self._columns.names if columns is None else list(columns)
        schema = pa.schema([self._columns.field(name) for name in chosen])
        return _Scanner(schema, lambda: self._scan(chosen, filter))


class _Scanner:
    """A scan that is about to start: what a pyarrow Scanner is to DuckDB."""

    def __init__(self, schema: pa.Schema, start: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self.projected_schema = schema
        self._start = start

    def to_reader(self) -> pa.RecordBatchReader:
        """Start the scan; a batch is made when it is asked for."""
        return pa.RecordBatchReader.from_batches(self.projected_schema, self._start())


def table_scan(tables: Callable[[], Iterator[pa.Table]]) -> Scan:
    """Return the scan of a table that comes in pieces; they are read anew by every query."""

    def scan(columns: Sequence[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        for table in tables():
            kept = table if where is None else filtered(table, where)
            yield from kept.select(columns).to_batches()

    return scan


def filtered(table: pa.Table, where: pc.Expression) -> pa.Table:
    """Return the rows for which a filter is true, in their order (``Table.filter`` may shuffle batches)."""
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    node = acero.Declaration("filter", acero.FilterNodeOptions(where))
    return acero.Declaration.from_sequence([source, node]).to_table(use_threads=False)


def possible(
    where: pc.Expression | None, schema: pa.Schema, guarantees: Sequence[pc.Expression]
) -> list[int]:
    """Return which of some parts of a table can hold rows that pass a filter.

    Arrow itself simplifies the filter under each guarantee, as it does for the folders of a partitioned
    dataset, so this is right for every shape of filter, and columns without a guarantee may hold anything.
    Costs about 10 µs a part and reads nothing: the files of the dataset are names only.

    Parameters
    ----------
    where : Expression or None
        None keeps all.
    schema : pa.Schema
        The columns that the filter may name.
    guarantees : sequence of Expression
        For each part, what is true of all of its rows.

    Examples
    --------
    >>> layer = pc.field("layer")
    >>> schema = pa.schema([("layer", pa.int32()), ("value", pa.float32())])
    >>> possible((layer > 1) & (pc.field("value") < 0), schema, [layer == 0, layer == 1, layer == 2])
    [2]
    """
    if where is None:
        return list(range(len(guarantees)))
    form, files = pads.IpcFileFormat(), pafs.LocalFileSystem()
    parts = [
        form.make_fragment(str(index), files, partition_expression=guarantee)
        for index, guarantee in enumerate(guarantees)
    ]
    dataset = pads.FileSystemDataset(parts, schema, form, files)
    return sorted(int(part.path) for part in dataset.get_fragments(filter=where))


def mentions(where: pc.Expression, column: str, schema: pa.Schema) -> bool:
    """Tell whether a filter names a column: without the column, it cannot be applied."""
    others = pa.schema([field for field in schema if field.name != column])
    try:
        filtered(others.empty_table(), where)
    except pa.ArrowInvalid:
        return True
    return False
