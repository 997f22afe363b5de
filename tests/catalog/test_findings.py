"""Findings: written whole, found again by their key, and only the newest shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlake.catalog.errors import CorruptRun
from layerlake.catalog.findings import (
    Finding,
    FindingKey,
    describe_finding,
    list_findings,
    merge_findings,
    newest_findings,
    read_finding,
    scan_findings,
    write_finding,
)
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import to_parquet

KEY = FindingKey("lens", 1, "tiny-0", {"scale": "own"}, {"resid": {"n_tokens": 36, "partitions": [0, 1]}})


def finding(key: FindingKey = KEY, *values: float) -> Finding:
    rows = values or (1.5, 2.5)
    main = pa.table({"run": [key.run] * len(rows), "entropy_bits": rows})
    return Finding(key.analysis, {"lens": main, "lens_tokens": main.slice(1)}, (key,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_the_digest_is_stable() -> None:
    """It names objects in lakes that exist: another digest would compute everything anew."""
    assert KEY.digest == "5cd73b3f1248905a"


def test_the_digest_depends_on_every_field_and_on_no_order() -> None:
    others = [
        replace(KEY, analysis="cka"),
        replace(KEY, version=2),
        replace(KEY, run="tiny-1"),
        replace(KEY, params={"scale": "final"}),
        replace(KEY, extents={"resid": {"n_tokens": 37, "partitions": [0, 1]}}),
    ]
    assert len({KEY.digest, *(key.digest for key in others)}) == 6
    one, two = replace(KEY, params={"a": 1, "b": 2}), replace(KEY, params={"b": 2, "a": 1})
    assert one.digest == two.digest


def test_what_is_written_is_read(store: Store) -> None:
    written = finding()
    assert read_finding(store, KEY, written.tables) is None
    write_finding(store, written)
    found = read_finding(store, KEY, written.tables)
    assert found == written
    assert found is not None
    assert found.table == written.tables["lens"]
    assert found.runs == ("tiny-0",)
    assert found.df()["entropy_bits"].tolist() == [1.5, 2.5]


def test_a_finding_without_its_main_table_is_absent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies has written the main table last, or not at all."""
    written: list[str] = []
    write = Store.write

    def die_at_the_main_table(self: Store, name: str, content: bytes) -> None:
        if "/lens/" in name:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, content)

    monkeypatch.setattr(Store, "write", die_at_the_main_table)
    with pytest.raises(KeyboardInterrupt):
        write_finding(store, finding())
    assert len(written) == 1
    assert read_finding(store, KEY, ["lens", "lens_tokens"]) is None
    assert list_findings(store) == list_findings(store, "lens_tokens") == []
    assert [table.view for table in scan_findings(store).unfinished] == ["lens_tokens"]


def test_stored_tables_are_listed_with_their_keys(store: Store) -> None:
    assert list_findings(store) == []
    write_finding(store, finding())
    tables = {table.view: table for table in list_findings(store)}
    assert set(tables) == {"lens", "lens_tokens"}
    assert (tables["lens"].n_rows, tables["lens_tokens"].n_rows) == (2, 1)
    assert tables["lens"].key == KEY
    assert tables["lens"].finding == KEY.digest
    assert store.exists(tables["lens"].path)
    assert [table.view for table in list_findings(store, "lens_tokens")] == ["lens_tokens"]


FOOTERS = [
    b"neither",
    to_parquet(pa.table({"a": [1]})),
    *(
        to_parquet(pa.table({"a": [1]}, metadata={"layerlake": text}))
        for text in ("{", "[]", "3", '{"created": 1}', '{"created": 1, "views": 3}', b"\xff")
    ),
]  # fmt: skip


@pytest.mark.parametrize("content", FOOTERS)
def test_what_is_no_finding_is_named_and_hides_no_other(store: Store, content: bytes) -> None:
    write_finding(store, finding())
    path = "findings/lens/0123/part-00000.parquet"
    store.write(path, content)
    with pytest.raises(CorruptRun, match="findings/lens/0123") as caught:
        describe_finding(store, "lens", "0123")
    assert path in caught.value.hint
    found = scan_findings(store)
    assert found.unreadable == (path,)
    assert len(found.whole) == len(list_findings(store)) == 2


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_has_changed_in_a_finding_is_a_damage(data: st.DataObject) -> None:
    store = Store("memory://damaged-findings")
    write_finding(store, finding())
    path = list_findings(store, "lens")[0].path
    content = store.read(path)
    place = data.draw(st.integers(0, len(content) - 1))
    bits = data.draw(st.integers(1, 255))
    store.write(path, content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
    found = scan_findings(store, "lens")
    assert len(found.whole) + len(found.unreadable) + len(found.unfinished) == 1
    with pytest.raises(CorruptRun, match="checksum"):
        read_finding(store, KEY, ["lens"])


def test_a_finding_that_goes_as_it_is_read_is_absent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_finding(store, finding())

    def gone(self: Store, name: str, **_: object) -> object:
        self.delete(name)
        raise FileNotFoundError(name)

    monkeypatch.setattr(Store, "open", gone)
    monkeypatch.setattr(Store, "read", gone)
    assert scan_findings(store).unreadable == ()
    assert list_findings(store) == []
    write_finding(store, finding())
    assert read_finding(store, KEY, ["lens"]) is None


def test_only_the_newest_extent_and_version_are_shown(store: Store) -> None:
    longer = replace(KEY, extents={"resid": {"n_tokens": 99, "partitions": [0, 1, 2]}})
    other = replace(KEY, params={"scale": "final"})
    elsewhere = replace(KEY, run="tiny-1")
    for key in (longer, KEY, other, elsewhere):
        write_finding(store, finding(key))
    assert shown(store) == {longer.digest, other.digest, elsewhere.digest}
    # whose parameters are others: that it has an option more does not leave the old rows beside its own
    newer = replace(KEY, version=2, params={"scale": "own", "window": 3})
    write_finding(store, finding(newer))
    assert shown(store) == {newer.digest, elsewhere.digest}


def shown(store: Store) -> set[str]:
    return {table.finding for table in newest_findings(list_findings(store, "lens"))}


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_findings_of_one_size_the_later_is_shown(store: Store, order: int) -> None:
    """Whichever has the greater digest, and though both are written within a second."""
    keys = [KEY, replace(KEY, extents={"pattern": KEY.extents["resid"]})][::order]
    for key in keys:
        write_finding(store, finding(key))
    assert shown(store) == {keys[-1].digest}


def test_a_finding_that_left_documents_out_is_shown_beside_the_one_that_did_not(store: Store) -> None:
    """And goes when a longer extent leaves out more of them."""
    of_all, without_two, without_three = (
        replace(KEY, params={"scale": "own", "n_excluded": n}, extents={"resid": {"n_tokens": 36 + n}})
        for n in (0, 2, 3)
    )
    for key in (KEY, of_all, without_two):
        write_finding(store, finding(key))
    assert shown(store) == {of_all.digest, without_two.digest}
    write_finding(store, finding(without_three))
    assert shown(store) == {of_all.digest, without_three.digest}


def test_findings_of_several_runs_are_stacked() -> None:
    other = replace(KEY, run="tiny-1")
    merged = merge_findings([finding(), finding(other, 9.0, 8.0, 7.0)])
    assert merged.runs == ("tiny-0", "tiny-1")
    assert merged.table["entropy_bits"].to_pylist() == [1.5, 2.5, 9, 8, 7]
    assert merged.tables["lens_tokens"].num_rows == 3
