"""The report: one file, nothing from the network, nothing from the lake that could act as HTML or script."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tests.analyze.test_ing import planted_run
from tests.analyze.test_subjoiner import VOCAB as WORDS_AND_PIECES
from tests.analyze.test_subjoiner import write_text
from tests.conftest import TINY, build_run

from layerlake.analyze.analyses import ANALYSES, run_all, run_analysis
from layerlake.analyze.captions import TITLES
from layerlake.analyze.demands import DEMANDS
from layerlake.analyze.report import build_report, label_runs, write_report
from layerlake.analyze.series import Axis
from layerlake.capture.placement import Prompt
from layerlake.catalog.errors import LayerLakeError, RunNotFound
from layerlake.catalog.findings import list_findings
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.run import Run

MADE = datetime(2024, 6, 19, 12, 0, tzinfo=UTC)
LENGTHS = (20, 30, 24, 19)  # some queries have 17 tokens before them
FIGURES = 7
UNMET = DEMANDS.keys() - {"stages", "neurons"}
ANY_TEXT = [name for name in TITLES if name not in UNMET]
"""What a run of random tokens can answer: the others need words, or a task, or interventions."""

MakeRun = Callable[..., Run]


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.commands: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002  # called by name
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words += data
        if self._inside == "pre":
            self.commands += data.splitlines()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def specs(self) -> list[dict[str, Any]]:
        data = [attributes.get("type") == "application/json" for attributes in self.of("script")]
        return [json.loads(text) for text, is_data in zip(self.scripts, data, strict=True) if is_data]


def rename(run: Run, **changes: Any) -> Run:
    """Change what a run's manifest says, by a further snapshot."""
    return Run(run.store, commit_manifest(run.store, dataclasses.replace(run.manifest, **changes)))


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run(name="first", lengths=LENGTHS, context=32, partition_tokens=64)


@pytest.fixture
def lake(run: Run) -> Lake:
    """One run, fully analysed."""
    lake = Lake(run.store.url)
    run_all(lake, scheduler="synchronous")
    return lake


@pytest.fixture
def other(make_run: MakeRun) -> Run:
    """A second run in the same lake, not analysed."""
    return make_run(name="second", lengths=LENGTHS, context=32, partition_tokens=64, seed=1)


def test_one_page_has_all_figures_and_what_they_come_from(lake: Lake, run: Run) -> None:
    text = build_report(lake, made=MADE)
    page = Page(text)
    assert len(page.specs) == FIGURES
    assert [div["data-spec"] for div in page.of("div") if "data-spec" in div] == [
        script["id"] for script in page.of("script") if "id" in script
    ]
    for analysis in ANY_TEXT:
        assert f"layerlake analyze {lake.url} {analysis}\n" in page.words
    assert f"layerlake report {lake.url} -o report.html" in page.words
    manifest = run.manifest
    for fact in (run.run_id, manifest.model_id, manifest.dataset, f"{manifest.n_tokens:,}", manifest.dtype):
        assert fact in page.words
    for table in list_findings(lake.store):
        assert table.finding in page.words
        assert table.created in page.words
    assert str(manifest.captures[0]["capture_id"]) in page.words
    assert "2024-06-19 12:00 UTC" in page.words
    assert "arXiv 2406.19384" in page.words
    assert "has not been analysed" not in page.words
    for name in UNMET:
        assert page.words.count(f"Left out, with {DEMANDS[name].lack}: first.") == 1
    assert "has grown" not in page.words
    rows = [row for spec in page.specs for rows in spec["datasets"].values() for row in rows]
    assert not any({"row", "unit"} & row.keys() for row in rows)  # nothing per token or per neuron


