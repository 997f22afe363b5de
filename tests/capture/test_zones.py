"""A capture writes zones beside its shards: those that ``index`` would write, whatever the run has grown from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.catalog.wreckage import without_zones

from layerlake.capture.execute import capture_run
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import CaptureInProgress
from layerlake.catalog.indexing import index_run
from layerlake.catalog.layout import run_path
from layerlake.catalog.manifest import read_manifest
from layerlake.catalog.reservation import INDEXING, reserve_run
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES
from layerlake.catalog.verify import verify_lake
from layerlake.catalog.zones import has_zones

MakeSpec = Callable[..., CaptureSpec]
ARRAYS = tuple(name for name, site in SITES.items() if site.is_array)


def zones_of(run: Run) -> dict[str, bytes]:
    return {name: run.store.read(name) for name, _ in run.store.walk(f"{run_path(run.run_id)}/zones")}


def require_indexed_alike(run: Run) -> None:
    """See that zones of all shards are there, and that index would make the same from the shards."""
    assert has_zones(run.manifest)
    captured = zones_of(run)
    assert len(captured) == sum("activations.zarr" in name for name in run.objects["name"].to_pylist())
    assert verify_lake(run.store).problems == ()
    index_run(run.store, without_zones(run).run_id)
    assert zones_of(run) == captured
    newest = read_manifest(run.store, run.run_id)
    assert newest is not None
    assert newest.zones == run.manifest.zones


@pytest.mark.parametrize(
    ("dtype", "codec"), [("float16", "none"), ("bfloat16", "lz4"), ("float32", "zstd"), ("float16", "zstd")]
)
def test_a_capture_makes_the_zones_that_index_makes(
    make_spec: MakeSpec, tmp_path: Path, dtype: str, codec: str
) -> None:
    run = capture_run(tmp_path / "lake", make_spec(dtype=dtype, codec=codec))
    assert len(run.manifest.partitions) >= 3
    assert set(run.manifest.zones) == set(ARRAYS)
    require_indexed_alike(run)


def test_a_run_that_has_grown_has_the_zones_of_both_captures(make_spec: MakeSpec, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    capture_run(lake, make_spec(sites="resid,mlp_post", max_tokens=60))
    partly = capture_run(lake, make_spec(sites="mlp_post"))
    assert not partly.has_site("resid")
    assert set(partly.manifest.zones) == {"resid", "mlp_post"}
    assert has_zones(partly.manifest)
    require_indexed_alike(capture_run(lake, make_spec()))


def test_an_old_run_that_grows_has_zones_of_what_is_new(make_spec: MakeSpec, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    without_zones(capture_run(lake, make_spec(sites="resid")))
    run = capture_run(lake, make_spec(sites="resid,attn_out"))
    assert set(run.manifest.zones) == {"attn_out"}
    assert not has_zones(run.manifest)
    assert verify_lake(run.store).problems == ()
    index_run(run.store, run.run_id)
    newest = read_manifest(run.store, run.run_id)
    assert newest is not None
    assert newest.zones == newest.sites
    require_indexed_alike(Run(run.store, newest))


def test_a_capture_waits_for_an_index(make_spec: MakeSpec, tmp_path: Path) -> None:
    run = capture_run(tmp_path / "lake", make_spec(sites="resid"))
    reserve_run(run.store, run.run_id, INDEXING)
    with pytest.raises(CaptureInProgress, match="held by layerlake index") as caught:
        capture_run(tmp_path / "lake", make_spec())
    assert f"layerlake index {run.store.url}" in caught.value.hint
