"""Shards read directly: the chunks that hold some rows, by byte ranges, each held against its checksum.

The arrays are ordinary Zarr arrays, and Zarr reads them too (:meth:`Run.array`). It takes some six times as long for a
few rows of many shards, where nearly all of its time goes to the coroutines that it makes for each chunk; and it gives
zeros for a chunk that a shard should have and has not, which here is an error.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from .errors import CorruptRun
from .layout import object_name, run_path
from .manifest import Manifest
from .problem import Deviation, require
from .sites import Site
from .stores import Store

__all__ = [
    "ABSENT",
    "STORED",
    "Rows",
    "ShardCut",
    "ascending",
    "decode",
    "decode_chunk",
    "parse_index",
    "read_index",
    "read_shard",
    "read_site",
    "require_crc32c",
    "split_rows",
]

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.uint64]
Rows = range | npt.NDArray[np.int64]
"""Places on the long axis of an array, as :func:`ascending` gives them: int64, or a range without steps."""

ABSENT = 2**64 - 1
"""Offset and length of a chunk that is not in the shard."""

STORED = {"float16": ("float16", 2), "bfloat16": ("uint16", 2), "float32": ("float32", 4)}
"""dtype of a run → name and bytes of a stored value."""


@dataclass(frozen=True, slots=True)
class ShardCut:
    """How one shard is cut, and how much of it is used."""

    n_series: int
    """Independent sequences of chunks: 1, or one a head."""
    n_chunks: int
    """Chunks of a series, used or not."""
    chunk_rows: int
    width: int
    """Values of a row."""
    n_rows: int
    """Used rows of a series, from the first on."""
    dtype: str
    """float16, bfloat16 or float32."""
    codec: str
    """none, lz4 or zstd."""

    @classmethod
    def of(cls, site: Site, manifest: Manifest, partition: int) -> ShardCut:
        """Return the cut of a partition's shards of one site."""
        geometry, shape = manifest.geometry, manifest.shape
        used = manifest.partition(partition)
        chunk_rows = geometry.chunk_rows[site.name]
        n_chunks = geometry.partition_rows(site) // chunk_rows
        if site.rows == "pair":
            n_series, width, n_rows = shape.n_heads, 1, used.n_pairs
        else:
            n_series, width, n_rows = 1, site.width(shape), used.n_rows
        return cls(n_series, n_chunks, chunk_rows, width, n_rows, manifest.dtype, manifest.codec)

    @property
    def chunk_values(self) -> int:
        """Values of a chunk."""
        return self.chunk_rows * self.width

    @property
    def n_values(self) -> int:
        """Used values of a series."""
        return self.n_rows * self.width

    @property
    def n_used(self) -> int:
        """Chunks of a series that hold a used row: these are in the shard, and no others."""
        return math.ceil(self.n_rows / self.chunk_rows)

    @property
    def index_nbytes(self) -> int:
        """Bytes of the index at the shard's end, its checksum included."""
        return 16 * self.n_series * self.n_chunks + 4


