"""Analyses by name: memoised, checked before work starts, over several runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from tests.analyze.intervention_rows import every_position, planned, write_rows

from layerlake.analyze import analyses, reduce
from layerlake.analyze.analyses import ANALYSES, run_all, run_analysis
from layerlake.analyze.lens import LensOptions
from layerlake.analyze.norms import NormsOptions
from layerlake.analyze.statistic import State
from layerlake.catalog.errors import AnalysisError, CorruptRun, RunNotFound, SiteNotFound
from layerlake.catalog.findings import list_findings, newest_findings
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.run import Run

ANY_TEXT = [
    name for name in ANALYSES if name not in ("subjoiner", "wic", "ing", "swap_cosines", "benchmarks")
]
"""What a run of random tokens and rows of interventions can answer: the others need words, a task, or cosines."""

each = pytest.mark.parametrize("name", ANALYSES)
answered = pytest.mark.parametrize("name", ANY_TEXT)


@pytest.fixture
def lake(make_run: Callable[..., Run]) -> Lake:
    runs = make_run(name="first"), make_run(name="second", lengths=(8, 9), dtype="float16")
    for run in runs:
        write_rows(run, planned(2, drop="all"), every_position(run))
    return Lake(runs[0].store.url)


@pytest.fixture
def forbid_computing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whatever is computed fails."""

    def forbid() -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise AssertionError("computed")

        for name, analysis in list(ANALYSES.items()):
            ways = ("open_statistic", "compute", "combine")
            failing: dict[str, Any] = {way: fail for way in ways if getattr(analysis, way) is not None}
            monkeypatch.setitem(ANALYSES, name, dataclasses.replace(analysis, **failing))

    return forbid


@answered
def test_second_call_reads_the_first(lake: Lake, forbid_computing: Callable[[], None], name: str) -> None:
    first = run_analysis(lake, name)
    assert tuple(first.tables) == ANALYSES[name].views
    assert first.runs == tuple(lake.run_ids)
    assert set(first.table["run"].to_pylist()) == set(lake.run_ids)
    forbid_computing()
    again = run_analysis(lake, name, scheduler="synchronous", progress=True)
    assert again.tables == first.tables
    assert again.keys == first.keys
    one = run_analysis(lake, name, runs=["sec"])
    assert set(one.table["run"].to_pylist()) == {lake.run("sec").run_id}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lens", {"scale": "final"}),
        ("lens", {"tokens": "9"}),
        ("cka", {"batch": 5}),
        ("neurons", {"threshold": 8.0}),
        ("attention_locality", {"variant": "authors"}),
        ("norms", {"tokens": "all"}),
    ],
)
def test_another_option_is_another_finding(
    lake: Lake, forbid_computing: Callable[[], None], name: str, options: dict[str, Any]
) -> None:
    run_analysis(lake, name)
    changed = run_analysis(lake, name, options=options)
    for option, value in options.items():
        for table in changed.tables.values():
            assert set(table[option].to_pylist()) == {value}
    assert len(newest_findings(lake.findings(ANALYSES[name].views[0]))) == 4
    forbid_computing()
    run_analysis(lake, name)
    run_analysis(lake, name, options=ANALYSES[name].options(**options))
    with pytest.raises(AssertionError, match="computed"):
        run_analysis(lake, "lens", options={"tokens": "11"})


