"""Interventions carried out: resumed and whole, against Hugging Face, counted, killed, and gone on with."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from layerlake.analyze.analyses import run_analysis
from layerlake.capture import units
from layerlake.capture.execute import capture_run
from layerlake.capture.intervene import execute_interventions
from layerlake.capture.interventions import InterventionSpec, plan_intervention
from layerlake.capture.model import open_model
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import CorruptRun, PlanError
from layerlake.catalog.interventions import INTERVENTIONS, GrowingFinding
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.schedules import count_blocks, plan_interventions
from layerlake.catalog.tables import read_parts

MakeSpec = Callable[..., CaptureSpec]
MakeModel = Callable[..., transformers.PreTrainedModel]
FAMILIES = ("gpt2", "gpt_neox", "phi", "llama", "qwen2", "gpt_neo")
EVERYTHING: dict[str, Any] = {
    "drop": "all", "swap": "all", "repeat": "1,2", "ablate_attn": "all", "ablate_mlp": "all", "schedules": ("1,0",),
}  # fmt: skip
ORDER = ["kind", "layer", "schedule", "document", "position"]
MEASURED = [
    "kl_nats",
    "agree",
    "correct",
    "loss_nats",
    "delta_loss_nats",
    "entropy_bits",
    "delta_entropy_bits",
]


@pytest.fixture
def run(request: pytest.FixtureRequest, make_spec: MakeSpec, tmp_path: Path) -> Run:
    """A family's run of resid, GPT-2's unless a test names another; a partition is a batch.

    Another batch is added up by the kernels in another order: what is resumed is the whole only as far as rounding.
    """
    family = getattr(request, "param", "gpt2")
    return capture_run(tmp_path / "lake", make_spec(family, sites="resid", batch_tokens=4096))


def intervene(run: Run, **options: Any) -> tuple[Any, Any]:
    plan = plan_intervention(run, InterventionSpec(**options))
    return plan, execute_interventions(plan)


def rows(run: Run, **params: Any) -> pd.DataFrame:
    """What the lake holds, without the floor, in an order of its own."""
    parts = GrowingFinding(run.store, run.run_id, {"positions": None, "is_resumed": True} | params).parts()
    table: pd.DataFrame = (
        read_parts(run.store, [p.path for p in parts]).select(INTERVENTIONS.names).to_pandas()
    )
    found: pd.DataFrame = table[table["kind"] != "noop"]
    return found.sort_values(ORDER, ignore_index=True)


@pytest.mark.parametrize("run", FAMILIES, indirect=True)
def test_resumed_it_is_the_whole_to_the_last_bit_and_what_hugging_face_has(
    run: Run, model_path: Callable[[str], Path]
) -> None:
    plan, resumed = intervene(run, **EVERYTHING, swap_cosines="all")
    _, whole = intervene(run, **EVERYTHING, resume=False)
    a, b = rows(run), rows(run, is_resumed=False)
    pd.testing.assert_frame_equal(a[ORDER + MEASURED], b[ORDER + MEASURED], check_exact=True)
    assert len(a) == len(plan.interventions) * plan.to_json()["positions"] > 0
    assert len(a) + (n_floor := resumed.n_rows - len(a)) == resumed.n_rows > whole.n_rows == len(b)
    assert n_floor > 0

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(run.shape.family))
    document = int(a["document"].iloc[0])
    ids = run.tokens.filter(np.equal(run.tokens["document"].to_numpy(), document))["token_id"].to_numpy()
    with torch.inference_mode():
        log_p = (
            model(torch.tensor(ids.tolist())[None], use_cache=False)
            .logits[0]
            .double()
            .log_softmax(-1)
            .numpy()
        )
    own = a[(a["kind"] == "none") & (a["document"] == document)]
    at = own["position"].to_numpy()
    assert at.tolist() == list(range(1, len(ids) - 1))
    np.testing.assert_allclose(own["loss_nats"], -log_p[at, ids[at + 1]], rtol=0, atol=2e-5)
    np.testing.assert_allclose(
        own["entropy_bits"], -(np.exp(log_p) * log_p).sum(-1)[at] / np.log(2), rtol=0, atol=5e-5
    )
    assert (own["correct"] == (log_p.argmax(-1)[at] == ids[at + 1])).all()
    assert own["row"].tolist() == (own["row"].iloc[0] - 1 + at).tolist()
    assert (own[["kl_nats", "delta_loss_nats", "delta_entropy_bits"]] == 0).all(axis=None)
    others = a[a["kind"] != "none"]
    assert (others["kl_nats"] > -2e-6).all()
    assert others.groupby(["kind", "layer", "schedule"], dropna=False)["kl_nats"].mean().min() > 1e-5
    np.testing.assert_allclose(
        others["delta_loss_nats"],
        others["loss_nats"] - others[["document", "position"]].merge(a[a["kind"] == "none"])["loss_nats"].to_numpy(),
        rtol=0, atol=1e-6,
    )  # fmt: skip


def test_nothing_changed_nothing_moved(run: Run) -> None:
    """In a float32 lake a no-op ends where the model ends, from every boundary, as far as batches are alike."""
    intervene(run, drop="all", schedules=("0-2",))
    parts = GrowingFinding(run.store, run.run_id, {"positions": None, "is_resumed": True}).parts()
    table = read_parts(run.store, [part.path for part in parts]).to_pandas()
    floor = table[table["kind"] == "noop"]
    assert sorted(floor["layer"].unique()) == [0, 1, 2]
    assert floor["kl_nats"].abs().max() < 5e-6
    identity = table[table["kind"] == "schedule"]
    assert (identity[["kl_nats", "delta_loss_nats", "delta_entropy_bits"]] == 0).all(axis=None)
    assert identity["agree"].all()


@pytest.mark.parametrize("run", FAMILIES, indirect=True)
def test_without_the_last_layer_it_is_the_lens(run: Run) -> None:
    """Boundary L − 1, its own scale: no block is run for it."""
    last = run.shape.n_layers - 1
    plan = plan_intervention(run, InterventionSpec(drop=str(last)))
    assert count_blocks(plan.interventions) == 0
    execute_interventions(plan)
    found = rows(run)
    found = found[found["kind"] == "drop"].set_index("row").sort_index()
    finding = run_analysis(Lake(run.store.url), "lens", options={"tokens": "all"}, scheduler="synchronous")
    lens = finding.tables["lens_tokens"].to_pandas()
    lens = lens[(lens["boundary"] == last) & (lens["scale"] == "own")].set_index("row").sort_index()
    assert found.index.tolist() == lens.index.tolist()
    for ours, theirs in (
        ("kl_nats", "kl_final_lens_nats"),
        ("loss_nats", "loss_nats"),
        ("entropy_bits",) * 2,
    ):
        np.testing.assert_allclose(found[ours], lens[theirs], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "what",
    [
        {"drop": "all"}, {"swap": "all"}, {"drop": "all", "swap": "all"}, {"repeat": "1,2"}, EVERYTHING,
        {"repeat": "2", "stale_kv": True}, {"swap_cosines": "all"},
    ],
)  # fmt: skip
def test_blocks_executed_are_those_of_the_closed_forms(run: Run, what: dict[str, Any]) -> None:
    for resume in (True, False):
        plan, outcome = intervene(run, **what, resume=resume)
        numbers = plan.to_json()
        assert outcome.n_blocks == numbers["blocks"] + numbers["floor_and_cosine_blocks"]
        assert outcome.n_batches == numbers["batches"] == sum(len(unit.batches) for unit in plan.units)
        n_batches = sum(len(unit.batches) for unit in plan.units if unit.is_main)
        assert numbers["blocks"] == n_batches * count_blocks(plan.interventions, is_resumed=resume)


def test_more_documents_and_more_schedules_run_what_is_missing(run: Run) -> None:
    _, first = intervene(run, drop="all", max_documents=4)
    before = rows(run)
    plan, more = intervene(run, drop="all")
    assert {d.number for u in plan.units for d in u.documents}.isdisjoint(before["document"])
    assert more.n_blocks == plan.to_json()["blocks"] > 0
    plan, other = intervene(run, drop="all", swap="0")
    assert {i.name for u in plan.units for i in u.interventions} == {plan.interventions[-1].name}
    assert other.n_blocks == len(plan.units) * count_blocks(plan_interventions(3, swap="0"))
    assert intervene(run, drop="1", swap="0", max_documents=2)[1].n_rows == 0

    found = rows(run)
    assert not found.duplicated(ORDER).any()
    kept = found.merge(before[ORDER], on=ORDER)
    pd.testing.assert_frame_equal(kept[before.columns], before, check_exact=True)
    assert first.n_rows > len(before)  # the floor


def test_some_positions_are_those_of_all(run: Run) -> None:
    plan, outcome = intervene(run, drop="all", positions=4)
    few, n_documents = rows(run, positions=4), len(run.stored_documents)
    assert len(few) == 4 * 4 * n_documents
    assert outcome.n_blocks < 10 * count_blocks(plan.interventions)
    intervene(run, drop="all")
    every = rows(run).merge(few[ORDER], on=ORDER)
    np.testing.assert_allclose(every["kl_nats"], few["kl_nats"], rtol=0, atol=5e-6)
    assert (few["positions"] == 4).all()


def test_what_another_process_has_stored_meanwhile_is_not_stored_again(run: Run) -> None:
    spec = InterventionSpec(drop="all")
    mine, theirs = plan_intervention(run, spec), plan_intervention(run, replace(spec, max_documents=5))
    same = plan_intervention(run, spec)
    execute_interventions(theirs)
    execute_interventions(mine)
    found = rows(run)
    assert not found.duplicated(ORDER).any()
    assert execute_interventions(same).n_rows == 0
    pd.testing.assert_frame_equal(rows(run), found, check_exact=True)


def test_what_is_gone_is_found_missing_though_others_stored_beside_it(run: Run) -> None:
    """A part claims no more than its rows: what was left to another's part is missing when that is gone."""
    drops, all_of_it = (
        plan_intervention(run, InterventionSpec(drop="all", swap=swap)) for swap in (None, "all")
    )
    execute_interventions(drops)
    of_drops = {part.path for part in drops.finding("interventions").parts()}
    execute_interventions(all_of_it)
    before = rows(run)
    for path in of_drops:
        run.store.delete(path)
    intervene(run, drop="all", swap="all")
    pd.testing.assert_frame_equal(rows(run), before, check_exact=True)


