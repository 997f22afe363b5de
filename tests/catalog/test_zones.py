"""Zones: what brute force finds, made alike by a capture and by ``index``, and held against the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.catalog.wreckage import without_zones

from layerlake.capture.zones import shard_zones
from layerlake.catalog import indexing, layout
from layerlake.catalog.collection import collect_lake
from layerlake.catalog.errors import CaptureInProgress, CorruptRun, DamagedLake
from layerlake.catalog.indexing import index_run
from layerlake.catalog.lake import Lake
from layerlake.catalog.layout import run_path, zones_name
from layerlake.catalog.manifest import commit_manifest, read_manifest
from layerlake.catalog.reservation import INDEXING, release_run, reserve_run, reserved_by
from layerlake.catalog.run import Run
from layerlake.catalog.shards import decode
from layerlake.catalog.sites import SITES
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import read_part, to_parquet
from layerlake.catalog.verify import verify_lake
from layerlake.catalog.zones import has_zones, read_zones, zone_table

MakeRun = Callable[..., Run]
DTYPES = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a partition, of different lengths for different widths."""
    monkeypatch.setattr(layout, "CHUNK_NBYTES", 256)


def zones_of(run: Run) -> dict[str, bytes]:
    folder = f"{run_path(run.run_id)}/zones"
    return {name: run.store.read(name) for name, _ in run.store.walk(folder)}


def by_brute_force(values: npt.NDArray[Any], *, with_norms: bool, with_units: bool) -> dict[str, Any]:
    """One chunk's zone, value by value: ``[row, value]``."""
    finite = [float(v) for v in values.ravel() if np.isfinite(v)]
    whole = [row.astype(np.float64) for row in values if np.isfinite(row).all()] if with_norms else []
    norms = [float(np.sqrt((row**2).sum())) for row in whole]
    columns = [[float(v) for v in column if np.isfinite(v)] for column in values.T]
    found: dict[str, Any] = {
        "min": min(finite, default=None), "max": max(finite, default=None),
        "norm_min": min(norms, default=None), "norm_max": max(norms, default=None),
        "n_nonfinite": values.size - len(finite),
    }  # fmt: skip
    return found | ({"unit_max": [max(c, default=None) for c in columns]} if with_units else {})


def require_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("norm") and value is not None:
            # in float32, whose squares overflow and underflow
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-18) or (
                value > 1e19 and np.isinf(found[name])
            )
        else:
            assert found[name] == value, name


@st.composite
def shards(draw: st.DrawFn) -> tuple[str, str, npt.NDArray[Any], int]:
    """A site, a dtype, stored values of all bits that there are, and the rows of a chunk."""
    site, dtype = draw(st.sampled_from(["resid", "mlp_post", "pattern"])), draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 5)))
    bits = draw(hnp.arrays(DTYPES[dtype], shape))
    return site, dtype, bits if dtype == "bfloat16" else bits.view(dtype), draw(st.integers(1, 4))


@settings(max_examples=300, deadline=None)
@given(shards())
def test_zones_are_what_brute_force_finds(
    shard: tuple[str, str, npt.NDArray[Any], int],
) -> None:
    name, dtype, stored, chunk_rows = shard
    site = SITES[name]

    def as_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return decode(values, dtype).astype(np.float32)

    found = zone_table(
        stored, site=site, layer=3, first_chunk=8, chunk_rows=chunk_rows, as_float32=as_float32
    ).to_pylist()
    is_pair = site.rows == "pair"
    values = as_float32(stored)
    expected = []
    for head, series in enumerate(values[:, :, None] if is_pair else values[None]):
        for i, start in enumerate(range(0, len(series), chunk_rows)):
            place = {"site": name, "layer": 3, "head": head if is_pair else None, "chunk": 8 + i}
            chunk = series[start : start + chunk_rows]
            expected.append(
                place | by_brute_force(chunk, with_norms=not is_pair, with_units=name == "mlp_post")
            )
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        require_equal(row, wanted)


