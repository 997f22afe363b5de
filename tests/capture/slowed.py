"""A capture in a process of its own, into a store that takes its time, which may be killed at a given operation.

``python slowed.py '{"lake": …, "spec": {…}}'``; or forked off a server that has imported everything
(:func:`start`), because that takes a hundred times as long as what is tested.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_OPERATIONS = ("read", "write", "create", "write_json", "exists", "list", "delete", "delete_all")
_PRELOADED = (
    "torch", "transformers", "transformer_lens.model_bridge", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.modeling_auto", "layerlake.capture.execute", "layerlake.catalog.lake",
)  # fmt: skip


@dataclass
class Slowed:
    """Patches the store of this process."""

    latency_s: float
    """What every operation takes longer: half of it before, half of it after."""
    kill: Mapping[str, Any] | None = None
    """``match``, a pattern; ``count``, which of the operations that fit; ``delay_s`` after it begins; ``signal``."""
    attempts_path: str | None = None
    """Gets the number of attempts, before the folder is cleaned up."""
    n_operations: int = 0
    _n_matching: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def patch(self) -> None:
        """Slow the store down."""
        from layerlake.catalog.stores import Store

        for operation in _OPERATIONS:
            setattr(Store, operation, self._slow(operation, getattr(Store, operation)))

    def _slow(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def slow(store: Any, name: Any = "", *args: Any, **options: Any) -> Any:
            if operation.startswith("delete") and str(name).endswith("plan.json"):
                self._note_attempts(store, str(name))
            self._tick(f"{operation} {name}")
            time.sleep(self.latency_s / 2)
            result = function(store, name, *args, **options)
            time.sleep(self.latency_s / 2)
            return result

        return slow

    def _tick(self, what: str) -> None:
        with self._lock:
            self.n_operations += 1
            if self.kill is None or not re.search(self.kill["match"], what):
                return
            self._n_matching += 1
            if self._n_matching == self.kill["count"]:
                number = self.kill.get("signal", signal.SIGKILL)
                threading.Timer(self.kill["delay_s"], os.kill, (os.getpid(), number)).start()

    def _note_attempts(self, store: Any, plan: str) -> None:
        if self.attempts_path is not None:
            names = store.list(f"{plan.removesuffix('plan.json')}attempts")
            with Path(self.attempts_path).open("a") as file:
                file.write(f"{len(names)}\n")


def capture(options: Mapping[str, Any]) -> dict[str, Any]:
    """Capture, and return what came of it."""
    import torch

    torch.set_num_threads(1)
    from layerlake.capture.execute import execute_plan
    from layerlake.capture.plan import plan_capture
    from layerlake.capture.share import Share
    from layerlake.capture.spec import CaptureSpec

    slowed = Slowed(options.get("latency_s", 0.0), options.get("kill"), options.get("attempts_path"))
    slowed.patch()
    plan = plan_capture(CaptureSpec(**options["spec"]), options["lake"])
    if "meet" in options:  # all writers begin at once
        Path(f"{options['meet']}-{os.getpid()}").touch()
        while (
            len(list(Path(options["meet"]).parent.glob(f"{Path(options['meet']).name}-*")))
            < options["n_meet"]
        ):
            time.sleep(0.005)
    outcome = execute_plan(plan, options["lake"], share=Share.parse(options.get("share", "0/1")))
    return outcome.to_json() | {"n_operations": slowed.n_operations, "predicted": plan.to_json()}


def start(result_path: Path, **options: Any) -> ForkServerProcess:
    """Start a capture in a process of its own; it leaves its outcome at the path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    given = {"OPTIONS": options | {"result_path": str(result_path)}}
    process = context.Process(target=runpy.run_path, args=(__file__, given, "__main__"), daemon=True)
    process.start()
    return process


if __name__ == "__main__":
    given: dict[str, Any] = globals().get("OPTIONS") or json.loads(sys.argv[1])
    Path(given["result_path"]).write_text(json.dumps(capture(given)))