def test_a_document_too_short_for_the_floor(make_spec: MakeSpec, tmp_path: Path) -> None:
    """An answer of two tokens has a place to look at, and its beginning has no evaluation position."""
    path = tmp_path / "lambada.jsonl"
    path.write_text(json.dumps({"context": "the", "continuation": "fox"}))
    run = capture_run(tmp_path / "lake", make_spec(dataset=path, task="lambada", sites="resid"))
    assert max(run.stored_documents["n_tokens"].to_pylist()) <= 2
    plan, outcome = intervene(run, drop="all")
    assert all(unit.is_main for unit in plan.units)
    assert outcome.n_rows == len(plan.interventions)


@pytest.mark.parametrize("run", ["gpt2", "gpt_neox", "llama"], indirect=True)
def test_an_ablated_layer_is_not_run_where_the_lake_holds_the_rest_of_it(
    run: Run, make_spec: MakeSpec
) -> None:
    what = {"ablate_attn": "all", "ablate_mlp": "all"}
    plan, outcome = intervene(run, **what)
    whole = sum(len(unit.batches) * count_blocks(unit.interventions) for unit in plan.units)
    held = capture_run(
        Path(run.store.url).parent / "held", make_spec(run.shape.family, sites="resid,attn_out,mlp_out")
    )
    _, spared = intervene(held, **what)
    n_layers = run.shape.n_layers if run.shape.block == "sequential" else 2 * run.shape.n_layers
    n_batches = sum(len(unit.batches) for unit in plan.units if unit.is_main)
    assert outcome.n_blocks == whole
    assert spared.n_blocks == whole - n_layers * n_batches
    numbers = [*ORDER, "kl_nats", "delta_loss_nats", "delta_entropy_bits"]  # the capture's batches are others
    pd.testing.assert_frame_equal(rows(held)[numbers], rows(run)[numbers], rtol=0, atol=1e-5)


