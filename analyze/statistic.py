"""What every analysis is made of: units that are read together, and states that merge.

A :class:`Statistic` cuts its work into units, turns what each of them reads into a :class:`State`, and
turns the whole run's state into tables. A state is a set of rows by key, and merging is the union of
disjoint sets; no number is added to another before ``finalise``. So merging is exactly associative and
commutative, the empty state is exactly neutral, and neither partitions nor schedulers change a digit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.run import Run

__all__ = [
    "State",
    "Statistic",
    "Unit",
    "choose_sites",
    "lacking_sites",
    "read_rows",
    "require_finite",
    "tidy_table",
]

Block = TypeVar("Block")


@dataclass(frozen=True, slots=True)
class Unit:
    """What one task reads together: a part of the read set, and the grain of parallel work."""

    reads: tuple[tuple[str, int], ...]
    """(site or weight, layer or boundary) of each array that is read."""
    items: npt.NDArray[np.int64]
    """Which of the statistic's own tokens, documents or neurons are measured, in order."""


@dataclass(frozen=True, slots=True)
class State:
    """What a statistic has found so far: one row a key, sorted by key.

    Examples
    --------
    >>> a = State.of(np.array([[3], [1]]), np.array([[30.0], [10.0]]))
    >>> b = State.of(np.array([[2]]), np.array([[20.0]]))
    >>> a.union(b).keys.ravel().tolist(), b.union(a).values.ravel().tolist()
    ([1, 2, 3], [10.0, 20.0, 30.0])
    """

    keys: npt.NDArray[np.int64]
    """``[row, part]``: unique, in lexicographic order."""
    values: npt.NDArray[Any]
    """``[row, …]``: float64, or float32 where there is a row for each token."""

    @classmethod
    def of(cls, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> Self:
        """Return the state of these rows, given in any order.

        Raises
        ------
        ValueError
            A key occurs twice: two units measured the same thing.
        """
        keys = np.asarray(keys, dtype=np.int64)
        order = np.lexsort(keys.T[::-1])
        keys = keys[order]
        if (keys[1:] == keys[:-1]).all(axis=1).any():
            raise ValueError("A state holds a key twice: the units of a statistic overlap.")
        return cls(keys, values[order])

    @classmethod
    def empty(cls, n_parts: int, shape: Sequence[int], dtype: npt.DTypeLike = np.float64) -> Self:
        """Return the state without rows, whose keys have ``n_parts`` parts and whose rows have this shape."""
        return cls(np.empty((0, n_parts), dtype=np.int64), np.empty((0, *shape), dtype=dtype))

    def union(self, other: State) -> State:
        """Return the rows of both, which must be disjoint."""
        return State.of(np.concatenate([self.keys, other.keys]), np.concatenate([self.values, other.values]))

    def to_table(self) -> pa.Table:
        """Return the state as a table, one row a key: ``key`` and ``value`` are lists."""
        columns = {}
        for name, rows in (("key", self.keys), ("value", self.values)):
            flat = np.ascontiguousarray(rows).reshape(-1)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(rows.shape[1:])))
        return pa.table(columns)

    @classmethod
    def of_table(cls, table: pa.Table, zero: State) -> Self:
        """Rebuild a state from :meth:`to_table`; it is equal. ``zero`` has the shape of its rows."""
        lists = (table[name].combine_chunks() for name in ("key", "value"))
        keys, values = (each.flatten().to_numpy(zero_copy_only=False) for each in lists)
        shape = (len(table), *zero.values.shape[1:])
        return cls(keys.reshape(len(table), zero.keys.shape[1]), values.reshape(shape))


