"""The analyses by name, and how they are run: once for each run, parameter set and extent, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pyarrow as pa

from ..catalog.errors import AnalysisError, NotInLake, did_you_mean
from ..catalog.findings import (
    Finding,
    FindingKey,
    list_findings,
    merge_findings,
    newest_findings,
    read_finding,
    state_view,
    write_finding,
)
from ..catalog.lake import Lake
from ..catalog.run import Run
from ..catalog.sites import ANALYSIS_SITES
from ..catalog.stores import Store
from .attention import ATTENTION_VERSION, ATTENTION_VIEWS, AttentionOptions, AttentionStatistic
from .benchmarks import BENCHMARKS_VERSION, BENCHMARKS_VIEWS, score_benchmarks
from .cka import CKA_VERSION, CKA_VIEWS, CkaOptions, CkaStatistic
from .ing import ING_VERSION, ING_VIEWS, IngOptions, compute_ing
from .inputs import Input, NoOptions, Scope
from .intervention_summary import (
    INTERVENTION_SUMMARY_VERSION,
    INTERVENTION_SUMMARY_VIEWS,
    summarise_interventions,
)
from .lens import LENS_VERSION, LENS_VIEWS, LensOptions, LensStatistic
from .neurons import NEURONS_VERSION, NEURONS_VIEWS, NeuronOptions, NeuronStatistic
from .nonfinite import find_nonfinite
from .norms import NORMS_VERSION, NORMS_VIEWS, NormsOptions, NormsStatistic
from .reduce import reduce_statistic, require_scheduler
from .stages import STAGES_READS, STAGES_VERSION, STAGES_VIEWS, locate_stages, require_plain_text
from .statistic import State, Statistic, choose_sites
from .subjoiner import SUBJOINER_VERSION, SUBJOINER_VIEWS, SubjoinerOptions, SubjoinerStatistic
from .swap_cosines import SWAP_COSINES_VERSION, SWAP_COSINES_VIEWS, summarise_swap_cosines
from .wic import WIC_VERSION, WIC_VIEWS, WicOptions, WicStatistic

_STATE_NBYTES = 64 << 20
"""Larger states are not kept: a longer extent is then measured from the beginning."""

__all__ = ["ANALYSES", "Analysis", "Skipped", "run_all", "run_analysis"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """One analysis: what it is called, reads and finds."""

    name: str
    summary: str
    """One line for people."""
    version: int
    """Raised whenever it would give other numbers from the same data."""
    views: tuple[str, ...]
    """The tables that it finds, the main one first."""
    options: type[Any]
    """A frozen dataclass; each field has a default and ``metadata["help"]``."""
    open_statistic: Callable[[Run, Any], Statistic[Any]] | None
    """Opens its statistic for a run and options; None where several build on each other."""
    compute: Callable[..., dict[str, pa.Table]] | None = None
    """``compute(run, options, scheduler=…, progress=…)`` → view → table, where there is no single statistic."""
    reads: Mapping[str, Scope] = field(default_factory=dict)
    """The views of findings that it builds on, and whose; it then reads no activations itself."""
    combine: Callable[[Run, Any, Mapping[str, Input]], dict[str, pa.Table]] | None = None
    """``combine(run, options, inputs)`` → view → table, of what builds on findings."""
    require: Callable[[Run], None] | None = None
    """Raises AnalysisError for a run that it can say nothing of, whatever sites that run holds."""

    @property
    def sites(self) -> tuple[tuple[str, ...], ...]:
        """The sets of sites that answer it (:data:`layerlake.catalog.sites.ANALYSIS_SITES`)."""
        return ANALYSIS_SITES[self.name]


class Skipped(NamedTuple):
    """An analysis that a run cannot answer."""

    run: str
    analysis: str
    reason: str


ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "lens", "Logit lens: entropy, KL to the final distribution, loss and agreement at every boundary.",
            LENS_VERSION, LENS_VIEWS, LensOptions, LensStatistic.open,
        ),
        Analysis(
            "cka", "Similarity of every two boundaries: unbiased minibatch CKA.",
            CKA_VERSION, CKA_VIEWS, CkaOptions, CkaStatistic.open,
        ),
        Analysis(
            "neurons", "Prediction and suppression neurons, from the weights.",
            NEURONS_VERSION, NEURONS_VIEWS, NeuronOptions, NeuronStatistic.open,
        ),
        Analysis(
            "attention_locality", "Attention paid to the previous 1 … 16 tokens, and to BOS.",
            ATTENTION_VERSION, ATTENTION_VIEWS, AttentionOptions, AttentionStatistic.open,
        ),
        Analysis(
            "subjoiner", "Heads by which the last token of a word attends to the word's other tokens.",
            SUBJOINER_VERSION, SUBJOINER_VIEWS, SubjoinerOptions, SubjoinerStatistic.open,
        ),
        Analysis(
            "wic", "Probes at every boundary: does a word mean the same in two sentences? Of runs of the task wic.",
            WIC_VERSION, WIC_VIEWS, WicOptions, WicStatistic.open,
        ),
        Analysis(
            "ing", "Neurons that speak for or against '-ing', and probes of what they foretell.",
            ING_VERSION, ING_VIEWS, IngOptions, None, compute_ing,
        ),
        Analysis(
            "norms", "Norms of attention and MLP outputs, alone and beside the residual stream.",
            NORMS_VERSION, NORMS_VIEWS, NormsOptions, NormsStatistic.open,
        ),
        Analysis(
            "intervention_summary", "What each intervention does to the output, on average.",
            INTERVENTION_SUMMARY_VERSION, INTERVENTION_SUMMARY_VIEWS, NoOptions, None,
            reads={"interventions": "run"}, combine=summarise_interventions,
        ),
        Analysis(
            "swap_cosines", "How like what attention and MLP give stays when two neighbouring layers change places.",
            SWAP_COSINES_VERSION, SWAP_COSINES_VIEWS, NoOptions, None,
            reads={"swap_cosine_documents": "run"}, combine=summarise_swap_cosines,
        ),
        Analysis(
            "benchmarks", "Accuracy under each intervention. Of runs of the tasks lambada, arc_easy and hellaswag.",
            BENCHMARKS_VERSION, BENCHMARKS_VIEWS, NoOptions, None,
            reads={"interventions": "run"}, combine=score_benchmarks,
        ),
        Analysis(
            "stages", "The four stages of inference: what marks each of them, where, and what speaks against it.",
            STAGES_VERSION, STAGES_VIEWS, NoOptions, None,
            reads=STAGES_READS, combine=locate_stages, require=require_plain_text,
        ),
    )
}  # fmt: skip
"""Every analysis by name, in the order in which a report shows them."""


def run_analysis(
    lake: Lake,
    name: str,
    *,
    runs: Sequence[str] = (),
    options: Any = None,
    scheduler: str = "threads",
    progress: bool = False,
    exclude_nonfinite: bool = False,
) -> Finding:
    """Compute an analysis for some runs, or read from the lake what was computed before.

    Parameters
    ----------
    lake : Lake
        Where the runs lie and the findings go.
    name : str
        A name in :data:`ANALYSES`.
    runs : sequence of str
        Runs by id or unique prefix; all runs if empty.
    options : mapping or options dataclass, optional
        The analysis's options; those not given have their defaults.
    scheduler, progress
        As in :func:`layerlake.analyze.reduce.reduce_statistic`.
    exclude_nonfinite : bool
        Leave out documents that hold a value that is NaN or infinite in a site that is read, instead of raising
        AnalysisError. The sites are read once more for it; which documents they are is part of the finding's key, and
        how many is the column ``n_excluded``.

    Raises
    ------
    AnalysisError
        There is no such analysis or option, or the data do not allow it.
    SiteNotFound
        A run lacks a site that the analysis reads. Nothing was computed; the hint says how to capture it.
    RunNotFound, AmbiguousRun
        A prefix fits no run, or several; or the lake has no runs.
    """
    require_scheduler(scheduler)
    analysis = _find(name)
    chosen = _options(analysis, options)
    opened = lake.runs(runs) or [lake.run()]  # which says that there are none
    for run in opened:
        _choose_sites(analysis, run)
    if exclude_nonfinite:
        opened = [_without_nonfinite(analysis, run, scheduler=scheduler) for run in opened]
    return merge_findings(
        [
            _find_or_compute(lake, analysis, run, chosen, scheduler=scheduler, progress=progress)
            for run in opened
        ]
    )


def _choose_sites(analysis: Analysis, run: Run) -> tuple[str, ...]:
    if analysis.require is not None:  # first: no site would help
        analysis.require(run)
    return choose_sites(run, analysis.sites)


def _without_nonfinite(analysis: Analysis, run: Run, *, scheduler: str) -> Run:
    sites = _choose_sites(analysis, run)
    found = find_nonfinite(run, sites, scheduler=scheduler) if sites else None
    return run.excluding(found["document"].to_pylist()) if found is not None else run


def run_all(
    lake: Lake, *, runs: Sequence[str] = (), scheduler: str = "threads", progress: bool = False
) -> tuple[list[Finding], list[Skipped]]:
    """Run every analysis with its defaults, as far as each run can answer it.

    Returns
    -------
    findings : list of Finding
        One an analysis, of the runs that could answer it.
    skipped : list of Skipped
        What could not be answered, and why. Other errors than a missing site, or data that an analysis
        cannot use, are raised.
    """
    require_scheduler(scheduler)
    opened = lake.runs(runs) or [lake.run()]
    findings, skipped = [], []
    for analysis in ANALYSES.values():
        found = []
        for run in opened:
            try:
                found.append(
                    _find_or_compute(
                        lake, analysis, run, analysis.options(), scheduler=scheduler, progress=progress
                    )
                )
            except (AnalysisError, NotInLake) as error:
                skipped.append(Skipped(run.run_id, analysis.name, error.advice))
        if found:
            findings.append(merge_findings(found))
    return findings, skipped


def _find_or_compute(
    lake: Lake, analysis: Analysis, run: Run, options: Any, *, scheduler: str, progress: bool
) -> Finding:
    """Read the memoised finding of one run, or compute and keep it."""
    params = {**asdict(options), "n_excluded": len(run.excluded)}
    sites = _choose_sites(analysis, run)
    inputs = {
        view: _input(lake, view, scope, run, scheduler=scheduler, progress=progress)
        for view, scope in analysis.reads.items()
    }
    key = FindingKey(analysis.name, analysis.version, run.run_id, params, _extents(run, sites, inputs))
    known = read_finding(lake.store, key, analysis.views)
    if known is not None:
        return known
    state = None
    if analysis.open_statistic is not None:
        statistic = analysis.open_statistic(run, options)
        held = _read_state(lake.store, key, statistic)
        found = reduce_statistic(statistic, run, scheduler=scheduler, progress=progress, known=held)
        tables = statistic.finalise(found)
        state = found if _is_kept(statistic, found) else None
    elif analysis.compute is not None:
        tables = analysis.compute(run, options, scheduler=scheduler, progress=progress)
    elif analysis.combine is not None:
        tables = analysis.combine(run, options, inputs)
    else:
        raise TypeError(f"Analysis '{analysis.name}' neither opens a statistic nor computes its tables.")
    tables = {
        view: table.append_column("n_excluded", pa.repeat(len(run.excluded), len(table)))
        for view, table in tables.items()
    }
    kept = {} if state is None else {state_view(analysis.name): _state_table(run, state)}
    write_finding(lake.store, Finding(analysis.name, tables | kept, (key,)))
    return Finding(analysis.name, tables, (key,))


def _state_table(run: Run, state: State) -> pa.Table:
    """Return a state as every table of a finding is, its run in front."""
    table = state.to_table()
    return table.add_column(0, "run", pa.array([run.run_id] * len(table), pa.string()))


def _is_kept(statistic: Statistic[Any], state: State) -> bool:
    """Tell whether a longer extent of the run can make use of a state that is not too large to keep."""
    units = statistic.units()
    is_reusable = statistic.is_extendable and bool(units) and statistic.keys(units[0]) is not None
    return is_reusable and state.values.nbytes <= _STATE_NBYTES


def _read_state(store: Store, key: FindingKey, statistic: Statistic[Any]) -> State | None:
    """Return what the analysis has kept of another extent of the run, the largest that has left out the same."""
    view = state_view(key.analysis)
    fitting = [
        table for table in list_findings(store, view) if _without_extents(table.key) == _without_extents(key)
    ]
    if not fitting:
        return None
    held = read_finding(store, max(fitting, key=lambda table: table.n_tokens).key, [view])
    return State.of_table(held.table, statistic.zero()) if held is not None else None


def _without_extents(key: FindingKey) -> FindingKey:
    """Return a key without how much was read: it still says of which sites, and which documents were left out."""
    return replace(key, extents={site: extent.get("excluded") for site, extent in key.extents.items()})


def _input(lake: Lake, view: str, scope: Scope, run: Run, *, scheduler: str, progress: bool) -> Input:
    """Find what an analysis builds on.

    Of the run itself: what the view's analysis finds with its defaults, computed if need be; or all parts of a view
    that no analysis makes. Of the run's model: what is stored with the defaults, of any run of the model as it is.
    """
    maker = next((analysis for analysis in ANALYSES.values() if view in analysis.views), None)
    if maker is not None and scope == "run":
        try:
            found = _find_or_compute(
                lake, maker, run, maker.options(), scheduler=scheduler, progress=progress
            )
        except (AnalysisError, NotInLake) as error:
            return Input(lake.store, view, (), error.advice)
        return Input(lake.store, view, found.keys)
    of = {run.run_id}
    if scope == "model":
        plain = [it.manifest for it in lake.runs() if it.manifest.baseline is None]
        of = {it.run_id for it in plain if it.model_id == run.manifest.model_id}
    defaults = None if maker is None else {**asdict(maker.options()), "n_excluded": 0}
    stored = [
        table.key
        for table in newest_findings(list_findings(lake.store, view))
        if table.key.run in of and defaults in (None, dict(table.key.params))
    ]
    return Input(lake.store, view, tuple(sorted(stored, key=lambda key: key.digest)))


def _extents(run: Run, sites: Sequence[str], inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Return what of the run decides the result, for the memo key."""
    if inputs:
        excluded = {"excluded": sorted(run.excluded)} if run.excluded else {}
        return {view: {**found.extent, **excluded} for view, found in inputs.items()}
    if not sites:
        return {"weights": {"n_tokens": 0, "model_id": run.manifest.model_id}}
    return {site: run.extent(site) for site in sites}


