"""A plan writes nothing and says exactly what a capture will write; what cannot be done is refused here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from layerlake.capture.execute import capture_run, execute_plan
from layerlake.capture.plan import CapturePlan, CaptureSpec, plan_capture
from layerlake.catalog import layout
from layerlake.catalog.errors import CorpusError, FormatError, LakeNotFound, PlanError, SiteNotFound
from layerlake.catalog.sites import SITES

MakeSpec = Callable[..., CaptureSpec]


def sizes_on_disk(lake: Path, plan: CapturePlan, site: str) -> list[int]:
    """The bytes of every object of a site."""
    folder = lake / "runs" / plan.run_id / "activations.zarr" / site / "c"
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("llama", {"partition_tokens": None, "max_memory": "2MiB"}),
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

    run = execute_plan(plan, lake)
    assert run.run_id == plan.run_id
    assert [cost.site for cost in plan.costs] == list(run.sites)
    for cost in plan.costs:
        found = sizes_on_disk(lake, plan, cost.site)
        assert len(found) == cost.n_objects
        assert sum(found) == pytest.approx(cost.nbytes, rel=0.01)
        assert run.array(cost.site).shape == cost.shape
        assert run.array(cost.site).chunks == cost.chunks
    assert plan.nbytes == sum(cost.nbytes for cost in plan.costs)
    assert run.documents == plan.documents
    assert run.tokens == plan.tokens

    numbers = plan.to_json()
    assert (numbers["run"], numbers["tokens"]) == (run.run_id, run.n_tokens)
    assert numbers["documents_stored"] == run.manifest.n_documents
    assert numbers["documents_cut"] == run.manifest.n_cut
    assert numbers["documents_refused"] == run.manifest.n_refused
    assert numbers["partitions"] == len(run.manifest.partitions)
    assert numbers["bos_token_id"] == run.manifest.bos_token_id


def test_only_the_chunks_that_documents_touch_are_counted_and_written(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_NBYTES", 1 << 13)
    plan = plan_capture(make_spec(partition_tokens=1024), tmp_path / "lake")
    rows, pairs = (plan.manifest.geometry.chunk_rows[site] for site in ("resid", "pattern"))
    (partition,) = plan.manifest.partitions
    run = execute_plan(plan, tmp_path / "lake")
    counted = {cost.site: cost.nbytes for cost in plan.costs}
    assert counted["resid"] == 4 * -(-partition.n_rows // rows) * rows * 32 * 4 < 4 * 1024 * 32 * 4
    assert counted["pattern"] == 3 * 4 * -(-partition.n_pairs // pairs) * pairs * 4
    for site, nbytes in counted.items():
        index = 16 * math.prod(run.array(site).shape) // math.prod(run.array(site).chunks)
        assert sum(sizes_on_disk(tmp_path / "lake", plan, site)) - index == pytest.approx(nbytes, rel=0.01)


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
    (tmp_path / "lake" / "layerlake.json").write_text('{"format_version": 2}')
    with pytest.raises(FormatError, match="has format 2"):
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
