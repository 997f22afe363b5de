"""The base model's scores are lm-evaluation-harness's, item by item.

Its numbers for a few invented items lie beside this, in ``lm_eval.json``; ``docs/make_lm_eval.py`` makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerlake import CaptureSpec, InterventionSpec, capture_run, intervene, open_lake
from layerlake.demo.tour import demo_model_path

GOLDEN = json.loads(Path(__file__).with_name("lm_eval.json").read_text())["tasks"]
ANSWERS = """
    SELECT item, -sum(loss_nats::DOUBLE) AS log_prob, bool_and(correct) AS is_greedy
    FROM documents JOIN interventions USING (document) WHERE kind = 'none'
    GROUP BY item, role ORDER BY item, role
"""


@pytest.mark.parametrize("task", GOLDEN)
def test_scores_are_those_of_lm_evaluation_harness(tmp_path: Path, task: str) -> None:
    golden: dict[str, Any] = GOLDEN[task]
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in golden["rows"]))
    model = demo_model_path("stdlib-gpt2")
    run = capture_run(
        tmp_path / "lake",
        CaptureSpec(model=model, task=task, dataset=items, sites="resid", dtype="float32"),
    )
    lake = open_lake(tmp_path / "lake")
    intervene(lake, InterventionSpec(drop="0"))

    answers = lake.sql(ANSWERS, run=run.run_id).to_arrow_table().to_pylist()
    expected = [
        (number, log_prob, is_greedy)
        for number, item in enumerate(zip(golden["log_probs"], golden["is_greedy"], strict=True))
        for log_prob, is_greedy in zip(*item, strict=True)
    ]
    assert [(row["item"], row["is_greedy"]) for row in answers] == [(n, g) for n, _, g in expected]
    # both add up some hundred float32: 1e-5 of an answer that is 100 nats long, and room for other kernels
    assert [row["log_prob"] for row in answers] == pytest.approx([p for _, p, _ in expected], abs=1e-3)

    (found,) = (row for row in lake.analyze("benchmarks").table.to_pylist() if row["kind"] == "none")
    assert found["n_items"] == len(golden["rows"])
    scores = {name: found[name] for name in golden["scores"]}
    assert scores == pytest.approx(golden["scores"], rel=1e-4)
