"""Many writers: whoever writes what, and whenever, the lake is the one that a single writer leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from layerlake.capture import execute
from layerlake.capture.execute import capture_run, execute_plan, finalise_plan
from layerlake.capture.plan import plan_capture
from layerlake.capture.share import Share
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.errors import CaptureInProgress, CaptureUnfinished
from layerlake.catalog.lake import Lake, create_lake
from layerlake.catalog.reservation import reserve_run
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES
from layerlake.catalog.stores import Store
from layerlake.cli import cli

MakeSpec = Callable[..., CaptureSpec]
TIMEOUT_S = 120.0


def contents(lake: Path) -> dict[str, bytes]:
    """Every object but the log, which says when a capture ended, and by whom."""
    return {
        path.relative_to(lake).as_posix(): path.read_bytes()
        for path in lake.rglob("*")
        if path.is_file() and "/log/" not in path.as_posix()
    }


@pytest.fixture(scope="module")
def alone(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one writer leaves."""
    lake = tmp_path_factory.mktemp("alone") / "lake"
    assert len(capture_run(lake, make_spec()).manifest.partitions) >= 3
    return contents(lake)


def spec_json(spec: CaptureSpec) -> dict[str, Any]:
    fields = ("model", "dataset", "dtype", "partition_tokens", "batch_tokens")
    return {name: v if isinstance(v := getattr(spec, name), int) else os.fspath(v) for name in fields}


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_three_writers_are_one(
    order: tuple[int, ...], make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    lake = tmp_path / "lake"
    n_partitions = len(plan_capture(make_spec()).manifest.partitions)
    left = n_partitions
    for i in order:
        outcome = execute_plan(plan_capture(make_spec(), lake), lake, share=Share(i, 3))
        left -= len(range(i, n_partitions, 3))
        assert outcome.n_pending == left
        assert (outcome.run is not None) == (left == 0) == bool(Lake(lake).run_ids)
    assert contents(lake) == alone


def test_more_writers_than_partitions(make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes]) -> None:
    lake = tmp_path / "lake"
    idle = execute_plan(plan_capture(make_spec(), lake), lake, share=Share(98, 99))
    assert idle.run is None
    assert idle.n_tokens == 0
    capture_run(lake, make_spec())
    assert contents(lake) == alone