@settings(max_examples=100, deadline=None)
@given(shards())
def test_a_capture_s_conversion_is_exact(shard: tuple[str, str, npt.NDArray[Any], int]) -> None:
    """What a capture makes with torch is what the catalog makes with numpy, to the last byte."""
    name, dtype, stored, chunk_rows = shard
    geometry = layout.Geometry(4 * chunk_rows, 1, {name: chunk_rows})
    manifest: Any = type("Manifest", (), {"geometry": geometry})
    captured = shard_zones(manifest, stored, site=name, layer=3, partition=2)
    later = zone_table(
        stored,
        site=SITES[name],
        layer=3,
        first_chunk=8,
        chunk_rows=chunk_rows,
        as_float32=lambda values: decode(values, dtype).astype(np.float32),
    )
    assert to_parquet(captured) == to_parquet(later)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_zones_of_a_run_cover_the_used_rows(make_run: MakeRun, dtype: str) -> None:
    """All of them, and of the last chunk no more: what lies behind would make the least value 0."""
    values = np.random.default_rng(1).uniform(1, 2, (2, 36, 16)).astype(np.float32)
    run = make_run(dtype=dtype, values={"mlp_post": values})
    assert has_zones(run.manifest)
    n_chunks = 0
    for site in (s for s in run.sites if SITES[s].is_array):
        rows = run.manifest.geometry.chunk_rows[site]
        for layer in range(SITES[site].n_layers(run.shape)):
            for partition in run.manifest.partitions:
                table = read_zones(run, site, layer, partition.index)
                assert table is not None
                start, stop = run.span(site, partition)
                assert sorted(set(table["chunk"].to_pylist())) == list(range(start // rows, -(-stop // rows)))
                n_chunks += table.num_rows
                stored = run.read(site, layer, partition).astype(np.float32)
                assert min(table["min"].to_pylist()) == stored.min()
                assert max(table["max"].to_pylist()) == stored.max()
                if site == "mlp_post":
                    units = np.array(table["unit_max"].to_pylist())
                    np.testing.assert_array_equal(units.max(axis=0), stored.max(axis=0))
    assert n_chunks > len(zones_of(run))
    assert any(p.n_rows % run.manifest.geometry.chunk_rows["mlp_post"] for p in run.manifest.partitions)


# -- index ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_index_writes_what_the_capture_would_have(make_run: MakeRun, dtype: str) -> None:
    run = make_run(dtype=dtype)
    captured = zones_of(run)
    old = without_zones(run)
    assert zones_of(old) == {}
    assert verify_lake(old.store).problems == ()
    indexed = index_run(old.store, old.run_id)
    assert (indexed.objects, indexed.nbytes) == (len(captured), sum(map(len, captured.values())))
    assert zones_of(old) == captured
    newest = Lake(old.store.url).run().manifest
    assert newest == dataclasses.replace(run.manifest, number=run.manifest.number + 1)
    found = verify_lake(old.store)
    assert (found.problems, found.notes) == ((), ())


def test_index_of_a_run_that_has_all_does_nothing(make_run: MakeRun) -> None:
    run = make_run()
    before = {name: run.store.read(name) for name, _ in run.store.walk()}
    assert index_run(run.store, run.run_id).objects == 0
    assert {name: run.store.read(name) for name, _ in run.store.walk()} == before


def test_index_brings_back_zones_that_are_gone(make_run: MakeRun) -> None:
    run = make_run()
    captured = zones_of(run)
    lost = f"{run_path(run.run_id)}/{zones_name(SITES['resid'], 1, 0)}"
    run.store.delete(lost)
    with pytest.raises(CorruptRun, match=r"zones/resid/1/part-00000000.parquet is gone"):
        read_zones(run, "resid", 1, 0)
    assert index_run(run.store, run.run_id).objects == 1
    assert zones_of(run) == captured
    assert read_manifest(run.store, run.run_id) == run.manifest


def test_index_of_a_run_with_some_zones_adds_the_others(make_run: MakeRun) -> None:
    run = make_run()
    captured = zones_of(run)
    some = {"resid": run.manifest.zones["resid"][:1]}
    for name in captured:
        if "/resid/" not in name or not name.endswith("00000000.parquet"):
            run.store.delete(name)
    partly = commit_manifest(run.store, dataclasses.replace(run.manifest, zones=some))
    assert not has_zones(partly)
    assert index_run(run.store, run.run_id).objects == len(captured) - SITES["resid"].n_layers(run.shape)
    assert zones_of(run) == captured


def test_an_interrupted_index_goes_on(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    old = without_zones(make_run())
    write, n_written = indexing._write_zones, 0  # noqa: SLF001  # stopped from outside

    def stop(run: Run, key: tuple[str, int, int]) -> int:
        nonlocal n_written
        if n_written == 5:
            raise KeyboardInterrupt
        n_written += 1
        return write(run, key)

    monkeypatch.setattr(indexing, "_N_THREADS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_write_zones", stop)
        with pytest.raises(KeyboardInterrupt):
            index_run(old.store, old.run_id)
    assert reserved_by(old.store, old.run_id) is None
    assert len(zones_of(old)) >= 5
    assert not has_zones(Lake(old.store.url).run().manifest)
    left = len(zones_of(make_run("memory://whole"))) - len(zones_of(old))
    assert index_run(old.store, old.run_id).objects == left > 0
    assert has_zones(Lake(old.store.url).run().manifest)


def test_an_index_that_was_killed_is_gone_on_with(make_run: MakeRun) -> None:
    """It could not let go of the run."""
    old = without_zones(make_run())
    assert reserve_run(old.store, old.run_id, INDEXING) == INDEXING
    assert verify_lake(old.store).notes == (
        f"Run {old.run_id} is held by layerlake index; if that was interrupted, run it again.",
    )
    assert index_run(old.store, old.run_id).objects > 0
    assert reserved_by(old.store, old.run_id) is None


def test_two_who_index_at_once_leave_what_one_leaves(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    captured = zones_of(run)
    old = without_zones(run)
    is_second = False

    def overtaken(store: Store, manifest: Any) -> Any:
        nonlocal is_second
        if not is_second:
            is_second = True
            index_run(store, old.run_id)
        return commit_manifest(store, manifest)

    monkeypatch.setattr(indexing, "commit_manifest", overtaken)
    index_run(old.store, old.run_id)
    assert zones_of(old) == captured
    newest = Lake(old.store.url).run().manifest
    assert (newest.zones, newest.number) == (run.manifest.zones, run.manifest.number + 1)


def test_a_run_that_somebody_holds_is_not_indexed(make_run: MakeRun) -> None:
    old = without_zones(make_run())
    reserve_run(old.store, old.run_id, "0123456789abcdef")
    with pytest.raises(CaptureInProgress, match="held by 0123456789abcdef"):
        index_run(old.store, old.run_id)
    assert zones_of(old) == {}
    release_run(old.store, old.run_id, "0123456789abcdef")
    (committed,) = {entry["capture_id"] for entry in old.manifest.captures}
    reserve_run(old.store, old.run_id, committed)  # it was interrupted as it cleaned up
    assert index_run(old.store, old.run_id).objects > 0


def test_an_index_stops_when_its_run_is_taken_from_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = without_zones(make_run())
    monkeypatch.setattr(indexing, "reserved_by", lambda *_: "rm-0123456789abcdef")
    with pytest.raises(CaptureInProgress, match="was taken over"):
        index_run(old.store, old.run_id)
    assert zones_of(old) == {}


def test_gc_removes_zones_that_no_snapshot_names(make_run: MakeRun) -> None:
    run = make_run()
    captured = zones_of(run)
    commit_manifest(run.store, run.manifest)
    collect_lake(run.store, older_than_s=0)
    assert zones_of(run) == captured
    stray = f"{run_path(run.run_id)}/{zones_name(SITES['resid'], 0, 77)}"
    run.store.write(stray, b"stray")
    (waste,) = collect_lake(run.store, older_than_s=0).waste
    assert [stored.name for stored in waste.objects] == [stray]
    assert zones_of(run) == captured


# -- verify -----------------------------------------------------------------------------------------


def changed(table: pa.Table, column: str) -> pa.Table:
    """The table with another value in its first row, in each way that the column allows."""
    place = table.column_names.index(column)
    values = table[column].to_pylist()
    first = values[0]
    if isinstance(first, list):
        values[0] = [first[0] + 1, *first[1:]]
    elif isinstance(first, str):
        values[0] = "attn_out"
    else:
        values[0] = 0 if first is None else first + 1
    return table.set_column(
        place, table.schema.field(column), pa.array(values, table.schema.field(column).type)
    )


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("site", "column"),
    [
        *(("resid", c) for c in ("site", "layer", "head", "chunk", "min", "max", "norm_min", "norm_max")),
        ("resid", "n_nonfinite"),
        *(("pattern", c) for c in ("head", "chunk", "min", "max", "norm_max")),
        *(("mlp_post", c) for c in ("max", "unit_max")),
    ],
)
def test_a_zone_that_contradicts_its_chunk_is_named(
    make_run: MakeRun, site: str, column: str, dtype: str
) -> None:
    """Though its seal is whole."""
    run = make_run(dtype=dtype)
    name = f"{run_path(run.run_id)}/{zones_name(SITES[site], 1, 1)}"
    run.store.write(name, to_parquet(changed(read_part(run.store, name), column)))
    with pytest.raises(DamagedLake) as caught:
        verify_lake(run.store)
    (problem,) = caught.value.verification.problems
    assert problem.object == name
    assert problem.what.startswith(column)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_values_that_are_not_finite_are_counted_and_left_out(make_run: MakeRun, dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal((2, 36, 16)).astype(np.float32)
    values[0, 3, 2], values[0, 3, 5], values[0, 4, 2], values[1, 7:9] = np.nan, np.inf, -np.inf, np.nan
    run = make_run(dtype=dtype, values={"mlp_post": values})
    entry = run.manifest.captures[0] | {"nonfinite": {"mlp_post": 3 + 32}}
    commit_manifest(run.store, dataclasses.replace(run.manifest, captures=(entry,)))
    assert verify_lake(run.store).problems == ()
    table = read_zones(run, "mlp_post", 0, 0)
    assert table is not None
    assert sum(table["n_nonfinite"].to_pylist()) == 3
    assert np.isfinite(table["max"].to_numpy()).all()
    assert np.isfinite(table["norm_max"].to_numpy()).all()


def test_zones_of_what_the_run_does_not_hold_are_damage(make_run: MakeRun) -> None:
    run = make_run(sites=("resid",))
    commit_manifest(run.store, dataclasses.replace(run.manifest, zones={"mlp_out": (0,)}))
    with pytest.raises(DamagedLake, match="partitions of mlp_out that have zones and no values"):
        verify_lake(run.store)


def test_a_manifest_from_before_there_were_zones_is_read(make_run: MakeRun) -> None:
    run = make_run()
    old = without_zones(run)
    assert "zones" not in old.store.read_json(layout.log_path(old.run_id, 1))
    assert old.manifest == dataclasses.replace(run.manifest, zones={})
    assert read_zones(old, "resid", 0, 0) is None
    np.testing.assert_array_equal(
        old.read("resid", 1, old.manifest.partitions[0]), run.read("resid", 1, run.manifest.partitions[0])
    )
