"""Parts of what interventions leave in the lake: what they hold, and that they only grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from layerlake.catalog.findings import newest_findings
from layerlake.catalog.interventions import (
    INTERVENTIONS,
    SWAP_COSINE_DOCUMENTS,
    GrowingFinding,
)
from layerlake.catalog.run import Run
from layerlake.catalog.schedules import Intervention, plan_interventions

PARAMS = {"positions": None, "is_resumed": True}
DROPS = plan_interventions(3, drop="all")


def rows(run: Run, interventions: tuple[Intervention, ...], documents: list[int]) -> pa.Table:
    found: list[dict[str, Any]] = [
        {"run": run.run_id, "kind": i.kind, "layer": i.layer, "schedule": i.schedule, "document": number}
        for i in interventions
        for number in documents
    ]
    return pa.Table.from_pylist(found, INTERVENTIONS)


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def write(run: Run, interventions: tuple[Intervention, ...], documents: list[int]) -> None:
    GrowingFinding(run.store, run.run_id, PARAMS).write(
        interventions=interventions, documents=documents, n_tokens=9,
        table=rows(run, interventions, documents),
    )  # fmt: skip


def test_parts_say_which_interventions_they_hold_on_which_documents(run: Run) -> None:
    write(run, DROPS[:2], [4, 0, 1])
    write(run, DROPS[1:], [2, 4])
    held = GrowingFinding(run.store, run.run_id, PARAMS).held()
    expected = ({0, 1, 4}, {0, 1, 2, 4}, {2, 4})
    assert held == {i.name: documents for i, documents in zip(DROPS, expected, strict=True)}


def test_a_view_shows_all_parts_and_each_once(run: Run) -> None:
    write(run, DROPS, [0])
    write(run, DROPS, [1, 2])
    write(run, DROPS, [1, 2])  # the same part again takes its own place
    parts = GrowingFinding(run.store, run.run_id, PARAMS).parts()
    assert sorted(part.n_rows for part in parts) == [3, 6]
    assert len(newest_findings(parts)) == 2


def test_parts_of_other_runs_parameters_and_views_are_apart(run: Run) -> None:
    write(run, DROPS, [0])
    assert not GrowingFinding(run.store, "another", PARAMS).parts()
    assert not GrowingFinding(run.store, run.run_id, PARAMS | {"positions": 8}).parts()
    assert not GrowingFinding(run.store, run.run_id, PARAMS, view="swap_cosine_documents").parts()
    cosines = GrowingFinding(run.store, run.run_id, {"positions": 8}, view="swap_cosine_documents")
    assert not cosines.parts()
    cosines.write(interventions=DROPS, documents=[0], n_tokens=1, table=SWAP_COSINE_DOCUMENTS.empty_table())
    (part,) = cosines.parts()
    assert part.schema == SWAP_COSINE_DOCUMENTS
    assert part.n_tokens == 1
