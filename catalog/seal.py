"""The seal: every JSON and Parquet object of a lake carries a CRC-32 of itself.

So any of them can be checked alone, whatever else is lost. The seal is text, ``crc32:`` and eight hex digits: the
CRC-32 of the object's bytes with these digits as zeros. In JSON it is the field ``checksum``, in the metadata of a
Zarr node an attribute of that name, in Parquet an entry of the file's key-value metadata. Shards need none: their
chunks carry checksums.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["SEAL_FIELD", "UNSEALED", "is_intact", "seal", "seal_json"]

SEAL_FIELD = "checksum"
"""The name under which an object carries its seal."""

UNSEALED = "crc32:00000000"
"""The seal before the digits are known."""


def seal(content: bytes, *, line: str = UNSEALED) -> bytes:
    """Return an object's bytes with an :data:`UNSEALED` in them made the seal.

    Parameters
    ----------
    content : bytes
        The object.
    line : str
        Text that ends with :data:`UNSEALED`; the last such text is meant.

    Raises
    ------
    ValueError
        There is no such text.
    """
    digits = content.rindex(line.encode()) + len(line) - 8
    return content[:digits] + f"{zlib.crc32(content):08x}".encode() + content[digits + 8 :]


def seal_json(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object's bytes, keys sorted, sealed.

    Examples
    --------
    >>> print(seal_json({"format_version": 1}).decode())
    {
     "checksum": "crc32:3c804531",
     "format_version": 1
    }
    <BLANKLINE>
    """
    field = {SEAL_FIELD: UNSEALED}
    # Zarr's own fields are fixed; what others have to say goes among a node's attributes
    is_node = "node_type" in value
    sealed = {**value, "attributes": {**value["attributes"], **field}} if is_node else {**value, **field}
    content = (json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    # no text inside the value can look like this line: a string has no line breaks, and what lies deeper is indented
    return seal(content, line=f'\n{"  " if is_node else " "}"{SEAL_FIELD}": "{UNSEALED}')


def is_intact(content: bytes) -> bool:
    """Tell whether one of the seals in an object's bytes is theirs; false where there is none."""
    return any(
        zlib.crc32(content[: found.start(1)] + b"0" * 8 + content[found.end(1) :]) == int(found[1], 16)
        for found in re.finditer(rb"crc32:([0-9a-f]{8})", content)
    )
