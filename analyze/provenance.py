"""Provenance: what the report says about where a run and its findings come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..catalog.findings import StoredTable
from ..catalog.layout import model_path
from ..catalog.run import Run
from .charts import Series

__all__ = ["RunCard", "describe_run", "params_text"]


@dataclass(frozen=True, slots=True)
class RunCard:
    """A run, in the words of the report."""

    run_id: str
    label: str
    color: str
    architecture: str
    dataset: str
    documents: str
    left_out: str
    """Documents that were cut or refused, if any."""
    tokens: str
    dtype: str
    facts: list[tuple[str, str]]
    """All that is known about how it came about: names and values."""
    findings: list[dict[str, str]]
    """The stored tables of the run that are shown, newest of each kind."""


def describe_run(run: Run, series: Series, color: str, stored: Sequence[StoredTable]) -> RunCard:
    """Describe a run from its manifest, its model's card and its findings; no activations are read."""
    manifest, shape = run.manifest, run.shape
    left_out = [
        f"{n:,} {word}" for n, word in ((manifest.n_cut, "cut"), (manifest.n_refused, "refused")) if n
    ]
    findings = [
        {
            "finding": table.finding,
            "view": table.view,
            "n_rows": f"{table.n_rows:,}",
            "version": str(table.key.version),
            "created": table.created,
            "params": params_text(table.key.params),
        }
        for table in sorted(stored, key=lambda table: (table.key.analysis, table.view, table.finding))
        if table.key.run == run.run_id
    ]
    return RunCard(
        run_id=run.run_id,
        label=series.label,
        color=color,
        architecture=f"{shape.family}, {shape.n_layers} {shape.block} blocks, d_model {shape.d_model}, "
        f"{shape.n_heads} heads, {shape.norm}",
        dataset=manifest.dataset,
        documents=f"{manifest.n_documents:,}",
        left_out=", ".join(left_out),
        tokens=f"{manifest.n_tokens:,}",
        dtype=manifest.dtype,
        facts=list(_facts(run)),
        findings=findings,
    )


def params_text(params: Mapping[str, Any]) -> str:
    """Return parameters as one line.

    Examples
    --------
    >>> params_text({"scale": "own", "seed": 0})
    'scale = own, seed = 0'
    """
    return ", ".join(f"{name} = {value}" for name, value in sorted(params.items()))


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    manifest, shape = run.manifest, run.shape
    card = run.store.read_json(f"{model_path(manifest.model_id)}/model.json")
    yield "model", manifest.model_name
    yield "model id", manifest.model_id
    for name in ("location", "revision"):
        if card.get(name):
            yield f"model {name}", str(card[name])
    heads = f"{shape.n_heads} heads ({shape.n_kv_heads} for keys and values) of {shape.d_head}"
    mlp = f"d_mlp {shape.d_mlp}, {shape.act_fn}{' gated' if shape.gated_mlp else ''}"
    unembed = f"vocabulary {shape.n_vocab}, {'tied' if shape.tied_unembed else 'untied'} unembedding"
    yield (
        "blocks",
        f"{shape.family}, {shape.n_layers} {shape.block} layers, {shape.norm}, context {shape.n_ctx}",
    )
    yield "sizes", f"d_model {shape.d_model}, {heads}, {mlp}, {unembed}"
    yield "dataset", manifest.dataset
    n_cut, n_refused = manifest.n_cut, manifest.n_refused
    yield "documents", f"{manifest.n_documents:,} stored (of which {n_cut:,} cut), {n_refused:,} refused"
    yield "tokens", f"{manifest.n_tokens:,} stored, at most {manifest.geometry.context:,} a document"
    yield "BOS token id", "none" if manifest.bos_token_id is None else str(manifest.bos_token_id)
    yield "stored dtype", manifest.dtype
    whole = len(manifest.partitions)
    held = {name: len(manifest.sites[name]) for name in run.sites}
    sites = (name if n == whole else f"{name} ({n} of {whole} partitions)" for name, n in held.items())
    yield "sites", ", ".join(sites)
    yield from _flat(manifest.identity, "identity")
    for number, capture in enumerate(manifest.captures, start=1):
        yield from _flat(capture, "capture" if len(manifest.captures) == 1 else f"capture {number}")


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Walk through a JSON value; a mapping of plain values is one fact, on one line."""
    if isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values()):
        for key, item in value.items():
            yield from _flat(item, f"{name}: {key.replace('_', ' ')}")
    else:
        yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        if len(value) > 12:
            return f"{len(value):,} ({_plain(value[0])} … {_plain(value[-1])})"
        return ", ".join(map(_plain, value))
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
