"""Objects as files: written whole or not at all, whoever else writes, lists and deletes there at the same time."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import StoreError

__all__ = [
    "check_folder",
    "delete_files",
    "delete_tree",
    "find_files",
    "put_file",
    "read_pieces",
    "read_tail",
]


def read_tail(path: Path, nbytes: int) -> bytes:
    """Return the last bytes of a file, or all if it has fewer."""
    with path.open("rb") as file:
        file.seek(-min(nbytes, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read()


def read_pieces(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return ranges of a file's bytes, each from a first to before a last."""
    with path.open("rb") as file:
        return [file.read(stop - file.seek(start)) for start, stop in ranges]


def check_folder(path: Path) -> None:
    """Raise unless files can be written to a folder, which need not be there yet.

    Raises
    ------
    StoreError
        It is something else, or lies in something else, or nobody here may write there.
    """
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        raise StoreError(
            f"'{path}' cannot be a folder: '{there}' is {what}.", hint="Name a new or an empty folder."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(
            f"'{path}' cannot be written to: no access to '{there}'.", hint="Check who may write there."
        )


def put_file(path: Path, *pieces: bytes | memoryview, create: bool) -> None:
    """Write a file under another name, ``.….partial``, and give it its own when it is whole.

    Parameters
    ----------
    path : Path
        The file; its folders are made if need be.
    *pieces : bytes-like
        What is in it, end to end.
    create : bool
        Whether it must not exist yet.

    Raises
    ------
    FileExistsError
        It does.
    StoreError
        Its folder cannot be made: something else has the name, of it or of one above.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        check_folder(path.parent)
        raise StoreError(f"'{path.parent}' could not be made.") from None
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
        if create:
            _link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless the name is taken; a rename would replace what has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS: a link whose answer was lost is made again, and finds itself (open(2), O_EXCL)
        with suppress(FileNotFoundError):
            if temporary.samefile(path):
                return
        raise


def find_files(path: str) -> dict[str, dict[str, Any]]:
    """Return path → ``size`` in bytes and ``mtime`` of every file under a folder, or of the file that it is.

    What vanishes meanwhile is left out. A folder that cannot be listed is an error; fsspec would leave it out.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    paths = [Path(path)] if Path(path).is_file() else []
    for parent, _, names in os.walk(path, onerror=refuse, followlinks=True):
        paths += [Path(parent, name) for name in names]
    found = {}
    for each in paths:
        with suppress(FileNotFoundError):
            known = each.stat()
            found[str(each)] = {"size": known.st_size, "mtime": known.st_mtime}
    return found


def delete_files(paths: Iterable[Path], *, below: Path) -> None:
    """Delete files, and those of their folders that are left empty, as far up as below a folder; absent is fine."""
    folders = set()
    for path in paths:
        path.unlink(missing_ok=True)
        folders |= {parent for parent in path.parents if below in parent.parents}
    _prune(folders)


def delete_tree(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; absent is fine. What is written there meanwhile stays."""
    if not path.is_dir() or path.is_symlink():
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
        return
    folders = [path]
    for parent, below, names in os.walk(path):
        folders += [Path(parent, name) for name in below]
        for name in names:
            Path(parent, name).unlink(missing_ok=True)
    _prune(folders)


def _prune(folders: Iterable[Path]) -> None:
    """Remove those of some folders that are empty, the deepest first."""
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            folder.rmdir()
