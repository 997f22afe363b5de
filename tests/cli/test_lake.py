"""verify, rm, gc and index as a user meets them, on a run made from numbers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from tests.catalog.wreckage import add_finding, without_zones

from layerlake.catalog.layout import part_path, run_path
from layerlake.catalog.manifest import commit_manifest
from layerlake.catalog.reservation import reserve_run
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES
from layerlake.cli import main


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def layerlake(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``layerlake ARGUMENTS``."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def test_verify_says_how_much_it_has_read(layerlake: Callable[..., Result], run: Run) -> None:
    result = layerlake("verify", run.store.url)
    assert (result.code, result.out) == (0, "")
    assert "read 96 objects" in result.err
    assert "1 runs, 1 models, 0 tables of findings" in result.err
    assert json.loads(layerlake("verify", run.store.url, "--run", "tiny", "--json").out)["objects"] == 96


def test_verify_is_red_and_names_the_object(layerlake: Callable[..., Result], run: Run) -> None:
    gone, changed = (f"{run_path(run.run_id)}/activations.zarr/resid/c/{layer}/0/0" for layer in (0, 1))
    run.store.delete(gone)
    run.store.write(changed, b"something else")
    result = layerlake("verify", run.store.url)
    assert result.code == 1
    assert gone in result.out
    assert changed in result.out
    assert "error: " in result.err
    assert "objects: 2" in result.err
    assert "hint: " in result.err
    as_json = layerlake("verify", run.store.url, "--json")
    assert as_json.code == 1
    assert [problem["object"] for problem in json.loads(as_json.out)["problems"]] == [gone, changed]


def test_verify_of_nothing_is_the_users_mistake(layerlake: Callable[..., Result], run: Run) -> None:
    assert layerlake("verify", run.store.url + "x").code == 2
    assert layerlake("verify", run.store.url, "--run", "x").code == 2


def test_rm_asks_and_says_what_goes(layerlake: Callable[..., Result], run: Run) -> None:
    url = run.store.url
    result = layerlake("rm", url, "tiny", "--dry-run")
    assert (result.code, run.run_id in result.out) == (0, True)
    asked = layerlake("rm", url, "tiny")
    assert asked.code == 2
    assert "--yes" in asked.err
    assert layerlake("verify", url).code == 0
    done = layerlake("rm", url, "tiny", "--yes", "--json")
    (row,) = json.loads(done.out)
    assert (done.code, row["run"], row["findings"]) == (0, run.run_id, 0)
    assert "removed" in done.err
    assert json.loads(layerlake("ls", url, "--json").out) == []
    assert layerlake("rm", url, "tiny", "--yes").code == 2


def test_rm_of_an_empty_name_removes_nothing(layerlake: Callable[..., Result], run: Run) -> None:
    result = layerlake("rm", run.store.url, "", "--yes")
    assert result.code == 2
    assert "empty" in result.err
    assert layerlake("verify", run.store.url).code == 0


def test_ls_tells_intervened_runs_apart(
    layerlake: Callable[..., Result], run: Run, make_run: Callable[..., Run]
) -> None:
    other = make_run(lengths=(5, 9)).manifest
    identity = other.identity | {"baseline": run.run_id, "schedule": "1,0"}
    commit_manifest(run.store, replace(other, identity=identity))
    rows = json.loads(layerlake("ls", run.store.url, "--json").out)
    assert {row["run"]: row["schedule"] for row in rows} == {run.run_id: None, other.run_id: "1,0"}
    assert "1,0" in layerlake("ls", run.store.url).out


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"format_version": 1}'])
def test_a_damaged_run_is_listed_with_its_error_among_the_others(
    layerlake: Callable[..., Result], run: Run, make_run: Callable[..., Run], content: bytes
) -> None:
    other = make_run(name="other")
    path = f"{run_path(other.run_id)}/log/00000001.json"
    other.store.write(path, content)
    for command in ("ls", "info"):
        result = layerlake(command, run.store.url)
        assert (result.code, run.run_id in result.out) == (1, True)
        assert other.run_id in result.err
        rows = {row["run"]: row for row in json.loads(layerlake(command, run.store.url, "--json").out)}
        assert rows[run.run_id]["tokens"] == 36
        assert set(rows[other.run_id]) == {"run", "error"}
    assert layerlake("info", run.store.url, "--run", "tiny").code == 0
    assert other.run_id in layerlake("gc", run.store.url).err
    assert layerlake("rm", run.store.url, other.run_id, "--yes").code == 0
    assert layerlake("ls", run.store.url).code == 0


def test_info_says_which_table_of_a_run_is_damaged(layerlake: Callable[..., Result], run: Run) -> None:
    path = part_path(run.run_id, "objects", run.manifest.parts["objects"][0])
    run.store.delete(path)
    result = layerlake("info", run.store.url)
    assert (result.code, path in result.err) == (1, True)


def test_sql_reads_all_findings_but_the_damaged_one(layerlake: Callable[..., Result], run: Run) -> None:
    _, damaged = sorted(add_finding(run))
    assert "lens_tokens" in damaged
    run.store.write(damaged, run.store.read(damaged)[:-9] + b"\0PAR1PAR1")
    result = layerlake("sql", run.store.url, "SELECT view FROM findings", "--format", "csv")
    assert (result.code, result.out.split()) == (0, ["view", "lens"])
    assert layerlake("verify", run.store.url).code == 1


def test_rm_refuses_a_run_with_an_open_capture(layerlake: Callable[..., Result], run: Run) -> None:
    reserve_run(run.store, run.run_id, "abc")
    refused = layerlake("rm", run.store.url, run.run_id, "--yes")
    assert refused.code == 2
    assert "held by abc" in refused.err
    assert "--force" in refused.err
    assert layerlake("rm", run.store.url, run.run_id, "--yes", "--force").code == 0


def test_gc_frees_what_it_says_it_would(layerlake: Callable[..., Result], run: Run) -> None:
    url = run.store.url
    run.store.write(f"{run_path(run.run_id)}/tokens/part-lost.parquet", b"orphan")
    reserve_run(run.store, run.run_id, "abc")
    young = layerlake("gc", url)
    assert (young.code, young.out) == (0, "")
    assert "is left alone" in young.err
    planned = layerlake("gc", url, "--older-than", "0s", "--dry-run", "--json")
    done = layerlake("gc", url, "--older-than", "0s", "--json")
    assert [row["kind"] for row in json.loads(done.out)["waste"]] == ["abandoned capture"]
    assert [row["objects"] for row in json.loads(done.out)["waste"]] == [2]
    assert json.loads(planned.out)["waste"][0]["objects"] == 2
    assert "would free" in planned.err
    assert "freed" in done.err
    assert layerlake("gc", url, "--older-than", "0s").out == ""
    wrong = layerlake("gc", url, "--older-than", "yesterday")
    assert (wrong.code, "24h" in wrong.err) == (2, True)


def test_index_adds_zones_to_the_runs_that_lack_them(layerlake: Callable[..., Result], run: Run) -> None:
    old = without_zones(run)
    done = layerlake("index", old.store.url, "--run", old.run_id, "--json")
    assert (done.code, done.err.startswith("wrote ")) == (0, True)
    (indexed,) = json.loads(done.out)
    assert indexed["run"] == old.run_id
    n_layers = sum(SITES[site].n_layers(run.shape) for site in run.manifest.zones)
    assert indexed["objects"] == n_layers * len(run.manifest.partitions)
    again = layerlake("index", old.store.url)
    assert again.code == 0
    assert "0" in again.out.splitlines()[1].split()
