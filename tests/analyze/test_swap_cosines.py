"""The cosines of swapped layers, summed up from what each document gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from layerlake.analyze.analyses import run_analysis
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.interventions import SWAP_COSINE_DOCUMENTS, GrowingFinding
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.schedules import plan_interventions

KINDS = ("self_earlier", "self_later", "index_earlier", "index_later", "adjacent")
SWAPS = plan_interventions(3, swap="all")


def write(
    run: Run, documents: list[int], *, positions: int | None = None, **given: Any
) -> list[dict[str, Any]]:
    """Write a part of cosines that differ from document to document."""
    chance = np.random.default_rng([len(documents), *documents])
    rows = [
        {
            "run": run.run_id, "layer": swap.layer, "component": component, "kind": kind, "document": document,
            "n_tokens": 3 + document, "n_zero": 1, "sum_cosine": float(chance.normal()), "centred": True,
            "positions": positions,
        } | given
        for swap in SWAPS for component in ("attn", "mlp") for kind in KINDS for document in documents
    ]  # fmt: skip
    finding = GrowingFinding(run.store, run.run_id, {"positions": positions}, view="swap_cosine_documents")
    finding.write(
        interventions=SWAPS,
        documents=documents,
        n_tokens=9,
        table=pa.Table.from_pylist(rows, SWAP_COSINE_DOCUMENTS),
    )
    return rows


def summarise(run: Run, **options: Any) -> list[dict[str, Any]]:
    finding = run_analysis(Lake(run.store.url), "swap_cosines", **options)
    found: list[dict[str, Any]] = finding.table.to_pylist()
    return found


def test_means_over_tokens_of_all_parts(make_run: Callable[..., Run]) -> None:
    run = make_run()
    rows = write(run, [0, 1, 3]) + write(run, [2, 4])
    found = summarise(run)
    assert [(r["component"], r["layer"], r["kind"]) for r in found] == [
        (component, swap.layer, kind) for component in ("attn", "mlp") for swap in SWAPS for kind in KINDS
    ]
    for row in found:
        mine = [r for r in rows if all(r[k] == row[k] for k in ("component", "layer", "kind"))]
        assert len(mine) == row["n_documents"] == 5
        n_tokens = sum(r["n_tokens"] for r in mine)
        assert row["cosine"] == pytest.approx(sum(r["sum_cosine"] for r in mine) / n_tokens)
        assert row["cosine_lo"] < row["cosine"] < row["cosine_hi"]
        assert (row["n_tokens"], row["n_zero"], row["centred"], row["reason"]) == (n_tokens, 5, True, None)
    assert run_analysis(Lake(run.store.url), "swap_cosines").table.column_names[:5] == [
        "run", "layer", "component", "kind", "cosine",
    ]  # fmt: skip


def test_what_two_processes_have_stored_counts_once(make_run: Callable[..., Run]) -> None:
    run = make_run()
    write(run, [0, 1])
    write(run, [1, 2])
    assert {row["n_documents"] for row in summarise(run)} == {3}


def test_samples_of_positions_stand_apart(make_run: Callable[..., Run]) -> None:
    run = make_run()
    write(run, [0, 1])
    write(run, [0], positions=4)
    found = summarise(run)
    assert [row["positions"] for row in found] == [None] * 20 + [4] * 20
    assert {row["n_documents"] for row in found[20:]} == {1}
    assert {row["cosine_lo"] for row in found[20:]} == {None}
    assert {row["reason"] for row in found[20:]} == {"no interval: the tokens are all of one document"}


def test_a_vector_that_is_zero_everywhere_has_no_cosine(make_run: Callable[..., Run]) -> None:
    run = make_run()
    write(run, [0, 1], n_tokens=0, sum_cosine=0.0)
    for row in summarise(run):
        assert (row["cosine"], row["cosine_lo"], row["n_zero"]) == (None, None, 2)
        assert row["reason"] == "a vector is zero at every token"


def test_without_rows_it_says_how_to_make_them(make_run: Callable[..., Run]) -> None:
    run = make_run()
    with pytest.raises(AnalysisError, match="has no cosines of swapped layers") as caught:
        summarise(run)
    assert f"layerlake intervene LAKE --run {run.run_id} --swap-cosines all" in caught.value.hint
