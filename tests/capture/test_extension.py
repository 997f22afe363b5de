"""A run grows: more documents, another site. What is there stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from layerlake.capture.execute import capture_run
from layerlake.capture.plan import plan_capture
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import PlanError
from layerlake.catalog.lake import Lake
from layerlake.catalog.layout import object_name
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES

MakeSpec = Callable[..., CaptureSpec]


def objects(lake: Path) -> dict[str, tuple[bytes, int]]:
    """Everything that a reader of an old snapshot relies on: content and time of writing."""
    return {
        path.relative_to(lake).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in lake.rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


def values(run: Run) -> dict[str, np.ndarray]:
    return {site: getattr(run, site).to_numpy() for site in run.sites if SITES[site].is_array}


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return tmp_path / "lake"


@pytest.fixture(scope="session")
def whole(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything captured at once."""
    return capture_run(tmp_path_factory.mktemp("whole") / "lake", make_spec())


def test_the_same_again_does_nothing(make_spec: MakeSpec, lake: Path) -> None:
    run = capture_run(lake, make_spec())
    before = objects(lake)
    plan = plan_capture(make_spec(), lake)
    assert plan.frozen is None
    assert plan.costs == ()
    assert plan.to_json()["nbytes"] == 0
    again = capture_run(lake, make_spec())
    fewer = capture_run(lake, make_spec(max_tokens=60, sites="resid"))
    assert again.manifest == fewer.manifest == run.manifest
    assert objects(lake) == before


def test_more_tokens_add_only_the_new_documents(make_spec: MakeSpec, lake: Path, whole: Run) -> None:
    old = capture_run(lake, make_spec(max_tokens=100))
    before, seen = objects(lake), values(old)
    assert (old.manifest.n_documents, len(old.manifest.partitions)) == (4, 1)

    plan = plan_capture(make_spec(), lake)
    assert plan.run_id == old.run_id
    assert plan.documents["document"].to_pylist() == list(range(5, 12))
    new = capture_run(lake, make_spec())
    after = objects(lake)
    assert {name: after[name] for name in before} == before
    added = {name for name in set(after) - set(before) if "/c/" in name or "/attn_band/" in name}
    first_new = old.manifest.partitions[-1].index + 1
    assert len(added) == sum(cost.n_objects for cost in plan.costs)
    assert added == {
        f"runs/{new.run_id}/{object_name(SITES[site], layer, partition.index)}"
        for site in SITES
        for layer in range(SITES[site].n_layers(new.shape))
        for partition in new.manifest.partitions[first_new:]
    }

    # a reader of the old snapshot is not disturbed
    for site, value in values(old).items():
        np.testing.assert_array_equal(value, seen[site])
    assert old.documents.num_rows == 5

    # and the documents are those of one capture of everything
    assert new.documents.select(["document", "status", "sources", "n_tokens"]) == whole.documents.select(
        ["document", "status", "sources", "n_tokens"]
    )
    assert new.tokens["token_id"] == whole.tokens["token_id"]
    for site, value in values(new).items():
        np.testing.assert_allclose(value, values(whole)[site], atol=1e-5, err_msg=site)
    assert (new.manifest.n_documents, new.manifest.n_tokens, new.manifest.n_cut, new.manifest.n_refused) == (
        whole.manifest.n_documents, whole.manifest.n_tokens, whole.manifest.n_cut, whole.manifest.n_refused,
    )  # fmt: skip


def test_the_same_tokens_in_one_step_or_in_several_are_the_same_documents(
    make_spec: MakeSpec, lake: Path, whole: Run
) -> None:
    run = whole
    for max_tokens in (50, 51, 90, 170, None):
        run = capture_run(lake, make_spec(sites="resid", max_tokens=max_tokens))
        assert max_tokens is None or run.n_tokens <= max_tokens
    assert run.documents["document"].to_pylist() == whole.documents["document"].to_pylist()
    assert run.tokens["token_id"] == whole.tokens["token_id"]
    indices = [partition.index for partition in run.manifest.partitions]
    assert indices == list(range(len(indices)))


