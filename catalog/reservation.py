"""Who may change a run: one at a time, a capture or those who remove. The holder stands in ``wip/open.json``."""

from __future__ import annotations

from .errors import CorruptRun
from .layout import run_path
from .stores import Store

__all__ = [
    "COLLECTING",
    "REMOVING",
    "UNREADABLE",
    "reservation_path",
    "reserve_run",
    "reserved_by",
    "take_over_run",
]

REMOVING = "rm"
"""Holds a run that is being removed: what is left of it is nobody's."""

COLLECTING = "gc"
"""Holds a run while what no snapshot of it names is removed."""


UNREADABLE = "unreadable"
"""Holds a run whose reservation is damaged: somebody does, and nobody can tell who."""


def reservation_path(run_id: str) -> str:
    """Return the object that says who holds a run."""
    return f"{run_path(run_id)}/wip/open.json"


def reserved_by(store: Store, run_id: str) -> str | None:
    """Return who holds a run: the id of a capture, one of the names above, or None."""
    try:
        return str(store.read_json(reservation_path(run_id))["capture_id"])
    except FileNotFoundError:
        return None
    except (CorruptRun, LookupError, TypeError):
        return UNREADABLE


def reserve_run(store: Store, run_id: str, holder: str) -> str:
    """Reserve a run unless it is held, and return who holds it then; of many at once, one gets it."""
    while True:
        try:
            store.write_json(reservation_path(run_id), {"capture_id": holder}, create=True)
        except FileExistsError:
            held_by = reserved_by(store, run_id)
            if held_by is not None:
                return held_by
        else:
            return holder


def take_over_run(store: Store, run_id: str, holder: str) -> None:
    """Reserve a run whoever holds it: a capture that finds itself replaced stops."""
    store.write_json(reservation_path(run_id), {"capture_id": holder})
