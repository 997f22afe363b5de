"""A lake's objects, wherever they lie: a folder, ``s3://``, ``gs://``, ``memory://`` (any fsspec URL)."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from .errors import CorruptRun, LakeNotFound, MissingExtra

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

__all__ = ["Store"]

_MEMORY = threading.Lock()
"""memory:// looks whether an object exists and then writes it; the other file systems do both at once."""

_EXTRA_OF = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}


class Store:
    """The objects under one URL, by relative name.

    Every write is whole or absent: a reader never sees half an object.

    Parameters
    ----------
    url : str or path
        A local path or an fsspec URL.

    Raises
    ------
    MissingExtra
        The URL's protocol needs a package that is not installed.
    LakeNotFound
        No file system has this protocol.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise MissingExtra(f"The package for {protocol}://", _EXTRA_OF.get(protocol, protocol)) from error
        except ValueError as error:
            raise LakeNotFound(f"'{self.url}' is not a path or a URL: {error}") from error

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

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def read(self, name: str) -> bytes:
        """Return an object's bytes; FileNotFoundError if it is absent."""
        content: bytes = self._fs.cat_file(self._path(name))
        return content

    def open(self, name: str) -> IO[bytes]:
        """Open an object for reading; a remote one is fetched by ranges as it is read."""
        file: IO[bytes] = self._fs.open(self._path(name), "rb")
        return file

    def read_json(self, name: str) -> Any:
        """Return a JSON object.

        Raises
        ------
        CorruptRun
            The object is not JSON.
        """
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise CorruptRun(f"{self.url}/{name} is not JSON: {error}") from error

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write or replace an object, all at once."""
        self._put(name, content, create=False)

    def create(self, name: str, content: bytes) -> None:
        """Write an object that must not exist yet; FileExistsError if it does. Atomic: one of many wins."""
        self._put(name, content, create=True)

    def _put(self, name: str, content: bytes | memoryview, *, create: bool) -> None:
        path = self._path(name)
        if not self.is_local:
            with _MEMORY if isinstance(self._fs, MemoryFileSystem) else nullcontext():
                self._fs.pipe_file(path, bytes(content), mode="create" if create else "overwrite")
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            temporary.write_bytes(content)
            if create:
                os.link(temporary, target)  # fails if the target exists; a rename would not
            else:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any, *, create: bool = False) -> None:
        """Write a JSON object with sorted keys; ``create`` as in :meth:`create`."""
        content = (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
        self._put(name, content, create=create)

    def exists(self, name: str) -> bool:
        """Tell whether an object or a folder of this name exists."""
        return bool(self._fs.exists(self._path(name)))

    def list(self, name: str) -> list[str]:
        """Return the sorted names directly under a folder, without their path; empty if it is absent."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._path(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(entry for entry in names if entry and not entry.endswith(".partial"))

    def walk(self, name: str = "") -> Iterator[tuple[str, int]]:
        """Yield ``(name, nbytes)`` of every object under a folder."""
        self._fs.invalidate_cache()
        prefix = len(self._path("").rstrip("/")) + 1
        for path, info in self._fs.find(self._path(name), detail=True).items():
            if not path.endswith(".partial"):
                yield path[prefix:], info["size"]

    def delete(self, name: str) -> None:
        """Delete an object or a folder with all that is in it; absent is fine."""
        if self.exists(name):
            self._fs.rm(self._path(name), recursive=True)

    def zarr_store(self, name: str, *, read_only: bool = True) -> ZarrStore:
        """Return a folder as a Zarr store."""
        from zarr.storage import FsspecStore, LocalStore

        if self.is_local:
            return LocalStore(self._path(name), read_only=read_only)
        protocol = self.url.partition("://")[0]
        return FsspecStore.from_url(f"{protocol}://{self._path(name).lstrip('/')}", read_only=read_only)
