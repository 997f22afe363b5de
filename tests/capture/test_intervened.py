"""What happens inside an intervened model, captured as a run over the baseline's documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerlake.capture.execute import capture_run, execute_plan
from layerlake.capture.intervene import execute_interventions
from layerlake.capture.intervened import capture_intervened, encoded_documents, plan_intervened_run
from layerlake.capture.interventions import InterventionSpec, plan_intervention
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import NotInLake, PlanError, SiteNotFound
from layerlake.catalog.run import Run
from layerlake.catalog.tables import read_parts
from layerlake.catalog.verify import verify_lake

MakeSpec = Callable[..., CaptureSpec]
Array = np.ndarray[Any, np.dtype[Any]]
FAMILIES = ("gpt2", "gpt_neox", "phi", "llama", "qwen2", "gpt_neo")


@pytest.fixture
def baseline(request: pytest.FixtureRequest, make_spec: MakeSpec, tmp_path: Path) -> Run:
    return capture_run(tmp_path, make_spec(getattr(request, "param", "gpt2")))


def capture(run: Run, sites: str, *, max_documents: int | None = None, **what: Any) -> Run:
    """Capture the first intervention of those that are asked for."""
    plan = plan_intervention(run, InterventionSpec(max_documents=max_documents, **what))
    documents = encoded_documents(run, max_documents)
    planned = plan_intervened_run(plan, plan.interventions[1], sites, documents)
    made = execute_plan(planned, run.store.url).run
    assert made is not None
    return made


def used(run: Run, site: str) -> Array:
    """The stored values, documents one after the other: ``[layer, token, width]``."""
    return np.asarray(run.array(site)[...])[:, run.tokens["row"].to_numpy()]


@pytest.mark.parametrize("baseline", FAMILIES, indirect=True)
def test_a_swap_shows_each_block_what_it_was_given(baseline: Run) -> None:
    run = capture(baseline, "resid,attn_out,mlp_out", swap="0")
    assert (run.manifest.baseline, run.manifest.schedule[:3]) == (baseline.run_id, "1,0")  # type: ignore[index]
    x, added = used(run, "resid"), used(run, "attn_out") + used(run, "mlp_out")
    np.testing.assert_allclose(x[1:], x[:-1] + added, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(x[0], used(baseline, "resid")[0])  # the embedding
    assert np.abs(x[1] - used(baseline, "resid")[1]).max() > 0.01
    assert run.tokens.equals(baseline.tokens)
    assert run.documents.equals(baseline.documents)
    verify_lake(run.store)


@pytest.mark.parametrize("baseline", ["gpt2", "gpt_neox"], indirect=True)
@pytest.mark.parametrize(
    "what",
    [{"drop": "1"}, {"repeat": "2"}, {"ablate_attn": "1"}, {"ablate_mlp": "1"}, {"schedules": ("2,0,1",)}],
)
def test_its_end_is_where_the_intervention_was_measured(baseline: Run, what: dict[str, Any]) -> None:
    """The last boundary, unembedded with the lake's weights, has the losses of the intervention's own rows."""
    run = capture(baseline, "resid", **what)
    plan = plan_intervention(baseline, InterventionSpec(**what))
    execute_interventions(plan)
    parts = plan.finding("interventions").parts()
    rows = read_parts(baseline.store, [part.path for part in parts]).to_pandas()
    rows = rows[
        (rows["kind"] == plan.interventions[1].kind) & (rows["schedule"] == plan.interventions[1].schedule)
    ]
    rows = rows.sort_values(["document", "position"])
    assert run.shape.n_layers == len(plan.interventions[1].steps)
    x = used(run, "resid")[-1].astype(np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    scale = np.sqrt((x * x).mean(axis=1, keepdims=True) + run.shape.norm_eps)
    logits = (x / scale * run.weight("ln_final.w") + run.weight("ln_final.b")) @ run.weight(
        "W_U"
    ) + run.weight("b_U")
    log_q = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    tokens = run.tokens.to_pandas().merge(rows, on=["document", "position"], how="left")
    at = np.flatnonzero(tokens["loss_nats"].notna())
    loss = -log_q[at, tokens["token_id"].to_numpy()[at + 1]]
    np.testing.assert_allclose(loss, tokens["loss_nats"].to_numpy()[at], rtol=0, atol=1e-4)


def test_a_component_that_is_left_out_adds_nothing(baseline: Run) -> None:
    run = capture(baseline, "attn_out,mlp_out", ablate_mlp="1")
    assert not used(run, "mlp_out")[1].any()
    assert used(run, "mlp_out")[0].any()
    assert used(run, "attn_out")[1].any()


def test_the_identity_is_the_baseline_again(baseline: Run) -> None:
    run = capture(baseline, "all", schedules=("0-",))
    assert run.run_id != baseline.run_id
    for site in ("resid", "attn_out", "mlp_out", "mlp_post"):
        np.testing.assert_allclose(used(run, site), used(baseline, site), rtol=0, atol=1e-5)  # other batches


def test_the_same_again_does_nothing_and_more_is_added(baseline: Run) -> None:
    first = capture(baseline, "resid", drop="1", max_documents=3)
    plan = plan_intervention(baseline, InterventionSpec(drop="1", max_documents=3))
    documents = encoded_documents(baseline, 3)
    assert plan_intervened_run(plan, plan.interventions[1], "resid", documents).frozen is None
    more_sites = capture(baseline, "resid,mlp_out", drop="1", max_documents=3)
    assert (more_sites.run_id, more_sites.sites) == (first.run_id, ("resid", "mlp_out"))
    longer = capture(baseline, "resid,mlp_out", drop="1")
    assert longer.run_id == first.run_id
    assert longer.n_tokens == baseline.n_tokens > first.n_tokens
    before = used(longer, "resid")[:, : first.n_tokens]
    np.testing.assert_array_equal(before, used(first, "resid"))


def test_what_an_intervened_run_is_not_for(baseline: Run) -> None:
    run = capture(baseline, "resid", drop="1")
    with pytest.raises(NotInLake, match=r"it has no weights by layer") as caught:
        run.weight("W_out")
    assert baseline.run_id in caught.value.hint
    with pytest.raises(PlanError, match="is one of an intervention already: 0,2"):
        plan_intervention(run, InterventionSpec(drop="0"))
    with pytest.raises(PlanError, match="runs twice in one step"):
        plan_intervention(baseline, InterventionSpec(repeat="1", stale_kv=True, capture_sites="resid"))
    with pytest.raises(SiteNotFound, match="no site 'rezid'"):
        plan_intervention(baseline, InterventionSpec(drop="1", capture_sites="rezid"))


def test_every_schedule_has_its_run(baseline: Run) -> None:
    plan = plan_intervention(baseline, InterventionSpec(drop="all", capture_sites="resid"))
    runs = capture_intervened(plan)
    assert [run.manifest.schedule for run in runs] == ["1-2", "0,2", "0-1"]
    assert [run.run_id for run in capture_intervened(plan)] == [run.run_id for run in runs]
    assert not capture_intervened(plan_intervention(baseline, InterventionSpec(drop="all")))
