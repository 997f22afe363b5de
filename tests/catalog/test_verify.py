"""Verify is green on what was written, and red, naming the object, after any byte of it has changed or it is gone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalog.wreckage import add_finding
from tests.conftest import build_run

from layerlake.catalog.errors import DamagedLake, FormatError, LakeNotFound, RunNotFound, StoreError
from layerlake.catalog.findings import Finding, FindingKey, write_finding
from layerlake.catalog.lake import create_lake
from layerlake.catalog.layout import log_path, model_path, part_path, run_path
from layerlake.catalog.reservation import COLLECTING, REMOVING, reserve_run
from layerlake.catalog.run import Run
from layerlake.catalog.run_inspection import Inspected, inspect_run
from layerlake.catalog.seal import seal_json
from layerlake.catalog.stores import Store
from layerlake.catalog.tables import OBJECTS, to_parquet
from layerlake.catalog.verify import Verification, verify_lake, verify_run

MakeRun = Callable[..., Run]


def problems(store: Store) -> set[str]:
    """The objects that verify names."""
    try:
        found = verify_lake(store).problems
    except DamagedLake as damaged:
        found = damaged.verification.problems
    return {problem.object for problem in found}


@pytest.fixture(scope="module")
def everything() -> Store:
    """A lake in memory with two runs and a finding."""
    url = "memory://verify"
    build_run(url, lengths=(5, 9), name="other", dtype="bfloat16", sites=("resid", "pattern", "attn_band"))
    add_finding(build_run(url))
    return Store(url)


@pytest.fixture
def spoilt(everything: Store) -> Iterator[dict[str, bytes]]:
    """What the lake's objects were; they are that again afterwards."""
    contents = {name: everything.read(name) for name, _ in everything.walk()}
    yield contents
    for name, content in contents.items():
        everything.write(name, content)


def test_a_whole_lake_is_read_to_the_last_byte(everything: Store) -> None:
    found = verify_lake(everything)
    sizes = dict(everything.walk())
    assert (found.problems, found.notes) == ((), ())
    assert (found.n_runs, found.n_models, found.n_findings) == (2, 2, 2)
    assert (found.n_objects, found.nbytes) == (len(sizes), sum(sizes.values()))
    one = verify_run(everything, "tiny")
    assert (one.n_runs, one.n_models, one.n_findings) == (1, 1, 2)
    assert json.loads(json.dumps(one.to_json()))["problems"] == []


def test_any_object_that_is_gone_is_named(everything: Store, spoilt: dict[str, bytes]) -> None:
    main = next(name for name in spoilt if name.startswith("findings/lens/"))
    for name, content in spoilt.items():
        everything.delete(name)
        # nothing names a finding but its own main table
        assert problems(everything) == ({name} if name != main else set()), name
        everything.write(name, content)


def test_any_object_with_a_changed_byte_is_named(everything: Store, spoilt: dict[str, bytes]) -> None:
    chance = np.random.default_rng(0)
    for name, content in spoilt.items():
        place = [0, len(content) - 1, int(chance.integers(len(content)))][chance.integers(3)]
        everything.write(name, flip(content, place, 1 << int(chance.integers(8))))
        assert problems(everything) == {name}, (name, place)
        everything.write(name, content)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_changed_byte_shows(everything: Store, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(name for name, _ in everything.walk())))
    content = everything.read(name)
    place = data.draw(st.integers(0, len(content) - 1))
    everything.write(name, flip(content, place, data.draw(st.integers(1, 255))))
    try:
        assert problems(everything) == {name}
    finally:
        everything.write(name, content)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"\0", lambda _: b""])
def test_an_object_of_another_length_is_named(
    everything: Store, spoilt: dict[str, bytes], change: Callable[[bytes], bytes]
) -> None:
    kinds = ("layerlake.json", "zarr.json", ".parquet", "/c/0", "/c/0/1/0", "/c/1/0/0", "/log/00000001.json")
    for name in {next(name for name in spoilt if name.endswith(kind)) for kind in kinds}:
        everything.write(name, change(spoilt[name]))
        assert problems(everything) == {name}
        everything.write(name, spoilt[name])


def flip(content: bytes, place: int, bits: int) -> bytes:
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def test_shards_that_have_changed_places_are_both_named(everything: Store, spoilt: dict[str, bytes]) -> None:
    one, two = sorted(name for name in spoilt if "/resid/c/1/" in name and "tiny" in name)[:2]
    everything.write(one, spoilt[two])
    everything.write(two, spoilt[one])
    assert problems(everything) == {one, two}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("weights.zarr/W_out/c/0/0/0", "weights.zarr/W_out/c/1/0/0"),
        ("weights.zarr/ln_final.w/c/0", "weights.zarr/ln_final.b/c/0"),
    ],
)
def test_weights_that_have_changed_places_are_both_named(run: Run, one: str, two: str) -> None:
    one, two = (f"{model_path(run.manifest.model_id)}/{name}" for name in (one, two))
    first, second = run.store.read(one), run.store.read(two)
    run.store.write(one, second)
    run.store.write(two, first)
    assert problems(run.store) == {one, two}


