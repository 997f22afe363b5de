"""The main schema: runs, models, sites, findings, and one view for every analysis that has been done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import pyarrow as pa

from ..catalog.findings import StoredTable, newest_findings
from ..catalog.lake import Lake
from ..catalog.layout import attn_band_nbytes, itemsize
from ..catalog.run import Run
from ..catalog.shapes import ModelShape
from ..catalog.sites import SITES
from ..catalog.tables import read_parts
from .dataset import LazyDataset, table_scan
from .directions import DIRECTIONS, read_directions

__all__ = ["ANALYSIS_OF_VIEW", "finding_views", "main_relations"]

ANALYSIS_OF_VIEW = {
    "lens": "lens",
    "lens_tokens": "lens",
    "cka": "cka",
    "neurons": "neurons",
    "neuron_counts": "neurons",
    "attention_locality": "attention_locality",
    "subjoiner": "subjoiner",
    "subjoiner_attention": "subjoiner",
    "wic": "wic",
    "wic_summary": "wic",
    "ing": "ing",
    "ing_neurons": "ing",
    "ing_histograms": "ing",
    "norms": "norms",
    "norm_tokens": "norms",
    "intervention_summary": "intervention_summary",
    "swap_cosines": "swap_cosines",
    "benchmarks": "benchmarks",
    "stages": "stages",
    "stage_curves": "stages",
}
"""Which analysis to run for a view that is not there yet."""

_RUNS = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("model_id", pa.string()),
        ("dataset", pa.string()),
        ("n_documents", pa.int64()),  # stored, cut ones included
        ("n_cut", pa.int64()),
        ("n_refused", pa.int64()),
        ("n_tokens", pa.int64()),
        ("sites", pa.list_(pa.string())),
        ("dtype", pa.string()),
        ("context", pa.int32()),
        ("bos_token_id", pa.int32()),
        ("baseline", pa.string()),  # of an intervened model: the run that it is compared with,
        ("schedule", pa.string()),  # and the order in which that one's blocks ran
        ("created", pa.string()),  # UTC, ISO 8601: when the first capture was finished
    ]
)
_SHAPE = pa.schema(
    [
        (
            field.name,
            {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}.get(str(field.type), pa.string()),
        )
        for field in fields(ModelShape)
    ]
)
_MODELS = pa.schema(
    [
        ("model", pa.string()),
        ("model_id", pa.string()),
        ("location", pa.string()),  # the hub id or the local path
        ("revision", pa.string()),
        *_SHAPE,
    ]
)
_SITES = pa.schema(
    [
        ("run", pa.string()),
        ("site", pa.string()),
        ("n_layers", pa.int32()),  # boundaries, for resid
        ("width", pa.int32()),  # heads, for pattern and attn_band
        ("dtype", pa.string()),
        ("n_tokens", pa.int64()),
        ("n_partitions", pa.int32()),
        ("chunk_rows", pa.int32()),  # NULL for attn_band, which is no array
        ("nbytes", pa.int64()),  # of the values, before compression
    ]
)
_FINDINGS = pa.schema(
    [
        ("finding", pa.string()),
        ("analysis", pa.string()),
        ("view", pa.string()),
        ("run", pa.string()),
        ("version", pa.int32()),
        ("params", pa.json_()),
        ("n_rows", pa.int64()),
        ("created", pa.string()),  # UTC, ISO 8601
    ]
)


def main_relations(lake: Lake, runs: Callable[[], Sequence[Run]]) -> dict[str, LazyDataset]:
    """Return what the main schema always has, by name: runs, models, sites, findings, directions.

    Each is read when it is first scanned, once: every run's manifest, the models' cards, the footers of all findings.

    Parameters
    ----------
    lake : Lake
        The lake.
    runs : callable
        Opens its runs.
    """
    return {
        "runs": _once(_RUNS, lambda: [_run_row(run) for run in runs()]),
        "models": _once(_MODELS, lambda: [card | card["shape"] for card in lake.models()]),
        "sites": _once(_SITES, lambda: [row for run in runs() for row in _site_rows(run)]),
        "findings": _once(_FINDINGS, lambda: [_finding_row(table) for table in lake.findings()]),
        "directions": _once(DIRECTIONS, lambda: read_directions(lake.store).to_pylist()),
    }


def finding_views(lake: Lake, names: Iterable[str] | None = None) -> dict[str, LazyDataset]:
    """Return some views of findings by name, or all; a view that no run has been analysed for is left out.

    Lists the findings, and reads the footers of the views' tables; the rows when a query scans them.
    """
    views: dict[str, list[StoredTable]] = {}
    for table in newest_findings(lake.findings() if names is None else _tables_of(lake, set(names))):
        if names is None or table.view in names:
            views.setdefault(table.view, []).append(table)
    return {view: _view(lake, tables) for view, tables in views.items()}


def _tables_of(lake: Lake, views: set[str]) -> list[StoredTable]:
    """Describe the tables of some views, and the main ones beside them: they tell an analysis's newest version."""
    tables = [table for view in sorted(views) for table in lake.findings(view)]
    mains = {table.views[0] for table in tables} - views
    return tables + [table for view in sorted(mains) for table in lake.findings(view)]


