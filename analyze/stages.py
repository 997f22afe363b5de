"""The four stages of inference: what marks each of them, where in the model it is, and what speaks against it.

After arXiv 2406.19384, Table 1 and Figure 1. What the paper leaves open (how near is near the end, how Figure 1 is
normalised) is said in ``docs/analyses.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from .inputs import Input, NoOptions, Scope
from .intervals import ratio
from .profiles import Profile, read_profiles
from .statistic import tidy_table

__all__ = [
    "STAGES_READS",
    "STAGES_VERSION",
    "STAGES_VIEWS",
    "family_curves",
    "locate_stages",
    "require_plain_text",
]

STAGES_VERSION = 2
STAGES_VIEWS = ("stages", "stage_curves")
STAGES_READS: dict[str, Scope] = {
    "intervention_summary": "run",
    "attention_locality": "run",
    "neuron_counts": "run",
    "lens": "run",
    "norms": "run",
    "wic_summary": "model",
}

_CURVES = ("kl_drop", "attention_previous_5", "prediction_density", "suppression_density")
"""Those of Figure 1, in the order in which they should peak."""

_GRID = np.linspace(0, 1, 101)

_BEGIN, _MIDDLE = 0.25, 0.5
"""Where stage 1 is over, and where stage 2 is."""

_FEW_LAYERS = 12
"""With fewer, a window of depth holds a layer or two."""

_CURVE = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("model_id", pa.string()),
        ("family", pa.string()),
        ("curve", pa.string()),
        ("depth", pa.float64()),
        ("value", pa.float64()),
        ("raw", pa.float64()),
        ("unit", pa.string()),
        ("reason", pa.string()),
        ("variant", pa.string()),
    ]
)

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a signature comes to in one run."""

    statement: str
    holds: bool | None = None
    """None where it cannot be told."""
    depth: float = np.nan
    values: tuple[float, float, float] = (np.nan, np.nan, np.nan)
    """The value, and the ends of its interval."""
    unit: str | None = None
    note: str | None = None
    reason: str | None = None
    """Why something is NULL."""


