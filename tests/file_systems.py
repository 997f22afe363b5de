"""Stores for tests: ``flaky://``, ``slow://`` and ``counting://`` in memory, and S3 from a server in this process."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from layerlake.catalog import retries

OPERATIONS = ("cat_file", "exists", "find", "info", "ls", "open", "pipe_file", "rm", "rm_file")


class WatchedFileSystem(MemoryFileSystem):  # type: ignore[misc]  # it has no types
    """memory:// of its own, whose every call from outside goes through :meth:`around`."""

    _inside = threading.local()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, str):
            path = path.removeprefix(f"{cls.protocol}://")
        return super()._strip_protocol(path)

    @classmethod
    @contextmanager
    def around(cls, operation: str) -> Iterator[None]:  # noqa: ARG003
        """Do what is to be done before and after an operation."""
        yield

    @classmethod
    def clear(cls) -> None:
        """Forget all objects."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]


def _watched(operation: str) -> Callable[..., Any]:
    function = getattr(MemoryFileSystem, operation)

    def call(self: WatchedFileSystem, *args: Any, **options: Any) -> Any:
        if getattr(self._inside, "is_set", False):
            return function(self, *args, **options)
        self._inside.is_set = True
        try:
            with self.around(operation):
                return function(self, *args, **options)
        finally:
            self._inside.is_set = False

    return call


for _operation in OPERATIONS:
    setattr(WatchedFileSystem, _operation, _watched(_operation))


class FlakyFileSystem(WatchedFileSystem):
    """Fails some of its calls, half of these after they did what they were asked to do."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    rate: ClassVar[float] = 0.1
    chances: ClassVar[dict[str, random.Random]] = {}
    """Each operation has its own, so that threads do not change how many of its calls fail."""
    failures: ClassVar[Counter[str]] = Counter()

    @classmethod
    @contextmanager
    def around(cls, operation: str) -> Iterator[None]:
        drawn = cls.chances[operation].random()
        if drawn < cls.rate / 2:
            cls.failures[operation] += 1
            raise ConnectionResetError(f"{operation}: the connection broke before it was done")
        yield
        if drawn < cls.rate:
            cls.failures[operation] += 1
            raise TimeoutError(f"{operation}: it was done, and nobody said so")


class SlowFileSystem(WatchedFileSystem):
    """Takes its time."""

    protocol = "slow"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    latency_s: ClassVar[float] = 0.02

    @classmethod
    @contextmanager
    def around(cls, operation: str) -> Iterator[None]:  # noqa: ARG003
        time.sleep(cls.latency_s)
        yield


class CountingFileSystem(WatchedFileSystem):
    """Counts its calls by operation."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[Counter[str]] = Counter()

    @classmethod
    @contextmanager
    def around(cls, operation: str) -> Iterator[None]:
        cls.calls[operation] += 1
        yield


for _kind in (FlakyFileSystem, SlowFileSystem, CountingFileSystem):
    fsspec.register_implementation(_kind.protocol, _kind, clobber=True)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once what failed."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    """``flaky://``, empty: every tenth call fails (``rate``); ``failures`` counts them. Nobody waits.

    More attempts than usual: one call in a million fails six times, and threads decide which.
    """
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(retries, "ATTEMPTS", 10)
    monkeypatch.setattr(FlakyFileSystem, "rate", 0.1)
    FlakyFileSystem.chances = {name: random.Random(name) for name in OPERATIONS}  # noqa: S311  # no secret
    FlakyFileSystem.failures.clear()
    yield FlakyFileSystem
    FlakyFileSystem.clear()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SlowFileSystem]]:
    """``slow://``, empty: every call waits for ``latency_s``."""
    monkeypatch.setattr(SlowFileSystem, "latency_s", 0.02)
    yield SlowFileSystem
    SlowFileSystem.clear()


@pytest.fixture
def counting() -> Iterator[type[CountingFileSystem]]:
    """``counting://``, empty; ``calls`` counts."""
    CountingFileSystem.calls.clear()
    yield CountingFileSystem
    CountingFileSystem.clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Run an S3 endpoint in this process, and return its URL."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(self: Any) -> Any:
        with one_at_a_time:  # moto looks whether an object exists and then writes it; S3 does both at once
            return put(self)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make an empty bucket, whose endpoint and credentials stand in AWS's own variables."""
    import s3fs

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()
