"""Remove a whole run, in an order in which an interruption does no harm.

The manifest log goes first, from its newest snapshot to its oldest: a run whose log is gone is in no listing, so that
nobody reads half a run as whole. Then what captures left unfinished, so that none goes on; then everything else, the
findings computed from it, and last the reservation, which keeps captures away until then and says, should the
removal be interrupted, that what is left is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from .errors import CaptureInProgress, CorruptRun, RunNotFound
from .findings import StoredTable, describe_finding
from .layout import finding_path, run_path
from .manifest import read_manifest
from .reservation import REMOVING, reservation_path, reserve_run, reserved_by, take_over_run
from .stores import Store, Stored

__all__ = ["Removal", "delete_held", "plan_removal", "readable_findings", "remove_run"]

_BATCH = 1000
"""Objects that are deleted at once: as many as S3 takes in one request."""


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
    objects = _in_order(run_id, store.scan(run_path(run_id)))
    if not objects:
        raise RunNotFound(f"There is no run {run_id} in the lake '{store.url}'.")
    described, _ = readable_findings(store)
    paths = {table.path for table in described if table.key.run == run_id}
    findings = tuple(stored for stored in store.scan("findings") if stored.name in paths) if paths else ()
    return Removal(run_id, tuple(objects), findings, held_by=_holder(store, run_id))


def remove_run(store: Store, run_id: str, *, force: bool = False) -> Removal:
    """Remove a run and the findings computed from it; one that was interrupted is finished.

    Parameters
    ----------
    store : Store
        The lake.
    run_id : str
        The run.
    force : bool
        Remove it though a capture is open, which is then taken for abandoned.

    Returns
    -------
    Removal
        What is gone.

    Raises
    ------
    CaptureInProgress
        A capture of the run is open.
    RunNotFound
        Nothing of it is in the lake.
    """
    planned = plan_removal(store, run_id)
    if reserve_run(store, run_id, REMOVING) != REMOVING:
        if not force:
            replace(planned, held_by=_holder(store, run_id)).require_free()
        take_over_run(store, run_id, REMOVING)
    folder, reservation = run_path(run_id), reservation_path(run_id)
    for stored in planned.objects:
        if stored.name.startswith(f"{folder}/log/"):
            store.delete_all([stored.name])
    # again until nothing is left: a writer that --force has cut off may have been about to write its last object
    while names := [
        stored.name for stored in _in_order(run_id, store.scan(folder)) if stored.name != reservation
    ]:
        if not delete_held(store, run_id, REMOVING, names):
            raise CaptureInProgress(
                f"Run {run_id} was taken over while it was removed.", hint="See what is there: layerlake ls"
            )
    store.delete_all([stored.name for stored in planned.findings])
    store.delete_all([reservation])
    return planned


def delete_held(store: Store, run_id: str, holder: str, names: Iterable[str]) -> bool:
    """Delete objects of a run, in order, as long as ``holder`` holds it; tell whether it still did at the end."""
    remaining = iter(names)
    while batch := list(islice(remaining, _BATCH)):
        if reserved_by(store, run_id) != holder:
            return False
        store.delete_all(batch)
    return True


def readable_findings(store: Store) -> tuple[list[StoredTable], list[str]]:
    """Return the tables of all findings, and the objects that should be such tables and are not."""
    described: list[StoredTable] = []
    unreadable: list[str] = []
    for view in store.list("findings"):
        for digest in store.list(f"findings/{view}"):
            try:
                described.append(describe_finding(store, view, digest))
            except FileNotFoundError:
                continue
            except (CorruptRun, ValueError, LookupError, TypeError):
                unreadable.append(finding_path(view, digest))
    return described, unreadable


def _holder(store: Store, run_id: str) -> str | None:
    """Return who holds a run, other than a removal, or a capture that is committed and had only to let go."""
    holder = reserved_by(store, run_id)
    if holder in (None, REMOVING):
        return None
    try:
        newest = read_manifest(store, run_id)
    except CorruptRun:
        return holder
    committed = newest is not None and any(entry["capture_id"] == holder for entry in newest.captures)
    return None if committed else holder


def _in_order(run_id: str, objects: Iterable[Stored]) -> Sequence[Stored]:
    """Sort a run's objects as they go: log, from the newest snapshot on; work in progress, plans first; the rest."""
    folder = run_path(run_id)
    ranks = (f"{folder}/log/", f"{folder}/wip/")

    def rank(stored: Stored) -> tuple[int, bool]:
        place = next((i for i, prefix in enumerate(ranks) if stored.name.startswith(prefix)), len(ranks))
        return place, not stored.name.endswith("/plan.json")

    newest_first = sorted(objects, key=lambda stored: stored.name, reverse=True)
    return sorted(newest_first, key=rank)
