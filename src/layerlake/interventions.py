"""Interventions as a user meets them: plan them on the runs of a lake, carry them out, sum them up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .catalog.errors import LayerLakeError, PlanError
from .catalog.findings import Finding
from .lake import Lake, open_lake

if TYPE_CHECKING:
    from .capture.interventions import InterventionPlan, InterventionSpec

__all__ = ["intervene", "plan_runs", "summarise_runs"]


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
    from .capture.intervene import execute_interventions
    from .capture.intervened import capture_intervened
    from .capture.interventions import InterventionSpec

    if spec is not None and options:
        raise PlanError(f"Say what to do in one place: in spec, or as {', '.join(options)}.")
    opened = lake if isinstance(lake, Lake) else open_lake(lake)
    asked = spec if spec is not None else InterventionSpec(**options)
    plans, _ = plan_runs(opened, asked, runs=(run,) if isinstance(run, str) else run)
    for plan in plans:
        execute_interventions(plan)
        capture_intervened(plan)
    return next(iter(summarise_runs(opened, plans).values()))


def plan_runs(
    lake: Lake, spec: InterventionSpec, *, runs: Sequence[str] = ()
) -> tuple[list[InterventionPlan], Mapping[str, LayerLakeError]]:
    """Plan interventions on some runs, or on all that allow them.

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
    for run in lake.runs(runs) or [lake.run()]:  # which says that there are none
        try:
            plans.append(plan_intervention(run, spec))
        except LayerLakeError as error:
            if runs:
                raise
            refused[run.run_id] = error
    if not plans:
        raise next(iter(refused.values()))
    return plans, refused


def summarise_runs(lake: Lake, plans: Sequence[InterventionPlan]) -> dict[str, Finding]:
    """Return the analyses of what the plans have measured, by name, the main one first.

    ``benchmarks`` is of the runs that are tasks with answers, ``swap_cosines`` of those that were asked for them.
    """
    from .analyze.analyses import run_analysis

    runs = {
        "intervention_summary": [plan.run.run_id for plan in plans if plan.interventions],
        "benchmarks": [plan.run.run_id for plan in plans if plan.interventions and plan.has_answers],
        "swap_cosines": [plan.run.run_id for plan in plans if plan.swaps],
    }
    return {name: run_analysis(lake, name, runs=ids) for name, ids in runs.items() if ids}
