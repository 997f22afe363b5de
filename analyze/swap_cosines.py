"""How like what attention and MLP give stays when two neighbouring layers change places.

After arXiv 2406.19384, A.4, Figures 17 and 18. Measured by ``layerlake intervene --swap-cosines``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from .inputs import Input, NoOptions
from .intervals import bootstrap_sums, percentile_interval, ratio
from .statistic import tidy_table

__all__ = ["SWAP_COSINES_VERSION", "SWAP_COSINES_VIEWS", "summarise_swap_cosines"]

SWAP_COSINES_VERSION = 1
SWAP_COSINES_VIEWS = ("swap_cosines",)

_IDENTITY = ("positions", "layer", "component", "kind")
_COMPONENTS = ("attn", "mlp")
_KINDS = ("self_earlier", "self_later", "index_earlier", "index_later", "adjacent")

Row = dict[str, Any]


def summarise_swap_cosines(run: Run, options: NoOptions, inputs: Mapping[str, Input]) -> dict[str, pa.Table]:  # noqa: ARG001
    """Return ``swap_cosines``: a row for each swap, component and kind, means over tokens.

    The documents of all rows are drawn again together, so that rows of the same documents vary as one.
    """
    tables = [
        table.filter(np.isin(table["document"].to_numpy(), list(run.excluded), invert=True))
        for table in inputs["swap_cosine_documents"].tables()
    ]
    if not any(map(len, tables)):
        raise AnalysisError(
            f"Run {run.run_id} has no cosines of swapped layers.",
            hint=f"Make them: layerlake intervene LAKE --run {run.run_id} --swap-cosines all",
        )
    # two processes may have stored the same at the same moment: it counts once
    keys = [*_IDENTITY, "document"]
    values = ("n_tokens", "n_zero", "sum_cosine", "centred")
    once = pa.concat_tables(tables).group_by(keys, use_threads=False)
    documents = once.aggregate([(name, "first") for name in values]).rename_columns([*keys, *values])
    in_order = sorted(documents.to_pylist(), key=_place)
    rows = [
        row for _, group in groupby(in_order, lambda row: row["positions"]) for row in _means(list(group))
    ]
    types = {"layer": pa.int32(), "component": pa.string(), "kind": pa.string()}
    ends = {"n_tokens": pa.int64(), "n_zero": pa.int64(), "n_documents": pa.int64()}
    ends |= {"centred": pa.bool_(), "positions": pa.int32(), "reason": pa.string()}
    columns: dict[str, Any] = {name: pa.array([row[name] for row in rows], t) for name, t in types.items()}
    columns |= {name: np.array([row[name] for row in rows]) for name in ("cosine", "cosine_lo", "cosine_hi")}
    columns |= {name: pa.array([row[name] for row in rows], t) for name, t in ends.items()}
    return {SWAP_COSINES_VIEWS[0]: tidy_table(run.run_id, columns, {"variant": "default"})}


def _place(row: Row) -> tuple[Any, ...]:
    """Return where a document's row stands in a table."""
    order = _COMPONENTS.index(row["component"]), row["layer"], _KINDS.index(row["kind"])
    return row["positions"] is not None, row["positions"] or 0, *order, row["document"]


def _means(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the means of some documents' rows, which are sorted by layer, component and kind."""
    groups = [list(group) for _, group in groupby(rows, lambda row: [row[name] for name in _IDENTITY])]
    numbers = np.unique([row["document"] for row in rows])
    sums = np.zeros((len(numbers), len(groups), 2))
    for i, group in enumerate(groups):
        at = np.searchsorted(numbers, [row["document"] for row in group])
        sums[at, i] = [(row["sum_cosine"], row["n_tokens"]) for row in group]

    def means(totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return ratio(totals[..., 0], totals[..., 1])

    shown = means(sums.sum(axis=0))
    replicates = bootstrap_sums(sums.reshape(len(numbers), -1)).reshape(-1, *sums.shape[1:])
    n_documents = (sums[..., 1] > 0).sum(axis=0)
    lo, hi = percentile_interval(means(replicates), n_documents=n_documents)
    for i, group in enumerate(groups):
        yield group[0] | {
            "cosine": shown[i],
            "cosine_lo": lo[i],
            "cosine_hi": hi[i],
            "n_tokens": sum(row["n_tokens"] for row in group),
            "n_zero": sum(row["n_zero"] for row in group),
            "n_documents": int(n_documents[i]),
            "reason": _reason(int(n_documents[i])),
        }


def _reason(n_documents: int) -> str | None:
    """Return why something of a row is NULL."""
    if n_documents == 0:
        return "a vector is zero at every token"
    return None if n_documents > 1 else "no interval: the tokens are all of one document"