@dataclass(frozen=True, slots=True)
class _Peak:
    """That a quantity is largest within a window of depth."""

    stage: int
    name: str
    profile: str
    window: tuple[float, float]

    @property
    def _where(self) -> str:
        first, last = self.window
        return f"depth {first:g}" + (f" to {last:g}" if last > first else "")

    @property
    def expected(self) -> str:
        """What the paper says, in words."""
        return f"largest at {self._where}"

    def judge(self, profiles: Mapping[str, Profile]) -> _Verdict:
        """Compare the largest value with the largest on the other side of the window."""
        it = profiles[self.profile]
        if it.lacking:
            return _unknown(it.lacking)
        first, last = self.window
        within = (first <= it.depth) & (it.depth <= last)
        if not within.any():
            return _unknown(f"no {it.kind} of so few is at {self._where}")
        peak, holds = it.peak, bool(within[it.peak])
        said = f"{it.what} is largest, {it.say(peak)}"
        other = np.flatnonzero(within != holds)
        if len(other):
            rival = int(other[it.value[other].argmax()])
            said += f"; {'outside' if holds else 'at'} {self._where} it is at most {it.say(rival)}"
            said += "" if it.are_apart(peak, rival) else ", which is no clear difference"
        return _verdict(
            self.stage, said, holds=holds, depth=float(it.depth[peak]), values=tuple(it.values[peak]), unit=it.unit,
            note=it.note, reason=it.no_interval,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _LateFall:
    """That a quantity falls faster behind the middle of the model than between stage 1 and the middle."""

    stage: int
    name: str
    profile: str
    expected = f"a faster fall behind depth {_MIDDLE:g} than from {_BEGIN:g} to it"

    def judge(self, profiles: Mapping[str, Profile]) -> _Verdict:
        """Return the share of the fall that is behind the middle, and the depth at which half of it is done."""
        it = profiles[self.profile]
        if it.lacking:
            return _unknown(it.lacking)
        begin, middle, end = np.interp([_BEGIN, _MIDDLE, 1], it.depth, it.value)
        said = f"{it.what}, {begin:.3g} {it.unit} at depth {_BEGIN:g} and {middle:.3g} at {_MIDDLE:g}"
        if not begin > end:
            said += f", does not fall: it is {end:.3g} in the end"
            return _verdict(
                self.stage, said, holds=False, note=it.note, reason="no share and no depth: no fall"
            )
        share, half = float((middle - end) / (begin - end)), (begin + end) / 2
        holds = share > (1 - _MIDDLE) / (1 - _BEGIN)  # what an even fall would have
        grid = np.union1d(it.depth[it.depth > _BEGIN], _BEGIN)
        values = np.interp(grid, it.depth, it.value)
        last = int(np.flatnonzero(values >= half)[-1])  # from there on it stays below
        depth = float(np.interp(half, values[[last + 1, last]], grid[[last + 1, last]]))
        said += f", falls to {end:.3g}: {share:.0%} of that behind the middle, {'faster' if holds else 'no faster'}"
        return _verdict(
            self.stage, said + " than before it", holds=holds, depth=depth, values=(share, np.nan, np.nan),
            unit="share", note=it.note, reason="no interval: a share of two differences of means",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Order:
    """That the curves of Figure 1 peak one behind the other."""

    stage = None
    name = "order_of_peaks"
    expected = "each behind the one before"

    def judge(self, profiles: Mapping[str, Profile]) -> _Verdict:
        """Return how many of the three neighbours are in order."""
        curves = [profiles[name] for name in _CURVES]
        lacking = "; ".join(it.lacking for it in curves if it.lacking)
        if lacking:
            return _unknown(lacking)
        depths = [float(it.depth[it.peak]) for it in curves]
        in_order = np.diff(depths) > 0
        said = ", ".join(f"{it.what} peaks at {depth:.2f}" for it, depth in zip(curves, depths, strict=True))
        return _verdict(
            None, said, holds=bool(in_order.all()), values=(float(in_order.sum()), np.nan, np.nan),
            unit="of 3 pairs in order", reason="no depth and no interval: it is about all of them",
        )  # fmt: skip


_SIGNATURES = (
    _Peak(1, "kl_drop_peak", "kl_drop", (0, 0)),
    _Peak(1, "attention_peak", "attention_previous_5", (0, 0.25)),
    _LateFall(2, "lens_progress", "lens_kl"),
    _Peak(2, "probe_peak", "wic_accuracy", (0.25, 0.75)),
    _Peak(3, "prediction_peak", "prediction_density", (0.75, 0.95)),
    _LateFall(3, "narrowing", "lens_entropy"),
    _Peak(4, "suppression_peak", "suppression_density", (0.9, 1)),
    _Peak(4, "mlp_norm_peak", "mlp_norm", (0.9, 1)),
    _Order(),
)


def _unknown(why: str) -> _Verdict:
    return _Verdict(f"Not known: {why}", reason=why)


def _verdict(stage: int | None, said: str, *, holds: bool, **given: Any) -> _Verdict:
    about = "the order of the stages" if stage is None else f"stage {stage}"
    return _Verdict(f"{'For' if holds else 'Against'} {about}: {said}.", holds, **given)


def require_plain_text(run: Run) -> None:
    """Require that a run is of a text, and of a model as it is.

    Raises
    ------
    AnalysisError
        The run is of an intervened model, whose layers have no depth to compare with another model's; or of a task,
        so that its interventions were looked at at answers only.
    """
    manifest = run.manifest
    if manifest.baseline is not None:
        raise AnalysisError(
            f"The layers of run {run.run_id} are steps of {manifest.schedule}: stages are those of a model as it is.",
            hint=f"They are its baseline's: --run {manifest.baseline}",
        )
    task = next((name for name in pc.unique(run.documents["task"]).to_pylist() if name), None)
    if task is not None:
        raise AnalysisError(
            f"Run {run.run_id} is of the task {task}: stages are told from text, at all of its tokens."
        )


def locate_stages(run: Run, options: NoOptions, inputs: Mapping[str, Input]) -> dict[str, pa.Table]:  # noqa: ARG001
    """Return ``stages``, a row for each signature, and ``stage_curves``, the four curves of Figure 1.

    Layer l is at depth l/(L - 1), boundary i at i/L. ``raw`` is a curve interpolated at 101 depths, ``value`` that
    divided by its largest value at a layer.
    """
    profiles = read_profiles(run, inputs)
    n_layers = run.shape.n_layers
    model = {"model": run.manifest.model_name, "model_id": run.manifest.model_id, "family": run.shape.family}
    verdicts = [signature.judge(profiles) for signature in _SIGNATURES]
    values = np.array([verdict.values for verdict in verdicts])
    few = f"with {n_layers} layers, depth is in steps of {1 / max(n_layers - 1, 1):.2f}"
    notes = [[verdict.note, few if n_layers < _FEW_LAYERS else None] for verdict in verdicts]
    stages: dict[str, Any] = {
        **model,
        "stage": pa.array([signature.stage for signature in _SIGNATURES], pa.int32()),
        "signature": [signature.name for signature in _SIGNATURES],
        "expected": [signature.expected for signature in _SIGNATURES],
        "value": values[:, 0],
        "value_lo": values[:, 1],
        "value_hi": values[:, 2],
        "unit": [verdict.unit for verdict in verdicts],
        "depth": np.array([verdict.depth for verdict in verdicts]),
        "holds": pa.array([verdict.holds for verdict in verdicts], pa.bool_()),
        "statement": [verdict.statement for verdict in verdicts],
        "reason": [verdict.reason for verdict in verdicts],
        "note": ["; ".join(filter(None, note)) or None for note in notes],
    }
    curves = [
        tidy_table(run.run_id, {**model, "curve": name, **columns}, {})
        for name in _CURVES
        if not profiles[name].lacking
        for columns in _variants(name, profiles[name])
    ]
    return {
        "stages": tidy_table(run.run_id, stages, {"variant": "default"}),
        "stage_curves": pa.concat_tables([_CURVE.empty_table(), *curves]),
    }


def _variants(name: str, it: Profile) -> Iterator[dict[str, Any]]:
    """Yield the columns of a curve, and of the divergence, which layer 0 dwarfs, also without it and as a logarithm."""
    yield _columns("default", it.unit, it.depth, it.value)
    if name == "kl_drop":
        if len(it.value) > 1:
            yield _columns("without_layer_0", it.unit, it.depth[1:], it.value[1:])
        yield _columns("log", "log10(1 + nats)", it.depth, np.log10(1 + it.value))


def _columns(variant: str, unit: str, depth: Doubles, values: Doubles) -> dict[str, Any]:
    grid = _GRID[depth[0] <= _GRID]
    raw = np.interp(grid, depth, values)
    value = ratio(raw, values.max())
    reason = pa.array(
        [None if values.max() else "no value: the curve is 0 at every layer"] * len(grid), pa.string()
    )
    return {"depth": grid, "value": value, "raw": raw, "unit": unit, "reason": reason, "variant": variant}


def family_curves(curves: pa.Table) -> pa.Table:
    """Return the curves of Figure 1 of families: means over models, again divided by their maximum.

    Takes ``stage_curves``, in which no intervened model is. A model of several runs is the mean over them, and
    counts once. A depth at which some model has no value (without layer 0, where few layers begin late) is left out.

    Returns
    -------
    pa.Table
        family, curve, variant, depth, value, n_models.
    """
    place = ["family", "curve", "variant", "depth"]
    known = curves.filter(pc.is_valid(curves["value"]))
    models = known.group_by([*place, "model_id"], use_threads=False).aggregate([("value", "mean")])
    means = models.group_by(place, use_threads=False).aggregate(
        [("value_mean", "mean"), ("value_mean", "count")]
    )
    means = means.rename_columns([*place, "mean", "n_models"])
    of = place[:3]
    scales = means.group_by(of, use_threads=False).aggregate([("n_models", "max")])
    means = means.join(scales, of)
    means = means.filter(pc.equal(means["n_models"], means["n_models_max"]))
    means = means.join(means.group_by(of, use_threads=False).aggregate([("mean", "max")]), of)
    value = pc.divide(means["mean"], means["mean_max"])
    return (
        means.append_column("value", value)
        .select([*place, "value", "n_models"])
        .sort_by([(name, "ascending") for name in place])
    )