def test_the_page_asks_the_network_for_nothing_and_runs_one_script(lake: Lake) -> None:
    text = build_report(lake, made=MADE)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert (
            not str(attributes.get("href", "#")).strip("#").startswith(("http", "//", "data:", "javascript:"))
        )
        assert not any(name.startswith("on") for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (script,) = [s for s, attributes in zip(page.scripts, page.of("script"), strict=True) if not attributes]
    assert script.count("window.vegaEmbed") + script.count(".vegaEmbed") <= 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [str(meta["content"]) for meta in page.of("meta") if "http-equiv" in meta]
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    assert "http" not in policy
    assert not any("url" in dataset for spec in page.specs for dataset in spec["datasets"].values())


def test_the_page_depends_on_nothing_but_the_lake_and_the_time(lake: Lake) -> None:
    later = build_report(Lake(lake.url), made=datetime(2024, 6, 20, 12, 0, tzinfo=UTC))
    assert later.replace("2024-06-20", "2024-06-19") == build_report(lake, made=MADE)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\" ' & \u2028"


def test_what_the_lake_says_stays_text(lake: Lake, run: Run) -> None:
    pages = []
    for word in ("harmless", HOSTILE):
        run = rename(run, model_name=word, dataset=word, identity={word: {"nested": [word]}})
        pages.append(Page(build_report(Lake(lake.url), output=f"{word}.html", made=MADE)))
    plain, page = pages
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attributes) for _, attributes in page.elements] == [sorted(a) for _, a in plain.elements]
    assert page.scripts[-1] == plain.scripts[-1]  # the only one that is run
    assert page.words.count(HOSTILE) >= 5
    label = HOSTILE.rpartition("/")[2]
    assert {row["model"] for rows in page.specs[0]["datasets"].values() for row in rows} == {label}


def test_a_run_that_lacks_an_analysis_is_named_with_the_command(lake: Lake, other: Run) -> None:
    run_analysis(lake, "lens", runs=["second"], scheduler="synchronous")
    words = Page(build_report(lake, made=MADE)).words
    assert words.count("second has not been analysed for this.") == len(ANY_TEXT) - 1
    assert "first has not been analysed" not in words
    assert words.count(": first; second.") == len(UNMET)  # one line for all runs
    assert f"layerlake analyze {lake.url} cka --run {other.run_id}" in words
    assert f"layerlake analyze {lake.url} lens --run {other.run_id}" not in words
    assert "Activations of first and second" in words


def test_a_text_that_can_answer_is_not_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    documents, _ = write_text()
    prompts = [Prompt("wic", "train", 0, "sentence1", 1, "word", (1, 2), 4) for _ in documents]
    words_run = make_run(
        shape=dataclasses.replace(TINY, n_vocab=len(WORDS_AND_PIECES)), lengths=[len(text) for text in documents],
        token_ids=np.concatenate(documents), vocab=WORDS_AND_PIECES, prompts=prompts, context=48, partition_tokens=128,
    )  # fmt: skip
    ing_run = planted_run(tmp_path / "ing", TINY, build_run)
    for run, met in (
        (words_run, {"subjoiner", "wic", "neurons"}),
        (ing_run, {"ing", "stages", "neurons"}),
    ):
        assert {name for name, demand in DEMANDS.items() if demand.is_met(run)} == met
        words = Page(build_report(Lake(run.store.url), made=MADE)).words
        assert words.count("Left out, with") == len(DEMANDS) - len(met)
        for name in met:
            assert f"layerlake analyze {run.store.url} {name} --run {run.run_id}" in words


def test_commands_name_the_runs_that_were_analysed(lake: Lake, run: Run, other: Run) -> None:
    commands = Page(build_report(Lake(lake.url), made=MADE)).commands
    for each in (run, other):  # of the second, in the note that it has not been
        assert f"layerlake analyze {lake.url} lens --run {each.run_id}" in commands
    assert f"layerlake analyze {lake.url} lens" not in commands