def _once(schema: pa.Schema, rows: Callable[[], list[dict[str, Any]]]) -> LazyDataset:
    @cache
    def table() -> pa.Table:
        return pa.Table.from_pylist(rows(), schema)

    return LazyDataset(schema, table_scan(lambda: iter([table()])))


def _run_row(run: Run) -> dict[str, object]:
    manifest = run.manifest
    return {
        "run": run.run_id,
        "model": manifest.model_name,
        "model_id": manifest.model_id,
        "dataset": manifest.dataset,
        "n_documents": manifest.n_documents,
        "n_cut": manifest.n_cut,
        "n_refused": manifest.n_refused,
        "n_tokens": manifest.n_tokens,
        "sites": list(run.sites),
        "dtype": manifest.dtype,
        "context": manifest.geometry.context,
        "bos_token_id": manifest.bos_token_id,
        "baseline": manifest.baseline,
        "schedule": manifest.schedule,
        "created": next((capture.get("finished") for capture in manifest.captures), None),
    }


def _site_rows(run: Run) -> Iterator[dict[str, object]]:
    manifest = run.manifest
    for name in run.sites:
        site = SITES[name]
        held = [partition for partition in manifest.partitions if partition.index in manifest.sites[name]]
        n_layers, width = site.n_layers(run.shape), site.width(run.shape)
        n_rows = sum(p.n_pairs if site.rows == "pair" else p.n_rows for p in held)
        nbytes = n_layers * n_rows * width * itemsize(manifest.dtype)
        yield {
            "run": run.run_id,
            "site": name,
            "n_layers": n_layers,
            "width": width,
            "dtype": manifest.dtype if site.is_array else "float32",
            "n_tokens": sum(partition.n_rows for partition in held),
            "n_partitions": len(held),
            "chunk_rows": manifest.geometry.chunk_rows[name] if site.is_array else None,
            "nbytes": nbytes
            if site.is_array
            else attn_band_nbytes(run.shape, sum(p.n_documents for p in held)),
        }


def _finding_row(table: StoredTable) -> dict[str, object]:
    return {
        "finding": table.finding,
        "analysis": table.key.analysis,
        "view": table.view,
        "run": table.key.run,
        "version": table.key.version,
        "params": json.dumps(table.key.params, sort_keys=True),
        "n_rows": table.n_rows,
        "created": table.created,
    }


def _view(lake: Lake, stored: Sequence[StoredTable]) -> LazyDataset:
    """Return the tables of one view as one; a column that an older finding lacks is NULL there."""
    whole = pa.unify_schemas([table.schema for table in stored], promote_options="permissive")

    def tables() -> Iterator[pa.Table]:
        for table in stored:
            found = read_parts(lake.store, [table.path]).replace_schema_metadata(None)
            yield pa.concat_tables([whole.empty_table(), found], promote_options="permissive")

    return LazyDataset(whole, table_scan(tables))
