"""What the writer records of its objects, and arrays that were left by another geometry."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from layerlake.capture.frozen import PartitionWork
from layerlake.capture.partition import PartitionBuffer
from layerlake.capture.writer import create_arrays, write_partition
from layerlake.catalog.errors import CorruptRun
from layerlake.catalog.layout import activations_path, plan_geometry, run_path
from layerlake.catalog.manifest import Manifest
from layerlake.catalog.run import Run
from layerlake.catalog.stores import Store


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def test_records_say_what_lies_there(run: Run) -> None:
    folder = run.store.local_path / run_path(run.run_id)
    records = run.objects.to_pylist()
    assert len(records) == len(run.manifest.partitions) * (3 + 4 * 2 + 1)
    for record in records:
        content = (folder / record["name"]).read_bytes()
        assert record["nbytes"] == len(content)
        assert record["crc32"] == f"{zlib.crc32(content):08x}"


def test_checksums_tell_shards_apart(run: Run) -> None:
    """CRC-32C would not: of bytes that carry their own CRC-32C it is a constant."""
    sums = run.objects["crc32"].to_pylist()
    assert len(set(sums)) == len(sums)


def test_arrays_grow_and_never_shrink(run: Run) -> None:
    group = zarr.open_group(run.store.zarr_store(activations_path(run.run_id)), mode="r")
    before = {name: array.shape for name, array in group.arrays()}
    fewer = dataclasses.replace(run.manifest, partitions=run.manifest.partitions[:1])
    create_arrays(run.store, fewer)
    last = run.manifest.partitions[-1]
    create_arrays(
        run.store,
        dataclasses.replace(run.manifest, partitions=(dataclasses.replace(last, index=last.index + 2),)),
    )
    group = zarr.open_group(run.store.zarr_store(activations_path(run.run_id)), mode="r")
    rows, pairs = run.manifest.geometry.partition_tokens, run.manifest.geometry.partition_pairs
    for name, array in group.arrays():
        grown = list(before[name])
        grown[2 if name == "pattern" else 1] += 2 * (pairs if name == "pattern" else rows)
        assert array.shape == tuple(grown)
    assert run.resid.shape[1] == run.n_tokens


def _with_partitions_of(run: Run, n_tokens: int, number: int) -> Manifest:
    geometry = plan_geometry(
        run.shape, context=12, dtype="float32", max_memory=2**30, partition_tokens=n_tokens
    )
    return dataclasses.replace(run.manifest, geometry=geometry, number=number)


def test_what_an_abandoned_first_capture_left_is_replaced(run: Run, tmp_path: Path) -> None:
    """Or shards of two partitions would share an object."""
    store = Store(tmp_path / "other")
    create_arrays(store, _with_partitions_of(run, 64, 0))
    manifest = _with_partitions_of(run, 16, 0)
    create_arrays(store, manifest)
    array = zarr.open_group(store.zarr_store(activations_path(run.run_id)), mode="r")["resid"]
    assert isinstance(array, zarr.Array)
    assert array.shards == (1, 16, 8)

    work = PartitionWork(0, ("resid",), ())
    buffer = PartitionBuffer(manifest, work, {})
    for values in buffer.values.values():
        values[...] = 1
    write_partition(store, manifest, buffer)
    create_arrays(store, manifest)
    used = manifest.partitions[0].n_rows
    assert np.asarray(array[:, :used]).all()  # arrays that fit stay


def test_a_committed_run_s_arrays_are_never_replaced(run: Run) -> None:
    with pytest.raises(CorruptRun, match="is not cut or encoded as the run's manifest says"):
        create_arrays(run.store, _with_partitions_of(run, 64, 1))
    assert run.resid.to_numpy().all()
