"""Which rows of a site a query can need, as far as its joins and subqueries tell before any value is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .dataset import LazyDataset, mentions
from .labels import PAIR_LABELS, TOKEN_LABELS

if TYPE_CHECKING:
    from .scan import SiteScan

__all__ = ["Keys", "Restriction", "key_columns", "labels_of"]

_FEW = 1000
"""The values that are held against each partition one by one; of more, the smallest and the largest."""


class Keys:
    """A set of combinations of some of a site's integer columns.

    Parameters
    ----------
    table : pa.Table
        One row a combination. Rows with a NULL are no combination of any site.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.drop_null()
        columns = self._columns(self.table)
        self._low = [int(column.min(initial=0)) for column in columns]
        self._sizes = [
            int(column.max(initial=0)) - low + 1 for column, low in zip(columns, self._low, strict=True)
        ]
        self._codes = np.unique(self._encode(columns))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(self.table.column_names)

    @property
    def n_keys(self) -> int:
        """The combinations."""
        return len(self._codes)

    @property
    def guard(self) -> pc.Expression:
        """What is true of each column by itself: for partitions and layers to be held against."""
        return reduce(and_, map(self._bound, self.names))

    def _bound(self, name: str) -> pc.Expression:
        values = pc.unique(self.table[name])
        if len(values) <= _FEW:
            return pc.field(name).isin(values)
        ends = pc.min_max(values).as_py()
        return (pc.field(name) >= ends["min"]) & (pc.field(name) <= ends["max"])

    def pick(self, rows: pa.Table) -> pa.Table:
        """Return the rows whose combination is in the set, in their order."""
        columns = self._columns(rows)
        inside = np.ones(rows.num_rows, dtype=bool)
        for column, low, size in zip(columns, self._low, self._sizes, strict=True):
            inside &= (column >= low) & (column < low + size)
        if not len(self._codes) or not inside.any():
            return rows.slice(0, 0)
        codes = self._encode(columns)
        found = self._codes[np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)]
        return rows.filter(pa.array(inside & (found == codes)))

    def _columns(self, rows: pa.Table) -> list[npt.NDArray[np.int64]]:
        return [rows[name].to_numpy().astype(np.int64) for name in self.names]

    def _encode(self, columns: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        """Return one number for each combination: each column's value is a digit."""
        codes = np.zeros(len(columns[0]), dtype=np.int64)
        for column, low, size in zip(columns, self._low, self._sizes, strict=True):
            codes = codes * size + (column - low)
        return codes


@dataclass(frozen=True, slots=True)
class Restriction:
    """What the first phase has found out of one occurrence of a site relation in a query."""

    run: str
    relation: str
    columns: tuple[str, ...] = ()
    """The columns whose combinations are known."""
    n_keys: int | None = None
    """How many combinations; None where there is no such thing to know."""
    min_norm: float | None = None
    """What norm a vector has to reach, if the query says so: zones tell in which chunks none can."""

    def __str__(self) -> str:
        found = []
        if self.n_keys is not None:
            found.append(f"joins, subqueries and functions leave {self.n_keys} ({', '.join(self.columns)})")
        if self.min_norm is not None:
            found.append(f"zones tell where a norm can reach {self.min_norm:g}")
        return f"{self.relation} of {self.run}: {'; '.join(found)}"


def key_columns(scan: SiteScan, names: set[str]) -> list[str]:
    """Return the columns whose combinations tell as much of a site's rows as some columns do; a token's row tells all.

    ``names`` may have others than the site's.
    """
    axes = [name for name in scan.dimensions if name in names and name not in PAIR_LABELS]
    if scan.is_pairs:
        return [*axes, *(name for name in PAIR_LABELS if name in names)]
    return [*axes, *(["row"] if names & {*TOKEN_LABELS, "chunk"} else [])]


def labels_of(scan: SiteScan) -> LazyDataset:
    """Return a site's relation without its values, as a set: each combination of the columns asked for, once or more.

    What is not asked for does not multiply the rows: without ``layer`` there is one layer, without ``query`` and
    ``key`` one pair a document.
    """
    schema = scan.schema.remove(len(scan.schema) - 1)

    def batches(columns: Sequence[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        asked = {
            n for n in schema.names if n in columns or (where is not None and mentions(where, n, schema))
        }
        if "key" in asked:
            asked.add("query")  # a pair has query ≥ key: not every key is there at query 0
        spare = [pc.field(name) == 0 for name in scan.dimensions if name not in asked]
        conditions = spare if where is None else [where, *spare]
        return scan.batches(columns, reduce(and_, conditions) if conditions else None)

    return LazyDataset(schema, batches)
