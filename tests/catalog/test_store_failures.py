"""Stores that fail: for a moment, for good, or without an answer."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import numpy as np
import pytest
import zarr
from moto.s3.responses import S3Response
from s3fs.errors import translate_boto_error

from layerlake.catalog.errors import StoreError
from layerlake.catalog.retries import ATTEMPTS
from layerlake.catalog.stores import Store


@pytest.mark.usefixtures("no_waiting")
def test_a_folder_that_vanishes_under_a_writer_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who deletes the last object of a folder removes the folder."""
    store, opened, calls = Store(tmp_path), Path.open, 0

    def too_late(path: Path, mode: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.parent.rmdir()
        return opened(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", too_late)
        store.write("wip/1", b"x", b"y")
    assert store.read("wip/1") == b"xy"
    assert calls == 2


def test_over_nfs_a_link_may_find_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, link = Store(tmp_path), os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    store.create("a", b"first")
    with pytest.raises(FileExistsError):
        store.create("a", b"first")
    assert store.list("") == ["a"]


@pytest.mark.parametrize("is_lost", [True, False], ids=["answer lost", "not done"])
def test_a_create_that_is_not_answered(
    is_lost: bool,
    flaky: type[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flaky, "rate", 0.0)
    store, create = Store("flaky://lake"), flaky.pipe_file
    n_calls = 0

    def unanswered(self: Any, path: str, value: bytes, **options: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if is_lost or n_calls > 1:
            create(self, path, value, **options)
        if n_calls == 1:
            raise ConnectionResetError

    monkeypatch.setattr(flaky, "pipe_file", unanswered)
    store.create("x", b"mine")
    assert n_calls == 2
    assert store.read("x") == b"mine"
    with pytest.raises(FileExistsError):
        store.create("x", b"another's")
    assert store.read("x") == b"mine"


def _client_error(code: str, status: int) -> Exception:
    answer: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(answer, "Something"))  # type: ignore[no-any-return]


class HttpError(Exception):
    """As gcsfs and the Azure SDK have them."""

    def __init__(self, message: str = "said the service", **fields: Any) -> None:
        super().__init__(message)
        vars(self).update(fields)


TRANSIENT: list[Exception] = [
    ConnectionResetError(),
    ConnectionRefusedError(),
    TimeoutError(),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.EBUSY, "busy"),
    _client_error("SlowDown", 503),
    _client_error("InternalError", 500),
    _client_error("RequestTimeout", 400),
    _client_error("TooManyRequests", 429),
    _client_error("ConditionalRequestConflict", 409),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://nowhere"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://nowhere"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://nowhere"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    HttpError(code="503"),
    HttpError(status_code=500),
]
FINAL: list[Exception] = [
    PermissionError("no"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EDQUOT, "quota"),
    OSError(errno.EROFS, "read-only"),
    OSError("Forbidden: x"),
    ValueError("Bad Request"),
    _client_error("AccessDenied", 403),
    _client_error("InvalidArgument", 400),
    _client_error("NotImplemented", 501),
    botocore.exceptions.NoCredentialsError(),
    HttpError(code=401),
    HttpError(status_code=403),
]


def _name(error: Exception) -> str:
    return f"{type(error).__name__} {error}"


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("error", TRANSIENT, ids=_name)
def test_what_may_pass_is_tried_again(
    error: Exception, counting: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = Store("counting://lake"), 0
    store.write("a", b"x")

    def fail(*_: object, **__: object) -> bytes:
        nonlocal calls
        calls += 1
        raise error

    monkeypatch.setattr(counting, "cat_file", fail)
    with pytest.raises(StoreError, match="counting://lake/a could not be read, in 6 attempts") as caught:
        store.read("a")
    assert calls == ATTEMPTS == 6
    assert caught.value.__cause__ is error
    assert "network" in caught.value.hint
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.hint) == (str(caught.value), caught.value.hint)


@pytest.mark.parametrize("error", FINAL, ids=_name)
def test_what_will_not_pass_is_said_at_once(
    error: Exception, counting: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = Store("counting://lake"), 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise error

    monkeypatch.setattr(counting, "pipe_file", fail)
    with pytest.raises(StoreError, match="counting://lake/a could not be written") as caught:
        store.write("a", b"x")
    assert calls == 1
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [FileNotFoundError(), FileExistsError(), IsADirectoryError()], ids=_name)
def test_an_answer_is_no_failure(
    error: Exception, counting: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store("counting://lake")

    def answer(*_: object, **__: object) -> bytes:
        counting.calls["cat_file"] += 1
        raise error

    monkeypatch.setattr(counting, "cat_file", answer)
    with pytest.raises(type(error)):
        store.read("a")
    assert counting.calls["cat_file"] == 1


def test_our_own_mistakes_are_not_blamed_on_the_store(
    counting: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: object, **__: object) -> bytes:
        raise TypeError

    monkeypatch.setattr(counting, "cat_file", mistake)
    with pytest.raises(TypeError):
        Store("counting://lake").read("a")


@pytest.mark.usefixtures("no_waiting")
def test_existence_is_not_denied_for_want_of_an_answer(
    counting: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise ConnectionResetError

    monkeypatch.setattr(counting, "info", fail)
    with pytest.raises(StoreError, match="could not be looked up"):
        Store("counting://lake").exists("a")


def test_a_folder_that_may_not_be_listed_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, scandir = Store(tmp_path), os.scandir
    store.write("a/1", b"")

    def refuse(path: str) -> Any:
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="no access") as caught:
        list(store.walk())
    assert "who may read" in caught.value.hint


@pytest.mark.usefixtures("no_waiting")
def test_a_chunk_that_cannot_be_read_is_no_zeros(
    counting: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = zarr.storage.MemoryStore()
    zarr.create_array(made, name="a", data=np.arange(6))
    store = Store("counting://lake")
    for name, content in made._store_dict.items():  # noqa: SLF001
        store.write(f"z/{name}", content.to_bytes())

    def fail(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("/c/0"):
            raise ConnectionResetError
        return read(self, path, **options)

    read = counting.cat_file
    monkeypatch.setattr(counting, "cat_file", fail)
    array = zarr.open_array(store.zarr_store("z"), path="a", mode="r", zarr_format=3)
    with pytest.raises(StoreError, match=r"counting://lake/z/a/c/0 could not be read, in 6 attempts"):
        array[...]


# -- S3 ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("client_attempts", [1, 2], ids=["botocore gives up", "botocore tries again"])
def test_a_create_that_s3_does_not_answer(
    s3_url: str, client_attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 writes the object and breaks off: ours is the object, whoever asks again, botocore or we."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(client_attempts))
    store, put, calls = Store(f"{s3_url}/lake"), S3Response.put_object, 0

    def unanswered(self: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = put(self)
        return answer if calls > 1 else (500, {}, "<Error><Code>InternalError</Code></Error>")

    monkeypatch.setattr(S3Response, "put_object", unanswered)
    store.create("x", b"mine")
    assert calls == 2
    assert store.read("x") == b"mine"
    with pytest.raises(FileExistsError):
        store.create("x", b"another's")


def test_s3_without_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=f"{s3_url}/lake/a could not be written: no access") as caught:
        Store(f"{s3_url}/lake").write("a", b"")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


def test_a_bucket_that_is_not_there(s3_url: str) -> None:
    store = Store(f"{s3_url}-not/lake")
    assert store.list("") == []
    assert not store.exists("a")
    with pytest.raises(StoreError, match="there is no such bucket"):
        store.write("a", b"")


@pytest.mark.usefixtures("no_waiting")
def test_s3_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match=r"in 6 attempts: EndpointConnectionError") as caught:
        Store(f"{s3_url}/lake").write("a", b"")
    assert "network" in caught.value.hint
