"""``layerlake intervene`` and its twin in Python: the plan, what is left out, and what is printed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerlake
from layerlake.capture.interventions import plan_intervention
from layerlake.catalog.errors import ModelError, PlanError, SiteNotFound
from layerlake.catalog.run import Run
from layerlake.cli import main
from layerlake.demo.tour import demo_model_path

MODEL = demo_model_path("stdlib-gpt2")
TEXTS = (
    "A lake of activations is filled once. ",
    "From then on every question is a read, without the model. ",
)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake with a run of two documents, and another of the same that holds no resid."""
    folder = tmp_path_factory.mktemp("lake")
    (folder / "text.txt").write_text("\n\n".join(3 * text for text in TEXTS))
    for sites, dtype in (("resid", "float32"), ("attn_out", "float16")):
        spec = layerlake.CaptureSpec(model=MODEL, dataset=folder / "text.txt", dtype=dtype, sites=sites)
        layerlake.capture_run(folder / "lake", spec)
    return os.fspath(folder / "lake")


@pytest.fixture
def runs(lake: str) -> dict[str, str]:
    """The ids by what the runs hold."""
    return {run.sites[0]: run.run_id for run in layerlake.open_lake(lake).runs()}


def invoke(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_plan_outcome_and_summary(
    lake: str, runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("intervene", lake, "--drop", "6-", "--swap", "6", "--max-documents", "1", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    run = runs["resid"]
    (plan,), (outcome,) = result["plan"], result["outcome"]
    assert plan | {"positions": 0} == {
        "run": run, "interventions": 3, "documents": 1, "positions": 0, "batches": 2, "blocks": 1 + 0 + 2 - 1,
        "blocks_without_resume": 8 + 7 + 7 + 8, "floor_and_cosine_blocks": 2 + 1,
    }  # fmt: skip
    assert [(row["kind"], row["layer"]) for row in result["summary"]] == [
        ("none", None), ("drop", 6), ("drop", 7), ("swap", 6),
    ]  # fmt: skip
    assert {row["n_tokens"] for row in result["summary"]} == {plan["positions"]}
    assert all(row["kl_noop_nats"] is not None for row in result["summary"] if row["kind"] != "none")
    assert outcome["run"] == run
    assert outcome["n_blocks"] == plan["blocks"] + plan["floor_and_cosine_blocks"]
    assert f"{runs['attn_out']} is left out: Run {runs['attn_out']} holds site 'resid' not at all" in err
    assert "layerlake capture LAKE … --sites resid" in err
    assert f"{run}: " in err
    assert "tok/s" in err
    assert "MB/s" not in err


def test_a_dry_run_only_says_what_it_would_do(
    lake: str, runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(layerlake.open_lake(lake).findings())
    asked = ("intervene", lake, "--run", runs["resid"], "--repeat", "3", "--dry-run")
    assert invoke(*asked) == 0
    out, err = capsys.readouterr()
    assert re.search(r"\d+ of \d+, \d\d% saved", out)
    assert not err
    assert invoke(*asked, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["plan"]
    assert len(layerlake.open_lake(lake).findings()) == before


def test_tables_for_people(lake: str, runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Only what was asked for, though the run may hold more; the second time nothing is run."""
    asked = ("intervene", lake, "--run", runs["resid"], "--schedule", "0-4,6,5,7", "--positions", "8")
    assert invoke(*asked, "--swap-cosines", "2") == 0
    out, _ = capsys.readouterr()
    plan, summary, cosines = out.split("\n" + "intervention_summary")[0], *out.split("swap_cosines")
    assert "for floor and cosines" in plan
    assert [line.split()[1] for line in summary.splitlines()[-2:]] == ["none", "schedule"]
    assert len(cosines.splitlines()) == 2 + 10
    assert invoke(*asked) == 0
    assert f"{runs['resid']}: the lake holds all of this already." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        ((), "No intervention was asked for", "--drop all"),
        (("--drop", "8"), "Layers '8' are not all within 0 … 7", ""),
        (("--schedule", "0-4,12"), "Layers '12' are not all within 0 … 7", ""),
        (("--swap", "7"), "Layer 7 is the last", "--swap takes layers 0 … 6"),
        (("--repeat", "9"), "A block of '9' layers cannot be repeated", "from 1 to 8"),
        (("--swap", "7,0-"), "Layer 7 is the last", "--swap takes layers 0 … 6"),
        (("--drop", "0", "--stale-kv"), "Nothing is repeated", "--stale-kv goes with --repeat"),
        (("--swap-cosines", "0", "--capture-sites", "resid"), "No schedule was asked for", "--drop 3"),
        (
            ("--schedule", "0-2,3(stale),4-", "--capture-sites", "resid"),
            "a block runs twice",
            "true repetition",
        ),
        (("--drop", "all", "--model", "/nowhere"), "/nowhere", ""),
        (("--drop", "all", "--max-memory", "1KiB"), "more than --max-memory 1", "Give more"),
    ],
)
def test_bad_input(  # noqa: PLR0917
    lake: str, runs: dict[str, str], arguments: tuple[str, ...], said: str, hint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert invoke("intervene", lake, "--run", runs["resid"], *arguments) == 2
    err = capsys.readouterr().err
    assert f"error: {said}" in err or said in err
    assert hint in err


def test_a_run_that_was_asked_for_and_does_not_allow_it(
    lake: str, runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("intervene", lake, "--run", runs["attn_out"], "--drop", "all") == 2
    assert "hint: Capture what it lacks: layerlake capture LAKE … --sites resid" in capsys.readouterr().err


def test_from_python(lake: str, runs: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match=f"{runs['attn_out']} is left out: .* --sites resid"):
        found = layerlake.intervene(lake, swap="0", max_documents=1)
    assert found.analysis == "intervention_summary"
    assert found.runs == (runs["resid"],)
    assert "swap" in found.df()["kind"].tolist()
    spec = layerlake.InterventionSpec(swap_cosines="0", max_documents=1)
    assert layerlake.intervene(layerlake.open_lake(lake), spec, run=runs["resid"]).analysis == "swap_cosines"
    with pytest.raises(PlanError, match="in spec, or as drop"):
        layerlake.intervene(lake, spec, drop="all")
    with pytest.raises(SiteNotFound, match="'resid' not at all"):
        layerlake.intervene(lake, drop="all", run=[runs["attn_out"]])


def test_where_no_run_allows_it_the_first_reason_is_given(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    make_run(sites=("attn_out",))
    with pytest.raises(SiteNotFound, match="'resid' not at all"):
        layerlake.intervene(tmp_path / "lake", drop="all")


def test_a_run_of_a_task_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"context": "import", "continuation": "os"}, {"context": "def main(", "continuation": "self"},
    ]  # fmt: skip
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = layerlake.CaptureSpec(
        model=MODEL, dataset=tmp_path / "lambada.jsonl", task="lambada", sites="resid", dtype="float32"
    )
    layerlake.capture_run(tmp_path / "lake", spec)
    assert invoke("intervene", str(tmp_path / "lake"), "--drop", "0", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["n_items"]) for row in result["benchmarks"]] == [("none", 2), ("drop", 2)]
    with pytest.raises(ModelError, match="not the model of run"):
        layerlake.intervene(tmp_path / "lake", drop="0", model=demo_model_path("stdlib-neox"))


def test_layers_as_python_has_them(lake: str, runs: dict[str, str]) -> None:
    """Numbers, lists and a single schedule do what their text does; a range of a schedule may fall."""
    run = layerlake.open_lake(lake).run(runs["resid"])
    for asked, text in (
        ({"drop": 3}, {"drop": "3"}),
        ({"drop": [0, 5], "repeat": 2}, {"drop": "0,5", "repeat": "2"}),
        ({"schedules": "7-4,0-3", "swap": range(2)}, {"schedules": ("7,6,5,4,0-3",), "swap": "0-1"}),
    ):
        plans = [plan_intervention(run, layerlake.InterventionSpec(**each)) for each in (asked, text)]
        assert plans[0].interventions == plans[1].interventions


def test_an_intervened_run_does_not_stand_in_the_way(
    lake: str, runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = os.fspath(shutil.copytree(lake, tmp_path / "lake"))
    assert invoke("intervene", copy, "--drop", "0", "--capture-sites", "resid", "--max-documents", "1") == 0
    (made,) = {run.run_id for run in layerlake.open_lake(copy).runs()} - set(runs.values())
    assert f"captured {made}: 1-7 of {runs['resid']}" in capsys.readouterr().err
    assert invoke("intervene", copy, "--run", runs["resid"], "--drop", "0", "--dry-run") == 0
    assert invoke("intervene", copy, "--drop", "0", "--max-documents", "1", "--dry-run") == 0
    assert made not in capsys.readouterr().err
    assert invoke("intervene", copy, "--drop", "99") == 2
    assert "Layers '99' are not all within 0 … 7" in capsys.readouterr().err
    assert invoke("intervene", copy, "--run", made, "--drop", "0") == 2
    assert f"Run {made} is one of an intervention already: 1-7" in capsys.readouterr().err


def test_a_task_of_which_no_item_is_whole_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    item = {
        "question": "?",
        "answerKey": "A",
        "choices": {"label": ["A", "B", "C"], "text": ["one", "two", "three"]},
    }
    (tmp_path / "arc.jsonl").write_text(json.dumps(item) + "\n")
    spec = layerlake.CaptureSpec(model=MODEL, dataset=tmp_path / "arc.jsonl", task="arc_easy", sites="resid")
    run = layerlake.capture_run(tmp_path / "lake", spec)
    assert invoke("intervene", os.fspath(tmp_path / "lake"), "--drop", "0", "--max-documents", "2") == 0
    out, err = capsys.readouterr()
    assert f"benchmarks of {run.run_id} is left out: " in err
    assert "intervention_summary" in out
    assert "drop" in out
