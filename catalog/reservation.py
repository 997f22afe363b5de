"""Who may change a run: one at a time, a capture or a remover. The holder stands in ``wip/open.json``.

A capture holds a run by its id, and whoever repeats it holds it too. Each removal and each collection has a holder's
name of its own (:func:`new_remover`), so that of two at work each can tell that the run is no longer its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from .errors import CorruptRun
from .layout import run_path
from .stores import Store

__all__ = [
    "COLLECTING",
    "INDEXING",
    "REMOVING",
    "UNREADABLE",
    "new_remover",
    "release_run",
    "remover",
    "requested_by",
    "reservation_path",
    "reserve_run",
    "reserved_by",
    "take_over_run",
]

REMOVING = "rm"
"""The command that holds a run while it is removed: what is left of it is nobody's."""

COLLECTING = "gc"
"""The command that holds a run while what no snapshot of it names is removed."""

INDEXING = "index"
"""Holds a run while its zones are written: whoever comes for that too goes on with it."""

UNREADABLE = "unreadable"
"""Holds a run whose reservation is damaged: somebody does, and nobody can tell who."""


def new_remover(command: str) -> str:
    """Return a holder's name that nobody else has, for ``rm`` or ``gc``."""
    return f"{command}-{uuid.uuid4().hex[:16]}"


def remover(holder: str | None) -> str | None:
    """Return the command that a holder is, ``rm`` or ``gc``; None if it is a capture, or nobody."""
    command = str(holder).partition("-")[0]
    return command if command in (REMOVING, COLLECTING) else None


def reservation_path(run_id: str) -> str:
    """Return the object that says who holds a run."""
    return f"{run_path(run_id)}/wip/open.json"


def _reservation(holder: str, request: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"capture_id": holder} | ({} if request is None else {"request": dict(request)})


def reserved_by(store: Store, run_id: str) -> str | None:
    """Return who holds a run: the id of a capture, a remover, ``unreadable``, or None."""
    try:
        return str(store.read_json(reservation_path(run_id))["capture_id"])
    except FileNotFoundError:
        return None
    except (CorruptRun, LookupError, TypeError):
        return UNREADABLE


def requested_by(store: Store, run_id: str) -> Any:
    """Return what the capture that holds a run was asked for; None if that is not known."""
    try:
        return store.read_json(reservation_path(run_id)).get("request")
    except (FileNotFoundError, CorruptRun, AttributeError):
        return None


def reserve_run(store: Store, run_id: str, holder: str, *, request: Mapping[str, Any] | None = None) -> str:
    """Reserve a run unless it is held, and return who holds it then; of many at once, one gets it.

    ``request`` is what a capture was asked for: whoever is asked for the same may go on in its place.
    """
    while True:
        try:
            store.write_json(reservation_path(run_id), _reservation(holder, request), create=True)
        except FileExistsError:
            held_by = reserved_by(store, run_id)
            if held_by is not None:
                return held_by
        else:
            return holder


def take_over_run(
    store: Store,
    run_id: str,
    holder: str,
    *,
    held_by: str | None = None,
    request: Mapping[str, Any] | None = None,
) -> bool:
    """Reserve a run whoever holds it, and return True: a capture that finds itself replaced stops.

    With ``held_by``, take it from that holder only, and return False if it is another's meanwhile. No store compares
    and swaps, so that somebody may still come in between: who takes a run over judges anew what lies there.
    """
    if held_by is not None and reserved_by(store, run_id) != held_by:
        return False
    store.write_json(reservation_path(run_id), _reservation(holder, request))
    return True


def release_run(store: Store, run_id: str, holder: str) -> None:
    """Let a run go, unless somebody else holds it meanwhile."""
    if reserved_by(store, run_id) == holder:
        store.delete_all([reservation_path(run_id)])
