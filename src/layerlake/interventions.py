"""Interventions as a user meets them: plan them on the runs of a lake, carry them out, sum them up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from .catalog.errors import AnalysisError, LayerLakeError, PlanError
from .catalog.findings import Finding, merge_findings
from .catalog.run import Run
from .console import CaptureProgress, silent
from .lake import Lake, open_lake

if TYPE_CHECKING:
    from .capture.intervene import InterventionOutcome
    from .capture.interventions import InterventionPlan, InterventionSpec

__all__ = ["execute_runs", "intervene", "plan_runs", "summarise_runs"]


def intervene(
    lake: str | os.PathLike[str] | Lake,
    spec: InterventionSpec | None = None,
    *,
    run: str | Sequence[str] = (),
    **options: Any,
) -> Finding:
    """Drop, swap, repeat and ablate layers of the models of some runs, and measure what they say then.

    Each schedule begins at the stored residual stream, behind the last layer that it leaves as it was; what the lake
    holds already is not run again. Needs the models. Costs a block for each further step of a schedule, an
    unembedding for each schedule, and memory up to ``max_memory`` beside the model.

    Parameters
    ----------
    lake : str, path or Lake
        The lake.
    spec : InterventionSpec, optional
        What to do.
    run : str or sequence of str
        Runs by id or unique prefix; all that allow it if empty.
    **options
        The fields of :class:`InterventionSpec`, instead of ``spec``: ``drop="all", swap="0-3"``.

    Returns
    -------
    Finding
        ``intervention_summary`` of these runs, or ``swap_cosines`` if nothing else was asked for. What was measured
        token by token is the view ``interventions``.

    Warns
    -----
    UserWarning
        A run that was not asked for by name does not allow it.

    Raises
    ------
    PlanError
        Nothing was asked for, or it does not fit into the memory.
    SiteNotFound
        A layer does not exist, or a run lacks ``resid``.
    ModelError
        A model is not there any more, or is another one.
    AdapterMismatch
        The blocks of this family are not known to run by themselves.
    """
    from .capture.interventions import InterventionSpec

    if spec is not None and options:
        raise PlanError(f"Say what to do in one place: in spec, or as {', '.join(options)}.")
    opened = lake if isinstance(lake, Lake) else open_lake(lake)
    asked = spec if spec is not None else InterventionSpec(**options)
    plans, refused = plan_runs(opened, asked, runs=(run,) if isinstance(run, str) else run)
    for _ in execute_runs(plans):
        pass
    findings, missed = summarise_runs(opened, plans)
    for name, error in (refused | missed).items():
        warnings.warn(f"{name} is left out: {error.advice}", stacklevel=2)
    return next(iter(findings.values()))


def plan_runs(
    lake: Lake, spec: InterventionSpec, *, runs: Sequence[str] = ()
) -> tuple[list[InterventionPlan], dict[str, LayerLakeError]]:
    """Plan interventions on some runs, or on all that allow them and are not of an intervention themselves.

    Returns
    -------
    plans : list of InterventionPlan
        One a run.
    refused : mapping
        Run → why not, of runs that were not asked for by name.

    Raises
    ------
    LayerLakeError
        A run that was asked for does not allow it, or none of them does.
    """
    from .capture.interventions import plan_intervention

    plans: list[InterventionPlan] = []
    refused: dict[str, LayerLakeError] = {}
    candidates = lake.runs(runs) or [lake.run()]  # which says that there are none
    own = [run for run in candidates if run.manifest.baseline is None]
    for run in candidates if runs else own or candidates:
        try:
            plans.append(plan_intervention(run, spec))
        except LayerLakeError as error:
            if runs:
                raise
            refused[run.run_id] = error
    if not plans:
        raise next(iter(refused.values()))
    return plans, refused


def execute_runs(
    plans: Sequence[InterventionPlan],
    show: Callable[[str], AbstractContextManager[CaptureProgress]] = lambda _: nullcontext(silent),
) -> Iterator[tuple[InterventionPlan, InterventionOutcome, list[Run]]]:
    """Carry out plans one by one; yield each with what was done, and the runs that were captured of it.

    ``show`` opens the progress of a run, by its id.
    """
    from .capture.intervene import execute_interventions
    from .capture.intervened import capture_intervened

    for plan in plans:
        with show(plan.run.run_id) as progress:
            outcome = execute_interventions(plan, progress=progress)
            captured = capture_intervened(plan, progress=progress)
        yield plan, outcome, captured


def summarise_runs(
    lake: Lake, plans: Sequence[InterventionPlan]
) -> tuple[dict[str, Finding], dict[str, LayerLakeError]]:
    """Return the analyses of what the plans have measured, by name, the main one first; and what has none, and why.

    ``benchmarks`` is of the runs that are tasks with answers, ``swap_cosines`` of those that were asked for them.
    """
    from .analyze.analyses import run_analysis

    runs = {
        "intervention_summary": [plan.run.run_id for plan in plans if plan.interventions],
        "benchmarks": [plan.run.run_id for plan in plans if plan.interventions and plan.has_answers],
        "swap_cosines": [plan.run.run_id for plan in plans if plan.swaps],
    }
    findings: dict[str, Finding] = {}
    missed: dict[str, LayerLakeError] = {}
    for name, ids in runs.items():
        found = []
        for run_id in ids:
            try:
                found.append(run_analysis(lake, name, runs=[run_id]))
            except AnalysisError as error:
                missed[f"{name} of {run_id}"] = error
        if found:
            findings[name] = merge_findings(found)
    if not findings:
        raise next(iter(missed.values()))
    return findings, missed
