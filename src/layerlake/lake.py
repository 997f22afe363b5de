"""The lake as a user meets it: the catalog's lake, with SQL, analyses and the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .catalog.findings import Finding
from .catalog.lake import Lake as CatalogLake

if TYPE_CHECKING:
    import duckdb

    from .analyze.series import Axis

__all__ = ["Lake", "open_lake"]


class Lake(CatalogLake):
    """A lake, opened for reading; findings are the only thing that it adds."""

    def sql(
        self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None, *, run: str | None = None
    ) -> duckdb.DuckDBPyRelation:
        """Ask a question in SQL, read-only.

        Parameters
        ----------
        query : str
            One SELECT, EXPLAIN, DESCRIBE or SHOW.
        params : sequence or mapping, optional
            Values of the query's ``?`` or ``$name``.
        run : str, optional
            The run whose relations (``resid``, ``tokens``, …) need no schema in front; the only run if None.

        Returns
        -------
        duckdb.DuckDBPyRelation
            Lazy; ``.df()``, ``.pl()``, ``.to_arrow_table()``, ``.fetchall()``, ``.show()``. It cannot write
            files: they are out of reach.

        Raises
        ------
        QueryError
            The SQL is wrong, or is not a read. What fails only when the rows are fetched (a cast of a
            value, say) is DuckDB's own ``duckdb.Error``.
        """
        from . import sql

        return sql.query(self, query, params=params, run=run)

    def connect(self, *, run: str | None = None) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection with the lake's relations registered and the configuration locked."""
        from . import sql

        return sql.connect(self, run=run)

    def analyze(
        self,
        name: str,
        *,
        run: str | Sequence[str] = (),
        scheduler: str = "threads",
        exclude_nonfinite: bool = False,
        **options: Any,
    ) -> Finding:
        """Compute an analysis for some runs, or read it from the lake if that was done before.

        Parameters
        ----------
        name : str
            lens, cka, neurons, attention_locality, subjoiner, wic, ing or norms.
        run : str or sequence of str
            Runs by id or unique prefix; all runs if empty.
        scheduler : str
            Dask's: ``synchronous``, ``threads``, or the address of a cluster.
        exclude_nonfinite : bool
            Leave out documents that hold NaN or infinities, which are an error otherwise.
        **options
            The analysis's own options; see ``layerlake analyze LAKE NAME --help``.

        Raises
        ------
        AnalysisError
            There is no such analysis or option, or the data do not allow it.
        SiteNotFound
            A run lacks a site that the analysis reads; the hint is the command that captures it.
        """
        from .analyze.analyses import run_analysis

        prefixes = (run,) if isinstance(run, str) else tuple(run)
        return run_analysis(
            self,
            name,
            runs=prefixes,
            options=options,
            scheduler=scheduler,
            exclude_nonfinite=exclude_nonfinite,
        )

    def report(
        self, path: str | os.PathLike[str], *, run: str | Sequence[str] = (), axis: Axis = "depth"
    ) -> None:
        """Write the findings of some runs (all if empty) as one self-contained HTML file.

        Layer l of L stands in the middle of its block, at (l + 0.5)/L of the depth; with axis ``paper`` at l/(L - 1).
        """
        from .analyze.report import write_report

        write_report(self, path, runs=(run,) if isinstance(run, str) else tuple(run), axis=axis)


def open_lake(url: str | os.PathLike[str]) -> Lake:
    """Open a lake by its path or URL.

    Raises
    ------
    LakeNotFound
        There is no lake.
    FormatError
        It was written by a newer layerlake.
    """
    return Lake(url)