def test_layers_can_stand_as_in_the_paper(lake: Lake) -> None:
    pages = {axis: Page(build_report(lake, axis=axis, made=MADE)) for axis in get_args(Axis)}
    depths = {
        axis: [
            sorted({row["depth"] for rows in spec["datasets"].values() for row in rows if "depth" in row})
            for spec in page.specs
        ]
        for axis, page in pages.items()
    }
    layers, boundaries = {"depth": [0.25, 0.75], "paper": [0, 1]}, [0, 0.5, 1]
    grid = [i / 100 for i in range(101)]  # of the stages, which always stand as in the paper
    for axis, page in pages.items():
        assert depths[axis] == [boundaries, [], layers[axis], layers[axis], layers[axis], layers[axis], grid]
        assert page.words.count("(l + 0.5)/L") == (axis == "depth")
        assert page.words.count("l/(L − 1)") == 1 + (axis == "paper")  # the stages always say so
    assert f"layerlake report {lake.url} -o report.html --axis paper" in pages["paper"].words
    with pytest.raises(LayerLakeError, match="'height'") as caught:
        build_report(lake, axis="height")  # type: ignore[arg-type]
    assert "depth, paper" in caught.value.hint


def test_a_run_that_lacks_a_site_is_told_which(make_run: MakeRun) -> None:
    lake = Lake(make_run(sites=["resid", "mlp_out"]).store.url)
    words = Page(build_report(lake, made=MADE)).words
    assert "(with --sites attn_band)" in words
    assert "(with --sites attn_out)" in words


def test_a_finding_that_its_run_has_outgrown_says_so(lake: Lake, run: Run) -> None:
    last = run.manifest.partitions[-1]
    further = dataclasses.replace(last, index=last.index + 1)
    sites = {name: (*held, further.index) for name, held in run.manifest.sites.items()}
    rename(run, partitions=(*run.manifest.partitions, further), sites=sites)
    words = Page(build_report(Lake(lake.url), made=MADE)).words
    assert (
        words.count("first has grown since this was computed.") == len(ANY_TEXT) - 2
    )  # not weights, nor what builds on findings