def test_another_model_s_vocabulary_is_named(run: Run, make_run: MakeRun) -> None:
    other = make_run(name="other", vocab=[f"other{i}" for i in range(24)])
    paths = [f"{model_path(each.manifest.model_id)}/vocab.parquet" for each in (run, other)]
    run.store.write(paths[0], run.store.read(paths[1]))
    assert problems(run.store) == {paths[0]}


# -- the log, and what is not damage --------------------------------------------------------------


def append_snapshot(run: Run) -> None:
    """Commit a second capture that adds nothing but its records."""
    part = "part-second"
    run.store.write(part_path(run.run_id, "objects", part), to_parquet(OBJECTS.empty_table()))
    following = run.manifest.to_json()
    following |= {
        "number": 2,
        "parts": following["parts"] | {"objects": [*run.manifest.parts["objects"], part]},
    }
    run.store.write(log_path(run.run_id, 2), seal_json(following))


@pytest.mark.parametrize("number", [1, 2])
def test_a_log_without_one_of_its_snapshots_is_damaged(run: Run, number: int) -> None:
    append_snapshot(run)
    assert problems(run.store) == set()
    run.store.delete(log_path(run.run_id, number))
    assert problems(run.store) == {log_path(run.run_id, number)}


def test_a_snapshot_that_forgets_is_damaged(run: Run) -> None:
    append_snapshot(run)
    path = log_path(run.run_id, 2)
    held = json.loads(run.store.read(path))
    held["sites"].pop("mlp_out")
    run.store.write(path, seal_json(held))
    assert problems(run.store) == {path}


def test_an_open_capture_and_what_it_has_written_are_no_damage(run: Run) -> None:
    work = f"{run_path(run.run_id)}/wip"
    reserve_run(run.store, run.run_id, "abc")
    run.store.write_json(f"{work}/abc/plan.json", {"manifest": {"number": 1}, "work": [1, 2, 3]})
    run.store.write_json(f"{work}/abc/ledgers/00000003.json", {})
    run.store.write(part_path(run.run_id, "objects", "part-abc"), b"not yet of the run")
    found = verify_lake(run.store)
    assert found.notes == (f"A capture of run {run.run_id} is open (abc): 1 of 3 partitions are written.",)
    for name in ("plan.json", "ledgers/00000003.json"):
        content = run.store.read(f"{work}/abc/{name}")
        run.store.write(f"{work}/abc/{name}", flip(content, 3, 4))
        assert problems(run.store) == {f"{work}/abc/{name}"}
        run.store.write(f"{work}/abc/{name}", content)
    # it extends a snapshot that is gone
    run.store.delete(log_path(run.run_id, 1))
    assert problems(run.store) == {log_path(run.run_id, 1)}


def test_what_an_open_capture_says_is_written_is_read(run: Run) -> None:
    store, work = run.store, f"{run_path(run.run_id)}/wip"
    names = [f"activations.zarr/resid/c/{layer}/7/0" for layer in range(2)]
    objects = [{"name": name, "nbytes": 3, "crc32": f"{zlib.crc32(b'abc'):08x}"} for name in names]
    reserve_run(store, run.run_id, "abc")
    store.write_json(f"{work}/abc/plan.json", {"manifest": run.manifest.to_json(), "work": [7]})
    store.write_json(f"{work}/abc/attempts/00000007-0.json", {})
    store.write_json(f"{work}/abc/ledgers/00000007.json", {"objects": objects})
    paths = [f"{run_path(run.run_id)}/{name}" for name in names]
    for path in paths:
        store.write(path, b"abc")
    assert problems(store) == set()
    store.write(paths[0], b"abd")
    store.delete(paths[1])
    assert problems(store) == set(paths)
    # another writer is at it: the capture will hold both against the ledger
    store.write_json(f"{work}/abc/attempts/00000007-1.json", {})
    assert problems(store) == set()


def test_a_ledger_that_names_what_is_not_in_the_lake_is_damage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"abc")
    record = {"name": "../../../outside", "nbytes": 3, "crc32": f"{zlib.crc32(b'abc'):08x}"}
    reserve_run(run.store, run.run_id, "abc")
    run.store.write_json(f"{run_path(run.run_id)}/wip/abc/ledgers/00000007.json", {"objects": [record]})
    assert problems(run.store) == {f"{run_path(run.run_id)}/../../../outside"}


@pytest.mark.parametrize("holder", [REMOVING, COLLECTING])
def test_a_removal_at_work_is_no_damage(run: Run, holder: str) -> None:
    reserve_run(run.store, run.run_id, holder)
    if holder == REMOVING:
        run.store.delete(log_path(run.run_id, 1))
    found = verify_lake(run.store)
    assert any(f"layerlake {holder}" in note for note in found.notes)