def read_site(
    store: Store, manifest: Manifest, site: Site, layer: int, rows: Rows, *, series: Sequence[int] = (0,)
) -> npt.NDArray[Any]:
    """Return some rows of one layer of a site as they are stored: ``[series, row, width]`` (:func:`read_shard`).

    Parameters
    ----------
    store, manifest : Store, Manifest
        The run, which holds the site in every partition of the rows.
    site, layer : Site, int
        The array, and the place on its first axis.
    rows : Rows
        Used ones, within the run's partitions.
    series : sequence of int
        Heads, of ``pattern``.

    Raises
    ------
    IndexError
        There is no such layer or head, or a row is not used.
    CorruptRun
        A shard is gone, or what is read of it is not what was written.
    """
    n_layers, per_partition = site.n_layers(manifest.shape), manifest.geometry.partition_rows(site)
    if not 0 <= layer < n_layers:
        raise IndexError(f"There is no {site.axis} {layer} of {site.name}: they are 0 … {n_layers - 1}.")
    pieces = []
    for number, inside in split_rows(rows, per_partition):
        cut = ShardCut.of(site, manifest, number)
        name = f"{run_path(manifest.run_id)}/{object_name(site, layer, number)}"
        pieces.append(read_shard(store, name, cut, inside, series=series))
    if not pieces:
        width = 1 if site.rows == "pair" else site.width(manifest.shape)
        return np.empty((len(series), 0, width), dtype=STORED[manifest.dtype][0])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def read_shard(
    store: Store, name: str, cut: ShardCut, rows: Rows, *, series: Sequence[int] = (0,)
) -> npt.NDArray[Any]:
    """Return some rows of a shard as they are stored: ``[series, row, width]``, bfloat16 as uint16.

    Reads the index and then the chunks that hold a row, neighbours in one range; all at once if these are all.

    Parameters
    ----------
    store : Store
        The lake.
    name : str
        The shard.
    cut : ShardCut
        How it is cut.
    rows : Rows
        Used rows, at least one, counted from the shard's first.
    series : sequence of int
        Heads, of ``pattern``.

    Raises
    ------
    IndexError
        There is no such head, or a row is not used.
    CorruptRun
        The shard is gone, or one of the chunks, or the index, is not what was written.
    """
    if not 0 <= rows[0] <= rows[-1] < cut.n_rows or not set(series) <= set(range(cut.n_series)):
        held = f"{cut.n_rows} used rows and {cut.n_series} heads"
        raise IndexError(f"{store.url}/{name} has {held}, and not all that are asked for.")
    parts = split_rows(rows, cut.chunk_rows)
    ends = np.cumsum([len(inside) for _, inside in parts]).tolist()
    values = np.empty((len(series), len(rows), cut.width), dtype=STORED[cut.dtype][0])
    places = [(one, number) for one in series for number, _ in parts]
    with _corrupt(store, name):
        for i, sealed in enumerate(_read_chunks(store, name, cut, places)):
            n, part = divmod(i, len(parts))
            inside = parts[part][1]
            chunk = decode_chunk(sealed, cut, places[i])
            chosen = slice(inside.start, inside.stop) if isinstance(inside, range) else inside
            values[n, ends[part] - len(inside) : ends[part]] = chunk[chosen]
    return values


def ascending(rows: Rows) -> Rows:
    """Return rows as int64, or as a range if they follow each other: in that, nothing has to be looked up.

    Raises
    ------
    ValueError
        They do not ascend.

    Examples
    --------
    >>> ascending(np.array([3, 4, 5], np.uint8)), ascending(range(1, 6, 2)), ascending(np.array([2, 2]))
    (range(3, 6), array([1, 3, 5]), array([2, 2]))
    """
    if isinstance(rows, range) and rows.step == 1:
        return rows
    each = np.asarray(rows, dtype=np.int64)
    steps = np.diff(each)
    if (steps < 0).any():
        raise ValueError("The rows to be read do not ascend.")
    return range(int(each[0]), int(each[-1]) + 1) if len(each) and (steps == 1).all() else each


