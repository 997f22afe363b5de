"""Verify a lake: read every object that it must have, and say which are missing or are not what was written.

An independent reader: it takes names and schemas from the catalog, shares no code with capture, and reads Zarr's
shards by hand (:mod:`layerlake.catalog.arrays`), because Zarr gives zeros for what is missing. Any changed byte shows:
JSON and Parquet carry a seal (:mod:`layerlake.catalog.seal`), shards a record of their CRC-32, and the chunks of
shards and weights a CRC-32C. So does any object that is gone and that a manifest, a model or a finding names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc

from .arrays import verify_group_metadata, verify_weight_chunk, verify_weight_metadata
from .errors import CorruptRun, DamagedLake, LakeNotFound
from .findings import FindingKey
from .inspection import Inspection, open_sealed_parquet, read_sealed_json
from .lake import match_run
from .layout import LAKE_MARKER, finding_path, model_path, require_format, weight_specs
from .manifest import read_manifest
from .problem import Deviation, Problem, require
from .run_inspection import Inspected, inspect_run
from .shapes import ModelShape
from .stores import Store

__all__ = ["Verification", "verify_lake", "verify_run"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read, and what was wrong with it."""

    problems: tuple[Problem, ...]
    """Each object that is damaged or missing."""
    notes: tuple[str, ...]
    """What is worth saying and no damage: an open capture, objects that nothing names."""
    n_runs: int
    n_models: int
    n_findings: int
    """Tables of findings."""
    n_objects: int
    """Objects read."""
    nbytes: int
    """Bytes read."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, problems and notes."""
        problems = [
            {"object": p.object, "what": p.what, "expected": p.expected, "found": p.found}
            for p in self.problems
        ]
        return {
            "runs": self.n_runs,
            "models": self.n_models,
            "findings": self.n_findings,
            "objects": self.n_objects,
            "nbytes": self.nbytes,
            "problems": problems,
            "notes": list(self.notes),
        }


def verify_lake(store: Store, runs: Sequence[str] = ()) -> Verification:
    """Verify a lake, or some of its runs with their models and findings.

    Reads every object once, and holds four of them at a time, and the tables' rows of one capture.

    Parameters
    ----------
    store : Store
        The lake.
    runs : sequence of str
        Ids or unique prefixes; everything if empty.

    Returns
    -------
    Verification
        Without problems.

    Raises
    ------
    DamagedLake
        There are problems; ``.verification`` has them.
    LakeNotFound, FormatError, RunNotFound, AmbiguousRun
        There is nothing to verify.
    """
    known = store.list("runs")
    if not known and not store.exists(LAKE_MARKER):
        raise LakeNotFound(f"'{store.url}' is not a lake (it has no {LAKE_MARKER}).")
    chosen = [match_run(prefix, known, url=store.url) for prefix in runs] or known
    inspection = Inspection(store)
    inspection.examine(LAKE_MARKER, _read_marker)
    shapes: dict[str, ModelShape | None] = {} if runs else dict.fromkeys(store.list("models"))
    inspected = {run_id: inspect_run(inspection, run_id) for run_id in chosen}
    shapes |= {run.newest.model_id: run.newest.shape for run in inspected.values() if run.newest}
    for model_id, shape in shapes.items():
        is_awaited = any(run.models is None or model_id in run.models for run in inspected.values())
        _inspect_model(inspection, model_id, shape, is_awaited=is_awaited)
    n_findings = _inspect_findings(inspection, known, inspected)
    verification = Verification(
        tuple(sorted(inspection.problems, key=lambda problem: problem.object)), tuple(inspection.notes),
        n_runs=len(chosen), n_models=len(shapes), n_findings=n_findings,
        n_objects=inspection.n_objects, nbytes=inspection.nbytes,
    )  # fmt: skip
    if verification.problems:
        raise _damaged(store, verification)
    return verification


def verify_run(store: Store, run: str) -> Verification:
    """Verify one run, with its model and findings: :func:`verify_lake` of one."""
    return verify_lake(store, [run])


def _damaged(store: Store, found: Verification) -> DamagedLake:
    objects = len({problem.object for problem in found.problems})
    error = DamagedLake(
        f"'{store.url}' is damaged, objects: {objects}. The first: {found.problems[0]}.",
        hint="Bring the objects back from a copy. Else remove the run (layerlake rm) and capture it again; a finding, "
        "remove its folder and analyze again.",
    )
    error.verification = found
    return error


def _read_marker(content: bytes) -> None:
    require_format(read_sealed_json(content)["format_version"], "The lake")


# -- models -------------------------------------------------------------------------------------


