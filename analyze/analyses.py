"""The analyses by name, and how they are run: once for each run, parameter set and extent, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from ..catalog.errors import AnalysisError, SiteNotFound, did_you_mean
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
from .cka import CKA_VERSION, CKA_VIEWS, CkaOptions, CkaStatistic
from .ing import ING_VERSION, ING_VIEWS, IngOptions, compute_ing
from .lens import LENS_VERSION, LENS_VIEWS, LensOptions, LensStatistic
from .neurons import NEURONS_VERSION, NEURONS_VIEWS, NeuronOptions, NeuronStatistic
from .nonfinite import find_nonfinite
from .norms import NORMS_VERSION, NORMS_VIEWS, NormsOptions, NormsStatistic
from .reduce import reduce_statistic, require_scheduler
from .statistic import State, Statistic, choose_sites
from .subjoiner import SUBJOINER_VERSION, SUBJOINER_VIEWS, SubjoinerOptions, SubjoinerStatistic
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
        AnalysisError. The sites are read once more for it; which documents it are is part of the finding's key.

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
        choose_sites(run, analysis.sites)
    if exclude_nonfinite:
        opened = [_without_nonfinite(analysis, run, scheduler=scheduler) for run in opened]
    return merge_findings(
        [
            _find_or_compute(lake, analysis, run, chosen, scheduler=scheduler, progress=progress)
            for run in opened
        ]
    )


def _without_nonfinite(analysis: Analysis, run: Run, *, scheduler: str) -> Run:
    sites = choose_sites(run, analysis.sites)
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
            except (AnalysisError, SiteNotFound) as error:
                skipped.append(
                    Skipped(run.run_id, analysis.name, " ".join(filter(None, (str(error), error.hint))))
                )
        if found:
            findings.append(merge_findings(found))
    return findings, skipped


def _find_or_compute(
    lake: Lake, analysis: Analysis, run: Run, options: Any, *, scheduler: str, progress: bool
) -> Finding:
    """Read the memoised finding of one run, or compute and keep it."""
    key = FindingKey(analysis.name, analysis.version, run.run_id, asdict(options), _extents(analysis, run))
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
    else:
        raise TypeError(f"Analysis '{analysis.name}' neither opens a statistic nor computes its tables.")
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
    return bool(units) and statistic.keys(units[0]) is not None and state.values.nbytes <= _STATE_NBYTES


def _read_state(store: Store, key: FindingKey, statistic: Statistic[Any]) -> State | None:
    """Return what the analysis has kept of another extent of the run, the largest."""
    view = state_view(key.analysis)
    same = [
        table
        for table in newest_findings(list_findings(store, view))
        if (table.key.version, table.key.run, table.key.params) == (key.version, key.run, key.params)
        and table.key.extents.keys() == key.extents.keys()  # the same sites
    ]
    if not same:
        return None
    with store.open(same[0].path) as file:
        return State.of_table(pq.read_table(file), statistic.zero())


def _extents(analysis: Analysis, run: Run) -> dict[str, Any]:
    """Return what of the run decides the result, for the memo key."""
    sites = choose_sites(run, analysis.sites)
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
    for option, value in dict[str, Any](given).items():
        _check_option(analysis, types, option, value)
    return analysis.options(**given)


def _check_option(analysis: Analysis, types: Mapping[str, Any], option: str, value: Any) -> None:
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
    elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        if kind is float and type(value) is int:
            return
        raise AnalysisError(f"Option {option} of '{analysis.name}' is a {kind.__name__}, not {value!r}.")
