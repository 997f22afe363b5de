"""Arrays as Zarr reads them from a store: failed reads are done again, and what is damaged is not taken for values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import zarr
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import StorePath, WrapperStore

from .errors import CorruptRun, LayerLakeError, decoding
from .retries import retried_async

if TYPE_CHECKING:
    from .stores import Store

__all__ = ["StoredArray", "ZarrReads", "is_chunk", "is_shard", "open_array"]

_HINT = "See what is damaged: layerlake verify LAKE"


class ZarrReads(WrapperStore[ZarrStore]):
    """A read-only Zarr store over a folder of a store; it pickles, so that Dask's workers can read too.

    Zarr takes an object that is absent, or empty, for a chunk of zeros. One that must be there is a CorruptRun, and
    one that could not be read a StoreError.

    Parameters
    ----------
    store : zarr.abc.store.Store
        The folder.
    url : str
        Its URL, for messages.
    is_named : callable, optional
        Tells of a key whether something in the lake names it, so that it must be there.
    """

    def __init__(self, store: ZarrStore, url: str, is_named: Callable[[str], bool] | None = None) -> None:
        super().__init__(store)
        self._url = url
        self._is_named = is_named

    def __str__(self) -> str:
        return self._url

    def _with_store(self, store: ZarrStore) -> Self:
        return type(self)(store, self._url, self._is_named)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object's bytes, or a range of them; None if it is absent.

        Raises
        ------
        CorruptRun
            It must be there, and is absent or too short.
        """
        content = await retried_async(
            "read", f"{self._url}/{key}", lambda: self._store.get(key, prototype, byte_range)
        )
        if not content and self._is_named is not None and self._is_named(key):
            what = "is missing" if content is None else "is shorter than it was written"
            raise CorruptRun(f"{self._url}/{key} {what}.", hint=_HINT)
        return content

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return ranges of several objects."""
        reads = (self.get(key, prototype, byte_range) for key, byte_range in key_ranges)
        return await asyncio.gather(*reads)

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for request in requests:
            yield request[0], await self.get(*request)

    async def exists(self, key: str) -> bool:
        """Tell whether an object exists."""
        return await retried_async("looked up", f"{self._url}/{key}", lambda: self._store.exists(key))

    def list(self) -> AsyncIterator[str]:
        """Yield the names of all objects."""
        return self._listed(self._store.list)

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of the objects under a prefix."""
        return self._listed(lambda: self._store.list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly under a folder."""
        return self._listed(lambda: self._store.list_dir(prefix))

    async def _listed(self, listing: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        async def names() -> tuple[str, ...]:
            return tuple([name async for name in listing()])

        for name in await retried_async("listed", self._url, names):
            yield name


class StoredArray(zarr.Array[ArrayV3Metadata]):
    """A Zarr array that says CorruptRun where what it reads is not what was written."""

    def get_basic_selection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        with self._decoding():
            return super().get_basic_selection(*args, **options)

    def get_orthogonal_selection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        with self._decoding():
            return super().get_orthogonal_selection(*args, **options)

    def get_mask_selection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        with self._decoding():
            return super().get_mask_selection(*args, **options)

    def get_coordinate_selection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        with self._decoding():
            return super().get_coordinate_selection(*args, **options)

    def get_block_selection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        with self._decoding():
            return super().get_block_selection(*args, **options)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except LayerLakeError:
            raise
        except (
            ValueError,
            RuntimeError,
        ) as error:  # from CRC-32C and Blosc; a wrong selection is an IndexError
            where = f"{self.store}/{self.path}"
            raise CorruptRun(f"An object of {where} is not what was written: {error}", hint=_HINT) from error


def open_array(store: Store, folder: str, name: str, is_named: Callable[[str], bool]) -> StoredArray:
    """Open an array of a Zarr group. Reads its ``zarr.json``.

    Parameters
    ----------
    store : Store
        The lake.
    folder : str
        The group.
    name : str
        The array's name in it.
    is_named : callable
        Tells of a name in the group whether that object must be there.

    Raises
    ------
    CorruptRun
        There is no such array, or its metadata are not what was written.
    """
    path = f"{folder}/{name}/zarr.json"
    try:
        metadata = store.read_json(path)
    except FileNotFoundError as error:
        raise CorruptRun(f"{store.url}/{path} is missing.", hint=_HINT) from error
    with decoding(f"{store.url}/{path}"):
        return StoredArray.from_dict(StorePath(store.zarr_store(folder, is_named), name), metadata)


def is_shard(name: str, axis: int, partitions: frozenset[int]) -> bool:
    """Tell whether an object of a site's array is a shard of one of some partitions, which lie along an axis.

    Examples
    --------
    >>> is_shard("resid/c/5/2/0", 1, frozenset({2})), is_shard("resid/zarr.json", 1, frozenset({2}))
    (True, False)
    """
    _, kind, *place = name.split("/")
    return kind == "c" and int(place[axis]) in partitions


def is_chunk(name: str) -> bool:
    """Tell whether an object of a weight is one of its chunks, all of which must be there."""
    return name.split("/")[1] == "c"
