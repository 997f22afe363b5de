"""Objects that are sealed and yet wrong: what a faulty writer would leave."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerlake.catalog.errors import DamagedLake
from layerlake.catalog.layout import log_path, part_path, run_path
from layerlake.catalog.run import Run
from layerlake.catalog.seal import seal_json
from layerlake.catalog.tables import to_parquet
from layerlake.catalog.verify import verify_lake

from .test_verify import flip, problems

MakeRun = Callable[..., Run]


def rewrite_part(run: Run, table: str, change: Callable[[list[dict[str, Any]]], object]) -> str:
    """Change the rows of a table's part, and seal it again."""
    path = part_path(run.run_id, table, run.manifest.parts[table][0])
    held = pq.read_table(io.BytesIO(run.store.read(path)))
    rows = held.to_pylist()
    change(rows)
    run.store.write(path, to_parquet(pa.Table.from_pylist(rows, held.schema)))
    return path


def swap_documents(rows: list[dict[str, Any]]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("documents", lambda rows: rows.pop(1)),
        ("documents", lambda rows: rows.append(rows[-1])),
        ("documents", swap_documents),
        ("documents", lambda rows: rows[1].update(row_start=rows[1]["row_start"] + 1)),
        ("documents", lambda rows: rows[1].update(pair_start=rows[1]["pair_start"] - 1)),
        ("documents", lambda rows: rows[1].update(partition=1)),
        ("documents", lambda rows: rows[1].update(status="lost")),
        ("documents", lambda rows: rows[1].update(status="refused")),
        ("documents", lambda rows: rows[1].update(status="cut")),
        ("documents", lambda rows: rows[1].update(n_tokens=rows[1]["n_tokens"] + 1)),
        ("documents", lambda rows: rows[1].update(document=7)),
        ("tokens", lambda rows: rows.pop()),
        ("tokens", lambda rows: rows.append(rows[-1])),
        ("tokens", lambda rows: rows[3].update(row=rows[3]["row"] + 1)),
        ("tokens", lambda rows: rows[3].update(document=1)),
        ("tokens", lambda rows: rows[3].update(position=2)),
        ("tokens", lambda rows: rows[3].update(token_id=24)),
        ("objects", lambda rows: rows.append(rows[0])),
        ("objects", lambda rows: rows[0].update(partition=9)),
        ("objects", lambda rows: rows[0].update(name=rows[1]["name"])),
    ],
)  # fmt: skip
def test_rows_that_do_not_add_up_are_found(
    run: Run, table: str, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    path = rewrite_part(run, table, change)
    assert path in problems(run.store)


def test_a_partition_without_documents_is_found(run: Run) -> None:
    rewrite_part(run, "documents", lambda rows: rows.pop())
    assert log_path(run.run_id, 1) in problems(run.store)


def test_a_missing_record_is_found(run: Run) -> None:
    rewrite_part(run, "objects", lambda rows: rows.pop())
    assert problems(run.store) == {log_path(run.run_id, 1)}


@pytest.mark.parametrize("crc32", ["00000000", None])
def test_a_shard_is_read_to_its_chunks_though_its_record_fits(run: Run, crc32: str | None) -> None:
    """What was damaged before its checksum was taken."""
    name = "activations.zarr/resid/c/1/0/0"
    path = f"{run_path(run.run_id)}/{name}"
    content = flip(run.store.read(path), 40, 1)
    run.store.write(path, content)
    told = crc32 or f"{zlib.crc32(content):08x}"

    def record(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["name"] == name)["crc32"] = told

    rewrite_part(run, "objects", record)
    with pytest.raises(
        DamagedLake, match="CRC-32C of the chunk 0" if crc32 is None else "CRC-32: "
    ) as caught:
        verify_lake(run.store)
    assert {problem.object for problem in caught.value.verification.problems} == {path}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("layer", 1),
        ("head", 1),
        ("document", 4),
        ("queries", "late"),
        ("bos_count", 9),
        ("distance_counts", [0] * 17),
    ],
)
def test_rows_of_attn_band_are_accounted_for(run: Run, column: str, value: object) -> None:
    name = "attn_band/part-00000000.parquet"
    path = f"{run_path(run.run_id)}/{name}"
    held = pq.read_table(io.BytesIO(run.store.read(path)))
    rows = held.to_pylist()
    rows[0][column] = value
    content = to_parquet(pa.Table.from_pylist(rows, held.schema))
    run.store.write(path, content)

    def record(records: list[dict[str, Any]]) -> None:
        mine = next(record for record in records if record["name"] == name)
        mine |= {"nbytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}

    rewrite_part(run, "objects", record)
    with pytest.raises(DamagedLake, match=column) as caught:
        verify_lake(run.store)
    assert {problem.object for problem in caught.value.verification.problems} == {path}


def rewrite_manifest(run: Run, **fields: object) -> str:
    path = log_path(run.run_id, 1)
    run.store.write(path, seal_json(run.manifest.to_json() | fields))
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"n_tokens": 37},
        {"n_documents": 4},
        {"n_cut": 1},
        {"n_refused": 1},
        {"number": 2},
        {"run_id": "other"},
        {"sites": {"resid": [0, 1, 2, 7]}},
        {"sites": {"resid_mid": [0]}},
        {"partitions": []},
        {"parts": {}},
    ],
)
def test_a_manifest_that_does_not_add_up_is_found(run: Run, fields: dict[str, object]) -> None:
    assert rewrite_manifest(run, **fields) in problems(run.store)


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("resid", {"shape": [3, 32, 8]}),
        ("resid", {"fill_value": 1.0}),
        ("resid", {"dimension_names": ["layer", "token", "d_model"]}),
        ("pattern", {"data_type": "float64"}),
        ("pattern", {"codecs": []}),
        ("mlp_post", {"attributes": {}}),
    ],
)
def test_an_array_that_is_not_cut_as_the_manifest_says_is_found(
    run: Run, array: str, change: dict[str, object]
) -> None:
    path = f"{run_path(run.run_id)}/activations.zarr/{array}/zarr.json"
    held = json.loads(run.store.read(path))
    held["attributes"].pop("checksum")
    run.store.write(path, seal_json(held | {"shape": [length * 2 for length in held["shape"]]} | change))
    assert problems(run.store) == {path}


def test_an_array_with_room_for_more_is_whole(run: Run) -> None:
    path = f"{run_path(run.run_id)}/activations.zarr/resid/zarr.json"
    held = json.loads(run.store.read(path))
    held["shape"][1] *= 2
    run.store.write(path, seal_json(held))
    assert problems(run.store) == set()


def test_values_that_are_not_finite_must_have_been_counted(make_run: MakeRun) -> None:
    values = np.random.default_rng(0).standard_normal((2, 36, 8)).astype(np.float32)
    values[1, 20, 3] = np.inf
    run = make_run(values={"attn_out": values})
    with pytest.raises(DamagedLake, match=r"log/00000001.*not finite.*'attn_out': 1"):
        verify_lake(run.store)
    (entry,) = run.manifest.captures
    rewrite_manifest(run, captures=[entry | {"nonfinite": {"attn_out": 1}}])
    assert problems(run.store) == set()
