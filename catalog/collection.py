"""Collect what nothing in a lake needs any more: abandoned captures, interrupted removals, superseded findings.

What a snapshot of a remaining run names is never touched, whatever its age, and of a run that a capture holds, nothing
at all, unless that capture has written nothing for as long as ``older_than_s`` says. A run is cleared only while its
reservation says so, and is judged anew once it does, so that nobody writes what is about to be deleted. A run whose log
or reservation does not fit what lies there is damaged, not waste, and is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .errors import LayerLakeError, RunNotFound
from .findings import newest_findings
from .layout import model_path, run_path, wip_path
from .manifest import Manifest
from .references import find_lost_snapshots, named_objects
from .removal import Removal, delete_held, plan_removal, readable_findings, remove_run
from .reservation import COLLECTING, REMOVING, reservation_path, reserve_run, reserved_by, take_over_run
from .stores import Store, Stored

__all__ = ["Collection", "Waste", "collect_lake", "plan_collection"]

_OF_RUNS = ("wip/", "log/.", "objects/", "documents/", "tokens/", "attn_band/", "activations.zarr/")
"""Where in a run's folder captures write, in the order in which it is cleared: ledgers never outlive their objects."""

_PARTIAL = ".partial"

_UNREADABLE = (LayerLakeError, LookupError, TypeError, ValueError)
"""What a snapshot raises whose bytes are not what they should be."""


@dataclass(frozen=True, slots=True)
class Waste:
    """Objects that nothing needs, of one kind and place."""

    kind: str
    """abandoned capture, interrupted removal, unnamed objects, unfinished files, unused model, superseded findings."""
    where: str
    """The run, model or folder."""
    objects: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        return sum(stored.nbytes for stored in self.objects)


