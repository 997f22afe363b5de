"""The stages of models whose findings are planted, and of runs whose findings are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from tests.analyze.intervention_rows import every_position, planned, write_rows
from tests.conftest import TINY

from layerlake.analyze.analyses import ANALYSES, run_all, run_analysis
from layerlake.analyze.inputs import Input, NoOptions
from layerlake.analyze.stages import STAGES_READS, family_curves, locate_stages
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.findings import Finding, FindingKey, newest_findings, write_finding
from layerlake.catalog.lake import Lake
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.run import Run
from layerlake.catalog.schedules import plan_interventions

N_LAYERS = 21
DEPTH = np.linspace(0, 1, N_LAYERS)

Doubles = npt.NDArray[np.float64]
Row = dict[str, Any]


def bump(at: float) -> Doubles:
    """A curve over the layers that is largest at a depth."""
    return np.asarray(1 - np.abs(DEPTH - at))


PAPER: dict[str, Doubles] = {
    "kl_drop": np.where(DEPTH == 0, 9.0, 0.3),
    "attention": bump(0.1),
    "prediction": bump(0.85),
    "suppression": DEPTH**4,
    "lens_kl": np.array([9.0] * 12 + [8.0] * 2 + [4.0] * 7 + [0.0]),
    "lens_entropy": np.array([12.0] * 15 + [3.0] * 7),
    "mlp_norm": 1 + DEPTH**2,
    "wic": np.append(0.5, 0.5 + 0.2 * bump(0.5)),
}
"""A model that is as the paper says, layer by layer; boundary by boundary what has one value more."""


def plant(run: Run, values: Mapping[str, Doubles]) -> dict[str, Input]:
    """Write findings with these values, and return them as what ``stages`` reads."""

    def column(name: str, value: float, width: float = 0.01) -> Row:
        return {name: value, f"{name}_lo": value - width, f"{name}_hi": value + width}

    def rows(name: str) -> list[tuple[int, float]]:
        return list(enumerate(values.get(name, np.empty(0)).tolist()))

    tables: dict[str, list[Row]] = {
        "intervention_summary": [
            {
                "kind": i.kind,
                "layer": i.layer,
                "positions": None,
                "is_resumed": True,
                "n_tokens": 9,
                "note": None,
            }
            | column("kl_nats", value)
            for i, (_, value) in zip(plan_interventions(N_LAYERS, drop="all"), rows("kl_drop"), strict=False)
        ],
        "attention_locality": [
            {"layer": i, "distance": distance, "reason": None}
            | column("cumulative_weight", value * distance / 5)
            for i, value in rows("attention")
            for distance in (4, 5, 6)
        ],
        "neuron_counts": [
            {"layer": i, "class": kind, "min_kurtosis": least, "threshold": 10.0}
            | {"n_units": round(1000 * value), "density": value if least == 10 else 1 - value}
            for kind in ("prediction", "suppression")
            for i, value in rows(kind)
            for least in (8.0, 10.0)
        ],
        "lens": [
            {"boundary": i, "reason": None}
            | column("kl_final_lens_nats", kl)
            | column("entropy_bits", entropy)
            for (i, kl), (_, entropy) in zip(rows("lens_kl"), rows("lens_entropy"), strict=True)
        ],
        "norms": [
            {"layer": i, "component": component, "reason": None} | column("mean_norm", value * scale)
            for i, value in rows("mlp_norm")
            for component, scale in (("attn_out", -1), ("mlp_out", 1))
        ],
        "wic_summary": [
            {"boundary": i, "features": features, "n_dev": 9, "reason": None}
            | column("accuracy", value * scale)
            for i, value in rows("wic")
            for features, scale in (("interaction", 1), ("concat", -1))
        ],
    }
    inputs = {}
    for view, given in tables.items():
        key = FindingKey(view, 1, run.run_id, {}, {"resid": {"n_tokens": 1}})
        if given:
            table = pa.Table.from_pylist([{"run": run.run_id, **row} for row in given])
            write_finding(run.store, Finding(view, {view: table}, (key,)))
        inputs[view] = Input(
            run.store, view, (key,) if given else (), "" if given else f"no {view}: layerlake …"
        )
    return inputs


@pytest.fixture
def deep(make_run: Callable[..., Run]) -> Run:
    """A run of a model of many layers."""
    return make_run(name="deep", shape=replace(TINY, n_layers=N_LAYERS), sites=("resid",), lengths=(5,))


def as_intervened(run: Run, baseline: Run) -> Run:
    """Let a run be one of the baseline's model with two layers swapped, by a further snapshot."""
    identity = run.manifest.identity | {"baseline": baseline.run_id, "schedule": "1,0"}
    return Run(run.store, commit_manifest(run.store, replace(run.manifest, identity=identity)))


