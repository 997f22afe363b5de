"""What interventions leave in the lake, in parts that only grow.

``interventions``
    One row a schedule, document and position.
``swap_cosine_documents``
    One row a swap, component, kind and document, from which ``swap_cosines`` is drawn.

Each part is a finding of its own, named by what is in it: some interventions on some documents. What is missing is
what no part holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from .errors import CorruptRun
from .findings import Finding, FindingKey, StoredTable, describe_finding, write_finding
from .schedules import Intervention
from .stores import Store

__all__ = [
    "INTERVENTIONS",
    "SWAP_COSINE_DOCUMENTS",
    "VERSION",
    "GrowingFinding",
    "GrowingView",
]

VERSION = 1

GrowingView = Literal["interventions", "swap_cosine_documents"]

INTERVENTIONS = pa.schema(
    [
        ("run", pa.string()),
        ("kind", pa.string()),  # none, noop, drop, swap, repeat, ablate_attn, ablate_mlp, schedule
        ("layer", pa.int32()),  # the lower one of a swap, the first of a repeat; the boundary of a noop
        ("span", pa.int32()),  # layers that are changed
        ("schedule", pa.string()),
        ("resumes_at", pa.int32()),  # the boundary from which blocks were run
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("row", pa.int64()),
        ("kl_nats", pa.float32()),  # KL(normal ‖ intervened)
        ("agree", pa.bool_()),  # the most likely token is the same
        ("correct", pa.bool_()),  # the most likely token is the next one
        ("loss_nats", pa.float32()),
        ("delta_loss_nats", pa.float32()),  # intervened − normal
        ("entropy_bits", pa.float32()),
        ("delta_entropy_bits", pa.float32()),
        ("positions", pa.int32()),  # of each document that were drawn; NULL for all
        ("is_resumed", pa.bool_()),
    ]
)
SWAP_COSINE_DOCUMENTS = pa.schema(
    [
        ("run", pa.string()),
        ("layer", pa.int32()),  # the lower one
        ("component", pa.string()),  # attn, mlp
        ("kind", pa.string()),  # self_earlier, self_later, index_earlier, index_later, adjacent
        ("document", pa.int64()),
        ("n_tokens", pa.int32()),  # those that have a cosine
        ("n_zero", pa.int32()),  # those that have none: a vector is zero
        ("sum_cosine", pa.float64()),
        ("centred", pa.bool_()),  # each vector's mean over d_model was taken away first
        ("positions", pa.int32()),  # of each document that were drawn; NULL for all
    ]
)


class GrowingFinding:
    """What a run has of a view with some parameters, part by part; the footer of each part is read once.

    Parameters
    ----------
    store, run_id : Store, str
        Whose it is.
    params : mapping
        What decides the numbers beyond intervention and document.
    view : str
        ``interventions`` or ``swap_cosine_documents``.
    """

    def __init__(
        self, store: Store, run_id: str, params: Mapping[str, Any], *, view: GrowingView = "interventions"
    ) -> None:
        self._store, self._view, self._run_id, self._params = store, view, run_id, dict(params)
        self._seen: set[str] = set()
        self._parts: list[StoredTable] = []
        self._held: dict[str, set[int]] = {}

    def parts(self) -> list[StoredTable]:
        """Return the parts that are there now; what is damaged is left out."""
        self._look()
        return self._parts

    def held(self) -> Mapping[str, set[int]]:
        """Return :attr:`Intervention.name` → the documents that the parts hold of it."""
        self._look()
        return self._held

    def write(
        self,
        *,
        interventions: Iterable[Intervention],
        documents: Sequence[int],
        n_tokens: int,
        table: pa.Table,
    ) -> None:
        """Write a part, all at once.

        Parameters
        ----------
        interventions, documents : iterable of Intervention, sequence of int
            What is in it, each of the ones on each of the others, even where that gave no row.
        n_tokens : int
            Tokens of these documents.
        table : pa.Table
            ``INTERVENTIONS`` or ``SWAP_COSINE_DOCUMENTS``.
        """
        extent = {
            "n_tokens": n_tokens,
            "documents": _stretches(sorted(documents)),
            "interventions": sorted(intervention.name for intervention in interventions),
        }
        part = hashlib.sha256(json.dumps(extent, sort_keys=True).encode()).hexdigest()[:16]
        key = FindingKey(self._view, VERSION, self._run_id, self._params, {"resid": extent}, part)
        write_finding(self._store, Finding(self._view, {self._view: table}, (key,)))

    def _look(self) -> None:
        """Take note of the parts that were written since the last look."""
        for digest in self._store.list(f"findings/{self._view}"):
            if digest in self._seen:
                continue
            try:
                part = describe_finding(self._store, self._view, digest)
            except (FileNotFoundError, CorruptRun):  # not written yet, or damaged
                continue
            self._seen.add(digest)
            if (part.key.run, part.key.version, dict(part.key.params)) == (
                self._run_id,
                VERSION,
                self._params,
            ):
                self._take(part)

    def _take(self, part: StoredTable) -> None:
        self._parts.append(part)
        extent = part.key.extents["resid"]
        documents = {number for first, stop in extent["documents"] for number in range(first, stop)}
        for name in extent["interventions"]:
            self._held.setdefault(name, set()).update(documents)


def _stretches(numbers: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as ``[first, stop]`` of each stretch.

    Examples
    --------
    >>> _stretches([0, 1, 2, 5, 7, 8])
    [[0, 3], [5, 6], [7, 9]]
    """
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and stretches[-1][1] == number:
            stretches[-1][1] += 1
        else:
            stretches.append([number, number + 1])
    return stretches
