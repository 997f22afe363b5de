"""The manifest log of a run: whole snapshots, numbered, each created only if absent; the last is the truth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from .errors import CorruptRun, decoding
from .layout import FORMAT_VERSION, Geometry, log_path, require_format, run_path
from .shapes import ModelShape
from .stores import Store

__all__ = ["Manifest", "Partition", "commit_manifest", "read_log", "read_manifest"]


@dataclass(frozen=True, slots=True)
class Partition:
    """What one partition holds; the same for every site captured of it."""

    index: int
    n_rows: int
    """Token rows used, from the partition's first row on."""
    n_pairs: int
    """(query, key) pairs used."""
    n_documents: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One snapshot of a run: everything a reader needs to know, and nothing that it must guess."""

    run_id: str
    model_id: str
    model_name: str
    """The hub id or the folder's name; for people."""
    shape: ModelShape
    identity: dict[str, Any]
    """What makes this run this run (weights, tokenizer, numerics, corpus); ``run_id`` is its digest."""
    dataset: str
    """The corpus in words; its fingerprint is in ``identity``."""
    geometry: Geometry
    dtype: str
    """The stored dtype: float16, bfloat16 or float32."""
    bos_token_id: int | None
    codec: str = "none"
    """How chunks are compressed: none, lz4 or zstd; fixed by the run's first capture, as the geometry is."""
    n_documents: int = 0
    """Stored documents (cut ones included)."""
    n_cut: int = 0
    n_refused: int = 0
    n_tokens: int = 0
    """Stored tokens."""
    partitions: tuple[Partition, ...] = ()
    sites: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """For each site, the partitions that hold it."""
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each table (documents, tokens, objects), its parts, in order."""
    zones: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """For each site that is an array, the partitions whose zones are there; a run may lack them."""
    captures: tuple[dict[str, Any], ...] = ()
    """Provenance, one entry a capture: time, versions, device, self-check."""
    number: int = 0
    """The snapshot's place in the log, from 1."""

    @property
    def baseline(self) -> str | None:
        """The run whose model this one's is but for its schedule, and whose documents it has; None of most runs."""
        baseline: str | None = self.identity.get("baseline")
        return baseline

    @property
    def schedule(self) -> str | None:
        """The order in which the baseline's blocks ran: layer i of this run is its i-th step. None of most runs."""
        schedule: str | None = self.identity.get("schedule")
        return schedule

    def partition(self, index: int) -> Partition:
        """Return the partition of this index."""
        (found,) = (partition for partition in self.partitions if partition.index == index)
        return found

    def has_capture(self, capture_id: str) -> bool:
        """Tell whether a capture is part of the snapshot."""
        return any(entry.get("capture_id") == capture_id for entry in self.captures)

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as a JSON object."""
        value = dataclasses.asdict(self)
        value["format_version"] = FORMAT_VERSION
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any], *, name: str = "A manifest") -> Self:
        """Rebuild a snapshot from :meth:`to_json`; ``name`` is its object's.

        Raises
        ------
        FormatError
            The snapshot was written in another format.
        CorruptRun
            A field is missing, or is not what it should be.
        """
        with decoding(name):
            require_format(value.get("format_version"), "The run")
            value = {"zones": {}} | value  # captured before there were any
            missing = [field.name for field in dataclasses.fields(cls) if field.name not in value]
            if missing:
                raise CorruptRun(f"{name} has no field '{missing[0]}'.")
            given = {field.name: value[field.name] for field in dataclasses.fields(cls)}
            given["shape"] = ModelShape.from_json(value["shape"])
            given["geometry"] = Geometry.from_json(value["geometry"])
            given["partitions"] = tuple(Partition(**item) for item in value["partitions"])
            given["sites"] = {site: tuple(items) for site, items in value["sites"].items()}
            given["parts"] = {table: tuple(items) for table, items in value["parts"].items()}
            given["zones"] = {site: tuple(items) for site, items in value["zones"].items()}
            given["captures"] = tuple(dict(entry) for entry in value["captures"])
            return cls(**given)


def read_log(store: Store, run_id: str) -> list[Manifest]:
    """Return all snapshots of a run, in order."""
    return [_read_snapshot(store, path) for path in _log_paths(store, run_id)]


def read_manifest(store: Store, run_id: str) -> Manifest | None:
    """Return the newest snapshot of a run, or None if none was committed."""
    paths = _log_paths(store, run_id)
    return _read_snapshot(store, paths[-1]) if paths else None


def _log_paths(store: Store, run_id: str) -> list[str]:
    folder = f"{run_path(run_id)}/log"
    return [f"{folder}/{name}" for name in store.list(folder) if name.endswith(".json")]


def _read_snapshot(store: Store, path: str) -> Manifest:
    return Manifest.from_json(store.read_json(path), name=f"{store.url}/{path}")


def commit_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Append a snapshot to the log.

    Parameters
    ----------
    manifest : Manifest
        ``number`` is that of the snapshot it was made from; the next one is created.

    Raises
    ------
    FileExistsError
        Somebody else committed since: read the newest, merge, try again.
    """
    following = dataclasses.replace(manifest, number=manifest.number + 1)
    store.write_json(log_path(manifest.run_id, following.number), following.to_json(), create=True)
    return following