def judged(run: Run, values: Mapping[str, Doubles]) -> dict[str, Row]:
    table = locate_stages(run, NoOptions(), plant(run, values))["stages"]
    return {row["signature"]: row for row in table.to_pylist()}


def test_a_model_that_is_as_the_paper_says(deep: Run) -> None:
    rows = judged(deep, PAPER)
    assert [(row["stage"], row["signature"], row["holds"]) for row in rows.values()] == [
        (1, "kl_drop_peak", True), (1, "attention_peak", True), (2, "lens_progress", True), (2, "probe_peak", True),
        (3, "prediction_peak", True), (3, "narrowing", True), (4, "suppression_peak", True),
        (4, "mlp_norm_peak", True), (None, "order_of_peaks", True),
    ]  # fmt: skip
    depths = {
        "kl_drop_peak": 0, "attention_peak": 0.1, "prediction_peak": 0.85, "suppression_peak": 1, "mlp_norm_peak": 1,
        "probe_peak": 11 / 21, "lens_progress": (13 + 3.5 / 4) / 21, "narrowing": 14.5 / 21,
    }  # fmt: skip
    for name, depth in depths.items():
        assert rows[name]["depth"] == pytest.approx(depth)
    for row in rows.values():
        about = "the order of the stages" if row["stage"] is None else f"stage {row['stage']}"
        assert row["statement"].startswith(f"For {about}: ")
        assert (row["model"], row["family"], row["note"]) == ("deep", "gpt2", None)
    assert rows["kl_drop_peak"]["statement"] == (
        "For stage 1: the KL divergence that dropping a layer makes is largest, 9 (8.99 to 9.01) at layer 0; outside "
        "depth 0 it is at most 0.3 (0.29 to 0.31) at layer 1."
    )
    peak = rows["attention_peak"]
    assert [peak[name] for name in ("value", "value_lo", "value_hi", "unit")] == [1, 0.99, 1.01, "share"]
    assert rows["lens_progress"]["value"] == pytest.approx((9 - 0) / (9 - 0))
    assert rows["prediction_peak"]["reason"] == "no interval: it is counted in the weights, not estimated"
    assert rows["order_of_peaks"]["value"] == 3