@dataclass(frozen=True, slots=True)
class Collection:
    """What is collected, and what was looked at and left alone."""

    waste: tuple[Waste, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all waste."""
        return sum(waste.nbytes for waste in self.waste)


def plan_collection(store: Store, *, older_than_s: float) -> Collection:
    """Return what :func:`collect_lake` would remove now. Lists all objects, and reads logs and findings' footers."""
    return _Collector(store, older_than_s).collect(is_dry=True)


def collect_lake(store: Store, *, older_than_s: float) -> Collection:
    """Remove what nothing in a lake needs any more, and return it.

    It may be interrupted and repeated at any time, and captures, readers and others like it may be at work.

    Parameters
    ----------
    store : Store
        The lake.
    older_than_s : float
        A capture that has written nothing for so many seconds is abandoned; a model that no run names, or a file
        that was not written to its end, is waste when it is as old.
    """
    return _Collector(store, older_than_s).collect(is_dry=False)


class _Collector:
    def __init__(self, store: Store, older_than_s: float) -> None:
        self.store = store
        self.before = time.time() - older_than_s
        self.waste: list[Waste] = []
        self.notes: list[str] = []
        self.cleared: dict[str, str] = {}
        """Runs that have been cleared, or would be → the kind of their waste."""

    def collect(self, *, is_dry: bool) -> Collection:
        for run_id in self.store.list("runs"):
            holder = reserved_by(self.store, run_id)
            waste = self._judge_run(run_id, holder)
            if waste is not None and not is_dry:
                waste = self._clear_run(run_id, holder)
            if waste is not None:
                self.cleared[run_id] = waste.kind
            self._count(waste)
        # What runs name is looked up last: a capture that has begun meanwhile names its model.
        for judge in (self._judge_models, self._judge_findings, self._judge_files):
            for waste in judge():
                if not is_dry:
                    self.store.delete_all(stored.name for stored in waste.objects)
                self._count(waste)
        return Collection(tuple(self.waste), tuple(dict.fromkeys(self.notes)))

    def _count(self, waste: Waste | None) -> None:
        if waste is not None and waste.objects:
            self.waste.append(waste)

    def _is_old(self, objects: Iterable[Stored]) -> bool:
        return all(stored.modified <= self.before for stored in objects)

    # -- runs -----------------------------------------------------------------------------------

    def _judge_run(self, run_id: str, holder: str | None, *, is_taken: bool = False) -> Waste | None:
        """Return what of a run is waste, perhaps no more than its reservation; None leaves it alone.

        Parameters
        ----------
        run_id : str
            The run.
        holder : str, optional
            Who holds it, or held it until this process took it over.
        is_taken : bool
            Whether it did; the reservation is then its own, and tells nothing of the holder's age.
        """
        if holder == REMOVING:
            return self._remove(run_id, plan_removal)
        # the objects first, and the log after them: what is committed in between is then named
        objects = {stored.name: stored for stored in self.store.scan(run_path(run_id))}
        snapshots = self._read_log(run_id, holder)
        if snapshots is None:
            return None
        named = {name for manifest in snapshots for name in named_objects(manifest)}
        loose = _in_order(run_id, (stored for name, stored in objects.items() if name not in named))
        reservation = [stored for stored in loose if stored.name == reservation_path(run_id)]
        loose = [stored for stored in loose if stored.name != reservation_path(run_id)]
        committed = {entry["capture_id"] for manifest in snapshots for entry in manifest.captures}
        if holder in (None, COLLECTING, *committed):
            # what is being written has a name of its own until it is whole, a reservation too
            loose = [stored for stored in loose if _is_whole(stored) or self._is_old([stored])]
            return Waste("unnamed objects", run_id, tuple(loose)) if loose or holder else None
        if not self._is_old(loose if is_taken else [*loose, *reservation]):
            self.notes.append(f"Run {run_id} is left alone: a capture of it is open ({holder}).")
            return None
        return Waste("abandoned capture", run_id, (*loose, *reservation))

    def _read_log(self, run_id: str, holder: str | None) -> list[Manifest] | None:
        """Return all snapshots of a run; None where the log is damaged, so that nobody knows what they name."""
        folder = f"{run_path(run_id)}/objects"
        parts = [f"{folder}/{name}" for name in self.store.list(folder)]
        try:
            snapshots = _read_snapshots(self.store, run_id)
        except _UNREADABLE as error:
            self.notes.append(f"Run {run_id} is left alone, because its log cannot be read: {error}")
            return None
        parts = [name for name in parts if self.store.exists(name)]
        named = {name for manifest in snapshots for name in named_objects(manifest)}
        lost = find_lost_snapshots(run_id, (manifest.number for manifest in snapshots), parts, named, holder)
        if lost:
            self.notes.append(
                f"Run {run_id} is left alone, because its log has lost {lost[0]}: see layerlake verify."
            )
            return None
        return snapshots

    def _remove(self, run_id: str, remove: Callable[[Store, str], Removal]) -> Waste | None:
        try:
            removal = remove(self.store, run_id)
        except RunNotFound:  # somebody has ended it meanwhile
            return None
        return Waste("interrupted removal", run_id, (*removal.objects, *removal.findings))

    def _clear_run(self, run_id: str, holder: str | None) -> Waste | None:
        """Take a run from its holder, judge it again, and remove its waste; return what was removed."""
        store = self.store
        if holder == REMOVING:
            return self._remove(run_id, remove_run)
        taken_from = reserve_run(store, run_id, COLLECTING)
        if taken_from not in (COLLECTING, holder):
            return None  # somebody has come in between
        if taken_from != COLLECTING:
            take_over_run(store, run_id, COLLECTING)
        try:
            waste = self._judge_run(run_id, taken_from, is_taken=True)
            if waste is None and taken_from != COLLECTING:  # it has gone on meanwhile
                take_over_run(store, run_id, taken_from)
            elif waste is not None:
                names = (stored.name for stored in waste.objects if stored.name != reservation_path(run_id))
                delete_held(store, run_id, COLLECTING, names)
        finally:
            if reserved_by(store, run_id) == COLLECTING:
                store.delete_all([reservation_path(run_id)])
        return waste

    # -- the rest -------------------------------------------------------------------------------

    def _judge_models(self) -> list[Waste]:
        """Return the models that no run names, and no open capture, if they are old enough."""
        used: set[str] = set()
        for run_id in self.store.list("runs"):
            if (models := self._models_of(run_id)) is None:
                self.notes.append(
                    f"All models are left alone: which of them run {run_id} needs is not known."
                )
                return []
            used |= models
        unused = []
        for model_id in self.store.list("models"):
            card = f"{model_path(model_id)}/model.json"
            # the card first: it says that the rest is whole
            objects = sorted(self.store.scan(model_path(model_id)), key=lambda stored: stored.name != card)
            if model_id not in used and self._is_old(objects):
                unused.append(Waste("unused model", model_id, tuple(objects)))
        return unused

    def _models_of(self, run_id: str) -> set[str] | None:
        """Return the models that a run's snapshots or its open capture name; None if that is not known."""
        kind, holder = self.cleared.get(run_id), reserved_by(self.store, run_id)
        if kind == "interrupted removal":
            return set()
        snapshots = self._read_log(run_id, holder)
        if snapshots is None:
            return None
        models = {manifest.model_id for manifest in snapshots}
        if holder not in (None, COLLECTING, REMOVING) and kind is None:
            try:
                models.add(
                    self.store.read_json(f"{wip_path(run_id, holder)}/plan.json")["manifest"]["model_id"]
                )
            except FileNotFoundError:  # it has only just begun
                return models or None
            except _UNREADABLE:
                return None
        return models

    def _judge_findings(self) -> list[Waste]:
        """Return the tables that no view shows: of older extents or versions, and of runs that are gone."""
        described, unreadable = readable_findings(self.store)
        if unreadable:
            self.notes.append(
                f"{len(unreadable)} findings cannot be read, {unreadable[0]} one of them: left alone."
            )
        known = set(self.store.list("runs"))
        shown = {table.path for table in newest_findings(described)}
        objects = {stored.name: stored for stored in self.store.scan("findings")}
        kinds = {
            "superseded findings": [t for t in described if t.path not in shown and t.key.run in known],
            "findings of removed runs": [t for t in described if t.key.run not in known],
        }
        return [
            Waste(kind, "findings", tuple(objects[table.path] for table in tables if table.path in objects))
            for kind, tables in kinds.items()
        ]

    def _judge_files(self) -> list[Waste]:
        """Return files outside runs that were not written to their end, if they are old enough."""
        counted = {stored.name for waste in self.waste for stored in waste.objects}
        found = [stored for folder in ("models", "findings") for stored in self.store.scan(folder)]
        unfinished = [s for s in found if not _is_whole(s) and s.name not in counted and self._is_old([s])]
        return [Waste("unfinished files", "models, findings", tuple(unfinished))]


def _read_snapshots(store: Store, run_id: str) -> list[Manifest]:
    folder = f"{run_path(run_id)}/log"
    names = [name for name in store.list(folder) if name.endswith(".json")]
    return [Manifest.from_json(store.read_json(f"{folder}/{name}")) for name in names]


def _is_whole(stored: Stored) -> bool:
    return not stored.name.endswith(_PARTIAL)


def _in_order(run_id: str, objects: Iterable[Stored]) -> Sequence[Stored]:
    """Return those objects of a run that captures have written, in the order in which they go, frozen plans first."""
    folder = run_path(run_id)
    ranked = [
        ((rank, not stored.name.endswith("/plan.json"), stored.name), stored)
        for stored in objects
        for rank, prefix in enumerate(_OF_RUNS)
        if stored.name.startswith(f"{folder}/{prefix}")
    ]
    return [stored for _, stored in sorted(ranked)]
