"""A lake's objects, wherever they lie: a folder, ``s3://``, ``gs://``, ``memory://`` (any fsspec URL)."""

from __future__ import annotations

import io
import json
import os
import posixpath
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from .errors import CorruptRun, LakeNotFound, MissingExtra, StoreError
from .files import check_folder, delete_files, delete_tree, find_files, put_file, read_pieces, read_tail
from .ranges import Ranges, fetch_pieces, fetch_tail, read_merged
from .retries import ATTEMPTS, is_transient, retried, store_error
from .seal import SEAL_FIELD, is_intact, seal_json

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

__all__ = ["Store", "Stored"]

_MEMORY = threading.Lock()
"""memory:// looks whether an object exists and then writes it; the other file systems do both at once."""

_EXTRA_OF = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}

_BULK = 1000
"""The objects that S3 deletes at one request."""

_AHEAD_NBYTES = 1 << 16
"""What is read at least of a remote object that is opened: more than most Parquet footers."""

T = TypeVar("T")


class Stored(NamedTuple):
    """An object as a listing shows it."""

    name: str
    nbytes: int
    modified: float
    """When it was last written: seconds since 1970, by the store's clock."""


class Store:
    """The objects under one URL, by relative name.

    Every write is whole or absent: a reader never sees half an object. An operation that fails for a moment is
    tried again (:mod:`layerlake.catalog.retries`); one that fails for good is a StoreError that names the object.

    Parameters
    ----------
    url : str or path
        A local path or an fsspec URL. Credentials and endpoints are those that the URL's client finds by itself,
        for S3 in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL and their like.

    Raises
    ------
    MissingExtra
        The URL's protocol needs a package that is not installed.
    LakeNotFound
        No file system has this protocol, or the URL names no place in it.
    StoreError
        The protocol's client cannot be set up.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        given = os.fspath(url)
        protocol, _, place = given.partition("://") if "://" in given else ("file", "", given)
        bucket = place.partition("/")[0] if protocol in _EXTRA_OF else place
        if not bucket or (protocol == "memory" and not place.strip("/")):
            raise LakeNotFound(
                f"'{given}' names no place for a lake.",
                hint="Name a folder, or a bucket and what is in it: s3://bucket/lake",
            )
        self.url = given.rstrip("/") if place.strip("/") else given
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            raise MissingExtra(f"The package for {protocol}://", _EXTRA_OF.get(protocol, protocol)) from error
        except ValueError as error:
            raise LakeNotFound(f"'{self.url}' is not a path or a URL: {error}") from error
        # What others write must be seen at once; without the cache, a listing is never older than the call.
        options = {"use_listings_cache": False} if protocol in _EXTRA_OF else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (OSError, ValueError) as error:
            raise store_error(error, "opened", self.url) from error

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether the objects are files on this machine."""
        return isinstance(self._fs, LocalFileSystem)

    @property
    def local_path(self) -> Path:
        """The root folder of a local store."""
        return Path(self._root)

    def free_nbytes(self) -> int | None:
        """Return the free space where a local store is, or will be; None for any other."""
        if not self.is_local:
            return None
        there = next(path for path in (self.local_path, *self.local_path.parents) if path.exists())
        return shutil.disk_usage(there).free

    def check_creatable(self) -> None:
        """Raise StoreError unless a local store is a folder, or can be made one; of any other, nothing is known."""
        if self.is_local:
            check_folder(self.local_path)

    def _path(self, name: str) -> str:
        """Return where an object is.

        Raises
        ------
        CorruptRun
            The name leads out of the store: names are made of what lakes say, which anybody may have written.
        """
        if not name:
            return str(self._root)
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise CorruptRun(
                f"'{name}' is no name of an object of {self.url}: a part of it is empty, '.' or '..'.",
                hint=f"See what is damaged: layerlake verify {self.url}",
            )
        return f"{self._root.rstrip('/')}/{name}"

    def _retried(
        self,
        done: str,
        name: str,
        operation: Callable[[], T],
        *,
        is_worth_it: Callable[[BaseException], bool] = is_transient,
    ) -> T:
        where = f"{self.url}/{name}" if name else self.url
        return retried(done, where, operation, is_worth_it=is_worth_it)

    def read(self, name: str) -> bytes:
        """Return an object's bytes; FileNotFoundError if it is absent."""
        content: bytes = self._retried("read", name, lambda: self._fs.cat_file(self._path(name)))
        return content

    def read_tail(self, name: str, nbytes: int) -> bytes:
        """Return the last bytes of an object, or all if it has fewer; FileNotFoundError if it is absent."""
        path = self._path(name)
        read = partial(read_tail, Path(path)) if self.is_local else partial(fetch_tail, self._fs, path)
        return self._retried("read", name, lambda: read(nbytes))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return ranges of an object's bytes, each from a first to before a last; what is beyond its end is left out.

        Ranges that touch are read as one, and a remote store is asked for all at a time. FileNotFoundError if the
        object is absent.
        """
        path = self._path(name)
        read = partial(read_pieces, Path(path)) if self.is_local else partial(fetch_pieces, self._fs, path)
        return self._retried("read", name, lambda: read_merged(ranges, read))

    def open(self, name: str, *, nbytes: int | None = None) -> IO[bytes]:
        """Open an object for reading; a remote one is fetched by ranges as it is read.

        ``nbytes`` is its length, if a listing has told it; else a remote store is asked, and FileNotFoundError comes
        here and not from the first read.
        """
        path = self._path(name)
        if self.is_local:
            return self._retried("read", name, lambda: Path(path).open("rb"))

        def fetch(start: int, stop: int) -> bytes:
            content: bytes = self._retried(
                "read", name, lambda: self._fs.cat_file(path, start=start, end=stop)
            )
            return content

        if nbytes is None:
            nbytes = self._retried("read", name, lambda: int(self._fs.info(path)["size"]))
        return io.BufferedReader(Ranges(fetch, nbytes), _AHEAD_NBYTES)

    def read_json(self, name: str) -> Any:
        """Return a JSON object, without its seal.

        Raises
        ------
        CorruptRun
            The object is not JSON, or not what was written.
        """
        content = self.read(name)
        hint = f"See what else is damaged: layerlake verify {self.url}"
        try:
            value = json.loads(content)
        except ValueError as error:
            raise CorruptRun(f"{self.url}/{name} is not JSON: {error}", hint=hint) from error
        if isinstance(value, dict) and _pop_seal(value) is not None and not is_intact(content):
            raise CorruptRun(
                f"{self.url}/{name} is not what was written: its checksum does not fit.", hint=hint
            )
        return value

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        """Write or replace an object, all at once: the pieces end to end, which only a remote store must first join."""
        self._put(name, *pieces, create=False)

    def create(self, name: str, content: bytes) -> None:
        """Write an object that must not exist yet; FileExistsError if it does. Atomic: one of many wins.

        A create may succeed without our hearing of it. So a remote object that is there with these very bytes counts
        as created: who must know to be the only one writes bytes that nobody else does.
        """
        self._put(name, content, create=True)

    def _put(self, name: str, *pieces: bytes | memoryview, create: bool) -> None:
        if self.is_local:
            self._retried(
                "written",
                name,
                lambda: put_file(Path(self._path(name)), *pieces, create=create),
                # somebody has removed the folder, empty as it was
                is_worth_it=lambda error: is_transient(error) or isinstance(error, FileNotFoundError),
            )
            return
        try:
            content = b"".join(pieces)
            self._retried("written", name, lambda: self._put_remote(name, content, create=create))
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.url}/{name} could not be written: there is no such bucket. {error}",
                hint="Make the bucket first, or mend the URL.",
            ) from error

    def _put_remote(self, name: str, content: bytes, *, create: bool) -> None:
        path, mode = self._path(name), "create" if create else "overwrite"
        try:
            with _MEMORY if isinstance(self._fs, MemoryFileSystem) else nullcontext():
                self._fs.pipe_file(path, content, mode=mode)
        except FileExistsError:
            # our own bytes: an attempt before, ours or the client's, has succeeded and its answer was lost
            with suppress(FileNotFoundError):
                if create and self._fs.cat_file(path) == content:
                    return
            raise

    def write_json(self, name: str, value: Any, *, create: bool = False) -> None:
        """Write a JSON object, sealed (:mod:`layerlake.catalog.seal`); ``create`` as in :meth:`create`."""
        self._put(name, seal_json(value), create=create)

    def exists(self, name: str) -> bool:
        """Tell whether an object or a folder of this name exists."""
        path = self._path(name)
        try:  # a file system's own `exists` takes every failure for absence
            self._retried("looked up", name, lambda: self._fs.info(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def list(self, name: str) -> list[str]:
        """Return the sorted names directly under a folder, without their path; empty if it is absent."""
        path = self._path(name)
        try:
            entries: list[str] = self._retried("listed", name, lambda: self._fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(entry for entry in names if entry and not entry.endswith(".partial"))

    def walk(self, name: str = "") -> Iterator[tuple[str, int]]:
        """Yield ``(name, nbytes)`` of every object under a folder; none if it is absent."""
        for found, info in self._find(name).items():
            if not found.endswith(".partial"):
                yield found, info["size"]

    def scan(self, name: str = "") -> Iterator[Stored]:
        """List every object under a folder, unfinished files of a local store among them."""
        for found, info in self._find(name).items():
            yield Stored(found, info["size"], _modified(info))

    def _find(self, name: str) -> dict[str, dict[str, Any]]:
        """Return name → what its file system says of it, of every object under a folder, sorted."""
        path, prefix = self._path(name), len(self._path("").rstrip("/")) + 1
        find = find_files if self.is_local else lambda path: self._fs.find(path, detail=True)
        found = self._retried("listed", name, lambda: find(path))
        return {each[prefix:]: info for each, info in sorted(found.items())}

    def delete_all(self, names: Iterable[str], *, go_on: Callable[[], bool] = lambda: True) -> int:
        """Delete many objects, in bulk where the store can; absent is fine. Folders left empty go too.

        Lists a remote store once, after all of them.

        Parameters
        ----------
        names : iterable of str
            They go in this order, a thousand at a time.
        go_on : callable, optional
            Asked before each thousand; where it says no, the rest stays.

        Returns
        -------
        int
            How many are gone.

        Raises
        ------
        StoreError
            Some are still there.
        """
        given, n_gone = list(dict.fromkeys(names)), 0
        while some := given[n_gone : n_gone + _BULK]:
            if not go_on():
                break
            if self.is_local:
                paths = [Path(self._path(name)) for name in some]
                self._retried("cleared", "", partial(delete_files, paths, below=self.local_path))
            else:
                self._delete_remote(some)
            n_gone += len(some)
        return n_gone if self.is_local else n_gone - self._delete_left(set(given[:n_gone]), go_on)

    def _delete_left(self, left: set[str], go_on: Callable[[], bool]) -> int:
        """Delete what a bulk deletion has kept to itself that it could not delete; return how many are left.

        Some also stop at what is absent.
        """
        for _ in range(ATTEMPTS):
            if left:
                left &= set(self._find(posixpath.commonpath(left)))
            if not left or not go_on():  # what is there may be somebody else's by now
                return len(left)
            self._delete_remote(left)
        raise StoreError(f"{len(left)} objects of {self.url} could not be deleted, among them {min(left)}.")

    def _delete_remote(self, names: Iterable[str]) -> None:
        paths = sorted(self._path(name) for name in names)
        has_bulk = not isinstance(self._fs, MemoryFileSystem)
        bulk = [path for path in paths if has_bulk and not has_magic(path)]
        single = [path for path in paths if not has_bulk or has_magic(path)]
        for first in range(0, len(bulk), _BULK):
            some = bulk[first : first + _BULK]
            with suppress(FileNotFoundError):
                self._retried("deleted", f"… ({len(some)} objects)", partial(self._fs.rm, some))
        for path in single:
            with suppress(FileNotFoundError):  # rm_file never takes a * in a name for a pattern
                self._retried("deleted", path, partial(self._fs.rm_file, path))

    def delete(self, name: str) -> None:
        """Delete an object or a folder with all that is in it; absent is fine."""
        if self.is_local:
            self._retried("deleted", name, lambda: delete_tree(Path(self._path(name))))
        else:
            self.delete_all(self._find(name))

    def zarr_store(self, name: str, is_named: Callable[[str], bool] | None = None) -> ZarrStore:
        """Return a folder as a Zarr store, read-only.

        Parameters
        ----------
        name : str
            The folder.
        is_named : callable, optional
            Tells of a name in it whether that object must be there, so that its absence is a CorruptRun; Zarr takes
            it for zeros. Must pickle if the store does.
        """
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
        from zarr.storage import FsspecStore, LocalStore

        from .zarr_reads import ZarrReads

        path, url = self._path(name), f"{self.url}/{name}"
        if self.is_local:
            return ZarrReads(LocalStore(path, read_only=True), url, is_named)
        # in threads over the one client; nobody would ever close the connections of an asynchronous one
        client = AsyncFileSystemWrapper(self._fs, asynchronous=True)
        return ZarrReads(FsspecStore(client, read_only=True, path=path), url, is_named)


def _pop_seal(value: dict[str, Any]) -> Any:
    """Take the seal out of a JSON object, or out of the attributes of a Zarr node, and return it if there is one."""
    fields = value.get("attributes") if "node_type" in value else value
    return fields.pop(SEAL_FIELD, None) if isinstance(fields, dict) else None


def _modified(info: Mapping[str, Any]) -> float:
    """Return when an object was last written, from what its file system says of it."""
    said = next(
        info[key] for key in ("mtime", "LastModified", "last_modified", "updated", "created") if info.get(key)
    )
    if isinstance(said, str):
        said = datetime.fromisoformat(said)
    return said.timestamp() if isinstance(said, datetime) else float(said)