@pytest.mark.parametrize("shares", [["0/3", "1/3", "2/3"], ["0/1", "0/1"]], ids=["disjoint", "the same"])
def test_processes_that_begin_at_once(
    shares: list[str], slowed: ModuleType, make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """With a third each; or with the same, which each finds partly written, and both may want to commit."""
    lake = tmp_path / "lake"
    processes = [
        slowed.start(
            tmp_path / f"outcome-{i}.json", lake=str(lake), spec=spec_json(make_spec()), share=share,
            latency_s=0.004, meet=str(tmp_path / "here"), n_meet=len(shares),
        )
        for i, share in enumerate(shares)
    ]  # fmt: skip
    for process in processes:
        process.join(TIMEOUT_S)
    assert [process.exitcode for process in processes] == [0] * len(shares)
    outcomes = [json.loads((tmp_path / f"outcome-{i}.json").read_text()) for i in range(len(shares))]
    run = Lake(lake).run()
    assert {outcome["run"] for outcome in outcomes} - {None} == {run.run_id}
    assert run.manifest.number == len(run.manifest.captures) == 1
    assert contents(lake) == alone
    n_objects = sum(outcome["objects"] for outcome in outcomes)
    assert n_objects >= run.objects.num_rows
    if len(shares) == 3:
        assert n_objects == run.objects.num_rows  # nothing twice


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_stood_still_wakes_after_the_commit(
    slowed: ModuleType, make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """It may end what it was about to write when it was stopped, to the same bytes, and nothing more."""
    lake = tmp_path / "lake"
    process = slowed.start(
        tmp_path / "outcome.json", lake=str(lake), spec=spec_json(make_spec()), latency_s=0.004,
        kill={"match": r"write .*activations", "count": 12, "delay_s": 0.0, "signal": int(signal.SIGSTOP)},
    )  # fmt: skip
    stat = Path(f"/proc/{process.pid}/stat")
    if not stat.exists():
        pytest.skip("only Linux tells whether a process stands still")
    _wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    run = capture_run(lake, make_spec())
    assert contents(lake) == alone
    before = {path: path.stat().st_mtime_ns for path in lake.rglob("*") if path.is_file()}
    os.kill(process.pid, signal.SIGCONT)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0
    assert {name: c for name, c in contents(lake).items() if not name.endswith(".partial")} == alone
    written = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert len(written) <= 4  # two encoder threads, each with a shard and its zones
    assert json.loads((tmp_path / "outcome.json").read_text())["run"] == run.run_id


def test_finalise_commits_without_a_model(
    make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = tmp_path / "lake"
    execute_plan(plan_capture(make_spec(), lake), lake, share=Share(0, 2))
    with pytest.raises(CaptureUnfinished, match=r"partitions .* are not written: 1"):
        finalise_plan(plan_capture(make_spec(), lake), lake)
    with monkeypatch.context() as patch:
        patch.setattr(execute, "finalise_capture", lambda *_: pytest.fail("committed"))
        with pytest.raises(pytest.fail.Exception):
            execute_plan(plan_capture(make_spec(), lake), lake, share=Share(1, 2))
    assert Lake(lake).run_ids == []
    monkeypatch.setattr(execute, "open_model", lambda *_, **__: pytest.fail("loaded a model"))
    run = finalise_plan(plan_capture(make_spec(), lake), lake)
    assert contents(lake) == alone
    assert finalise_plan(plan_capture(make_spec(), lake), lake).manifest == run.manifest


def command(spec: CaptureSpec, lake: Path) -> list[str]:
    options = [[f"--{name.replace('_', '-')}", str(value)] for name, value in spec_json(spec).items()]
    return ["capture", str(lake), *(word for option in options for word in option)]


def test_the_command_line_s_writers(make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes]) -> None:
    lake, runner = tmp_path / "lake", CliRunner()
    given = command(make_spec(), lake)
    first = runner.invoke(cli, [*given, "--partition", "1/2", "--json"])
    assert first.exit_code == 0, first.output
    outcome = json.loads(first.stdout)["actual"]
    assert outcome["run"] is None
    assert outcome["partitions_left"] > 0
    assert "partitions are left to other writers" in first.stderr
    early = runner.invoke(cli, [*given, "--finalise"])
    assert isinstance(early.exception, CaptureUnfinished)
    both = runner.invoke(cli, [*given, "--finalise", "--partition", "0/2"])
    assert both.exit_code == 2
    second = runner.invoke(cli, [*given, "--partition", "0/2"])
    assert second.exit_code == 0, second.output
    assert runner.invoke(cli, [*given, "--finalise"]).exit_code == 0  # is there already
    assert contents(lake) == alone


def test_torchrun_shares_the_partitions_out(
    make_spec: MakeSpec, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    lake = tmp_path / "lake"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "layerlake", *command(make_spec(), lake), "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert contents(lake) == alone
    tokens = [
        json.loads(f"{{{line.strip().rstrip(',')}}}")["tokens"]
        for line in done.stdout.splitlines()
        if line.startswith('  "tokens":')
    ]
    ran = [n for n in tokens if n < Lake(lake).run().n_tokens]
    assert len(ran) == 2
    assert sum(ran) == Lake(lake).run().n_tokens


def values(run: Run) -> dict[str, np.ndarray]:
    return {site: getattr(run, site).to_numpy() for site in run.sites if SITES[site].is_array}


def test_a_reader_of_the_old_snapshot_is_not_disturbed_by_an_extension(
    slowed: ModuleType, make_spec: MakeSpec, tmp_path: Path
) -> None:
    """Another process adds documents, and then a site, while this one reads."""
    lake = tmp_path / "lake"
    old = capture_run(lake, make_spec(sites="resid,pattern", max_tokens=100))
    seen = values(old)
    n_reads = 0
    for more in ({}, {"sites": "resid,pattern,mlp_post"}):
        process = slowed.start(
            tmp_path / "outcome.json", lake=str(lake), latency_s=0.01,
            spec=spec_json(make_spec()) | {"sites": "resid,pattern"} | more,
        )  # fmt: skip
        while process.is_alive():
            for site, value in values(old).items():
                np.testing.assert_array_equal(value, seen[site])
            n_reads += 1
        process.join()
        assert process.exitcode == 0
    assert n_reads > 2
    new = Lake(lake).run()
    assert new.manifest.number == 3
    assert new.n_tokens > old.n_tokens
    for site, value in seen.items():
        axis = 2 if site == "pattern" else 1
        np.testing.assert_array_equal(
            getattr(new, site).to_numpy().take(range(value.shape[axis]), axis), value
        )
    assert old.documents.num_rows < new.documents.num_rows


def test_writers_that_start_at_once_on_unlike_machines_write_one_capture(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They plan for other threads: whoever comes second takes the first one's plan."""
    plans = []
    for n_threads in (1, 2):
        monkeypatch.setattr("layerlake.capture.plan._intra_op_threads", lambda n=n_threads: n)
        plans.append(plan_capture(make_spec(sites="resid"), tmp_path / "lake"))
    assert len({plan.frozen.capture_id for plan in plans if plan.frozen}) == 2
    outcomes = [execute_plan(plan, tmp_path / "lake", share=Share(i, 2)) for i, plan in enumerate(plans)]
    assert outcomes[0].run is None
    assert outcomes[1].run is not None
    (entry,) = outcomes[1].run.manifest.captures
    assert plans[0].frozen is not None
    assert entry["capture_id"] == plans[0].frozen.capture_id


def test_a_capture_that_died_as_it_began_is_no_obstacle(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its reservation and its plan, on a machine with other cores; for another request it still is one."""
    monkeypatch.setattr("layerlake.capture.phases.PATIENCE_S", 0.0)
    lake = tmp_path / "lake"
    plan = plan_capture(make_spec(sites="resid"), lake)
    create_lake(lake)
    assert plan.frozen is not None
    reserve_run(Store(lake), plan.run_id, "0123456789abcdef", request=plan.frozen.request)
    with pytest.raises(CaptureInProgress, match="0123456789abcdef"):
        execute_plan(plan_capture(make_spec(sites="attn_out"), lake), lake)
    assert execute_plan(plan, lake).run is not None


def test_nothing_can_be_finalised_where_nothing_is_open(
    make_spec: Callable[..., CaptureSpec], tmp_path: Path
) -> None:
    with pytest.raises(CaptureUnfinished, match=r"No capture of run .* is open"):
        finalise_plan(plan_capture(make_spec(sites="resid"), tmp_path / "lake"), tmp_path / "lake")