@pytest.mark.parametrize(
    ("signature", "changed", "said"),
    [
        ("kl_drop_peak", {"kl_drop": np.where(DEPTH == 0.5, 9.0, 0.3)},
         "is largest, 9 (8.99 to 9.01) at layer 10; at depth 0 it is at most 0.3 (0.29 to 0.31) at layer 0."),
        ("attention_peak", {"attention": bump(0.3)}, "(0.99 to 1.01) at layer 6; at depth 0 to 0.25 it is"),
        ("lens_progress", {"lens_kl": 9 * np.linspace(1, 0, 22) ** 1.2}, "of that behind the middle, no faster than"),
        ("probe_peak", {"wic": np.linspace(0.5, 0.7, 22)}, "is largest, 0.7 (0.69 to 0.71) at boundary 21"),
        ("prediction_peak", {"prediction": bump(0.5)}, "is largest, 1 at layer 10; at depth 0.75 to 0.95"),
        ("narrowing", {"lens_entropy": np.linspace(3, 12, 22)}, "does not fall: it is 12 in the end."),
        ("suppression_peak", {"suppression": bump(0.8)}, "is largest, 1 at layer 16"),
        ("mlp_norm_peak", {"mlp_norm": 2 - DEPTH}, "is largest, 2 (1.99 to 2.01) at layer 0"),
        ("order_of_peaks", {"suppression": bump(0.5)}, "suppression neurons peaks at 0.50"),
    ],
)  # fmt: skip
def test_what_speaks_against_a_stage_is_said(
    deep: Run, signature: str, changed: dict[str, Doubles], said: str
) -> None:
    row = judged(deep, PAPER | changed)[signature]
    assert row["holds"] is False
    assert row["statement"].startswith("Against ")
    assert said in row["statement"]


@pytest.mark.parametrize("at", [0.25, 0.3])
def test_what_is_no_clear_difference_is_said(deep: Run, at: float) -> None:
    """Two layers, on both sides of an end of the window, whose intervals overlap."""
    near = np.where(np.isclose(np.abs(DEPTH - 0.275), 0.025), 0.9, 0.1) + 0.001 * np.isclose(DEPTH, at)
    row = judged(deep, PAPER | {"attention": near})["attention_peak"]
    assert (row["depth"], row["holds"]) == (pytest.approx(at), at <= 0.25)
    assert row["statement"].endswith(", which is no clear difference.")


@pytest.mark.parametrize(
    ("signature", "without", "said"),
    [
        ("kl_drop_peak", "kl_drop", "no intervention_summary: layerlake …"),
        ("attention_peak", "attention", "no attention_locality: layerlake …"),
        ("mlp_norm_peak", "mlp_norm", "no norms: layerlake …"),
        ("order_of_peaks", "attention", "no attention_locality: layerlake …"),
    ],
)
def test_what_is_not_known_is_said(deep: Run, signature: str, without: str, said: str) -> None:
    row = judged(deep, {name: values for name, values in PAPER.items() if name != without})[signature]
    assert (row["holds"], row["value"], row["depth"], row["reason"]) == (None, None, None, said)
    assert row["statement"] == f"Not known: {said}"


def test_a_model_without_neurons_of_a_class_has_no_peak(deep: Run) -> None:
    values = PAPER | {"prediction": np.zeros(N_LAYERS)}
    rows = judged(deep, values)
    for name in ("prediction_peak", "order_of_peaks"):
        assert (rows[name]["holds"], rows[name]["reason"]) == (
            None,
            "no neuron of the model is a prediction neuron",
        )
    curves = locate_stages(deep, NoOptions(), plant(deep, values))["stage_curves"]
    assert set(curves["curve"].to_pylist()) == {"kl_drop", "attention_previous_5", "suppression_density"}


def test_layers_that_were_not_dropped_are_asked_for(deep: Run) -> None:
    row = judged(deep, PAPER | {"kl_drop": PAPER["kl_drop"][:-1]})["kl_drop_peak"]
    assert row["holds"] is None
    assert row["reason"].endswith(f"layerlake intervene LAKE --run {deep.run_id} --drop all")