def _inspect_model(
    inspection: Inspection, model_id: str, shape: ModelShape | None, *, is_awaited: bool
) -> None:
    """Read a model's card, vocabulary and weights.

    ``shape`` is that of the runs that name it, None if none does; ``is_awaited`` tells whether one may be about to.
    """
    folder = model_path(model_id)
    if shape is None:
        is_whole = inspection.store.exists(f"{folder}/model.json")
        what = "is named by no run" if is_whole else "is not whole, and named by no run"
        if not is_awaited:
            inspection.notes.append(f"Model {model_id} {what}: layerlake gc removes it.")
        if not is_whole:
            return

    def read_card(content: bytes) -> tuple[ModelShape, dict[str, str]]:
        card = read_sealed_json(content)
        require("model_id", model_id, card["model_id"])
        found = ModelShape.from_json(card["shape"])
        require("shape", shape or found, found)
        return found, dict(card["crc32"])

    card = inspection.examine(f"{folder}/model.json", read_card)
    found, crc32 = card or (None, None)

    def verify_object(content: bytes, name: str, verify: Callable[[bytes], None]) -> None:
        if crc32 is not None:
            require("CRC-32", crc32.get(name), f"{zlib.crc32(content):08x}")
        verify(content)

    vocab = "vocab.parquet"
    inspection.examine(f"{folder}/{vocab}", partial(verify_object, name=vocab, verify=_verify_vocab))
    inspection.examine(
        f"{folder}/weights.zarr/zarr.json", lambda c: verify_group_metadata(read_sealed_json(c))
    )
    shape = shape or found
    for name, spec in weight_specs(shape).items() if shape else ():
        array = f"weights.zarr/{name}"
        read_chunks = partial(_read_weight_chunks, shape=spec.shape)
        chunks = inspection.examine(f"{folder}/{array}/zarr.json", read_chunks)
        if chunks is not None:
            chunk_shape, places = chunks
            verify = partial(verify_weight_chunk, chunk_shape=chunk_shape)
            keys = ["/".join([array, "c", *map(str, place)]) for place in places]
            inspection.examine_all(
                (f"{folder}/{key}", partial(verify_object, name=key, verify=verify)) for key in keys
            )


def _read_weight_chunks(
    content: bytes, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the shape of a weight's chunks, and the place of each."""
    metadata = read_sealed_json(content)
    places = verify_weight_metadata(metadata, shape)
    return tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]), places


def _verify_vocab(content: bytes) -> None:
    """Raise Deviation unless each token id has one text."""
    token_ids = open_sealed_parquet(content).read(columns=["token_id", "text", "is_special"])["token_id"]
    require("token ids", len(token_ids), pc.count_distinct(token_ids).as_py())


# -- findings -----------------------------------------------------------------------------------


def _inspect_findings(
    inspection: Inspection, known: Sequence[str], inspected: Mapping[str, Inspected]
) -> int:
    """Read the findings of the inspected runs, and return how many tables they have."""
    store = inspection.store
    present = {name for name, _ in store.walk("findings")}
    n_tables, n_of_none, read = 0, 0, set()
    for view in sorted({name.split("/")[1] for name in present}):
        for digest in sorted(
            {name.split("/")[2] for name in present if name.startswith(f"findings/{view}/")}
        ):
            path = finding_path(view, digest)
            if path not in present:
                continue
            read.add(path)
            described = inspection.examine(
                path, partial(_read_finding, view=view, digest=digest), is_optional=True
            )
            if described is None or (described["run"] in known and described["run"] not in inspected):
                continue
            n_tables += 1
            n_of_none += described["run"] not in known
            with inspection.of(path):
                _require_held(inspection, described, inspected)
            _inspect_siblings(inspection, present, digest, described["views"])
    if orphans := present - read:
        inspection.notes.append(
            f"{len(orphans)} objects among the findings are none, {min(orphans)} one of them."
        )
    if n_of_none:
        inspection.notes.append(
            f"{n_of_none} tables of findings are of runs that are gone: layerlake gc removes them."
        )
    return n_tables


def _require_held(
    inspection: Inspection, described: Mapping[str, Any], inspected: Mapping[str, Inspected]
) -> None:
    """Raise Deviation if a finding was drawn from partitions that its run does not hold."""
    run_id = described["run"]
    newest = inspected[run_id].newest if run_id in inspected else None
    if newest is None or not inspected[run_id].is_log_whole:  # what the run holds is not known
        return
    claimed = {
        site: set(extent["partitions"])
        for site, extent in described["extents"].items()
        if "partitions" in extent
    }
    if any(claimed[site] - set(newest.sites.get(site, ())) for site in claimed):
        try:  # it may have grown since it was inspected
            newest = read_manifest(inspection.store, run_id) or newest
        except CorruptRun:
            return
    for site, partitions in claimed.items():
        lacking = sorted(partitions - set(newest.sites.get(site, ())))
        require(f"partitions of {site} that it was drawn from, and the run does not hold", [], lacking)


def _inspect_siblings(inspection: Inspection, present: set[str], digest: str, views: Sequence[str]) -> None:
    """Report the tables of a finding that are gone.

    The main table is written last, and says that the others are there; without it a finding was not written to its end.
    """
    main, *others = (finding_path(view, digest) for view in views)
    if main not in present:
        inspection.notes.append(
            f"Finding {digest} was not written to its end, and does not count: analyze again."
        )
        return
    for path in others:
        if path not in present and inspection.store.exists(main):
            inspection.miss(path)


def _read_finding(content: bytes, view: str, digest: str) -> dict[str, Any]:
    """Return the description of one table of a finding."""
    file = open_sealed_parquet(content)
    description: dict[str, Any] = json.loads(file.metadata.metadata[b"layerlake"])
    names = ("analysis", "version", "run", "params", "extents", "part")
    key = FindingKey(**{name: description[name] for name in names if name in description})
    require("digest of the key", key.digest, digest)
    views = description.setdefault("views", [view])
    if view not in views:
        raise Deviation("view", f"one of {', '.join(views)}", view)
    runs = pc.unique(file.read(columns=["run"])["run"]).to_pylist()
    require("run of all rows", [key.run][: len(runs)], runs)
    return description
