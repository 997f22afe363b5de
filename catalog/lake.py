"""A lake: runs, models and findings under one URL."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

from .errors import (
    AmbiguousRun,
    CorruptRun,
    FormatError,
    LakeNotFound,
    LayerLakeError,
    RunNotFound,
    did_you_mean,
)
from .findings import StoredTable, is_state_view, list_findings
from .layout import FORMAT_VERSION, LAKE_MARKER, require_format
from .manifest import read_manifest
from .run import Run
from .stores import Store

__all__ = ["Lake", "check_creatable", "create_lake", "match_run"]


class Lake:
    """A lake, opened for reading.

    Parameters
    ----------
    url : str or path
        A folder or an fsspec URL (``s3://…``, ``gs://…``, ``memory://…``).

    Raises
    ------
    LakeNotFound
        There is no lake at the URL.
    FormatError
        The lake was written in another format.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.store = Store(url)
        if not self.store.exists(LAKE_MARKER):
            what = "is not a lake" if self.store.exists("") else "does not exist"
            raise LakeNotFound(
                f"'{self.store.url}' {what} (it has no {LAKE_MARKER}).",
                hint="Make one: layerlake capture LAKE --model … --dataset …",
            )
        _check_format(self.store)

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Self:
        """Open a lake; the same as calling the class."""
        return cls(url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store.url!r}, {len(self.run_ids)} runs)"

    @property
    def url(self) -> str:
        """Where the lake lies."""
        return self.store.url

    @property
    def run_ids(self) -> list[str]:
        """The ids of all committed runs."""
        return list(self.iter_run_ids())

    def iter_run_ids(self, beginning: str = "") -> Iterator[str]:
        """Yield the ids of the committed runs that begin so, in order; each costs a look into its log."""
        for run_id in self.store.list("runs"):
            if run_id.startswith(beginning) and self.store.list(f"runs/{run_id}/log"):
                yield run_id

    def match(self, prefix: str | None = None) -> str:
        """Return the id of the run that begins so; without a prefix, of the lake's only run.

        Raises
        ------
        RunNotFound
            No run fits.
        AmbiguousRun
            Several do.
        """
        fitting = list(self.iter_run_ids(prefix)) if prefix else []
        return match_run(prefix, fitting or self.run_ids, url=self.url)

    def run(self, prefix: str | None = None) -> Run:
        """Open one run by its id or a unique prefix of it; without one, the lake's only run.

        Raises
        ------
        RunNotFound
            No run fits.
        AmbiguousRun
            Several do.
        """
        return self._open(self.match(prefix))

    def runs(self, prefixes: Sequence[str] = ()) -> list[Run]:
        """Open the runs that the prefixes name, each once, or all runs, in the order of their ids."""
        return [self._open(run_id) for run_id in self._match(prefixes)]

    def readable_runs(self, prefixes: Sequence[str] = ()) -> dict[str, Run | LayerLakeError]:
        """Open the runs as :meth:`runs` does: id → run, or what keeps a damaged one from being opened."""
        opened: dict[str, Run | LayerLakeError] = {}
        for run_id in self._match(prefixes):
            try:
                opened[run_id] = self._open(run_id)
            except (CorruptRun, FormatError) as error:
                opened[run_id] = error
        return opened

    def _match(self, prefixes: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(map(self.match, prefixes))) or self.run_ids

    def _open(self, run_id: str) -> Run:
        manifest = read_manifest(self.store, run_id)
        if manifest is None:
            raise RunNotFound(f"Run {run_id} has no manifest.")
        return Run(self.store, manifest)

    def models(self) -> list[dict[str, Any]]:
        """Describe the models (``model.json`` of each)."""
        return [self.store.read_json(f"models/{name}/model.json") for name in self.store.list("models")]

    def findings(self, view: str | None = None) -> list[StoredTable]:
        """Describe all stored findings, or those of one view.

        What analyses keep for themselves is left out, and so is what is unfinished or damaged, which ``verify`` names.
        """
        return [table for table in list_findings(self.store, view) if not is_state_view(table.view)]


def match_run(prefix: str | None, known: Sequence[str], *, url: str) -> str:
    """Return the one known id that is the prefix or begins with it; without a prefix, the only one.

    Raises
    ------
    RunNotFound
        None fits.
    AmbiguousRun
        Several do.
    """
    if prefix == "":  # every id begins with it: a script's empty variable, and not a choice
        raise RunNotFound("No run has an empty name.", hint=f"Runs are: {', '.join(known) or 'none'}.")
    beginning = [run_id for run_id in known if run_id.startswith(prefix or "")]
    fitting = [run_id for run_id in beginning if run_id == prefix] or beginning
    if not fitting:
        if prefix is None:
            raise RunNotFound(f"The lake '{url}' has no runs.", hint="Capture one: layerlake capture LAKE …")
        raise RunNotFound(
            f"No run of the lake '{url}' begins with '{prefix}'.{did_you_mean(prefix, known)}",
            hint=f"Runs are: {', '.join(known) or 'none'}.",
        )
    if len(fitting) > 1:
        asked = f"begin with '{prefix}'" if prefix else "are in the lake"
        raise AmbiguousRun(f"{len(fitting)} runs {asked}: {', '.join(fitting)}.", hint="Say which: --run ID.")
    return fitting[0]


def _check_format(store: Store) -> None:
    marker = store.read_json(LAKE_MARKER)
    version = marker.get("format_version") if isinstance(marker, dict) else None
    require_format(version, f"The lake '{store.url}'")


def create_lake(url: str | os.PathLike[str]) -> Store:
    """Make a lake at the URL unless there is one, and return its store.

    Raises
    ------
    LakeNotFound
        The URL is a folder with something else in it.
    FormatError
        There is a lake of another format.
    """
    store = Store(url)
    check_creatable(store)
    if not store.exists(LAKE_MARKER):
        store.write_json(LAKE_MARKER, {"format": "layerlake", "format_version": FORMAT_VERSION})
    return store


def check_creatable(store: Store) -> None:
    """Raise unless the store is empty or a lake that this version can write to.

    Raises
    ------
    LakeNotFound
        It is neither a lake nor empty.
    FormatError
        It is a lake of another format.
    StoreError
        Nothing can be made there.
    """
    names = store.list("")
    if LAKE_MARKER in names:
        _check_format(store)
    elif names:
        raise LakeNotFound(
            f"'{store.url}' is not a lake, and it is not empty.", hint="Name a new or an empty folder."
        )
    else:
        store.check_creatable()