def test_curves_equal_numpy(deep: Run) -> None:
    found = locate_stages(deep, NoOptions(), plant(deep, PAPER))["stage_curves"].to_pandas()
    kl, grid = PAPER["kl_drop"] + DEPTH, np.linspace(0, 1, 101)
    found = locate_stages(deep, NoOptions(), plant(deep, PAPER | {"kl_drop": kl}))["stage_curves"].to_pandas()
    expected = {
        ("kl_drop", "default"): (grid, DEPTH, kl, "nats"),
        ("kl_drop", "without_layer_0"): (grid[5:], DEPTH[1:], kl[1:], "nats"),
        ("kl_drop", "log"): (grid, DEPTH, np.log10(1 + kl), "log10(1 + nats)"),
        ("attention_previous_5", "default"): (grid, DEPTH, PAPER["attention"], "share"),
        ("prediction_density", "default"): (grid, DEPTH, PAPER["prediction"], "share"),
        ("suppression_density", "default"): (grid, DEPTH, PAPER["suppression"], "share"),
    }
    groups = dict(list(found.groupby(["curve", "variant"])))
    assert set(groups) == set(expected)
    for key, (depth, at, values, unit) in expected.items():
        group = groups[key]
        np.testing.assert_allclose(group.depth, depth)
        np.testing.assert_allclose(group.raw, np.interp(depth, at, values))
        np.testing.assert_allclose(group.value, np.interp(depth, at, values) / values.max())
        assert set(group.unit) == {unit}


def test_a_family_is_the_mean_over_its_models(make_run: Callable[..., Run]) -> None:
    """Two runs of one model, another model of the family with other depth, and one of another family."""
    shapes = {
        ("a", 0): TINY, ("a", 1): TINY, ("b", 0): replace(TINY, n_layers=5), ("c", 0): replace(TINY, family="phi")
    }  # fmt: skip
    parts = []
    rng = np.random.default_rng(0)
    for (name, number), shape in shapes.items():
        run = make_run(name=name, shape=shape, sites=("resid",), lengths=(5, 3 + number))
        kl = rng.exponential(size=shape.n_layers)
        drops = [
            {"run": run.run_id, "kind": "drop", "layer": i, "kl_nats": value, "positions": None, "is_resumed": True,
             "n_tokens": 9, "note": None}
            for i, value in enumerate(kl)
        ]  # fmt: skip
        key = FindingKey("intervention_summary", 1, run.run_id, {}, {})
        table = pa.Table.from_pylist(drops)
        write_finding(run.store, Finding(key.analysis, {key.analysis: table}, (key,)))
        inputs = {view: Input(run.store, view, (), "none") for view in STAGES_READS}
        inputs["intervention_summary"] = Input(run.store, "intervention_summary", (key,))
        parts.append(locate_stages(run, NoOptions(), inputs)["stage_curves"])
    frames = [part.to_pandas().set_index(["variant", "depth"])["value"] for part in parts]
    found = family_curves(pa.concat_tables(parts)).to_pandas()
    assert set(found.curve) == {"kl_drop"}
    for variant, first in (("default", 0.0), ("log", 0.0), ("without_layer_0", 1.0)):
        a, b = (frames[0][variant] + frames[1][variant]) / 2, frames[2][variant]
        mean = (a + b)[(a + b).notna()] / 2
        own = found[(found.family == "gpt2") & (found.variant == variant)]
        assert own.depth.min() == first
        np.testing.assert_allclose(own.depth, mean.index)
        np.testing.assert_allclose(own.value, mean / mean.max())
        assert set(own.n_models) == {2}
        other = found[(found.family == "phi") & (found.variant == variant)]
        np.testing.assert_allclose(other.value, frames[3][variant] / frames[3][variant].max())


