"""A plan writes nothing and says exactly what a capture will write; what cannot be done is refused here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from layerlake.analyze.analyses import ANALYSES, run_analysis
from layerlake.analyze.statistic import lacking_sites
from layerlake.capture.execute import capture_run, execute_plan
from layerlake.capture.plan import plan_capture
from layerlake.capture.share import Share
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import (
    CaptureInProgress,
    CorpusError,
    FormatError,
    LakeNotFound,
    PlanError,
    SiteNotFound,
)
from layerlake.catalog.lake import Lake
from layerlake.catalog.sites import SITES
from layerlake.catalog.stores import Store

MakeSpec = Callable[..., CaptureSpec]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("llama", {"partition_tokens": None, "max_memory": "48MiB"}),
        ("gpt_neo", {"dtype": "float16", "sites": "resid,pattern", "max_tokens": 150}),
        ("phi", {"dtype": "bfloat16", "partition_tokens": 8192}),
    ],
)
def test_a_plan_writes_nothing_and_comes_true(
    make_spec: MakeSpec, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    lake = tmp_path / "lake"
    plan = plan_capture(make_spec(family, **options), lake)
    assert not lake.exists()

    outcome = execute_plan(plan, lake)
    run = outcome.run
    assert run is not None
    assert run.run_id == plan.run_id
    assert (outcome.n_tokens, outcome.n_objects) == (run.n_tokens, run.objects.num_rows)
    assert [cost.site for cost in plan.costs] == list(run.sites)
    assert run.documents == plan.documents
    assert run.tokens == plan.tokens

    numbers = plan.to_json()
    assert (numbers["run"], numbers["tokens"]) == (run.run_id, run.n_tokens)
    assert numbers["documents_stored"] == run.manifest.n_documents
    assert numbers["documents_cut"] == run.manifest.n_cut
    assert numbers["documents_refused"] == run.manifest.n_refused
    assert numbers["partitions"] == len(run.manifest.partitions)
    assert numbers["bos_token_id"] == run.manifest.bos_token_id


def test_planning_over_a_lake_leaves_it_untouched(make_spec: MakeSpec, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    capture_run(lake, make_spec(sites="resid", max_tokens=150))
    before = {path: path.stat().st_mtime_ns for path in lake.rglob("*")}
    for options in ({}, {"max_tokens": 150}, {"dtype": "float16"}, {"sites": "mlp_out"}):
        plan_capture(make_spec(**options), lake)
    assert {path: path.stat().st_mtime_ns for path in lake.rglob("*")} == before


def test_a_plan_needs_no_lake_and_no_weights(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    with_lake, without = plan_capture(make_spec(), tmp_path / "lake"), plan_capture(make_spec())
    assert with_lake.frozen == without.frozen
    assert with_lake.costs == without.costs


def test_the_default_context_is_what_the_model_takes_and_no_more_than_512(
    make_spec: MakeSpec, make_model: Callable[..., Any], tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    assert plan_capture(make_spec()).manifest.geometry.context == 48
    roomy = make_model("llama", max_position_embeddings=4096)
    plan = plan_capture(make_spec(model=roomy, tokenizer=tokenizer, partition_tokens=512))
    assert plan.manifest.geometry.context == 512
    assert plan.manifest.n_cut == 0


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"compute_dtype": "bfloat16"},
        {"context": 24},
        {"bos": "none"},
        {"bos": "5"},
        {"min_tokens": 5},
        {"sample_by": "line"},
        {"dataset": "other.txt"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_the_values_changes_the_run(
    make_spec: MakeSpec, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "dataset" in options:
        options = {"dataset": tmp_path / "other.txt"}
        options["dataset"].write_text("another fox sees another dog")
    assert plan_capture(make_spec(**options)).run_id != plan_capture(make_spec()).run_id


@pytest.mark.parametrize(
    "options",
    [
        {"sites": "resid"},
        {"max_tokens": 100},
        {"batch_tokens": 64},
        {"partition_tokens": 128},
        {"max_memory": "1GiB"},
        {"device": "cpu"},
        {"bos": "0"},
        {"context": 48},
        {"text_column": "text"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_does_not_change_the_values_does_not(make_spec: MakeSpec, options: dict[str, Any]) -> None:
    assert plan_capture(make_spec(**options)).run_id == plan_capture(make_spec()).run_id


def test_the_same_text_in_another_place_is_the_same_run(
    make_spec: MakeSpec, text_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "text.txt"
    copy.write_bytes(text_path.read_bytes())
    assert plan_capture(make_spec(dataset=copy)).run_id == plan_capture(make_spec()).run_id


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 49}, PlanError, "context of 49 tokens is more than the 48 that tiny-gpt2 takes"),
        ({"context": 0}, PlanError, "--context must be positive, not 0"),
        ({"batch_tokens": -1}, PlanError, "--batch-tokens must be positive"),
        ({"partition_tokens": 32}, PlanError, "32 tokens is smaller than the context of 48"),
        ({"sites": "mlp_pst"}, SiteNotFound, "Did you mean 'mlp_post'"),
        ({"sites": ()}, SiteNotFound, "No site was named"),
        ({"dtype": "float8"}, PlanError, "cannot be stored as 'float8'"),
        ({"compute_dtype": "float8"}, PlanError, "cannot run in 'float8'"),
        ({"max_tokens": "many"}, PlanError, "'many' is not a count"),
        ({"max_memory": "some"}, PlanError, "'some' is not a size"),
        ({"bos": "first"}, CorpusError, "'first' is not a BOS"),
        ({"min_tokens": 1000}, CorpusError, "None of the 12 documents can be stored; the first: 12 tokens"),
        ({"max_tokens": 5}, CorpusError, "Not even the first document fits into --max-tokens 5"),
        ({"dataset": "nothing.txt"}, CorpusError, "'nothing.txt' does not exist"),
        ({"text_column": "body"}, CorpusError, "no column 'body'; it has text"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_done_is_refused_before_a_byte_is_written(
    make_spec: MakeSpec, tmp_path: Path, options: dict[str, Any], error: type[PlanError], message: str
) -> None:
    with pytest.raises(error) as caught:
        capture_run(tmp_path / "lake", make_spec(**options))
    assert message in str(caught.value)
    assert not (tmp_path / "lake").exists()


def test_only_a_lake_or_an_empty_folder_is_written_to(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LakeNotFound, match="not empty"):
        plan_capture(make_spec(), tmp_path)
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "layerlake.json").write_text('{"format_version": 99}')
    with pytest.raises(FormatError, match="has format 99"):
        plan_capture(make_spec(), tmp_path / "lake")
    (tmp_path / "empty").mkdir()
    plan_capture(make_spec(), tmp_path / "empty")


def test_max_tokens_is_counted_over_the_whole_run(make_spec: MakeSpec) -> None:
    """Documents of 12, 34, (2) and 23 tokens: with 80, the next of 12 does not fit any more."""
    plan = plan_capture(make_spec(max_tokens="0.08k"))
    assert plan.tokens.num_rows == 12 + 34 + 23
    assert plan.documents["status"].to_pylist() == ["stored", "stored", "refused", "stored"]


def test_sites_may_be_named_in_many_ways(make_spec: MakeSpec) -> None:
    assert set(plan_capture(make_spec(sites=("resid_post", "pattern"))).manifest.sites) == {
        "resid",
        "pattern",
    }
    assert set(plan_capture(make_spec(sites="all")).manifest.sites) == set(SITES)


@pytest.mark.parametrize(
    ("analyses", "sites"),
    [
        ("lens", ("resid",)),
        ("lens,cka,wic", ("resid",)),
        ("neurons", ("attn_band",)),
        ("neurons,cka", ("resid",)),
        ("attention_locality", ("attn_band",)),
        ("attention_locality,subjoiner", ("pattern",)),
        (("norms", "ing"), ("resid", "attn_out", "mlp_out", "mlp_post")),
        ("all", ("resid", "attn_out", "mlp_out", "mlp_post", "pattern")),
    ],
)
def test_analyses_choose_the_cheapest_sites_that_answer_them(
    make_spec: MakeSpec, analyses: str, sites: tuple[str, ...]
) -> None:
    assert tuple(plan_capture(make_spec(analyses=analyses)).manifest.sites) == sites


def test_the_sites_that_are_chosen_do_answer(make_spec: MakeSpec, tmp_path: Path) -> None:
    for name in ANALYSES:
        run = capture_run(tmp_path / name, make_spec(analyses=(name,)))
        assert lacking_sites(run, ANALYSES[name].sites) == ()
        # these also want more text than this, or a task; what combines findings, interventions
        if name not in ("subjoiner", "wic", "ing") and ANALYSES[name].combine is None:
            run_analysis(Lake(tmp_path / name), name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"analyses": "lens", "sites": "resid"}, "Sites were named, and analyses too"),
        ({"analyses": "lense"}, "Did you mean 'lens'"),
        ({"analyses": ""}, "No analysis was named"),
        ({"codec": "gzip"}, "no codec 'gzip'"),
        ({"overflow": "ignore"}, "'ignore' is not what can be done about overflow"),
        ({"dataset": None}, "no saying how many tokens"),
        ({"dataset": None, "max_tokens": 47}, "less than one window of 48 tokens"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_more_that_cannot_be_planned(make_spec: MakeSpec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_capture(make_spec(**options))


def test_without_a_dataset_windows_are_full(make_spec: MakeSpec, tmp_path: Path) -> None:
    plan = plan_capture(make_spec(dataset=None, max_tokens=1000), tmp_path / "lake")
    assert plan.tokens.num_rows == 20 * 48
    assert set(plan.documents["n_tokens"].to_pylist()) == {48}
    assert plan.run_id == ""
    with pytest.raises(PlanError, match="There is no text to capture"):
        execute_plan(plan, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()


def test_a_hub_model_is_planned_by_its_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no file of it."""
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    plan = plan_capture(CaptureSpec(model="gpt2", max_tokens="1M", analyses="lens"))
    assert plan.to_json()["tokens"] == 1953 * 512