def test_of_a_task_the_losses_add_up_to_the_answers_likelihood(
    make_spec: MakeSpec, model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "lambada.jsonl"
    path.write_text(json.dumps({"context": "the quick fox number 7 sees the", "continuation": "lazy dog"}))
    run = capture_run(tmp_path / "lake", make_spec(dataset=path, task="lambada", sites="resid"))
    intervene(run, swap="0")
    (document,) = run.stored_documents.to_pylist()
    span = slice(document["span_start"], document["span_end"])
    ids = torch.tensor(run.tokens["token_id"].to_pylist())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_path("gpt2"))
    blocks = model.transformer.h
    unmodified = None
    for kind in ("none", "swap"):
        if kind == "swap":
            model.transformer.h = torch.nn.ModuleList([blocks[1], blocks[0], *blocks[2:]])
        with torch.inference_mode():
            log_p = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[:-1]
        unmodified = log_p if unmodified is None else unmodified
        found = rows(run)
        found = found[found["kind"] == kind]
        divergence = (unmodified.exp() * (unmodified - log_p)).sum(-1)[span.start - 1 : span.stop - 1]
        np.testing.assert_allclose(found["kl_nats"], divergence.numpy(), rtol=1e-5, atol=5e-6)
        expected = log_p[torch.arange(len(ids) - 1), ids[1:]][span.start - 1 : span.stop - 1].sum().item()
        assert -found["loss_nats"].sum() == pytest.approx(expected, abs=5e-5)
        assert len(found) == span.stop - span.start