def split_rows(rows: Rows, size: int) -> list[tuple[int, Rows]]:
    """Cut rows where a block of so many rows ends: each block's number, and its rows counted from its first.

    Examples
    --------
    >>> split_rows(range(3, 9), 4)
    [(0, range(3, 4)), (1, range(0, 4)), (2, range(0, 1))]
    >>> split_rows(np.array([1, 2, 2, 9]), 4)
    [(0, array([1, 2, 2])), (2, array([1]))]
    """
    if not len(rows):
        return []
    numbers = range(int(rows[0]) // size, int(rows[-1]) // size + 1)
    edges = [bisect_left(rows, number * size) for number in numbers] + [len(rows)]
    return [
        (number, _moved(rows[first:end], -number * size))
        for number, (first, end) in zip(numbers, pairwise(edges), strict=True)
        if first < end
    ]


def _moved(rows: Rows, by: int) -> Rows:
    return range(rows.start + by, rows.stop + by) if isinstance(rows, range) else rows + by


def read_index(store: Store, name: str, cut: ShardCut) -> Index:
    """Return where the chunks of a shard lie: ``[series, chunk, (offset, length)]``, uint64, in bytes.

    Raises
    ------
    CorruptRun
        The shard is gone, or its index is not what was written.
    """
    with _corrupt(store, name):
        return parse_index(store.read_tail(name, cut.index_nbytes), cut)


def parse_index(content: bytes | memoryview, cut: ShardCut) -> Index:
    """Return where the chunks of a shard lie: ``[series, chunk, (offset, length)]``, uint64, in bytes.

    Raises
    ------
    Deviation
        These are not the bytes of such an index.
    """
    require("bytes of the index", cut.index_nbytes, len(content))
    require_crc32c("index", np.frombuffer(content, dtype=np.uint8))
    return np.frombuffer(content[:-4], dtype="<u8").reshape(cut.n_series, cut.n_chunks, 2)


def decode_chunk(sealed: Bytes, cut: ShardCut, place: tuple[int, int]) -> npt.NDArray[Any]:
    """Return a chunk's values as they are stored, once its checksum is right: ``[row, width]``.

    Without a codec they are not copied.

    Parameters
    ----------
    sealed : uint8 ``[byte]``
        The encoded chunk, which ends with its checksum.
    cut : ShardCut
        How the shard is cut.
    place : (int, int)
        The chunk's series and its number, for messages.

    Raises
    ------
    Deviation
        The chunk is not what was written.
    """
    series, number = place
    require_crc32c(f"chunk {number} of series {series}", sealed)
    name, itemsize = STORED[cut.dtype]
    raw = sealed[:-4] if cut.codec == "none" else _decompress(sealed[:-4])
    require(f"bytes of chunk {number} of series {series}", cut.chunk_values * itemsize, len(raw))
    return raw.view(np.dtype(name).newbyteorder("<")).reshape(cut.chunk_rows, cut.width)


def _decompress(content: Bytes) -> Bytes:
    try:
        return np.frombuffer(blosc.decompress(content), dtype=np.uint8)
    except (RuntimeError, ValueError, SystemError) as error:  # the last for a length below 0
        raise Deviation("compressed bytes", "those of Blosc", error) from error


def decode(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return stored values as numbers: bfloat16 bits become float32, everything else stays as it is."""
    if dtype != "bfloat16":
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def require_crc32c(what: str, sealed: Bytes) -> None:
    """Raise Deviation unless the last four bytes are the CRC-32C of those before."""
    found = google_crc32c.value(sealed[:-4])
    require(
        f"CRC-32C of the {what}", f"{int.from_bytes(sealed[-4:].tobytes(), 'little'):08x}", f"{found:08x}"
    )


def _read_chunks(store: Store, name: str, cut: ShardCut, places: Sequence[tuple[int, int]]) -> list[Bytes]:
    """Return the encoded chunks at some (series, chunk)."""
    if len(places) == cut.n_series * cut.n_used:
        whole = store.read(name)
        spans = _spans(parse_index(whole[-cut.index_nbytes :], cut), cut, places)
        return [np.frombuffer(whole, dtype=np.uint8)[start:stop] for start, stop in spans]
    spans = _spans(read_index(store, name, cut), cut, places)
    return [np.frombuffer(content, dtype=np.uint8) for content in store.read_ranges(name, spans)]


def _spans(index: Index, cut: ShardCut, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first byte of each chunk, and the one after its last."""
    found = [index[place].tolist() for place in places]
    require("chunks of used rows that are absent", 0, sum(ABSENT in span for span in found))
    most = cut.chunk_values * STORED[cut.dtype][1] + _OVERHEAD_NBYTES
    require("chunks that are longer than they can be", 0, sum(nbytes > most for _, nbytes in found))
    require("chunks that begin beyond any object's end", 0, sum(start >= 1 << 62 for start, _ in found))
    return [(start, start + nbytes) for start, nbytes in found]


_OVERHEAD_NBYTES = 20
"""What an encoded chunk has beside its values, at most: Blosc's header and the checksum."""


@contextmanager
def _corrupt(store: Store, name: str) -> Iterator[None]:
    """Raise CorruptRun if a shard is gone, or deviates."""
    hint = "See what is damaged: layerlake verify LAKE"
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptRun(f"{store.url}/{name} is missing.", hint=hint) from error
    except Deviation as error:
        what = f"{error.what}: {error.found} instead of {error.expected}"
        raise CorruptRun(f"{store.url}/{name} is not what was written: {what}", hint=hint) from error