def test_what_does_not_fit_the_disk_is_refused(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan_capture(make_spec(), tmp_path / "lake").nbytes
    monkeypatch.setattr(Store, "free_nbytes", lambda _: needed)
    plan_capture(make_spec(), tmp_path / "lake")
    monkeypatch.setattr(Store, "free_nbytes", lambda _: needed - 1)
    with pytest.raises(PlanError, match=r"The capture needs .* has .* left") as caught:
        plan_capture(make_spec(), tmp_path / "lake")
    assert "--for" in caught.value.hint
    assert not (tmp_path / "lake").exists()


def test_sites_that_an_extension_leaves_behind_are_named(make_spec: MakeSpec, tmp_path: Path) -> None:
    capture_run(tmp_path / "lake", make_spec(sites="resid,mlp_out", max_tokens=100))
    assert plan_capture(make_spec(sites="resid"), tmp_path / "lake").partial_sites == ("mlp_out",)
    assert plan_capture(make_spec(sites="resid,mlp_out"), tmp_path / "lake").partial_sites == ()


def test_an_open_capture_is_joined_without_its_text(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = tmp_path / "lake"
    first = plan_capture(make_spec(), lake)
    execute_plan(first, lake, share=Share(0, 2))
    monkeypatch.setattr("layerlake.capture.plan.encode_corpus", None)
    joined = plan_capture(make_spec(), lake)
    assert joined.frozen == first.frozen
    assert (joined.documents, joined.tokens) == (first.documents, first.tokens)
    for options in ({"sites": "resid"}, {"max_tokens": 100}):
        with pytest.raises(CaptureInProgress, match="Another capture"):
            plan_capture(make_spec(**options), lake)
    assert execute_plan(joined, lake).run is not None


_NO_OP = """
import sys
from importlib.abc import MetaPathFinder

class Nothing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "transformer_lens", "datasets", "dask", "duckdb"}:
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
from layerlake.cli import main
main()
"""


@pytest.mark.parametrize("command", ["plan", "capture"])
def test_the_same_again_imports_nothing_that_is_slow(
    make_spec: MakeSpec, tmp_path: Path, model_path: Callable[[str], Path], text_path: Path, command: str
) -> None:
    """So that it is over within two seconds, wherever."""
    run = capture_run(tmp_path / "lake", make_spec(sites="resid", dtype="float16"))
    words = [
        command,
        tmp_path / "lake",
        "--model",
        model_path("gpt2"),
        "--dataset",
        text_path,
        "--sites",
        "resid",
    ]
    done = subprocess.run(
        [sys.executable, "-c", _NO_OP, *map(str, words), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown if command == "plan" else shown["actual"])["run"] == run.run_id
    assert "holds all of this already" in done.stderr or command == "plan"


def test_what_is_written_already_needs_no_room(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a capture that fits could not be resumed on the disk that it half fills, nor finalised."""
    lake = tmp_path / "lake"
    whole = plan_capture(make_spec(), lake)
    execute_plan(whole, lake, share=Share(0, 2))
    monkeypatch.setattr(Store, "free_nbytes", lambda _: int(0.6 * whole.nbytes))
    rest = plan_capture(make_spec(), lake)
    assert rest.nbytes == whole.nbytes
    monkeypatch.setattr(Store, "free_nbytes", lambda _: int(0.3 * whole.nbytes))
    with pytest.raises(PlanError, match="The capture needs"):
        plan_capture(make_spec(), lake)


def test_sites_of_several_captures_are_one_answer(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sites in ("resid", "attn_out"):
        capture_run(tmp_path / "lake", make_spec(sites=sites))
    monkeypatch.setattr("layerlake.capture.plan.encode_corpus", None)
    for options in ({"sites": "resid,attn_out"}, {"sites": "attn_out", "max_tokens": 100}):
        assert plan_capture(make_spec(**options), tmp_path / "lake").frozen is None


def test_another_site_of_a_part_of_a_run_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    """It would be captured of the whole run, which may be a hundred times what was asked for."""
    capture_run(tmp_path / "lake", make_spec(sites="resid"))
    with pytest.raises(PlanError, match=r"has \d+ tokens, more than --max-tokens 100") as caught:
        plan_capture(make_spec(sites="pattern", max_tokens=100), tmp_path / "lake")
    assert "--max-tokens" in caught.value.hint


def test_many_short_documents_are_captured_within_the_memory_that_is_planned(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a dog {i}"}) + "\n" for i in range(400)))
    spec = make_spec(dataset=text, sites="attn_band", partition_tokens=4096, max_memory="40MiB")
    plan = plan_capture(spec, tmp_path / "lake")
    (partition,) = plan.manifest.partitions
    assert partition.n_documents == 400
    assert plan.memory is not None
    assert plan.memory.partition_nbytes == 400 * 3 * 4 * 2 * 18 * 4
    run = execute_plan(plan, tmp_path / "lake").run
    assert run is not None
    assert run.attn_band.num_rows == 400 * 3 * 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "main"}, "Only a model of the hub has a revision"),
        ({"dataset_config": "x"}, "is a file and has no dataset-config 'x'"),
        ({"dataset_revision": "x"}, "is a file and has no dataset-revision 'x'"),
        ({"seed": -1, "shuffle_buffer": 8}, "--seed must not be negative"),
        ({"device": "meta"}, "'meta' is not a device to capture on"),
        ({"device": "mps"}, "'mps' is not a device to capture on"),
        ({"partition_tokens": 1 << 20 | 2}, "cannot be cut into equal chunks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_options_without_effect_are_refused(
    make_spec: MakeSpec, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_capture(make_spec(**options))