DYING = """
import os, signal, torch
torch.set_num_threads(1)
from layerlake.capture.intervene import execute_interventions
from layerlake.capture.interventions import InterventionSpec, plan_intervention
from layerlake.catalog.lake import Lake
from layerlake.catalog.stores import Store

write, n_parts = Store.write, 0

def write_and_die(store, name, *args, **options):
    global n_parts
    write(store, name, *args, **options)
    n_parts += name.startswith("findings/interventions/")
    if n_parts == OPTIONS["n_parts"]:
        os.kill(os.getpid(), signal.SIGKILL)

Store.write = write_and_die
execute_interventions(plan_intervention(Lake(OPTIONS["lake"]).run(), InterventionSpec(drop="all", swap="all")))
"""


def test_killed_between_parts_it_goes_on(run: Run, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run.store.url, whole)
    plan, outcome = intervene(Lake(whole).run(), drop="all", swap="all")
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformer_lens.model_bridge", "layerlake.capture.intervene"])
    given = {"OPTIONS": {"lake": str(run.store.url), "n_parts": 2}}
    process = context.Process(target=runpy.run_path, args=(str(script), given, "__main__"), daemon=True)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -9

    assert len(GrowingFinding(run.store, run.run_id, plan.params("interventions")).parts()) == 2
    left, rest = intervene(run, drop="all", swap="all")
    assert len(left.units) == len(plan.units) - 2 > 0
    assert rest.n_blocks == outcome.n_blocks - 2 * count_blocks(plan.interventions)
    pd.testing.assert_frame_equal(rows(run), rows(Lake(whole).run()), check_exact=True)
    names = [
        sorted(path.parent.name for path in Path(lake).glob("findings/*/*/*"))
        for lake in (run.store.url, whole)
    ]
    assert names[0] == names[1]


def test_a_boundary_that_is_not_finite(
    make_spec: MakeSpec, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e6
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    run = capture_run(tmp_path, make_spec(**given, sites="resid", dtype="float16", overflow="keep"))
    with pytest.raises(CorruptRun, match="holds values that are not finite") as caught:
        intervene(run, drop="all", **given)
    assert "--no-resume" in caught.value.hint
    _, outcome = intervene(run, drop="all", resume=False, **given)
    assert outcome.n_rows > 0


def test_batches_fit_into_the_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_intervention(run, InterventionSpec(drop="all"))
    documents = [document for unit in plan.units[:-1] for document in unit.documents]

    def batches(max_memory: int | str = "4GiB") -> tuple[tuple[units.MeasuredDocument, ...], ...]:
        return units.plan_batches(run, documents, plan.interventions, device="cpu", max_memory=max_memory)

    (together,) = batches()
    assert sorted(d.number for d in together) == [d.number for d in documents]
    lengths = [len(d.token_ids) for d in together]
    assert lengths == sorted(lengths)
    monkeypatch.setattr(units, "_MAX_BATCH_TOKENS", 2 * max(lengths))
    cut = batches()
    assert [d.number for batch in cut for d in batch] == [d.number for d in together]
    assert max(len(batch) * len(batch[-1].token_ids) for batch in cut) <= 2 * max(lengths)
    assert min(map(len, cut)) >= 1 < len(cut)

    monkeypatch.undo()
    counts = [len(batches(nbytes)) for nbytes in range(129 << 20, 134 << 20, 256 << 10)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 1
    with pytest.raises(PlanError, match=r"more than --max-memory 1\.0 MiB") as caught:
        batches(1 << 20)
    assert caught.value.hint == "Give more."


def test_values_that_overflow_on_the_way(run: Run) -> None:
    """The lake is finite, and the model in half precision is not."""
    plan = plan_intervention(run, InterventionSpec(repeat="1"))
    model = open_model(plan.model, device="cpu", compute_dtype="float16")
    with torch.no_grad():
        for parameter in model.bridge.ln_final.parameters():
            parameter.fill_(60000)
    with pytest.raises(PlanError, match="The model gives no numbers under repeat 0,0-2: its values overflow"):
        execute_interventions(plan, model=model)


def test_a_tree_of_schedules_runs_what_they_share_once(run: Run) -> None:
    texts = ("0,2", "0,2,1", "0,2,1,1", "0,2,1,0")
    plan, _ = intervene(run, schedules=texts, max_documents=2)
    assert count_blocks(plan.interventions) == 1 + 1 + 1 + 1
    alone = [intervene(run, schedules=(text,), resume=False, max_documents=2) for text in texts]
    assert len(alone) == 4
    a, b = rows(run), rows(run, is_resumed=False)
    pd.testing.assert_frame_equal(a[ORDER + MEASURED], b[ORDER + MEASURED], check_exact=True)
    assert set(a["resumes_at"]) == {1, 3}
    assert set(b["resumes_at"]) == {0}
