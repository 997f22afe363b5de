"""What a run lacks of what is asked for: documents, and sites of partitions that are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..catalog.errors import CorpusError
from ..catalog.layout import Geometry
from ..catalog.manifest import Manifest
from ..catalog.run import Run
from ..catalog.sites import SITES
from .frozen import PartitionWork
from .placement import EncodedDocument, Placement, batch_documents, place_documents

__all__ = ["lacking_sites", "next_manifest", "partition_work", "place_missing"]


def place_missing(
    encode: Callable[[int, int | None], list[EncodedDocument]],
    budget: int | None,
    geometry: Geometry,
    held: Run | None,
) -> Placement:
    """Tokenise and place the documents that the run does not have yet.

    Parameters
    ----------
    encode : callable
        Returns the documents after the first so many, as far as they fit so many tokens (None: all).
    budget : int or None
        The most tokens that the run is to have.
    geometry : Geometry
        The run's.
    held : Run or None
        The run as it is.

    Raises
    ------
    CorpusError
        There is nothing to begin the run with.
    """
    if held is None:
        encoded = encode(0, budget)
        if not any(item.refusal is None for item in encoded):
            raise _nothing_to_store(encoded, budget)
        return place_documents(encoded, geometry)
    n_input = held.documents.num_rows
    left = None if budget is None else budget - held.n_tokens
    encoded = encode(n_input, left) if left is None or left > 0 else []
    following = 1 + max(partition.index for partition in held.manifest.partitions)
    return place_documents(encoded, geometry, first_document=n_input, first_partition=following)


def _nothing_to_store(encoded: list[EncodedDocument], budget: int | None) -> CorpusError:
    if encoded:
        return CorpusError(
            f"None of the {len(encoded)} documents can be stored; the first: {encoded[0].refusal}.",
            hint="Lower --min-tokens, or look at --text-column and --sample-by.",
        )
    if budget is not None:
        return CorpusError(f"Not even the first document fits into --max-tokens {budget}.")
    return CorpusError("The dataset is empty.")


def next_manifest(manifest: Manifest, placement: Placement, sites: tuple[str, ...]) -> Manifest:
    """Return the snapshot after the capture, but for the parts and the entry that finalise adds."""
    statuses = placement.documents["status"].to_pylist()
    partitions = manifest.partitions + placement.partitions
    everywhere = tuple(partition.index for partition in partitions)
    held = {name: everywhere if name in sites else manifest.sites.get(name, ()) for name in SITES}
    return dataclasses.replace(
        manifest,
        n_documents=manifest.n_documents + len(statuses) - statuses.count("refused"),
        n_cut=manifest.n_cut + statuses.count("cut"),
        n_refused=manifest.n_refused + statuses.count("refused"),
        n_tokens=manifest.n_tokens + placement.tokens.num_rows,
        partitions=partitions,
        sites={name: indices for name, indices in held.items() if indices},
    )


def lacking_sites(
    sites: tuple[str, ...], held: Run | None, placement: Placement
) -> dict[int, tuple[str, ...]]:
    """Return, for each partition that lacks something, the sites that it lacks."""
    lacking: dict[int, tuple[str, ...]] = {}
    if held is not None:
        for partition in held.manifest.partitions:
            missing = tuple(s for s in sites if partition.index not in held.manifest.sites.get(s, ()))
            if missing:
                lacking[partition.index] = missing
    return lacking | {partition.index: sites for partition in placement.partitions}


def partition_work(
    lacking: dict[int, tuple[str, ...]], held: Run | None, placement: Placement, batch_tokens: int
) -> tuple[PartitionWork, ...]:
    """Return, for each partition that lacks something, the sites it lacks and its batches."""
    tables = [placement.documents, *([held.documents] if held is not None else [])]
    members: dict[int, list[tuple[int, int]]] = {index: [] for index in lacking}
    for table in tables:
        columns = (table[name].to_pylist() for name in ("partition", "document", "n_tokens"))
        for partition_index, document, n_tokens in zip(*columns, strict=True):
            if partition_index in members:
                members[partition_index].append((document, n_tokens))
    return tuple(
        PartitionWork(
            index,
            lacking[index],
            batch_documents([d for d, _ in members[index]], [n for _, n in members[index]], batch_tokens),
        )
        for index in sorted(lacking)
    )
