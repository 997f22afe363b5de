"""What an intervention will do, and what keeps it from being done, before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from layerlake.capture import interventions
from layerlake.capture.execute import capture_run
from layerlake.capture.intervene import execute_interventions
from layerlake.capture.interventions import InterventionSpec, plan_intervention
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import AdapterMismatch, ModelError, PlanError, SiteNotFound
from layerlake.catalog.mask import evaluation_positions
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

MakeSpec = Callable[..., CaptureSpec]
MakeModel = Callable[..., transformers.PreTrainedModel]
DROP = InterventionSpec(drop="all")


@pytest.fixture
def run(make_spec: MakeSpec, tmp_path: Path) -> Run:
    return capture_run(tmp_path / "lake", make_spec(sites="resid"))


@pytest.fixture
def lambada(make_spec: MakeSpec, tmp_path: Path) -> Run:
    rows = [
        {"context": f"the quick fox number {i} sees the lazy", "continuation": "dog 77"} for i in range(5)
    ]
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return capture_run(tmp_path / "tasks", make_spec(dataset=path, task="lambada", sites="resid"))


def test_a_plan_says_what_is_missing(run: Run) -> None:
    plan = plan_intervention(run, InterventionSpec(drop="all", swap="all", swap_cosines="all"))
    stored = run.stored_documents["n_tokens"].to_pylist()
    n_layers = run.shape.n_layers
    assert n_layers == 3
    n_partitions = len(run.manifest.partitions)
    assert plan.to_json() == {
        "run": run.run_id,
        "interventions": 5,
        "documents": len(stored),
        "positions": sum(len(evaluation_positions(n)) for n in stored),
        "batches": 2 * n_partitions + 1,
        "blocks": n_partitions * (3 + 5 - 2),
        "blocks_without_resume": n_partitions * (3 + 3 * 2 + 2 * 3),
        "floor_and_cosine_blocks": (3 + 2 + 1) + n_partitions * (2 * 2 + 3),
    }
    execute_interventions(plan)
    again = plan_intervention(run, plan.spec)
    assert not again.units
    nothing = dict.fromkeys(plan.to_json().keys() - {"run", "interventions"}, 0)
    assert again.to_json() == plan.to_json() | nothing


def test_units_are_of_one_partition_and_hold_what_fits_into_a_part(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run.manifest.geometry.partition_tokens
    units = [unit for unit in plan_intervention(run, DROP).units if unit.interventions[0].kind == "none"]
    assert len(units) == len(run.manifest.partitions) > 2
    for unit in units:
        assert len({document.row_start // rows for document in unit.documents}) == 1
    monkeypatch.setattr(interventions, "_UNIT_ROWS", 100)
    cut = [unit for unit in plan_intervention(run, DROP).units if unit.interventions[0].kind == "none"]
    assert len(cut) > len(units)
    assert [d.number for u in cut for d in u.documents] == [d.number for u in units for d in u.documents]
    for unit in cut:
        n_positions = sum(len(document.positions) for document in unit.documents)
        assert len(unit.documents) == 1 or n_positions * len(unit.interventions) <= 100


def test_the_floor_is_of_the_boundaries_that_something_resumes_at(run: Run) -> None:
    plan = plan_intervention(run, InterventionSpec(drop="1", swap="1", repeat="1"))
    (floor,) = (unit for unit in plan.units if unit.interventions[0].kind == "noop")
    assert [i.layer for i in floor.interventions] == [1, 2]  # a repeat of layer l resumes behind it
    assert all(len(document.token_ids) <= 32 for document in floor.documents)
    assert not any(
        i.kind == "noop"
        for unit in plan_intervention(run, replace(plan.spec, resume=False)).units
        for i in unit.interventions
    )


def test_sampled_positions_depend_on_the_document_alone(run: Run) -> None:
    def positions(**options: Any) -> dict[int, list[int]]:
        units = plan_intervention(run, InterventionSpec(**options)).units
        of = {d.number: d.positions.tolist() for unit in reversed(units) for d in unit.documents}
        return dict(sorted(of.items()))

    few = positions(drop="all", positions=5)
    assert few == positions(swap="0", positions=5)
    assert {len(each) for each in few.values()} == {5}
    every = positions(drop="all")
    assert all(set(few[number]) <= set(every[number]) for number in few)
    first = positions(drop="all", positions=5, max_documents=3)
    assert first == {number: few[number] for number in list(few)[:3]}


def test_of_a_task_only_the_answers_are_looked_at(lambada: Run) -> None:
    plan = plan_intervention(lambada, DROP)
    assert plan.has_answers
    rows = {row["document"]: row for row in lambada.stored_documents.to_pylist()}
    seen = {d.number: d for unit in reversed(plan.units) for d in unit.documents}
    assert sorted(seen) == list(rows)
    for number, document in seen.items():
        row = rows[number]
        assert document.positions.tolist() == list(range(row["span_start"] - 1, row["span_end"] - 1))
        assert (
            document.positions[-1] == row["n_tokens"] - 2
        )  # the last token is foretold, and foretells nothing
    sampled = plan_intervention(lambada, replace(DROP, positions=1))
    assert sampled.to_json() == plan.to_json()
    assert sampled.params("interventions") == plan.params("interventions")


@pytest.mark.parametrize(
    ("options", "error", "said", "hint"),
    [
        ({}, PlanError, "No intervention was asked for", "--drop all"),
        ({"drop": "3"}, SiteNotFound, "Layers '3' are not all within 0 … 2", ""),
        ({"schedules": ("0,9",)}, SiteNotFound, "Layers '9' are not all within 0 … 2", ""),
        ({"swap_cosines": "2"}, PlanError, "Layer 2 is the last", "0 … 1"),
        ({"drop": "all", "positions": 0}, PlanError, "positions is 0", "1 or more"),
        ({"drop": "all", "max_documents": -1}, PlanError, "max_documents is -1", "1 or more"),
        ({"drop": "all", "model": "/nowhere"}, ModelError, "/nowhere", ""),
    ],
)
def test_what_cannot_be_done(
    run: Run, options: dict[str, Any], error: type[Exception], said: str, hint: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        plan_intervention(run, InterventionSpec(**options))
    assert hint in caught.value.hint  # type: ignore[attr-defined]


def test_a_run_without_the_residual_stream(make_spec: MakeSpec, tmp_path: Path) -> None:
    run = capture_run(tmp_path, make_spec(sites="attn_out"))
    with pytest.raises(SiteNotFound, match="holds site 'resid' not at all") as caught:
        plan_intervention(run, DROP)
    assert caught.value.hint == "Capture what it lacks: layerlake capture LAKE … --sites resid"


def test_a_model_that_is_not_there_any_more(
    make_spec: MakeSpec, model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(model_path("gpt2"), tmp_path / "model")
    run = capture_run(tmp_path / "lake", make_spec(model=tmp_path / "model", sites="resid"))
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(ModelError, match="cannot be opened where it was") as caught:
        plan_intervention(run, DROP)
    assert caught.value.hint == "Say where it is: --model PATH."
    assert plan_intervention(run, replace(DROP, model=tmp_path / "moved")).units


def test_another_model_is_refused(run: Run, make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    make_model("gpt2", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=f"'other' is not the model of run {run.run_id}"):
        plan_intervention(run, replace(DROP, model=tmp_path / "other"))


def test_a_model_from_memory_is_passed_again(
    make_spec: MakeSpec, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": make_model("llama"), "tokenizer": tokenizer}
    run = capture_run(tmp_path, make_spec(sites="resid", **given))
    with pytest.raises(ModelError, match="captured from a model in memory") as caught:
        plan_intervention(run, DROP)
    assert "model=…, tokenizer=…" in caught.value.hint
    assert plan_intervention(run, replace(DROP, **given)).units
    with pytest.raises(ModelError, match="is not the model of run"):
        plan_intervention(run, replace(DROP, model=make_model("llama", seed=1), tokenizer=tokenizer))


def test_a_model_in_memory_is_not_one_from_files(run: Run, make_model: MakeModel, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="cannot be held against their digest"):
        plan_intervention(run, replace(DROP, model=make_model("gpt2"), tokenizer=tokenizer))


def test_a_family_whose_blocks_are_not_known(make_run: Callable[..., Run]) -> None:
    shape = ModelShape(
        family="mistral", n_layers=2, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=16, n_vocab=24,
        n_ctx=32, block="sequential", norm="rmsnorm", norm_eps=1e-5, act_fn="silu", gated_mlp=True,
        tied_unembed=False,
    )  # fmt: skip
    with pytest.raises(AdapterMismatch, match="The blocks of mistral models"):
        plan_intervention(make_run(shape=shape), DROP)


def test_documents_without_a_position_to_look_at(make_run: Callable[..., Run]) -> None:
    with pytest.raises(PlanError, match="no document with a position to look at"):
        plan_intervention(make_run(lengths=(2, 1)), DROP)
