"""A statistic over a run, through Dask: one task a unit, states merged in a tree of fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..catalog.errors import AnalysisError, LayerLakeError, did_you_mean
from ..catalog.run import Run
from .statistic import State, Statistic, Unit

if TYPE_CHECKING:
    from dask.callbacks import Callback
    from dask.delayed import Delayed
    from distributed import Future, Worker, WorkerPlugin

__all__ = ["SCHEDULERS", "compute_tables", "reduce_statistic", "require_scheduler"]

SCHEDULERS = ("threads", "synchronous")
"""The schedulers that need no cluster; any address (``tcp://…``) is the third choice."""

_PATIENCE_S = 10
"""How long a cluster's scheduler, and then its first worker, is waited for."""


def require_scheduler(scheduler: str) -> None:
    """Raise AnalysisError unless the scheduler is one of :data:`SCHEDULERS`, or an address."""
    if scheduler not in SCHEDULERS and "://" not in scheduler:
        raise AnalysisError(
            f"There is no scheduler '{scheduler}'.{did_you_mean(scheduler, SCHEDULERS)}",
            hint=f"It is one of {', '.join(SCHEDULERS)}, or the address of a Dask cluster (tcp://HOST:PORT).",
        )


def reduce_statistic(
    statistic: Statistic[Any],
    run: Run,
    *,
    scheduler: str = "threads",
    progress: bool = False,
    known: State | None = None,
) -> State:
    """Return the state of a whole run.

    Each worker holds one unit's block at a time (the statistic says how large) and shares the statistic's
    weights with the other threads of its process. BLAS runs on one thread, so that workers × BLAS threads
    are the cores, and so that the result has the same digits whatever the scheduler and the number of workers.

    Parameters
    ----------
    statistic : Statistic
        What to compute.
    run : Run
        The run to read.
    scheduler : str
        ``"threads"`` (one worker a core), ``"synchronous"`` (this thread; for debugging), or the address
        of a Dask cluster, whose workers must see the lake under the same URL.
    progress : bool
        Whether to draw a bar on stderr. A cluster has its own dashboard instead.
    known : State, optional
        What was found in a shorter extent of the run, by the same statistic: units that are in it whole are not
        measured again (:meth:`Statistic.keys`).

    Raises
    ------
    AnalysisError
        The scheduler is unknown, or the data cannot be analysed.
    LayerLakeError
        Nobody answers at the scheduler's address, or it has no workers.
    """
    require_scheduler(scheduler)
    units, held = _split_known(statistic, statistic.units(), known)
    if not units:
        return held
    run = Run(
        run.store, run.manifest, excluded=run.excluded
    )  # without the tables that the other has read: it may have to travel
    if "://" in scheduler:
        return statistic.merge(held, _reduce_on_cluster(statistic, run, units, scheduler))
    from dask.delayed import delayed
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    plan = _plan(delayed(statistic, pure=False, traverse=False), run, units)
    with threadpool_limits(1, "blas"), _bar(statistic, run, len(units), shown=progress):
        merged: State = plan.compute(scheduler=scheduler)
    return statistic.merge(held, merged)


def _split_known(
    statistic: Statistic[Any], units: list[Unit], known: State | None
) -> tuple[list[Unit], State]:
    """Return the units that have to be measured, and the state of the others."""
    keys = [statistic.keys(unit) for unit in units] if known is not None else []
    if known is None or not units or any(each is None for each in keys):
        return units, statistic.zero()
    counts = [len(each) for each in keys if each is not None]
    _, ids = np.unique(np.concatenate([known.keys, *keys]), axis=0, return_inverse=True)
    held, *wanted = np.split(ids, np.cumsum([len(known.keys), *counts])[:-1])
    is_held = np.isin(np.arange(ids.max() + 1), held)
    is_whole = [bool(is_held[each].all()) for each in wanted]
    kept = [each for each, whole in zip(wanted, is_whole, strict=True) if whole]
    used = np.isin(held, np.concatenate(kept)) if kept else np.zeros(len(held), dtype=bool)
    lacking = [unit for unit, whole in zip(units, is_whole, strict=True) if not whole]
    return lacking, State(known.keys[used], known.values[used])


def compute_tables(
    open_statistic: Callable[[Run, Any], Statistic[Any]],
    run: Run,
    options: Any,
    *,
    scheduler: str = "threads",
    progress: bool = False,
) -> dict[str, pa.Table]:
    """Return what a statistic finds in a run: view → table.

    Parameters
    ----------
    open_statistic : callable
        Of a run and options, such as ``LensStatistic.open``.
    run, options
        What it is called with.
    scheduler, progress
        As in :func:`reduce_statistic`.
    """
    statistic = open_statistic(run, options)
    return statistic.finalise(reduce_statistic(statistic, run, scheduler=scheduler, progress=progress))


def _reduce_on_cluster(statistic: Statistic[Any], run: Run, units: list[Unit], address: str) -> State:
    from distributed import Client

    try:
        client = Client(address, set_as_default=False, timeout=_PATIENCE_S)
    except (OSError, ValueError) as error:
        raise LayerLakeError(
            f"No Dask scheduler answers at '{address}': {error}",
            hint="Start one: dask scheduler; dask worker ADDRESS.",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_PATIENCE_S)
        except TimeoutError as error:
            raise LayerLakeError(
                f"The Dask scheduler at '{address}' has no workers.",
                hint=f"Start some: dask worker {address}.",
            ) from error
        client.register_plugin(_one_blas_thread())
        # it holds the weights: once to each worker
        shared = client.scatter(statistic, broadcast=True, hash=False)
        merged: State = client.compute(_plan(shared, run, units), sync=True)
    return merged


def _one_blas_thread() -> WorkerPlugin:
    """Return what tells the workers that are there, and those that join later, how many threads BLAS has."""
    from distributed import WorkerPlugin

    class OneBlasThread(WorkerPlugin):
        name = "layerlake-one-blas-thread"
        idempotent = True

        def setup(self, worker: Worker) -> None:  # noqa: ARG002
            from threadpoolctl import threadpool_limits

            # not a context: a worker keeps it, as Dask's nanny would have set it
            threadpool_limits(1, "blas")

    return OneBlasThread()


def _plan(statistic: Delayed | Future[Statistic[Any]], run: Run, units: list[Unit]) -> Delayed:
    """Return the lazy state: leaves in the order of the units, merged two by two until one is left."""
    from dask.delayed import delayed

    measure, merge = delayed(_measure, pure=False), delayed(_merge, pure=False)
    opened = delayed(run, pure=False, traverse=False)
    states = [measure(statistic, opened, unit) for unit in units]
    while len(states) > 1:
        pairs = (states[i : i + 2] for i in range(0, len(states), 2))
        states = [merge(statistic, *pair) if len(pair) > 1 else pair[0] for pair in pairs]
    whole: Delayed = states[0]
    return whole


def _measure(statistic: Statistic[Any], run: Run, unit: Unit) -> State:
    return statistic.update(statistic.zero(), statistic.read(run, unit))


def _merge(statistic: Statistic[Any], a: State, b: State) -> State:
    return statistic.merge(a, b)


@contextmanager
def _bar(statistic: Statistic[Any], run: Run, n_units: int, *, shown: bool) -> Iterator[Callback | None]:
    """Draw the progress of the leaves on stderr."""
    if not shown:
        yield None
        return
    from dask.callbacks import Callback
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(
            f"{type(statistic).__name__.removesuffix('Statistic')} of {run.run_id}", total=n_units
        )

        def count(key: Any, *_: Any) -> None:
            if str(key).startswith("_measure-"):
                bar.advance(task)

        with Callback(posttask=count) as callback:
            yield callback
