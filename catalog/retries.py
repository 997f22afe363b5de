"""Operations on a store, done again where network or service fail for a moment, and said in words where they fail.

The waits are exponential with full jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/),
so that many writers who were turned away together do not come back together. What a client library retries by itself
(botocore, s3fs, gcsfs, the Azure SDK) happens below this.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from .errors import LayerLakeError, StoreError

__all__ = ["ATTEMPTS", "http_status", "is_transient", "retried", "retried_async", "store_error"]

ATTEMPTS = 6
"""How often an operation is tried."""

FIRST_WAIT_S = 0.5
"""The longest wait before the second attempt; it doubles with each attempt."""

LONGEST_WAIT_S = 10.0

PATIENCE_S = 60.0
"""No attempt is begun later than this after the first."""

ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""What an operation may find out: no failures, and never translated."""

_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP: timeout, conflict with an operation under way, too early, too many requests, the server's own troubles."""

_TRANSIENT_ERRNO = {
    errno.EAGAIN, errno.EBUSY, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.ENETDOWN,
    errno.ENETRESET, errno.ENETUNREACH, errno.ENOBUFS, getattr(errno, "EREMOTEIO", errno.EIO), errno.ESTALE,
}  # fmt: skip
"""EIO and ESTALE are what NFS says when its server was away."""

_TRANSIENT_KINDS = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.parsers.ResponseParserError",
    "gcsfs.retry.ChecksumError",
    "google.auth.exceptions.TransportError",
    "http.client.HTTPException",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
}
"""Errors of the clients' that say that a connection failed; by name, because most of the clients are not installed."""

_ACCESS_KINDS = {
    "azure.core.exceptions.ClientAuthenticationError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.SSOError",
    "botocore.exceptions.TokenRetrievalError",
    "google.auth.exceptions.DefaultCredentialsError",
    "google.auth.exceptions.RefreshError",
}

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_CONNECTION_STRING)",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_CONNECTION_STRING)",
}
"""protocol → where its client takes credentials from."""

T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Tell whether the same operation may succeed a moment later."""
    if isinstance(error, (*ANSWERS, PermissionError)):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    return any(
        getattr(cause, "errno", None) in _TRANSIENT_ERRNO or _is_kind(cause, _TRANSIENT_KINDS)
        for cause in _causes(error)
    )


def retried(
    done: str,
    where: str,
    operation: Callable[[], T],
    *,
    is_worth_it: Callable[[BaseException], bool] = is_transient,
) -> T:
    """Return what an operation returns; at most six attempts within a minute.

    Parameters
    ----------
    done : str
        What the operation does, as it is said of an object: "read", "written", "listed", …
    where : str
        The object's URL.
    operation : callable
        May be done several times, also after it has succeeded unnoticed.
    is_worth_it : callable, optional
        Which errors to try again after.

    Raises
    ------
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError
        The operation's own answers.
    StoreError
        It failed for good.
    """
    policy = Retrying(**_policy(is_worth_it))
    with _translated(done, where, policy.statistics):
        return policy(operation)


async def retried_async(done: str, where: str, operation: Callable[[], Awaitable[T]]) -> T:
    """Do what :func:`retried` does with an operation that is awaited."""

    async def awaited() -> T:  # tenacity awaits coroutine functions only
        return await operation()

    policy = AsyncRetrying(**_policy(is_transient))
    with _translated(done, where, policy.statistics):
        return await policy(awaited)


@contextmanager
def _translated(done: str, where: str, attempts: Mapping[str, float]) -> Iterator[None]:
    """Turn what fails for good into a StoreError, and let an operation's own answers pass."""
    try:
        yield
    except ANSWERS:
        raise
    except Exception as error:
        if not _is_foreign(error):
            raise
        raise store_error(error, done, where, attempts) from error


def _policy(is_worth_it: Callable[[BaseException], bool]) -> dict[str, Any]:
    return {
        "stop": stop_after_attempt(ATTEMPTS) | stop_after_delay(PATIENCE_S),
        "wait": wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        "retry": retry_if_exception(is_worth_it),
        "reraise": True,
    }


def store_error(
    error: BaseException, done: str, where: str, attempts: Mapping[str, float] | None = None
) -> StoreError:
    """Return the error that says what failed, at which object, why, and what to do.

    Parameters
    ----------
    error : Exception
        The last cause.
    done, where
        As in :func:`retried`.
    attempts : mapping, optional
        tenacity's statistics of the attempts.
    """
    scheme = where.partition("://")[0] if "://" in where else ""
    what = f"{where} could not be {done}"
    if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}:
        full = (
            "the disk is full"
            if getattr(error, "errno", None) == errno.ENOSPC
            else "the disk quota is used up"
        )
        return StoreError(f"{what}: {full}.", hint="Make room there, then run the command again.")
    if is_transient(error):
        n = int((attempts or {}).get("attempt_number", 1))
        return StoreError(
            f"{what}, in {n} attempt{'s' * (n != 1)}: {_in_words(error)}",
            hint="Is the network up, and the service? Then run the command again.",
        )
    if _is_access(error):
        mend = f"Its client takes them from {_CREDENTIALS[scheme]}." if scheme in _CREDENTIALS else ""
        return StoreError(
            f"{what}: no access. {_in_words(error)}",
            hint=f"Check the credentials and what they may do there. {mend}".strip()
            if scheme
            else "Check who may read and write there.",
        )
    return StoreError(f"{what}: {_in_words(error)}")


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ").rstrip(".") + "."


def _is_foreign(error: BaseException) -> bool:
    """Tell whether an error comes from a file system or its client, not from a mistake in this package."""
    if isinstance(error, LayerLakeError):
        return False
    return isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__ != "builtins"


def _is_access(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or http_status(error) in {401, 403}
        or any(_is_kind(cause, _ACCESS_KINDS) for cause in _causes(error))
        or "Forbidden" in str(error)  # gcsfs: an OSError without a number
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from: s3fs and adlfs wrap their clients' errors."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_kind(error: BaseException, names: set[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error stands for, as botocore, aiohttp, gcsfs and azure keep it."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):  # botocore's ClientError
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for name in ("status_code", "status", "code"):
            status = str(getattr(cause, name, ""))
            if status.isdecimal() and 100 <= int(status) < 600:
                return int(status)
    return None
