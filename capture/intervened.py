"""Capture what happens inside an intervened model: a run over the baseline's own documents, by another schedule."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..catalog.manifest import Manifest, read_manifest
from ..catalog.run import Run
from ..catalog.schedules import Intervention
from ..catalog.sites import parse_sites
from ..console import CaptureProgress, silent
from .asked import Asked
from .description import slug
from .execute import execute_plan
from .frozen import digest_json
from .interventions import InterventionPlan
from .missing import place_missing
from .model import open_model
from .partition import place_tokens
from .placement import EncodedDocument, Prompt
from .plan import CapturePlan, choose_geometry, plan_work
from .spec import CaptureSpec, complete_spec

__all__ = ["capture_intervened", "encoded_documents", "plan_intervened_run"]


def capture_intervened(plan: InterventionPlan, *, progress: CaptureProgress = silent) -> list[Run]:
    """Capture the sites that were asked for of each intervened model; what the lake holds is not captured again.

    Costs a whole forward of every schedule: nothing resumes here, for every layer is to be seen.
    """
    if plan.spec.capture_sites is None:
        return []
    runs: list[Run] = []
    documents, model = encoded_documents(plan.run, plan.spec.max_documents), None
    for intervention in plan.interventions:
        if intervention.kind == "none":
            continue
        planned = plan_intervened_run(plan, intervention, plan.spec.capture_sites, documents)
        if planned.frozen is not None and model is None:
            model = open_model(
                plan.model, device=planned.spec.device, compute_dtype=planned.spec.compute_dtype
            )
        run = execute_plan(planned, plan.run.store.url, model=model, progress=progress).run
        runs += [run] if run else []
    return runs


def plan_intervened_run(
    plan: InterventionPlan, intervention: Intervention, sites: str, documents: list[EncodedDocument]
) -> CapturePlan:
    """Plan the capture of a model under an intervention, on the documents that the plan looks at.

    The run's layers are the steps of the schedule: its layer i is the i-th block that ran, and boundary i is what
    that block was given. Its weights are the baseline's.

    Parameters
    ----------
    plan : InterventionPlan
        Of the baseline.
    intervention : Intervention
        The schedule.
    sites : str
        What to capture, as ``capture --sites`` takes it.
    documents : list of EncodedDocument
        The baseline's (:func:`encoded_documents`).

    Raises
    ------
    PlanError
        As :func:`layerlake.capture.plan.plan_capture`.
    SiteNotFound
        A site does not exist.
    """
    run, spec = plan.run, plan.spec
    baseline, store = run.manifest, run.store
    identity = baseline.identity | {"baseline": run.run_id, "schedule": intervention.schedule}
    run_id = f"{slug(baseline.model_name)}-{digest_json(identity, 8)}"
    existing = read_manifest(store, run_id)
    capture = complete_spec(
        CaptureSpec(
            model=spec.model or plan.model.location,
            sites=sites,
            dtype=baseline.dtype,
            codec=baseline.codec,
            compute_dtype=identity["numerics"]["compute_dtype"],
            device=spec.device,
            max_memory=spec.max_memory,
            partition_tokens=baseline.geometry.partition_tokens,
        )
    )
    asked = Asked(spec=capture, sites=parse_sites(sites), store=store, model=plan.model, existing=existing)
    shape = dataclasses.replace(run.shape, n_layers=len(intervention.steps))
    geometry = choose_geometry(capture, shape, baseline.geometry.context, existing)
    placement = place_missing(lambda skip, _: documents[skip:], None, geometry, asked.held)
    current = existing or Manifest(
        run_id=run_id,
        model_id=baseline.model_id,
        model_name=baseline.model_name,
        shape=shape,
        identity=identity,
        dataset=baseline.dataset,
        geometry=geometry,
        dtype=baseline.dtype,
        bos_token_id=baseline.bos_token_id,
        codec=baseline.codec,
    )
    return plan_work(asked, current, placement)


def encoded_documents(run: Run, n_documents: int | None) -> list[EncodedDocument]:
    """Return a run's documents up to so many stored ones, as a corpus would give them; they keep their numbers."""
    placed = place_tokens(run.documents, run.tokens)
    documents: list[EncodedDocument] = []
    n_stored = 0
    for row in run.documents.to_pylist():
        if n_stored == n_documents:
            break
        refusal = row["reason"] if row["status"] == "refused" else None
        n_stored += refusal is None
        documents.append(
            EncodedDocument(
                tuple(row["sources"]),
                placed[row["document"]].token_ids if refusal is None else np.empty(0, dtype=np.int32),
                row["n_source_tokens"],
                refusal,
                _prompt(row),
            )
        )
    return documents


def _prompt(row: dict[str, Any]) -> Prompt | None:
    if row["task"] is None:
        return None
    given = {name: row[name] for name in ("task", "split", "item", "role", "label", "word", "span_chars")}
    span = None if row["span_start"] is None else (row["span_start"], row["span_end"])
    return Prompt(**given, span=span)