def _find(name: str) -> Analysis:
    if name not in ANALYSES:
        raise AnalysisError(
            f"There is no analysis '{name}'.{did_you_mean(name, ANALYSES)}",
            hint=f"They are: {', '.join(ANALYSES)}.",
        )
    return ANALYSES[name]


def _options(analysis: Analysis, given: Any) -> Any:
    """Return the options as the analysis's dataclass, checked."""
    if given is None:
        return analysis.options()
    if is_dataclass(given):
        if not isinstance(given, analysis.options):
            raise AnalysisError(f"{type(given).__name__} are not the options of '{analysis.name}'.")
        given = {item.name: getattr(given, item.name) for item in fields(given)}
    types = get_type_hints(analysis.options)
    checked = {option: _check_option(analysis, types, option, value) for option, value in dict(given).items()}
    return analysis.options(**checked)


def _check_option(analysis: Analysis, types: Mapping[str, Any], option: str, value: Any) -> Any:
    """Return the value of an option: of its type, so that one number is one parameter."""
    if option not in types:
        raise AnalysisError(
            f"Analysis '{analysis.name}' has no option '{option}'.{did_you_mean(option, types)}",
            hint=f"Its options are: {', '.join(types)}.",
        )
    kind = types[option]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise AnalysisError(
                f"Option {option} of '{analysis.name}' cannot be {value!r}.{did_you_mean(str(value), choices)}",
                hint=f"It is one of: {', '.join(choices)}.",
            )
        return value
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise AnalysisError(f"Option {option} of '{analysis.name}' is a {kind.__name__}, not {value!r}.")
    if option == "seed" and value < 0:
        raise AnalysisError(f"Option seed of '{analysis.name}' is at least 0, not {value}.")
    return value
