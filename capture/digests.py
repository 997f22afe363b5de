"""Digests of files, of tensors and of JSON; those of large files are remembered."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .frozen import digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["digest_files", "digest_tensors", "file_digest"]

_REMEMBERED_NBYTES = 64 << 20
"""Smaller files are read faster than they are looked up."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hex.

    That of a large file is kept in the user's cache by path, size and time of change, and not computed again.
    """
    status = path.stat()
    if status.st_size < _REMEMBERED_NBYTES:
        return _read_digest(path)
    key = {"path": str(path.resolve()), "nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    note = _cache_folder() / f"{digest_json(key['path'], 32)}.json"
    # a cache that cannot be read or written is no cache
    with suppress(OSError, ValueError, TypeError):
        known = json.loads(note.read_text())
        if all(known.get(name) == value for name, value in key.items()):
            return str(known["sha256"])
    digest = _read_digest(path)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.{os.getpid()}")
        temporary.write_text(json.dumps(key | {"sha256": digest}))
        temporary.replace(note)
    return digest


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "layerlake" / "digests"


def digest_files(paths: Iterable[Path]) -> str:
    """Return the digest of some files' names and contents; ValueError if there are none: nothing identifies nothing."""
    found = [[path.name, file_digest(path)] for path in sorted(paths)]
    if not found:
        raise ValueError("there are no files to digest")
    return digest_json(found, 64)


def digest_tensors(model: PreTrainedModel) -> str:
    """Return the digest of a loaded model's parameters and buffers by name, shape and bits."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