class Statistic(ABC, Generic[Block]):
    """One analysis of one run, as Dask may cut it up (:mod:`layerlake.analyze.reduce`).

    ``Block`` is what a unit reads: arrays, or an iterator over them where one task need not hold all at once.
    """

    @property
    @abstractmethod
    def key(self) -> Mapping[str, Any]:
        """Every parameter that changes the result; JSON values only."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """Return the read set: disjoint units that together cover it, in a fixed order."""

    def keys(self, unit: Unit) -> npt.NDArray[np.int64] | None:  # noqa: ARG002
        """Return the keys of the rows that a unit will measure: ``[row, part]``.

        What a shorter extent of the run has measured under these keys is then not measured again, so a key must
        stand for what is read. None if a row may change with the run's extent.
        """
        return None

    @property
    def is_extendable(self) -> bool:
        """Whether a longer extent of the run asks again for all that is read now, so that it is worth keeping."""
        return True

    @abstractmethod
    def read(self, run: Run, unit: Unit) -> Block:
        """Read what a unit names, and nothing else."""

    @abstractmethod
    def zero(self) -> State:
        """Return the neutral state."""

    @abstractmethod
    def measure(self, block: Block) -> State:
        """Return the state of one block."""

    def update(self, state: State, block: Block) -> State:
        """Return the state with a block added."""
        return self.merge(state, self.measure(block))

    def merge(self, a: State, b: State) -> State:
        """Return the state of both parts of the read set, which are disjoint."""
        return a.union(b)

    @abstractmethod
    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return the tables by view name, the main one first."""


def choose_sites(run: Run, alternatives: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the first of some sets of sites that the run holds whole.

    Raises
    ------
    SiteNotFound
        It holds none of them; the error is about all that it lacks of the first.
    """
    run.require_sites(*lacking_sites(run, alternatives))
    return next(tuple(sites) for sites in alternatives if all(map(run.has_site, sites)))


def lacking_sites(run: Run, alternatives: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return what a run lacks of the first of some sets of sites, or nothing if it holds one of them whole."""
    if any(all(map(run.has_site, sites)) for sites in alternatives):
        return ()
    return tuple(site for site in alternatives[0] if not run.has_site(site))


def read_rows(run: Run, site: str, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Read given rows of one layer of a site: ``[token, width]``, in the stored dtype (bfloat16 as float32).

    Reads the chunks that hold a row. Not for ``pattern``.

    Parameters
    ----------
    run : Run
        The run.
    site : str
        The site.
    layer : int
        The layer, or boundary.
    rows : int64 ``[token]``
        Rows of the token axis, ascending.

    Raises
    ------
    AnalysisError
        A value is NaN or infinite.
    """
    values = run.read_rows(site, layer, rows)
    require_finite(run, site, layer, values)
    return values


def require_finite(run: Run, site: str, layer: int, values: npt.NDArray[Any]) -> None:
    """Raise unless all values are numbers.

    Raises
    ------
    AnalysisError
        Some are NaN or infinite; the message says where and how many.
    """
    n_bad = values.size - np.count_nonzero(np.isfinite(values))
    if n_bad:
        raise AnalysisError(
            f"Run {run.run_id} holds {n_bad} values that are not finite (NaN or infinite) among the {values.size} "
            f"just read of site '{site}', layer {layer}.",
            hint="Nothing was averaged over them. Leave out the documents that hold them: --exclude-nonfinite. "
            f"Are they as captured? layerlake verify LAKE --run {run.run_id}",
        )


def tidy_table(run: str, columns: Mapping[str, Any], params: Mapping[str, Any]) -> pa.Table:
    """Return a tidy table: ``run``, the columns, then every parameter that is not among them.

    Integer columns of numpy and float ones keep their width, NaN becomes NULL, strings and parameters
    repeat in every row where they are given once.

    Examples
    --------
    >>> table = tidy_table("r", {"layer": np.arange(2, dtype=np.int32), "x": np.array([0.5, np.nan])}, {"k": "a"})
    >>> table.to_pylist()[1]
    {'run': 'r', 'layer': 1, 'x': None, 'k': 'a'}
    """
    given = {"run": run, **columns, **{name: value for name, value in params.items() if name not in columns}}
    n_rows = next(len(column) for column in columns.values() if not isinstance(column, str | float | int))
    arrays = {name: _arrow(value, n_rows) for name, value in given.items()}
    return pa.table(arrays, schema=pa.schema([(name, array.type) for name, array in arrays.items()]))


def _arrow(value: Any, n_rows: int) -> pa.Array:
    """Return a column; a single value is repeated."""
    if isinstance(value, pa.Array):
        return value
    if isinstance(value, np.ndarray):
        return pa.array(value, from_pandas=True)  # NaN → NULL
    if isinstance(value, str | float | int):  # bool is an int to Python, and a boolean to Arrow
        return pa.repeat(pa.scalar(value), n_rows)
    return pa.array(value, pa.string())
