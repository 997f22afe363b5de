"""Running a statistic through Dask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from layerlake.analyze import reduce
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic
from layerlake.analyze.norms import NormsOptions, NormsStatistic
from layerlake.analyze.reduce import reduce_statistic
from layerlake.analyze.statistic import State
from layerlake.catalog.errors import AnalysisError, LayerLakeError
from layerlake.catalog.run import Run


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_blas_has_one_thread_in_a_worker(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    run, before = make_run(), blas_threads()
    seen: list[set[int]] = []
    measure = NeuronStatistic.measure

    def measured(statistic: NeuronStatistic, block: Any) -> State:
        seen.append(blas_threads())
        return measure(statistic, block)

    monkeypatch.setattr(NeuronStatistic, "measure", measured)
    reduce_statistic(NeuronStatistic.open(run, NeuronOptions()), run, scheduler=scheduler)
    assert seen == [{1}, {1}]
    assert blas_threads() == before


def test_progress_goes_to_stderr_and_only_when_asked_for(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    statistic = NormsStatistic.open(run, NormsOptions())
    reduce_statistic(statistic, run)
    assert capsys.readouterr() == ("", "")
    reduce_statistic(statistic, run, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    n_units = len(statistic.units())
    assert f"{n_units}/{n_units}" in err


def test_errors_of_a_worker_are_raised_as_they_are(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise AnalysisError("a unit cannot be read")

    run = make_run()
    monkeypatch.setattr(NormsStatistic, "measure", fail)
    for scheduler in ("threads", "synchronous"):
        with pytest.raises(AnalysisError, match="a unit cannot be read"):
            reduce_statistic(NormsStatistic.open(run, NormsOptions()), run, scheduler=scheduler)


def test_unknown_scheduler(make_run: Callable[..., Run]) -> None:
    run = make_run()
    with pytest.raises(AnalysisError, match=r"no scheduler 'thread'\. Did you mean 'threads'"):
        reduce_statistic(NormsStatistic.open(run, NormsOptions()), run, scheduler="thread")


def test_cluster(make_run: Callable[..., Run]) -> None:
    """Two worker processes give the same digits; an address where nobody answers is said to be one."""
    from distributed import LocalCluster

    run = make_run()
    statistic = NormsStatistic.open(run, NormsOptions())
    here = reduce_statistic(statistic, run, scheduler="synchronous")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        address = cluster.scheduler_address
        there = reduce_statistic(statistic, run, scheduler=address)
    np.testing.assert_array_equal(there.keys, here.keys)
    np.testing.assert_array_equal(there.values, here.values)


def test_workers_that_join_later_have_one_blas_thread_too(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client, LocalCluster

    monkeypatch.setenv(
        "OPENBLAS_NUM_THREADS", "2"
    )  # Dask gives its workers 1, with which nothing could be seen

    def seen() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    run = make_run()
    statistic = NormsStatistic.open(run, NormsOptions())
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert client.submit(seen, pure=False).result() == {2}
        reduce_statistic(statistic, run, scheduler=cluster.scheduler_address)
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        assert list(client.run(seen).values()) == [{1}, {1}]


def test_a_cluster_without_workers_is_said_to_have_none(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(reduce, "_PATIENCE_S", 1)
    run = make_run()
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None, silence_logs=50) as cluster,
        pytest.raises(LayerLakeError, match="has no workers") as caught,
    ):
        reduce_statistic(NormsStatistic.open(run, NormsOptions()), run, scheduler=cluster.scheduler_address)
    assert f"dask worker {cluster.scheduler_address}" in caught.value.hint


def test_no_cluster(make_run: Callable[..., Run]) -> None:
    run = make_run()
    with pytest.raises(LayerLakeError, match="No Dask scheduler answers at 'nowhere://x'"):
        reduce_statistic(NormsStatistic.open(run, NormsOptions()), run, scheduler="nowhere://x")
