"""Collect what nothing in a lake needs any more: abandoned captures, interrupted removals, superseded findings.

What a snapshot of a remaining run names is never touched, whatever its age, and of a run that somebody holds, nothing
at all, unless he has done nothing for as long as ``older_than_s`` says. A run is cleared only while its reservation
says so, and is judged anew once it does, so that nobody writes what is about to be deleted. A run whose log or
reservation does not fit what lies there is damaged, not waste, and is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from .errors import DECODING_ERRORS, CaptureInProgress, LayerLakeError, RunNotFound
from .findings import StoredTable, newest_findings, scan_findings
from .layout import model_path, run_path
from .manifest import Manifest, read_log
from .references import find_lost_snapshots, named_objects
from .removal import Removal, delete_findings, delete_held, in_order, plan_removal, remove_run
from .reservation import (
    COLLECTING,
    REMOVING,
    new_remover,
    release_run,
    remover,
    reservation_path,
    reserve_run,
    reserved_by,
    take_over_run,
)
from .stores import Store, Stored

__all__ = ["Collection", "Waste", "collect_lake", "plan_collection"]

_OF_RUNS = ("wip/", "log/.", "objects/", "documents/", "tokens/", "attn_band/", "activations.zarr/", "zones/")
"""Where in a run's folder captures and ``index`` write; what else lies there is somebody's own."""

_PARTIAL = ".partial"

_LEASE_S = 600.0
"""Who has held a run for so long, and had only to clear up, has been interrupted; ``older_than_s``, if it is less."""

_UNREADABLE = (LayerLakeError, *DECODING_ERRORS)
"""What a snapshot or a plan raises whose bytes are not what they should be."""


@dataclass(frozen=True, slots=True)
class Waste:
    """Objects that nothing needs, of one kind and place."""

    kind: str
    """abandoned capture, interrupted removal, unnamed objects, unused model, superseded findings, unfinished findings,
    findings of removed runs, unfinished files."""
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
    return _Collector(store, older_than_s, is_dry=True).collect()


def collect_lake(store: Store, *, older_than_s: float) -> Collection:
    """Remove what nothing in a lake needs any more, and return it.

    It may be interrupted and repeated at any time, and captures, readers and others like it may be at work.

    Parameters
    ----------
    store : Store
        The lake.
    older_than_s : float
        A capture that has written nothing for so many seconds is abandoned; a model that no run names, a finding or a
        file that was not written to its end, is waste when it is as old. An ``rm`` or another ``gc`` that has held a
        run for so long, or for ten minutes, has been interrupted. So 0 says that nobody else is at work.
    """
    return _Collector(store, older_than_s, is_dry=False).collect()


class _Collector:
    def __init__(self, store: Store, older_than_s: float, *, is_dry: bool) -> None:
        self.store = store
        self.is_dry = is_dry
        now = time.time()
        self.before = now - older_than_s
        self.lease_before = now - min(older_than_s, _LEASE_S)
        self.waste: list[Waste] = []
        self.notes: list[str] = []
        self.planned: dict[str, str] = {}
        """Runs that would be cleared → the kind of their waste."""

    def collect(self) -> Collection:
        for run_id in self.store.list("runs"):
            holder = reserved_by(self.store, run_id)
            waste = self._judge_run(run_id, holder)
            if waste is not None and self.is_dry:
                self.planned[run_id] = waste.kind
            elif waste is not None:
                waste = self._clear_run(run_id, holder)
            self._count(waste)
        # What runs name is looked up last: a capture that has begun meanwhile names its model.
        self._collect_models()
        self._collect_findings()
        self._collect_files()
        return Collection(tuple(self.waste), tuple(dict.fromkeys(self.notes)))

    def _count(self, waste: Waste | None) -> None:
        if waste is not None and waste.objects:
            self.waste.append(waste)

    def _is_old(self, objects: Iterable[Stored]) -> bool:
        return all(stored.modified <= self.before for stored in objects)

    def _leave(self, run_id: str, why: str) -> None:
        self.notes.append(f"Run {run_id} is left alone{why}")

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
        # the objects first, and the log after them: what is committed in between is then named
        objects = {stored.name: stored for stored in self.store.scan(run_path(run_id))}
        reservation = [stored for stored in objects.values() if stored.name == reservation_path(run_id)]
        is_new = not is_taken and any(stored.modified > self.lease_before for stored in reservation)
        if remover(holder) == REMOVING and not is_new:
            return self._as_waste(lambda: plan_removal(self.store, run_id))
        snapshots = self._read_log(run_id, holder)
        if snapshots is None:
            return None
        named = {name for manifest in snapshots for name in named_objects(manifest)}
        written = tuple(f"{run_path(run_id)}/{prefix}" for prefix in _OF_RUNS)
        unnamed = [s for s in objects.values() if s.name.startswith(written) and s.name not in named]
        loose = [stored for stored in in_order(run_id, unnamed) if stored not in reservation]
        if holder is None:
            # what is being written has a name of its own until it is whole, a reservation too
            waste = [stored for stored in loose if _is_whole(stored) or self._is_old([stored])]
            return Waste("unnamed objects", run_id, tuple(waste)) if waste else None
        committed = {entry["capture_id"] for manifest in snapshots for entry in manifest.captures}
        if remover(holder) is not None or holder in committed:  # it has only to clear up
            kind, is_busy = "unnamed objects", is_new
            # somebody may have come in between its end and this: what is young may be his
            waste = [stored for stored in loose if self._is_old([stored])]
        else:
            kind, waste = "abandoned capture", [*loose, *reservation]
            is_busy = not self._is_old(loose if is_taken else waste)
        if is_busy:
            self._leave(run_id, f": it is held by {holder}, which is at work or was interrupted.")
            return None
        return Waste(kind, run_id, tuple(waste))

    def _read_log(self, run_id: str, holder: str | None) -> list[Manifest] | None:
        """Return all snapshots of a run; None where the log is damaged, so that nobody knows what they name."""
        folder = f"{run_path(run_id)}/objects"
        parts = [f"{folder}/{name}" for name in self.store.list(folder)]
        try:
            snapshots = read_log(self.store, run_id)
            named = {name for manifest in snapshots for name in named_objects(manifest)}
        except _UNREADABLE as error:
            self._leave(run_id, f", because its log cannot be read: {error}")
            return None
        parts = [name for name in parts if self.store.exists(name)]
        lost = find_lost_snapshots(run_id, (manifest.number for manifest in snapshots), parts, named, holder)
        if lost:
            self._leave(run_id, f", because its log has lost {lost[0]}: see layerlake verify.")
            return None
        return snapshots

    def _as_waste(self, remove: Callable[[], Removal]) -> Waste | None:
        try:
            removal = remove()
        except (RunNotFound, CaptureInProgress):  # somebody has ended it meanwhile, or has taken it over
            return None
        return Waste("interrupted removal", removal.run_id, (*removal.objects, *removal.findings))

    def _clear_run(self, run_id: str, holder: str | None) -> Waste | None:
        """Take a run from its holder, judge it again, and remove its waste; return what was removed.

        Until the first object goes, an error gives the run back. After it, the run stays held until somebody ends this.
        """
        store, mine, held = self.store, new_remover(COLLECTING), b""
        if remover(holder) == REMOVING:
            return self._as_waste(lambda: remove_run(store, run_id, held_by=holder))
        if holder is None:
            if reserve_run(store, run_id, mine) != mine:  # somebody has come in between
                return None
        else:
            with suppress(FileNotFoundError):
                held = store.read(reservation_path(run_id))
            if not take_over_run(store, run_id, mine, held_by=holder):
                return None
        waste = None
        try:
            waste = self._judge_run(run_id, holder, is_taken=holder is not None)
        finally:
            if waste is None and held and reserved_by(store, run_id) == mine:  # it has gone on meanwhile
                store.write(reservation_path(run_id), held)
            elif waste is None:
                release_run(store, run_id, mine)
        if waste is None:
            return None
        loose = [stored for stored in waste.objects if stored.name != reservation_path(run_id)]
        n_deleted = delete_held(store, run_id, mine, loose)
        if n_deleted < len(loose):
            self._leave(run_id, " from now on: it was taken over.")
            return Waste(waste.kind, run_id, tuple(loose[:n_deleted]))
        release_run(store, run_id, mine)
        return waste

    # -- models ---------------------------------------------------------------------------------

    def _collect_models(self) -> None:
        """Collect the models that no run names, and no open capture, if they are old enough."""
        if (used := self._used_models()) is None:
            return
        for model_id in self.store.list("models"):
            objects = tuple(self.store.scan(model_path(model_id)))
            if model_id in used or not self._is_old(objects):
                continue
            waste = Waste("unused model", model_id, objects)
            self._count(waste if self.is_dry else self._clear_model(waste))

    def _clear_model(self, waste: Waste) -> Waste | None:
        """Remove a model and return what was removed; None if somebody uses it meanwhile.

        Its card goes first: it says that the rest is whole. A capture names its model before it looks for the card. So
        it is found here, and the card brought back; or it finds no card, and writes everything anew.
        """
        store, model_id = self.store, waste.where
        card = f"{model_path(model_id)}/model.json"
        try:
            content = store.read(card)
        except FileNotFoundError:
            content = b""
        is_used = True
        try:
            store.delete_all([card])
            used = self._used_models()
            is_used = used is None or model_id in used
        finally:
            if is_used and content:
                with suppress(FileExistsError):
                    store.create(card, content)
        if is_used:
            return None
        there = set(store.scan(model_path(model_id)))  # what is written anew has another time
        rest = [stored for stored in waste.objects if stored.name != card and stored in there]
        store.delete_all(stored.name for stored in rest)
        return replace(waste, objects=(*(s for s in waste.objects if s.name == card), *rest))

    def _used_models(self) -> set[str] | None:
        """Return the models that runs and open captures name; None if that is not known of all of them."""
        used: set[str] = set()
        for run_id in self.store.list("runs"):
            if (models := self._models_of(run_id)) is None:
                self.notes.append(
                    f"All models are left alone: which of them run {run_id} needs is not known."
                )
                return None
            used |= models
        return used

    def _models_of(self, run_id: str) -> set[str] | None:
        """Return the models that a run's snapshots or its open capture name; None if that is not known."""
        kind, holder = self.planned.get(run_id), reserved_by(self.store, run_id)
        if kind == "interrupted removal":
            return set()
        snapshots = self._read_log(run_id, holder)
        if snapshots is None:
            return None
        models = {manifest.model_id for manifest in snapshots}
        if holder is None or kind is not None or remover(holder) == REMOVING:
            return models
        for stored in self.store.scan(f"{run_path(run_id)}/wip"):
            if stored.name.endswith("/plan.json"):
                try:
                    models.add(self.store.read_json(stored.name)["manifest"]["model_id"])
                except _UNREADABLE:
                    return None
        return models or None  # a capture that has only just begun

    # -- the rest -------------------------------------------------------------------------------

    def _collect_findings(self) -> None:
        """Collect the findings no table of which a view shows, those of runs that are gone, and unfinished ones."""
        found = scan_findings(self.store)
        known = set(self.store.list("runs"))  # after the findings: a run may be new, and be analysed
        if found.unreadable:
            self.notes.append(
                f"{len(found.unreadable)} findings cannot be read, {found.unreadable[0]} one of them: left alone."
            )
        shown = {table.finding for table in newest_findings(found.whole)}

        def is_old(table: StoredTable) -> bool:
            return self._is_old([found.objects[table.path]])

        kinds = {
            "superseded findings": [t for t in found.whole if t.finding not in shown and t.key.run in known],
            "unfinished findings": [t for t in found.unfinished if t.key.run in known and is_old(t)],
            "findings of removed runs": [
                t for t in (*found.whole, *found.unfinished) if t.key.run not in known
            ],
        }
        for kind, tables in kinds.items():
            waste = Waste(kind, "findings", found.objects_of(tables))
            if not self.is_dry:
                delete_findings(self.store, waste.objects)
            self._count(waste)

    def _collect_files(self) -> None:
        """Collect files outside runs that were not written to their end, if they are old enough."""
        counted = {stored.name for waste in self.waste for stored in waste.objects}
        there = [stored for folder in ("models", "findings") for stored in self.store.scan(folder)]
        unfinished = [s for s in there if not _is_whole(s) and s.name not in counted and self._is_old([s])]
        if not self.is_dry:
            self.store.delete_all(stored.name for stored in unfinished)
        self._count(Waste("unfinished files", "models, findings", tuple(unfinished)))


def _is_whole(stored: Stored) -> bool:
    return not stored.name.endswith(_PARTIAL)
