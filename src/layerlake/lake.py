"""The lake as a user meets it: the catalog's lake, with SQL, analyses and the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .catalog.findings import Finding
from .catalog.lake import Lake as CatalogLake

if TYPE_CHECKING:
    import duckdb
    import numpy.typing as npt
    import pyarrow as pa

    from .analyze.series import Axis
    from .sql import Explanation

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

    def explain(
        self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None, *, run: str | None = None
    ) -> Explanation:
        """Run a query as :meth:`sql` does, and tell what it read of the sites: chunks and bytes, of how many."""
        from . import sql

        return sql.explain(self, query, params=params, run=run)

    def connect(self, *, run: str | Sequence[str] | None = None) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection with the lake's relations registered and the configuration locked.

        Its queries are DuckDB's alone: what joins and subqueries spare is spared by :meth:`sql`.

        Parameters
        ----------
        run : str or sequence of str, optional
            Runs by id or unique prefix; a single one's relations need no schema in front. All runs if None.
        """
        from . import sql

        return sql.connect(self, run=run)

    def top_tokens(
        self, site: str, layer: int, unit: int, k: int = 10, *, run: str | None = None
    ) -> pa.Table:
        """Return the k tokens at which a unit has its largest values, the largest first.

        Reads the chunks that zones leave in question, of the layer; without zones, all of them.

        Parameters
        ----------
        site : str
            A relation with vectors: ``mlp_post``, ``resid``, ``resid_mid``, …
        layer, unit : int
            Which, from 0; the boundary, of ``resid``.
        k : int
            How many.
        run : str, optional
            The run, by id or unique prefix; the only run if None.

        Returns
        -------
        pa.Table
            row, document, position, text, value.

        Raises
        ------
        SiteNotFound
            There is no such site, or the run lacks it.
        QueryError
            The site has no such layer or unit.
        """
        from .sql.top_tokens import top_tokens

        return top_tokens(self.run(run), site, layer, unit, k)

    def save_direction(
        self,
        name: str,
        vector: npt.ArrayLike,
        *,
        site: str | None = None,
        layer: int | None = None,
        run: str | None = None,
        normalise: bool = False,
        replace: bool = False,
    ) -> None:
        """Keep a vector under a name, for ``project(vec, 'name')`` in SQL; ``FROM directions`` lists them.

        Parameters
        ----------
        name : str
            A model has one direction of each name. Saving the same again does nothing.
        vector : array ``[width]``
            A probe's weights, a difference of means, a column of the unembedding: finite numbers, kept as float32.
        site, layer : str and int, optional
            What it is a direction in; recorded, and its width checked.
        run : str, optional
            The run that it was drawn from, by id or unique prefix; the only run if None. All runs of its model see it.
        normalise : bool
            Divide it by its Euclidean norm first: a projection is the dot product with what is stored.
        replace : bool
            Take the place of another one of that name, saved with the same run.

        Raises
        ------
        AnalysisError
            It is no direction, or the name is taken.
        SiteNotFound
            The model has no such site or layer.
        """
        from .sql.directions import save_direction

        save_direction(
            self.run(run), name, vector, site=site, layer=layer, normalise=normalise, replace=replace
        )

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
            lens, cka, neurons, attention_locality, subjoiner, wic, ing, norms, intervention_summary, swap_cosines,
            benchmarks or stages.
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
