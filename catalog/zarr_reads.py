"""A remote store as Zarr reads it: each read is done again where it fails for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from .retries import retried_async

__all__ = ["ZarrReads"]


class ZarrReads(WrapperStore[FsspecStore]):
    """A read-only Zarr store over a folder of a remote store; it pickles, so that Dask's workers can read too.

    Zarr takes an object that is absent for a chunk of zeros; one that could not be read is a StoreError.

    Parameters
    ----------
    store : FsspecStore
        The folder.
    url : str
        Its URL, for messages.
    """

    def __init__(self, store: FsspecStore, url: str) -> None:
        super().__init__(store)
        self._url = url

    def _with_store(self, store: FsspecStore) -> Self:
        return type(self)(store, self._url)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object's bytes, or a range of them; None if it is absent."""
        return await retried_async(
            "read", f"{self._url}/{key}", lambda: self._store.get(key, prototype, byte_range)
        )

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
