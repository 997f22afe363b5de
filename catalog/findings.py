"""Findings: the results of analyses, kept in the lake. The one owner of how they are named, written and read.

A finding is one or more tidy tables that one analysis drew from one run with one set of parameters.
Each of its tables is one Parquet object, ``findings/<view>/<digest>/part-00000.parquet``, which carries
its own description, so that a table is either whole and explained or absent. The digest covers the
analysis, its version, the run, the parameters and the extents that were read: equal digest, equal result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CorruptRun, decoding
from .layout import finding_path
from .stores import Store, Stored
from .tables import read_part, to_parquet

__all__ = [
    "Finding",
    "FindingKey",
    "StoredFindings",
    "StoredTable",
    "describe_finding",
    "is_state_view",
    "list_findings",
    "merge_findings",
    "newest_findings",
    "read_finding",
    "scan_findings",
    "state_view",
    "write_finding",
]

_METADATA_KEY = b"layerlake"
_STATE = "_state"


@dataclass(frozen=True, slots=True)
class FindingKey:
    """All that decides what an analysis finds in one run: the memo key."""

    analysis: str
    version: int
    """Raised whenever the analysis would give other numbers from the same data."""
    run: str
    params: Mapping[str, Any]
    """Every parameter that changes the result; JSON values only. ``n_excluded`` is how many documents were left out."""
    extents: Mapping[str, Any]
    """For each site that is read, what the run held of it (:meth:`Run.extent`)."""
    part: str = ""
    """Of a finding that grows, which part of it this is; a view shows all of them."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the SHA-256 of the key."""
        fields = [self.analysis, self.version, self.run, dict(self.params), dict(self.extents)]
        text = json.dumps(fields + [self.part] * bool(self.part), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Finding:
    """What an analysis found: its tables by view name, and how they came about."""

    analysis: str
    tables: dict[str, pa.Table]
    """View name → table; the first is the main one. Every table begins with a column ``run``."""
    keys: tuple[FindingKey, ...]
    """One key for each run that is in the tables."""

    @property
    def table(self) -> pa.Table:
        """The main table."""
        return next(iter(self.tables.values()))

    @property
    def runs(self) -> tuple[str, ...]:
        """The ids of the runs in the tables."""
        return tuple(key.run for key in self.keys)

    def df(self) -> Any:
        """Return the main table as a pandas DataFrame."""
        return self.table.to_pandas()


@dataclass(frozen=True, slots=True)
class StoredTable:
    """One table of a stored finding, described without reading its rows."""

    view: str
    finding: str
    """The digest of the finding's key."""
    key: FindingKey
    n_rows: int
    created: str
    """UTC time of writing, ISO 8601."""
    views: tuple[str, ...]
    """All tables of the finding; the first is written last, and says that the others are there."""
    n_tokens: int
    """Tokens that were read, summed over sites."""
    schema: pa.Schema = field(repr=False, compare=False)
    """Of its rows, without metadata."""

    @property
    def path(self) -> str:
        """The object that holds the table."""
        return finding_path(self.view, self.finding)

    @property
    def main_path(self) -> str:
        """The object that holds the finding's main table."""
        return finding_path(self.views[0], self.finding)


@dataclass(frozen=True, slots=True)
class StoredFindings:
    """The tables that lie among the findings."""

    whole: tuple[StoredTable, ...]
    """Those of findings whose main table is there."""
    unfinished: tuple[StoredTable, ...]
    """Those of findings whose main table is not there, or not yet: they do not count."""
    unreadable: tuple[str, ...]
    """Objects that should be such tables and are not."""
    objects: Mapping[str, Stored]
    """All objects that lie there, by name."""

    def objects_of(self, tables: Iterable[StoredTable]) -> tuple[Stored, ...]:
        """Return the objects of tables as they go, main tables first: without it, none of a finding counts."""
        in_order = sorted(tables, key=lambda table: (table.path != table.main_path, table.path))
        return tuple(self.objects[table.path] for table in in_order)


def state_view(analysis: str) -> str:
    """Return where an analysis keeps, beside its tables, what a longer extent of the run need not measure again."""
    return f"{analysis}{_STATE}"


def is_state_view(view: str) -> bool:
    """Tell whether a view is an analysis's own notes, which are not for readers."""
    return view.endswith(_STATE)


def write_finding(store: Store, finding: Finding) -> None:
    """Write a finding of one run; the main table last, so that its presence means that all are there."""
    (key,) = finding.keys
    description = {
        "analysis": key.analysis,
        "version": key.version,
        "run": key.run,
        "params": dict(key.params),
        "extents": dict(key.extents),
        "part": key.part,
        "views": list(finding.tables),
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    metadata = {_METADATA_KEY: json.dumps(description, sort_keys=True).encode()}
    for view, table in reversed(finding.tables.items()):
        store.write(finding_path(view, key.digest), to_parquet(table.replace_schema_metadata(metadata)))


def read_finding(store: Store, key: FindingKey, views: Iterable[str]) -> Finding | None:
    """Return the stored finding of a key, or None unless all of its views are there.

    Raises
    ------
    CorruptRun
        One of its tables is damaged.
    """
    tables = {}
    for view in views:
        path = finding_path(view, key.digest)
        try:
            tables[view] = read_part(store, path).replace_schema_metadata(None)
        except CorruptRun as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
    return Finding(key.analysis, tables, (key,))


def scan_findings(store: Store, view: str | None = None) -> StoredFindings:
    """Describe every stored table, or those of one view. Lists all findings, and reads each table's footer."""
    objects = {stored.name: stored for stored in store.scan("findings")}
    described: list[StoredTable] = []
    unreadable = []
    for name, stored in objects.items():
        of_view, _, rest = name.removeprefix("findings/").partition("/")
        digest = rest.partition("/")[0]
        if name != finding_path(of_view, digest) or view not in (None, of_view):
            continue
        try:
            described.append(describe_finding(store, of_view, digest, nbytes=stored.nbytes))
        except FileNotFoundError:  # removed since
            continue
        except CorruptRun:
            unreadable.append(name)
    whole, unfinished = (
        tuple(table for table in described if (table.main_path in objects) is is_whole)
        for is_whole in (True, False)
    )
    return StoredFindings(whole, unfinished, tuple(unreadable), objects)


def list_findings(store: Store, view: str | None = None) -> list[StoredTable]:
    """Describe the tables of all findings, or those of one view; what is damaged or unfinished is left out."""
    return list(scan_findings(store, view).whole)


def describe_finding(store: Store, view: str, digest: str, *, nbytes: int | None = None) -> StoredTable:
    """Describe one stored table. Reads its footer only; ``nbytes`` is the object's length, if it was listed.

    Raises
    ------
    CorruptRun
        The object is not the table of a finding.
    FileNotFoundError
        There is no such object.
    """
    path = finding_path(view, digest)
    with (
        decoding(path, hint=f"Remove {path} and analyze again."),
        store.open(path, nbytes=nbytes) as file,
    ):
        footer = pq.read_metadata(file)
        text = (footer.metadata or {}).get(_METADATA_KEY)
        if text is None:
            raise CorruptRun(f"{path} is not a finding: it carries no description.", hint=f"Remove {path}.")
        given = json.loads(text)
        created, views = str(given.pop("created")), tuple(map(str, given.pop("views", [view])))
        key = FindingKey(**given)
        if key.digest != digest or view not in views:
            raise CorruptRun(f"{path} is not what its description says: it describes {key.digest}.")
        n_tokens = sum(int(extent["n_tokens"]) for extent in key.extents.values())
        schema = footer.schema.to_arrow_schema().remove_metadata()
        return StoredTable(view, digest, key, footer.num_rows, created, views, n_tokens, schema)


def newest_findings(stored: Iterable[StoredTable]) -> list[StoredTable]:
    """Keep, for each view, run and parameter set, the newest extent only, of an analysis's newest version there.

    What an older version has found goes as a whole, for parameters of two versions do not compare.
    """
    tables = list(stored)
    versions: dict[tuple[str, str], int] = {}
    for table in tables:
        place = table.key.analysis, table.key.run
        versions[place] = max(table.key.version, versions.get(place, table.key.version))
    newest: dict[str, StoredTable] = {}
    for table in tables:
        if table.key.version < versions[table.key.analysis, table.key.run]:
            continue
        slot = _slot(table)
        if slot not in newest or _age(newest[slot]) < _age(table):
            newest[slot] = table
    return list(newest.values())


def _slot(table: StoredTable) -> str:
    """Return what tables have in common of which a view shows one.

    Whether documents were left out is a choice; how many is counted anew in each extent.
    """
    params = dict(table.key.params)
    params["n_excluded"] = bool(params.get("n_excluded"))
    return json.dumps([table.view, table.key.run, params, table.key.part], sort_keys=True)


def _age(table: StoredTable) -> tuple[int, str]:
    return table.n_tokens, table.created


def merge_findings(findings: Iterable[Finding]) -> Finding:
    """Stack the findings of several runs by one analysis into one, table by table."""
    first, *others = findings
    tables = {
        view: pa.concat_tables([table, *(other.tables[view] for other in others)], promote_options="default")
        for view, table in first.tables.items()
    }
    return replace(first, tables=tables, keys=tuple(key for f in (first, *others) for key in f.keys))