def test_another_site_adds_only_that_site_to_all_partitions(
    make_spec: MakeSpec, lake: Path, whole: Run
) -> None:
    old = capture_run(lake, make_spec(sites="resid"))
    before = objects(lake)
    plan = plan_capture(make_spec(sites="pattern,resid"), lake)
    assert plan.documents.num_rows == 0
    assert [cost.site for cost in plan.costs] == ["pattern"]
    new = capture_run(lake, make_spec(sites="pattern,resid"))
    after = objects(lake)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[3] for name in set(after) - set(before) if "/c/" in name} == {"pattern"}
    assert new.sites == ("resid", "pattern")
    assert new.manifest.sites["pattern"] == tuple(p.index for p in new.manifest.partitions)
    np.testing.assert_array_equal(new.pattern.to_numpy(), whole.pattern.to_numpy())
    assert old.sites == ("resid",)
    assert new.manifest.parts["tokens"] == old.manifest.parts["tokens"]
    assert len(new.manifest.captures) == 2
    assert new.objects.num_rows == sum(
        1 for name in after if "activations.zarr" in name or "attn_band" in name
    )


def test_more_documents_and_another_site_at_once(make_spec: MakeSpec, lake: Path, whole: Run) -> None:
    capture_run(lake, make_spec(sites="resid", max_tokens=100))
    run = capture_run(lake, make_spec())
    assert run.sites == tuple(SITES)
    for site, value in values(run).items():
        np.testing.assert_allclose(value, values(whole)[site], atol=1e-5, err_msg=site)


def test_a_site_that_the_new_documents_lack_is_not_given_as_whole(make_spec: MakeSpec, lake: Path) -> None:
    capture_run(lake, make_spec(sites="resid,mlp_out", max_tokens=100))
    run = capture_run(lake, make_spec(sites="resid"))
    assert run.manifest.sites["mlp_out"] == (0,)
    with pytest.raises(LookupError, match="in 1 of its"):
        run.mlp_out  # noqa: B018
    mended = capture_run(lake, make_spec(sites="mlp_out"))
    assert mended.mlp_out.shape[1] == run.n_tokens


def test_a_run_keeps_its_geometry(make_spec: MakeSpec, lake: Path) -> None:
    run = capture_run(lake, make_spec(sites="resid", max_tokens=100))
    with pytest.raises(PlanError, match="has partitions of 96 tokens, not 128") as caught:
        plan_capture(make_spec(partition_tokens=128), lake)
    assert "--partition-tokens" in caught.value.hint
    grown = capture_run(lake, make_spec(sites="resid", partition_tokens=None, max_memory="40MiB"))
    assert grown.manifest.geometry == run.manifest.geometry


def test_two_runs_share_a_model_and_nothing_else(make_spec: MakeSpec, lake: Path) -> None:
    one = capture_run(lake, make_spec(sites="resid"))
    before = objects(lake)
    two = capture_run(lake, make_spec(sites="resid", bos="none"))
    assert one.manifest.model_id == two.manifest.model_id
    assert one.run_id != two.run_id
    assert len(Lake(lake).models()) == 1
    assert {name: item for name, item in objects(lake).items() if name in before} == before


def test_refused_documents_belong_to_the_capture_that_passes_them(
    make_spec: MakeSpec, lake: Path, tmp_path: Path
) -> None:
    """Those after the last one that fits too: so an extension never begins with nothing but refusals."""
    text = tmp_path / "text.jsonl"
    rows = ["the quick fox sees the lazy dog", "a", "b", "the lazy dog sees the quick fox", "c"]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    first = capture_run(lake, make_spec(dataset=text, max_tokens=8, sites="resid"))
    assert first.documents["status"].to_pylist() == ["stored", "refused", "refused"]
    again = capture_run(lake, make_spec(dataset=text, max_tokens=9, sites="resid"))
    assert again.manifest == first.manifest
    whole = capture_run(lake, make_spec(dataset=text, sites="resid"))
    at_once = capture_run(tmp_path / "other", make_spec(dataset=text, sites="resid"))
    assert whole.documents["document"].to_pylist() == [0, 1, 2, 3, 4]
    assert whole.documents.select(["status", "sources"]) == at_once.documents.select(["status", "sources"])
