"""What is said of a query's reads is what it reads: chunk by chunk, byte by byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import TINY, build_run

from layerlake.catalog import layout
from layerlake.catalog.errors import CorruptRun, QueryError
from layerlake.catalog.run import Run
from layerlake.cli import main
from layerlake.lake import Lake, open_lake
from layerlake.sql import Explanation, explain

SITES = ("resid", "attn_out", "mlp_post", "pattern", "attn_band")
SOME = "SELECT norm(vec) FROM resid WHERE boundary = 1 AND row IN (SELECT row FROM tokens WHERE position = 8)"


@pytest.fixture
def run(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run cut into chunks of few rows."""
    monkeypatch.setattr(layout, "CHUNK_NBYTES", 64)
    return make_run(sites=SITES)


def total(told: Explanation) -> tuple[int, int, int, int]:
    return told.n_chunks, told.n_chunks_stored, told.nbytes, told.nbytes_stored


def test_the_last_line_says_how_much_of_how_much(run: Run) -> None:
    told = open_lake(run.store.url).explain(SOME)
    # two chunks, of 2 rows of 8 values of 4 bytes and a checksum of 4, of 3 boundaries of 7, 8 and 4 chunks
    assert str(told).splitlines()[-1] == f"read 2 of 57 chunks ({2 * 68} of {57 * 68} bytes)"
    first, second, _ = str(told).splitlines()
    assert first.startswith(f"resid of {run.run_id}: 2 of 57 chunks, 136 B of ")
    assert "(1 of 3 boundaries, 2 of 3 partitions, 2 of 15 chunks there)" in first
    assert "leave 2 (boundary, row)" in second


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT count(*) FROM resid", (0, 57, 0, 57 * 68)),
        ("SELECT vec FROM resid", (57, 57, 57 * 68, 57 * 68)),
        ("SELECT vec FROM resid_mid WHERE layer = 0 AND row = 3", (2, 57 + 38, 136, (57 + 38) * 68)),
        ("SELECT a.vec, b.vec FROM resid_pre a JOIN resid_post b USING (row, layer) WHERE row = 3 AND layer = 0",
         (2, 57, 136, 57 * 68)),
        ("SELECT vec FROM mlp_post WHERE layer = 1 AND row IN (3, 4, 20)", (3, 72, 3 * 68, 72 * 68)),
        ("SELECT count(*) FROM tokens", (0, 0, 0, 0)),
        ("EXPLAIN SELECT vec FROM resid", (0, 57, 0, 57 * 68)),
    ],
)  # fmt: skip
def test_totals(run: Run, text: str, expected: tuple[int, int, int, int]) -> None:
    assert total(explain(Lake(run.store.url), text)) == expected


def test_tables_of_attention_count_as_they_lie(run: Run) -> None:
    told = explain(Lake(run.store.url), "SELECT bos_sum FROM attn_band WHERE document = 4")
    sizes = [row["nbytes"] for row in run.objects.to_pylist() if row["site"] == "attn_band"]
    assert total(told) == (1, 3, sizes[2], sum(sizes))


def test_all_of_a_site_is_all_of_its_bytes(run: Run) -> None:
    told = explain(Lake(run.store.url), "SELECT sum(value) FROM pattern")
    assert told.n_chunks == told.n_chunks_stored > 50
    assert told.nbytes == told.nbytes_stored


def test_no_site_is_forgotten_and_none_invented(run: Run) -> None:
    told = explain(Lake(run.store.url), f'WITH k AS (FROM "{run.run_id}".MLP_POST) FROM k, attn_out LIMIT 0')
    assert {site.site for site in told.sites} == {"mlp_post", "attn_out"}
    with pytest.raises(QueryError, match="nosuch"):
        explain(Lake(run.store.url), "FROM nosuch")


def test_damage_is_the_lake_s(run: Run) -> None:
    run.store.delete(f"runs/{run.run_id}/activations.zarr/resid/c/1/0/0")
    with pytest.raises(CorruptRun):
        explain(Lake(run.store.url), SOME)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_a_remote_store_is_asked_for_what_is_said(
    s3_url: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(layout, "CHUNK_NBYTES", 4096)
    shape = dataclasses.replace(TINY, d_model=256)
    values = np.zeros((3, 36, 256), dtype=np.float32)
    values[:, :, :100] = np.random.default_rng(0).standard_normal((3, 36, 100))
    build_run(f"{s3_url}/lake", shape=shape, sites=("resid",), values={"resid": values}, codec=codec)
    asked: list[int] = []
    fetch = s3fs.S3FileSystem._cat_file  # noqa: SLF001  # what every read of a range comes to

    async def counted(self: Any, path: str, *args: Any, **options: Any) -> bytes:
        content: bytes = await fetch(self, path, *args, **options)
        if "/resid/c/" in path:
            asked.append(len(content))
        return content

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", counted)
    s3fs.S3FileSystem.clear_instance_cache()
    lake = Lake(f"{s3_url}/lake")
    rows = lake.sql(SOME).fetchall()
    # position 8 of documents 1 and 3, which begin at tokens 5 and 17
    expected = [float(np.linalg.norm(values[1, row])) for row in (13, 25)]
    assert sorted(row[0] for row in rows) == pytest.approx(sorted(expected))
    n_asked = sum(asked)
    told = lake.explain(SOME)
    index_nbytes = 16 * 4 + 4  # a shard has four chunks, of four rows
    assert told.n_chunks == 2
    assert told.nbytes <= n_asked <= told.nbytes + told.n_chunks * index_nbytes
    is_small = told.nbytes < 2 * (4 * 256 * 4 + 4)
    assert is_small == (codec != "none")


def test_the_command_prints_what_python_tells(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.sql").write_text(SOME, encoding="utf-8")
    main(["sql", run.store.url, "-f", str(tmp_path / "some.sql"), "--explain"])
    assert capsys.readouterr().out == f"{explain(Lake(run.store.url), SOME)}\n"
