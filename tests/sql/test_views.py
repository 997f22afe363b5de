"""The main schema: what is in the lake, and the newest findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from layerlake.catalog.findings import Finding, FindingKey, write_finding
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.sql import query

MakeRun = Callable[..., Run]


def key(run: Run, *, n_tokens: int = 36, version: int = 1, **params: Any) -> FindingKey:
    extents = {"resid": {"n_tokens": n_tokens, "partitions": [0]}}
    return FindingKey("lens", version, run.run_id, {"variant": "default"} | params, extents)


def write(run: Run, of: FindingKey, lens: dict[str, list[Any]], **views: dict[str, list[Any]]) -> None:
    tables = {
        view: pa.table({"run": [run.run_id] * len(next(iter(columns.values()))), **columns})
        for view, columns in {"lens": lens, **views}.items()
    }
    write_finding(run.store, Finding("lens", tables, (of,)))


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run(dtype="float16")


def test_runs_and_models(run: Run) -> None:
    lake = Lake(run.store.url)
    row = query(lake, "FROM runs").to_dicts()
    assert [
        {
            name: row[0][name]
            for name in ("run", "model", "dataset", "n_documents", "n_tokens", "sites", "dtype", "context")
        }
    ] == [
        {
            "run": run.run_id,
            "model": "tiny",
            "dataset": "synthetic",
            "n_documents": 5,
            "n_tokens": 36,
            "sites": list(run.sites),
            "dtype": "float16",
            "context": 12,
        }
    ]
    assert row[0]["created"] == run.manifest.captures[0]["finished"]
    joined = "SELECT family, n_layers, norm_eps, tied_unembed FROM runs JOIN models USING (model_id)"
    assert query(lake, joined).fetchall() == [("gpt2", 2, 1e-5, False)]


def test_sites(run: Run) -> None:
    text = "SELECT site, n_layers, width, dtype, n_tokens, nbytes FROM sites"
    n_pairs = sum(n * (n + 1) // 2 for n in (5, 9, 3, 12, 7))
    assert query(Lake(run.store.url), text).fetchall() == [
        ("resid", 3, 8, "float16", 36, 3 * 36 * 8 * 2),
        ("attn_out", 2, 8, "float16", 36, 2 * 36 * 8 * 2),
        ("mlp_out", 2, 8, "float16", 36, 2 * 36 * 8 * 2),
        ("mlp_post", 2, 16, "float16", 36, 2 * 36 * 16 * 2),
        ("pattern", 2, 2, "float16", 36, 2 * 2 * n_pairs * 2),
        ("attn_band", 2, 2, "float32", 36, 5 * 2 * 2 * 2 * 18 * 4),
    ]


def test_documents(run: Run) -> None:
    lake = Lake(run.store.url)
    assert query(lake, "FROM all_documents").to_arrow_table().to_pylist() == run.documents.to_pylist()
    assert query(lake, "FROM documents").to_arrow_table().to_pylist() == run.stored_documents.to_pylist()
    assert query(lake, "SELECT sources[1] FROM documents WHERE n_tokens > 8").fetchall() == [
        ("tiny:1",),
        ("tiny:3",),
    ]
    assert query(lake, "FROM vocab").to_arrow_table().to_pylist() == run.vocab.to_pylist()


def test_analysis_views_show_the_newest_finding_of_each_parameter_set(run: Run) -> None:
    write(run, key(run, n_tokens=18), {"boundary": [0], "loss_nats": [1.0]})
    write(run, key(run, n_tokens=36), {"boundary": [0], "loss_nats": [2.0]}, lens_tokens={"row": [6]})
    write(
        run, key(run, n_tokens=18, version=2), {"boundary": [0], "loss_nats": [3.0]}, lens_tokens={"row": [7]}
    )
    write(run, key(run, n_tokens=18, version=2, variant="authors"), {"boundary": [0], "loss_nats": [4.0]})
    lake = Lake(run.store.url)
    assert query(lake, "SELECT loss_nats FROM lens ORDER BY ALL").fetchall() == [(3.0,), (4.0,)]
    assert query(lake, "SELECT row FROM lens_tokens").fetchall() == [(7,)]
    history = (
        "SELECT version, params->>'variant', n_rows, analysis FROM findings WHERE view = 'lens' ORDER BY ALL"
    )
    assert query(lake, history).fetchall() == [
        (1, "default", 1, "lens"),
        (1, "default", 1, "lens"),
        (2, "authors", 1, "lens"),
        (2, "default", 1, "lens"),
    ]


def test_findings_of_several_runs_and_shapes_are_one_view(run: Run, make_run: MakeRun) -> None:
    other = make_run(name="other")
    write(run, key(run), {"boundary": [0, 1], "note": [None, None]})
    write(other, key(other), {"boundary": [0], "note": ["x"], "extra": [0.5]})
    lake = Lake(run.store.url)
    rows = query(
        lake, "SELECT boundary, note, extra FROM lens ORDER BY run = ?, boundary", params=[other.run_id]
    )
    assert rows.fetchall() == [(0, None, None), (1, None, None), (0, "x", 0.5)]
    assert query(lake, "SELECT boundary FROM lens WHERE extra <= 0.5 AND note = 'x'").fetchall() == [(0,)]
    assert query(lake, "SELECT count(*) FROM lens WHERE run = ?", params=[run.run_id]).fetchall() == [(2,)]