def test_what_an_older_version_found_is_to_be_computed_again(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = dataclasses.replace(ANALYSES["lens"], version=ANALYSES["lens"].version + 1)
    monkeypatch.setitem(ANALYSES, "lens", following)
    page = Page(build_report(lake, made=MADE))
    assert len(page.specs) == FIGURES - 1
    assert page.words.count("first has not been analysed for this.") == 1


def test_each_set_of_parameters_has_its_figures_and_its_command(lake: Lake) -> None:
    run_analysis(lake, "lens", options={"scale": "authors"}, scheduler="synchronous")
    options = {"samples": "tokens_per_doc", "include_bos": True}
    run_analysis(lake, "cka", options=options, scheduler="synchronous")
    page = Page(build_report(lake, made=MADE))
    assert len(page.specs) == FIGURES + 2
    assert page.words.index("\nscale = own\n") < page.words.index("\nscale = authors\n")
    assert "\ninclude_bos = True, samples = tokens_per_doc\n" in page.words
    assert f"layerlake analyze {lake.url} lens --scale authors" in page.commands
    assert f"layerlake analyze {lake.url} cka --samples tokens_per_doc --include-bos" in page.commands
    queries = [shlex.split(command)[-1] for command in page.commands if command.startswith("layerlake sql")]
    assert "SELECT * FROM lens WHERE scale = 'authors'" in queries
    assert "SELECT * FROM cka WHERE include_bos = True AND samples = 'tokens_per_doc'" in queries
    assert "biases are left out" in page.words


def test_some_runs_of_the_lake(lake: Lake, run: Run, other: Run) -> None:
    page = Page(build_report(lake, runs=["first", run.run_id], made=MADE))
    assert other.run_id not in page.words
    assert f"layerlake analyze {lake.url} lens --run {run.run_id}" in page.words
    assert f"layerlake report {lake.url} -o report.html --run {run.run_id}" in page.words
    assert page.words.count("Provenance") >= 1
    with pytest.raises(RunNotFound):
        build_report(lake, runs=["third"])


@pytest.mark.parametrize("name", ["my lake", "it's", "it's $HOME", "a`b`!", 'a"b'])
def test_commands_quote_what_a_shell_would_take_apart(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    run = make_run(url=tmp_path / name)
    page = Page(build_report(Lake(run.store.url), output="my report.html", made=MADE))
    assert len(page.commands) == 1 + len(ANY_TEXT)
    for command in page.commands:
        assert shlex.split(command)[2] == str(tmp_path / name)
    assert shlex.split(page.commands[0])[3:] == ["-o", "my report.html"]


def test_values_that_are_missing_are_explained(make_run: MakeRun) -> None:
    lake = Lake(make_run().store.url)  # no document is long enough for attention at distance 16
    run_all(lake, scheduler="synchronous")
    page = Page(build_report(lake, made=MADE))
    assert "no document has a query that counts" in page.words
    assert "of the 4 batches that the jackknife needs" in page.words


def test_labels_are_short_and_differ(make_run: MakeRun) -> None:
    runs = [make_run(seed=seed) for seed in range(5)]
    for run, (model, dataset) in zip(
        runs,
        [("org/a", "x.txt"), ("b", "x.txt"), ("b", "dir/y.txt"), ("c", "x.txt"), ("/models/c/", "x.txt")],
        strict=True,
    ):
        rename(run, model_name=model, dataset=dataset)
    renamed = Lake(runs[0].store.url).runs([run.run_id for run in runs])
    series = label_runs(renamed)
    digits = [run.run_id[-8:] for run in runs]
    assert [item.label for item in series] == [
        "a", "b · x.txt", "b · y.txt", f"c · x.txt · {digits[3]}", f"c · x.txt · {digits[4]}",
    ]  # fmt: skip
    assert [item.run for item in series] == [run.run_id for run in runs]
    assert {(item.n_layers, item.family) for item in series} == {(TINY.n_layers, TINY.family)}


def test_the_label_of_an_intervened_run_is_its_schedule(make_run: MakeRun) -> None:
    """Also of one by itself; text and digits follow where they are needed."""
    plain, *others = (make_run(seed=seed) for seed in range(4))
    told = [("0,2", "x.txt"), ("1,0", "x.txt"), ("1,0", "y.txt")]
    runs = [plain] + [
        rename(run, dataset=dataset, identity={"baseline": plain.run_id, "schedule": schedule})
        for run, (schedule, dataset) in zip(others, told, strict=True)
    ]
    labels = ["tiny", "tiny · 0,2", "tiny · 1,0 · x.txt", "tiny · 1,0 · y.txt"]
    assert [item.label for item in label_runs(runs)] == labels
    assert [item.label for item in label_runs(runs[2:3])] == ["tiny · 1,0"]


def test_a_lake_without_runs(tmp_path: Path) -> None:
    create_lake(tmp_path / "lake")
    with pytest.raises(RunNotFound, match="no runs") as caught:
        build_report(Lake(tmp_path / "lake"))
    assert "layerlake capture" in caught.value.hint


def test_write_report_replaces_the_file_as_a_whole(run: Run, tmp_path: Path) -> None:
    lake, path = Lake(run.store.url), tmp_path / "out" / "report.html"
    with pytest.raises(LayerLakeError, match="cannot be written"):
        write_report(lake, path)
    path.parent.mkdir()
    path.write_text("old")
    write_report(lake, path, made=MADE)
    assert path.read_text(encoding="utf-8") == build_report(lake, output=str(path), made=MADE)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_chromium_draws_every_chart_without_a_network(lake: Lake, tmp_path: Path) -> None:
    path, log = tmp_path / "report.html", tmp_path / "net.json"
    write_report(lake, path)
    ran = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update"),
            f"--user-data-dir={tmp_path}/profile",
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", "--enable-logging=stderr"),
            *("--virtual-time-budget=20000", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    drawn = Page(ran.stdout)
    charts = [svg for svg in drawn.of("svg") if "marks" in (svg.get("class") or "")]
    assert len(charts) == FIGURES
    assert "could not be drawn" not in drawn.words
    assert "CONSOLE" not in ran.stderr  # Vega's warnings, and whatever the page's policy refused
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What Chromium asks for by itself has 'not an origin' as its initiator; what a local page asks for, 'null'.
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    assert not [url for url in asked if url.startswith("http")]