def test_what_nothing_names_is_noted_and_not_damage(run: Run) -> None:
    add_finding(run)
    run.store.write(f"{run_path(run.run_id)}/activations.zarr/resid/c/9/9/0", b"orphan")
    run.store.write("models/unused/vocab.parquet", b"orphan")
    run.store.write("findings/lens/0123/notes.txt", b"orphan")
    notes = verify_lake(run.store).notes
    assert len(notes) == 3
    for word in ("no snapshot names", "unused", "notes.txt"):
        assert any(word in note for note in notes)


@pytest.mark.parametrize("gone", ["resid/c/1/0/0", "vocab.parquet", "log/00000001.json"])
def test_an_object_that_cannot_be_read_is_named_and_the_others_are_read(
    run: Run, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.read
    damaged = f"{run_path(run.run_id)}/activations.zarr/resid/c/0/0/0"
    run.store.write(damaged, b"something else")

    def fail(self: Store, name: str) -> bytes:
        if name.endswith(gone):
            raise StoreError(f"{name} could not be read: Input/output error")
        return read(self, name)

    monkeypatch.setattr(Store, "read", fail)
    with pytest.raises(DamagedLake, match=r"Input/output error|instead of") as caught:
        verify_lake(run.store)
    found = {problem.object.endswith(gone): problem for problem in caught.value.verification.problems}
    assert "Input/output error" in found[True].found
    assert gone == "log/00000001.json" or found[False].object == damaged


def test_a_finding_of_partitions_that_the_run_does_not_hold_is_damaged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = run.extent("resid")
    extent = held | {"partitions": [*held["partitions"], 9]}
    key = FindingKey("lens", 1, run.run_id, {}, {"resid": extent})
    write_finding(run.store, Finding("lens", {"lens": pa.table({"run": [run.run_id]})}, (key,)))
    with pytest.raises(DamagedLake, match=r"findings/lens/.*resid.*\[9\] instead of \[\]"):
        verify_lake(run.store)
    # it grows as it is inspected
    following = run.manifest.to_json() | {"number": 2}
    following["partitions"] = [
        *following["partitions"],
        {"index": 9, "n_rows": 0, "n_pairs": 0, "n_documents": 0},
    ]
    following["sites"] = {site: [*held, 9] for site, held in following["sites"].items()}

    def grow(*given: Any) -> Inspected:
        inspected = inspect_run(*given)
        run.store.write(log_path(run.run_id, 2), seal_json(following))
        return inspected

    monkeypatch.setattr("layerlake.catalog.verify.inspect_run", grow)
    assert problems(run.store) == set()


def test_the_model_of_a_first_capture_is_not_said_to_be_waste(run: Run) -> None:
    store, model_id = run.store, run.manifest.model_id
    for name, _ in list(store.walk(run_path(run.run_id))):
        store.delete(name)
    assert verify_lake(store).notes == (f"Model {model_id} is named by no run: layerlake gc removes it.",)
    reserve_run(store, run.run_id, "abc")
    assert len(verify_lake(store).notes) == 1  # nobody knows yet which model it is
    plan = f"{run_path(run.run_id)}/wip/abc/plan.json"
    manifest = run.manifest.to_json() | {"number": 0}
    store.write_json(plan, {"manifest": manifest, "work": [1]})
    for whole in (True, False):
        (note,) = verify_lake(store).notes
        assert "is open (abc)" in note
        if whole:
            store.delete(f"models/{model_id}/model.json")
    store.write_json(plan, {"manifest": manifest | {"model_id": "another"}, "work": [1]})
    assert any(model_id in note and "not whole" in note for note in verify_lake(store).notes)


def test_a_finding_whose_main_table_is_not_written_is_noted(run: Run) -> None:
    main = min(add_finding(run))
    run.store.delete(main)
    (note,) = verify_lake(run.store).notes
    assert "was not written to its end" in note


def test_a_finding_under_another_digest_is_damaged(run: Run) -> None:
    main = min(add_finding(run))
    path = "findings/lens/0123456789abcdef/part-00000.parquet"
    run.store.write(path, run.store.read(main))
    assert problems(run.store) == {path}


def test_there_must_be_something_to_verify(tmp_path: Path, run: Run) -> None:
    with pytest.raises(LakeNotFound):
        verify_lake(Store(tmp_path / "nowhere"))
    with pytest.raises(RunNotFound, match="Did you mean"):
        verify_lake(run.store, [run.run_id + "0"])
    run.store.write("layerlake.json", seal_json({"format_version": 3}))
    with pytest.raises(FormatError):
        verify_lake(run.store)
    empty = create_lake("memory://empty-lake")
    assert verify_lake(empty) == Verification((), (), 0, 0, 0, 1, len(empty.read("layerlake.json")))