@pytest.mark.parametrize(
    "name", [name for name in ANY_TEXT if any(ANALYSES[name].sites) and not ANALYSES[name].reads]
)
def test_a_longer_extent_is_computed_anew(
    lake: Lake, forbid_computing: Callable[[], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    short = run_analysis(lake, name, runs=["first"])
    extent = Run.extent
    monkeypatch.setattr(
        Run, "extent", lambda self, site: {**extent(self, site), "n_tokens": 100_000}
    )  # as after an extension
    long = run_analysis(lake, name, runs=["first"])
    assert long.keys != short.keys
    newest = newest_findings(lake.findings(ANALYSES[name].views[0]))
    assert [table.finding for table in newest] == [long.keys[0].digest]
    monkeypatch.setattr(Run, "extent", lambda self, site: {**extent(self, site), "n_tokens": 200_000})
    forbid_computing()
    with pytest.raises(AssertionError, match="computed"):
        run_analysis(lake, name, runs=["first"])


def test_same_option_written_otherwise_is_the_same_finding(
    lake: Lake, forbid_computing: Callable[[], None]
) -> None:
    run_analysis(lake, "lens", options={"tokens": "20000"})
    forbid_computing()
    run_analysis(lake, "lens", options=LensOptions(tokens="20k"))


def test_an_integer_for_a_float_is_the_same_finding(lake: Lake, forbid_computing: Callable[[], None]) -> None:
    found = run_analysis(lake, "neurons", options={"threshold": 10})
    assert type(found.keys[0].params["threshold"]) is float
    assert found.table["threshold"].type == "double"
    forbid_computing()
    assert run_analysis(lake, "neurons").keys == found.keys


def test_a_killed_analysis_leaves_nothing(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reduce, "_merge", die)
    with pytest.raises(KeyboardInterrupt):
        run_analysis(lake, "attention_locality", scheduler="synchronous")
    assert {finding.view for finding in lake.findings()} == {"interventions"}


def test_missing_site_is_said_before_work_starts(
    make_run: Callable[..., Run], forbid_computing: Callable[[], None]
) -> None:
    make_run(name="first")
    lake = Lake(make_run(name="second", sites=("resid",)).store.url)
    forbid_computing()
    with pytest.raises(SiteNotFound, match="'attn_band' not at all") as error:
        run_analysis(lake, "attention_locality")
    assert "--sites attn_band" in error.value.hint


def test_run_all_skips_what_a_run_cannot_answer(make_run: Callable[..., Run]) -> None:
    first = make_run(name="first")
    second = make_run(name="second", sites=("resid",), lengths=(2, 2, 1))
    write_rows(first, planned(2, drop="all"), every_position(first))
    lake = Lake(second.store.url)
    findings, skipped = run_all(lake)
    assert [finding.analysis for finding in findings] == ANY_TEXT
    assert {finding.analysis: finding.runs for finding in findings} == {
        "lens": (first.run_id,),
        "cka": (first.run_id, second.run_id),
        "neurons": (first.run_id, second.run_id),
        "attention_locality": (first.run_id,),
        "norms": (first.run_id,),
        "intervention_summary": (first.run_id,),
        "stages": (first.run_id,),
    }
    refused = {(skip.run, skip.analysis) for skip in skipped if skip.analysis in ANY_TEXT}
    assert refused == {
        (second.run_id, "lens"), (second.run_id, "attention_locality"), (second.run_id, "norms"),
        (second.run_id, "intervention_summary"), (second.run_id, "stages"),
    }  # fmt: skip
    assert {skip.analysis for skip in skipped if skip.run == first.run_id} == {*ANALYSES} - {*ANY_TEXT}
    reasons = {skip.analysis: skip.reason for skip in skipped}
    assert "no document is longer than 2 tokens" in reasons["lens"]
    assert "--sites attn_band" in reasons["attention_locality"]


@pytest.mark.parametrize("site", ["pattern", "attn_band"])
def test_either_site_answers_for_attention_locality(make_run: Callable[..., Run], site: str) -> None:
    lake = Lake(make_run(sites=(site,), lengths=(20, 30), context=32, partition_tokens=64).store.url)
    findings, skipped = run_all(lake)
    assert [finding.analysis for finding in findings] == ["neurons", "attention_locality"]
    assert [skip.analysis for skip in skipped if skip.analysis in ANY_TEXT] == [
        "lens", "cka", "norms", "intervention_summary", "stages"
    ]  # fmt: skip
    (key,) = findings[1].keys
    assert set(key.extents) == {site}
    assert set(findings[1].table["source"].to_pylist()) == {site}


def test_a_run_that_gets_the_sums_later_is_computed_from_them(make_run: Callable[..., Run]) -> None:
    """The memo key says which site was read; the newest finding is what the view shows."""
    run = make_run(sites=("pattern", "attn_band"), lengths=(20, 30), context=32, partition_tokens=64)
    lake = Lake(run.store.url)
    held = {"pattern": run.manifest.sites["pattern"]}
    commit_manifest(run.store, dataclasses.replace(run.manifest, sites=held))
    before = run_analysis(lake, "attention_locality")
    commit_manifest(run.store, dataclasses.replace(lake.run().manifest, sites=run.manifest.sites))
    after = run_analysis(lake, "attention_locality")
    assert [set(finding.keys[0].extents) for finding in (before, after)] == [{"pattern"}, {"attn_band"}]
    (shown,) = newest_findings(lake.findings("attention_locality"))
    assert shown.finding == after.keys[0].digest


def grow(monkeypatch: pytest.MonkeyPatch, n_tokens: int) -> None:
    """Let runs say that they hold so many tokens of a site, as after an extension."""
    extent = Run.extent
    monkeypatch.setattr(Run, "extent", lambda self, site: {**extent(self, site), "n_tokens": n_tokens})


def test_what_is_known_is_looked_for_among_findings_of_the_same_sites(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later finding of other sites, which the view shows in its place, does not hide it."""
    run = make_run(sites=("pattern", "attn_band"), lengths=(20, 30), context=32, partition_tokens=64)
    lake, known = Lake(run.store.url), []

    def reduced(statistic: Any, run: Run, **given: Any) -> State:
        known.append(given["known"])
        return reduce.reduce_statistic(statistic, run, **given)

    monkeypatch.setattr(analyses, "reduce_statistic", reduced)
    for n_tokens, site in enumerate(("attn_band", "pattern", "attn_band"), 50):
        sites = {site: run.manifest.sites[site]}
        commit_manifest(run.store, dataclasses.replace(lake.run().manifest, sites=sites))
        grow(monkeypatch, n_tokens)
        run_analysis(lake, "attention_locality")
    assert [state is not None for state in known] == [False, False, True]


@pytest.mark.parametrize(("tokens", "is_kept"), [("9", False), ("20k", True), ("all", True)])
def test_a_state_is_kept_if_a_longer_extent_asks_for_it_again(
    make_run: Callable[..., Run], tokens: str, *, is_kept: bool
) -> None:
    """A choice of tokens does not: it is spread anew over the whole run."""
    lake = Lake(make_run().store.url)
    run_analysis(lake, "lens", options={"tokens": tokens})
    assert bool(list_findings(lake.store, "lens_state")) is is_kept


def test_a_damaged_state_is_not_built_upon(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(make_run().store.url)
    run_analysis(lake, "cka", options={"batch": 4})
    (table,) = list_findings(lake.store, "cka_state")
    content = bytearray(lake.store.read(table.path))
    content[len(content) // 4] ^= 1
    lake.store.write(table.path, bytes(content))
    grow(monkeypatch, 100_000)
    with pytest.raises(CorruptRun, match="checksum"):
        run_analysis(lake, "cka", options={"batch": 4})


def test_a_run_that_is_named_twice_is_analysed_once(lake: Lake) -> None:
    named = ["sec", "first", lake.run("second").run_id]
    finding = run_analysis(lake, "cka", runs=named)
    assert finding.runs == (lake.run("second").run_id, lake.run("first").run_id)
    assert finding.table == run_analysis(lake, "cka", runs=["second", "first"]).table
    findings, skipped = run_all(lake, runs=named)
    assert {len(each.runs) for each in findings} == {2}
    assert len({(skip.run, skip.analysis) for skip in skipped}) == len(skipped)


@pytest.mark.parametrize(
    "name", [name for name in ANALYSES if "seed" in get_type_hints(ANALYSES[name].options)]
)
def test_a_seed_is_not_negative(make_run: Callable[..., Run], name: str) -> None:
    lake = Lake(make_run().store.url)
    with pytest.raises(AnalysisError, match=f"seed of '{name}' is at least 0, not -1"):
        run_analysis(lake, name, options={"seed": -1})


def test_run_all_raises_other_errors(lake: Lake) -> None:
    model = lake.run("first").manifest.model_id
    lake.store.delete(f"models/{model}/weights.zarr/W_U")
    with pytest.raises(CorruptRun, match="W_U"):
        run_all(lake)


@pytest.mark.parametrize(
    ("name", "site", "layer"),
    [
        ("lens", "resid", 1),
        ("cka", "resid", 2),
        ("norms", "mlp_out", 1),
        ("attention_locality", "pattern", 0),
    ],
)
def test_values_that_are_not_finite_are_never_averaged(
    make_run: Callable[..., Run], name: str, site: str, layer: int
) -> None:
    clean = make_run(url=None, name="clean", lengths=(20, 9, 5, 6), context=24, partition_tokens=32)
    values = np.concatenate(
        [np.stack([clean.read(site, i, p) for i in range(clean.array(site).shape[0])])
         for p in clean.manifest.partitions],
        axis=-1 if site == "pattern" else 1,
    )  # fmt: skip
    if site == "pattern":
        values[layer, 1, 50] = np.nan
    else:
        values[layer, [5, 19], 3] = np.nan
    run = make_run(
        name="bad", lengths=(20, 9, 5, 6), context=24, partition_tokens=32, values={site: values},
        sites=["resid", "attn_out", "mlp_out", "pattern"],
    )  # fmt: skip
    lake = Lake(run.store.url)
    with pytest.raises(
        AnalysisError, match=rf"Run bad-\w+ holds \d values .* of site '{site}', layer {layer}"
    ):
        run_analysis(lake, name, runs=["bad"])
    assert [skip.analysis for skip in run_all(lake, runs=["bad"])[1] if skip.analysis == name] == [name]
    assert {finding.view for finding in lake.findings()}.isdisjoint(ANALYSES[name].views)


def test_unknown_names_and_options_are_corrected(lake: Lake) -> None:
    with pytest.raises(AnalysisError, match=r"no analysis 'norm'\. Did you mean 'norms'"):
        run_analysis(lake, "norm")
    with pytest.raises(AnalysisError, match=r"no option 'scales'\. Did you mean 'scale'"):
        run_analysis(lake, "lens", options={"scales": "own"})
    with pytest.raises(AnalysisError, match=r"cannot be 'finl'\. Did you mean 'final'"):
        run_analysis(lake, "lens", options={"scale": "finl"})
    with pytest.raises(AnalysisError, match="int"):
        run_analysis(lake, "cka", options={"batch": "128"})
    with pytest.raises(AnalysisError, match="NormsOptions are not the options of 'lens'"):
        run_analysis(lake, "lens", options=NormsOptions())
    for call in (
        lambda: run_analysis(lake, "lens", scheduler="tread"),
        lambda: run_all(lake, scheduler="tread"),
    ):
        with pytest.raises(AnalysisError, match="no scheduler 'tread'"):
            call()


def test_a_lake_without_runs_says_so(tmp_path: Path) -> None:
    create_lake(tmp_path / "empty")
    with pytest.raises(RunNotFound, match="has no runs"):
        run_analysis(Lake(tmp_path / "empty"), "lens")
    with pytest.raises(RunNotFound, match="has no runs"):
        run_all(Lake(tmp_path / "empty"))


@each
def test_options_can_be_made_into_a_command_line(name: str) -> None:
    kind = ANALYSES[name].options
    assert kind() == kind()
    assert kind.__dataclass_params__.frozen
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation = types[field.name]
        assert annotation in {int, float, str, bool} or get_origin(annotation) is Literal
        assert all(isinstance(choice, str) for choice in get_args(annotation))
        assert field.default is not dataclasses.MISSING
        assert field.metadata["help"].endswith(".")


@each
def test_views_belong_to_one_analysis(name: str) -> None:
    others = {view for other in ANALYSES.values() if other.name != name for view in other.views}
    assert others.isdisjoint(ANALYSES[name].views)
    assert analyses.ANALYSES[name].summary
