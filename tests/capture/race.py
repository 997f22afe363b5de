"""Writers as threads of which one runs at a time, by a schedule: each operation on the store is a step."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerlake.catalog.manifest import Manifest
from layerlake.catalog.stores import Store

__all__ = ["Crash", "Play", "Stepping"]


class Crash(BaseException):
    """Ends a writer as kill −9 would: nothing may catch it."""


class Stepping(Store):
    """A store of which one writer's operations are steps: before each it waits for its turn.

    Or, where a writer is not to pause between its last look and what it writes then, before some of them.
    """

    def __init__(self, url: str, step: Callable[[], None], *, pauses_before_writes: bool) -> None:
        super().__init__(url)
        self._step_always, self._pauses_before_writes = step, pauses_before_writes

    def _step(self, name: str = "", *, is_last_look: bool = False) -> None:
        if self._pauses_before_writes or not (is_last_look or name.endswith(("open.json", "plan.json"))):
            self._step_always()

    def read(self, name: str) -> bytes:
        self._step(name)
        return super().read(name)

    def exists(self, name: str) -> bool:
        self._step(name)
        return super().exists(name)

    def list(self, name: str) -> list[str]:
        self._step()
        return super().list(name)

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        self._step(is_last_look=True)
        super().write(name, *pieces)

    def create(self, name: str, content: bytes) -> None:
        self._step(is_last_look=True)
        super().create(name, content)

    def write_json(self, name: str, value: Any, *, create: bool = False) -> None:
        self._step(is_last_look=True)
        super().write_json(name, value, create=create)

    def delete(self, name: str) -> None:
        """A folder goes object by object: this is where remote stores may be interrupted."""
        names = [each for each, _ in super().walk(name)]
        for i, each in enumerate(names or [name]):
            self._step(is_last_look=i == 0)
            super().delete_all([each])


class _Writer:
    def __init__(self, play: Play, url: str, dies_at: int | None, *, pauses_before_writes: bool) -> None:
        self.store = Stepping(url, self._step, pauses_before_writes=pauses_before_writes)
        self.dies_at = dies_at
        self.n_steps = 0
        self.is_done = False
        self.result: Manifest | BaseException | None = None
        self._play = play
        self._turn = threading.Semaphore(0)

    def start(self, function: Callable[[Store], Manifest | None]) -> None:
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[Store], Manifest | None]) -> None:
        self._turn.acquire()
        try:
            self.result = function(self.store)
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            self.result = error
        self.is_done = True
        self._play.stopped.release()

    def _step(self) -> None:
        self._play.stopped.release()
        self._turn.acquire()
        if self.n_steps == self.dies_at:
            raise Crash
        self.n_steps += 1

    def advance(self) -> None:
        self._turn.release()
        self._play.stopped.acquire()


class Play:
    """Runs several writers by a schedule.

    Parameters
    ----------
    url : str
        An empty lake.
    functions : sequence of callable
        One a writer: is given its store.
    schedule : sequence of (int, int)
        Which of those that are still there goes, and for how many steps; after its end, one after the other.
    deaths : mapping
        Writer → the step at which it dies.
    watch : callable
        Looks at the store each time that another writer's turn comes.
    pauses_before_writes : bool
        Whether a writer may stand still between its last look at the store and what it writes then.
    """

    def __init__(
        self, url: str, functions: Sequence[Callable[[Store], Manifest | None]], schedule: Sequence[tuple[int, int]],
        deaths: Mapping[int, int], *, watch: Callable[[Store], None], pauses_before_writes: bool = True,
    ) -> None:  # fmt: skip
        self.stopped = threading.Semaphore(0)
        self.store = Store(url)
        self.writers = [
            _Writer(self, url, deaths.get(i), pauses_before_writes=pauses_before_writes)
            for i in range(len(functions))
        ]
        for writer, function in zip(self.writers, functions, strict=True):
            writer.start(function)
        for which, n_steps in itertools.chain(schedule, itertools.repeat((0, 10))):
            alive = [writer for writer in self.writers if not writer.is_done]
            if not alive:
                break
            writer = alive[which % len(alive)]
            for _ in range(n_steps):
                if not writer.is_done:
                    writer.advance()
            watch(self.store)

    @property
    def failures(self) -> list[BaseException]:
        """What ended writers, but for their deaths."""
        found = (writer.result for writer in self.writers)
        return [each for each in found if isinstance(each, BaseException) and not isinstance(each, Crash)]