def test_stages_of_runs_build_on_what_is_computed(make_run: Callable[..., Run]) -> None:
    runs = [
        make_run(name=name, lengths=(20, 24, 18), context=24, partition_tokens=64) for name in ("one", "two")
    ]
    lake = Lake(runs[0].store.url)
    before = run_analysis(lake, "stages")
    assert before.runs == tuple(run.run_id for run in runs)
    rows = {row["signature"]: row for row in before.table.to_pylist() if row["run"] == runs[1].run_id}
    assert f"layerlake intervene LAKE --run {runs[1].run_id}" in rows["kl_drop_peak"]["reason"]
    assert "layerlake analyze LAKE wic" in rows["probe_peak"]["reason"]
    assert rows["prediction_peak"]["reason"] is not None  # none, or no layer there
    assert rows["attention_peak"]["note"] == "with 2 layers, depth is in steps of 1.00"
    attention = run_analysis(lake, "attention_locality").table.to_pandas().query("distance == 5")
    largest = attention.groupby("run").cumulative_weight.max()
    assert rows["attention_peak"]["value"] == largest[runs[1].run_id]
    assert run_analysis(lake, "stages").keys == before.keys

    for run in runs:
        write_rows(run, planned(2, drop="all"), every_position(run))
    after = run_analysis(lake, "stages")
    assert {key.digest for key in after.keys}.isdisjoint(key.digest for key in before.keys)
    summary = run_analysis(lake, "intervention_summary")
    assert after.keys[0].extents["intervention_summary"]["findings"] == [summary.keys[0].digest]
    dropped = summary.table.to_pandas().query("kind == 'drop'").groupby("run").kl_nats.max()
    for row in after.table.to_pylist():
        if row["signature"] == "kl_drop_peak":
            assert row["value"] == dropped[row["run"]]
    shown = {table.finding for table in newest_findings(lake.findings("stages"))}
    assert shown == {key.digest for key in after.keys}


def test_probes_are_those_of_another_run_of_the_model(make_run: Callable[..., Run]) -> None:
    """WiC is a run of its own; only what is stored is read, with the defaults, of the model as it is."""
    text, other, swapped = (make_run(name="m", lengths=lengths) for lengths in ((5, 9), (5, 8), (5, 7)))
    swapped = as_intervened(swapped, other)
    stranger = make_run(name="n")
    lake = Lake(text.store.url)
    version = ANALYSES["wic"].version
    defaults = {"pooling": "last", "seeds": 5, "train_split": "train", "dev_split": "auto", "n_excluded": 0}
    for run, changed, peak, n_dev in (
        (other, {}, 1, 9),
        (other, {"pooling": "mean"}, 0, 9),
        (stranger, {}, 0, 99),
        (swapped, {}, 0, 99),
    ):
        rows = [
            {
                "run": run.run_id,
                "boundary": i,
                "features": "interaction",
                "n_dev": n_dev,
                "accuracy": accuracy,
            }
            for i, accuracy in enumerate(np.where(np.arange(3) == peak, 0.6, 0.5).tolist())
        ]
        key = FindingKey("wic", version, run.run_id, defaults | changed, {"resid": {"n_tokens": 1}})
        tables = {"wic": pa.table({"run": [run.run_id]}), "wic_summary": pa.Table.from_pylist(rows)}
        write_finding(run.store, Finding("wic", tables, (key,)))
    found = run_analysis(lake, "stages", runs=[text.run_id]).table.to_pylist()
    (row,) = (row for row in found if row["signature"] == "probe_peak")
    assert (row["value"], row["depth"], row["holds"]) == (0.6, 0.5, True)
    assert row["note"].startswith(f"from run {other.run_id}; ")


@pytest.mark.parametrize("sites", [("resid", "attn_band"), ("resid",)])
def test_an_intervened_model_has_no_stages(make_run: Callable[..., Run], sites: tuple[str, ...]) -> None:
    """Nor is any curve of it in its family's mean. The baseline is named, not a site that would be of no use."""
    baseline = make_run(name="m", sites=("resid", "attn_band"))
    swapped = as_intervened(make_run(name="m", lengths=(5, 8), sites=sites), baseline)
    lake = Lake(baseline.store.url)
    findings, skipped = run_all(lake)
    assert {finding.analysis: finding.runs for finding in findings}["stages"] == (baseline.run_id,)
    (reason,) = (skip.reason for skip in skipped if (skip.run, skip.analysis) == (swapped.run_id, "stages"))
    assert "are steps of 1,0" in reason
    with pytest.raises(AnalysisError, match="are steps of 1,0") as caught:
        run_analysis(lake, "stages", runs=[swapped.run_id])
    assert caught.value.hint.endswith(f"--run {baseline.run_id}")
