"""Remove a whole run, in an order in which an interruption does no harm.

The manifest log goes first, from its newest snapshot to its oldest: a run whose log is gone is in no listing, so that
nobody reads half a run as whole. Then what captures left unfinished, so that none goes on; then everything else, the
findings computed from it, and last the reservation, which keeps captures away until then and says, should the
removal be interrupted, that what is left is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .errors import CaptureInProgress, CorruptRun, FormatError, RunNotFound
from .findings import scan_findings
from .layout import run_path
from .manifest import read_manifest
from .reservation import (
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

__all__ = ["Removal", "delete_findings", "delete_held", "in_order", "plan_removal", "remove_run"]


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes with a run."""

    run_id: str
    objects: tuple[Stored, ...]
    """The objects of the run, in the order in which they go."""
    findings: tuple[Stored, ...]
    """The tables of the findings computed from it."""
    held_by: str | None
    """Who holds it: a capture that is open, or another that clears up; None if nobody does."""

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        return sum(stored.nbytes for stored in (*self.objects, *self.findings))

    def require_free(self) -> None:
        """Raise CaptureInProgress if somebody holds the run."""
        if self.held_by is not None:
            raise CaptureInProgress(
                f"Run {self.run_id} is held by {self.held_by}: a capture of it is open, or somebody clears up.",
                hint="Wait for it; if it is abandoned, add --force.",
            )


def plan_removal(store: Store, run_id: str) -> Removal:
    """Return what the removal of a run would remove. Lists its objects, and reads the footer of every finding.

    Raises
    ------
    RunNotFound
        Nothing of it is in the lake.
    """
    objects = in_order(run_id, store.scan(run_path(run_id)))
    if not objects:
        raise RunNotFound(f"There is no run {run_id} in the lake '{store.url}'.")
    found = scan_findings(store)
    tables = [table for table in (*found.whole, *found.unfinished) if table.key.run == run_id]
    held_by = _in_the_way(store, run_id, reserved_by(store, run_id))
    return Removal(run_id, tuple(objects), found.objects_of(tables), held_by=held_by)


def remove_run(store: Store, run_id: str, *, force: bool = False, held_by: str | None = None) -> Removal:
    """Remove a run and the findings computed from it; one that was interrupted is finished.

    Parameters
    ----------
    store : Store
        The lake.
    run_id : str
        The run.
    force : bool
        Remove it though a capture is open, which is then taken for abandoned.
    held_by : str, optional
        End the removal that this holder has begun, and do nothing if it is over.

    Returns
    -------
    Removal
        What is gone.

    Raises
    ------
    CaptureInProgress
        A capture of the run is open, or somebody has taken it over meanwhile.
    RunNotFound
        Nothing of it is in the lake.
    """
    planned, holder = plan_removal(store, run_id), new_remover(REMOVING)
    found = held_by or reserve_run(store, run_id, holder)
    if found != holder:
        if not force:
            replace(planned, held_by=_in_the_way(store, run_id, found)).require_free()
        if not take_over_run(store, run_id, holder, held_by=found):
            raise _taken_over(run_id)
    folder, reservation = run_path(run_id), reservation_path(run_id)
    for stored in planned.objects:
        if stored.name.startswith(f"{folder}/log/"):  # one after the other: their order is what counts
            _delete_held(store, run_id, holder, [stored])
    # again until nothing is left: a writer that --force has cut off may have been about to write its last object
    while left := [each for each in in_order(run_id, store.scan(folder)) if each.name != reservation]:
        _delete_held(store, run_id, holder, left)
    delete_findings(store, planned.findings)
    release_run(store, run_id, holder)
    return planned


def _delete_held(store: Store, run_id: str, holder: str, objects: Sequence[Stored]) -> None:
    if delete_held(store, run_id, holder, objects) < len(objects):
        raise _taken_over(run_id)


def _taken_over(run_id: str) -> CaptureInProgress:
    return CaptureInProgress(
        f"Run {run_id} was taken over while it was removed.", hint="See what is there: layerlake ls LAKE"
    )


def delete_held(store: Store, run_id: str, holder: str, objects: Sequence[Stored]) -> int:
    """Delete objects of a run, in order, as long as ``holder`` holds it; return how many went."""
    names = [stored.name for stored in objects]
    return store.delete_all(names, go_on=lambda: reserved_by(store, run_id) == holder)


def delete_findings(store: Store, tables: Iterable[Stored]) -> None:
    """Delete tables of findings one after the other, as :meth:`StoredFindings.objects_of` sorts them."""
    for stored in tables:
        store.delete_all([stored.name])


def _in_the_way(store: Store, run_id: str, holder: str | None) -> str | None:
    """Return the holder of a run if it may not be removed: a capture that is not committed, or a collection."""
    if holder is None or remover(holder) == REMOVING:
        return None
    try:
        newest = read_manifest(store, run_id)
    except (CorruptRun, FormatError):
        return holder
    return None if newest is not None and newest.has_capture(holder) else holder


def in_order(run_id: str, objects: Iterable[Stored]) -> Sequence[Stored]:
    """Sort a run's objects as they go: log, from the newest snapshot on; work in progress, plans first; the rest.

    So no ledger outlives an object that it records.
    """
    folder = run_path(run_id)
    ranks = (f"{folder}/log/", f"{folder}/wip/")

    def rank(stored: Stored) -> tuple[int, bool]:
        place = next((i for i, prefix in enumerate(ranks) if stored.name.startswith(prefix)), len(ranks))
        return place, not stored.name.endswith("/plan.json")

    newest_first = sorted(objects, key=lambda stored: stored.name, reverse=True)
    return sorted(newest_first, key=rank)
