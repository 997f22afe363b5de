"""A run, opened for reading: its tables, and its sites, by rows or as labelled arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .errors import NotInLake, SiteNotFound, did_you_mean
from .layout import (
    activations_path,
    model_path,
    n_pairs,
    object_name,
    part_path,
    run_path,
)
from .manifest import Manifest, Partition
from .mask import evaluation_mask
from .shapes import ModelShape
from .shards import Rows, ascending, decode, read_site, split_rows
from .sites import SITES
from .stores import Store
from .tables import DOCUMENTS, OBJECTS, TOKENS, read_part, read_parts

if TYPE_CHECKING:
    import xarray
    import zarr

__all__ = ["Run"]


class Run:
    """One model over one corpus, as one snapshot of its manifest describes it.

    A capture that extends the run meanwhile does not disturb it. Nothing is read until asked for.

    Attributes
    ----------
    manifest : Manifest
        The snapshot.
    excluded : frozenset of int
        Documents that are taken for not stored (:meth:`excluding`).
    """

    def __init__(self, store: Store, manifest: Manifest, *, excluded: frozenset[int] = frozenset()) -> None:
        self.store = store
        self.manifest = manifest
        self.excluded = excluded
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def __repr__(self) -> str:
        held = ", ".join(self.sites)
        return f"Run({self.run_id!r}: {self.n_tokens:,} tokens of {self.manifest.dataset}; {held})"

    @property
    def run_id(self) -> str:
        """The run's id: model slug and digest of the run's identity."""
        return self.manifest.run_id

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return self.manifest.shape

    @property
    def n_tokens(self) -> int:
        """Stored tokens."""
        return self.manifest.n_tokens

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that the run holds, in whole or in part."""
        return tuple(name for name in SITES if self.manifest.sites.get(name))

    # -- tables ---------------------------------------------------------------------------------

    @cached_property
    def documents(self) -> pa.Table:
        """One row an input document, refused ones included (``tables.DOCUMENTS``)."""
        return self._table("documents", DOCUMENTS)

    @cached_property
    def stored_documents(self) -> pa.Table:
        """The documents that have rows: status ``stored`` or ``cut``."""
        return self._kept(self.documents.filter(pc.not_equal(self.documents["status"], "refused")))

    @cached_property
    def tokens(self) -> pa.Table:
        """One row a stored token: row, document, position, token_id (``tables.TOKENS``)."""
        return self._kept(self._table("tokens", TOKENS))

    @cached_property
    def vocab(self) -> pa.Table:
        """One row a token id: token_id, text, is_special. Padded rows of the unembedding have no entry."""
        return read_parts(self.store, [f"{model_path(self.manifest.model_id)}/vocab.parquet"])

    @cached_property
    def objects(self) -> pa.Table:
        """One row a written object of a site: name, site, layer, partition, nbytes, crc32 (``tables.OBJECTS``)."""
        return self._table("objects", OBJECTS)

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        paths = [part_path(self.run_id, name, part) for part in self.manifest.parts.get(name, ())]
        return read_parts(self.store, paths, schema)

    def excluding(self, documents: Iterable[int]) -> Run:
        """Return the run without some documents: ``stored_documents``, ``tokens`` and ``masked_tokens`` leave them out.

        What is read by place (:meth:`read`, :meth:`array`) is as it lies.
        """
        return Run(self.store, self.manifest, excluded=self.excluded | frozenset(documents))

    def _kept(self, table: pa.Table) -> pa.Table:
        if not self.excluded:
            return table
        return table.filter(np.isin(table["document"].to_numpy(), list(self.excluded), invert=True))

    # -- weights --------------------------------------------------------------------------------

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """Return a weight of the model, raw (nothing folded or centred), float32.

        Parameters
        ----------
        name : str
            ``W_U`` ``[d_model, vocab]``, ``b_U`` ``[vocab]``, ``ln_final.w`` and ``ln_final.b`` ``[d_model]``,
            ``W_out`` ``[layer, d_mlp, d_model]``, ``b_out`` ``[layer, d_model]``. Biases that the model
            does not have are zeros.
        """
        values: npt.NDArray[np.float32] = np.asarray(self.weight_array(name)[...])
        return values

    def weight_array(self, name: str) -> zarr.Array[Any]:
        """Return a weight as a Zarr array, to read it layer by layer.

        Raises
        ------
        NotInLake
            The run is of an intervened model: its layers are steps of a schedule, and weights by layer its baseline's.
        CorruptRun
            The lake has no such weight of the model; reading it says so of the weight's objects.
        """
        if self.manifest.baseline is not None and name in ("W_out", "b_out"):
            raise NotInLake(
                f"The layers of run {self.run_id} are steps of {self.manifest.schedule}: it has no weights by layer.",
                hint=f"They are its baseline's: --run {self.manifest.baseline}",
            )
        from .zarr_reads import is_chunk

        return self._open_array(f"{model_path(self.manifest.model_id)}/weights.zarr", name, is_chunk)

    def _open_array(self, folder: str, name: str, is_named: Callable[[str], bool]) -> zarr.Array[Any]:
        """Return an array, which is opened once."""
        from .zarr_reads import open_array

        if name not in self._arrays:
            self._arrays[name] = open_array(self.store, folder, name, is_named)
        return self._arrays[name]

    # -- activations ----------------------------------------------------------------------------

    def has_site(self, site: str) -> bool:
        """Tell whether the run holds the site in every partition."""
        held = self.manifest.sites.get(site, ())
        return len(held) == len(self.manifest.partitions) > 0

    def require_sites(self, *sites: str) -> None:
        """Raise unless the run holds the sites in every partition.

        Raises
        ------
        SiteNotFound
            It lacks some; the hint is the command that captures them all.
        """
        lacking = [site for site in sites if not self.has_site(site)]
        if not lacking:
            return
        parts = " and ".join(f"site '{site}' {self._part_held(site)}" for site in lacking)
        unknown = next((site for site in lacking if site not in SITES), None)
        near = did_you_mean(unknown, SITES) if unknown else ""
        raise SiteNotFound(
            f"Run {self.run_id} holds {parts} (it holds {', '.join(self.sites)}).{near}",
            hint=""
            if unknown
            else f"Capture what it lacks: layerlake capture LAKE … --sites {','.join(lacking)}",
        )

    def _part_held(self, site: str) -> str:
        held = len(self.manifest.sites.get(site, ()))
        return f"in {held} of its {len(self.manifest.partitions)} partitions only" if held else "not at all"

    def extent(self, site: str) -> dict[str, Any]:
        """Return what the run holds of a site, as a part of a finding's key."""
        self.require_sites(site)
        held = [p for p in self.manifest.partitions if p.index in self.manifest.sites[site]]
        excluded = {"excluded": sorted(self.excluded)} if self.excluded else {}
        return {"n_tokens": sum(p.n_rows for p in held), "partitions": [p.index for p in held], **excluded}

    def array(self, site: str) -> zarr.Array[Any]:
        """Return the site's Zarr array as it lies on disk, with unwritten rows, which are zeros, between partitions.

        Zeros are also what Zarr gives for a chunk that a shard should hold and does not: :meth:`read_rows` and
        ``layerlake verify`` tell.

        Raises
        ------
        SiteNotFound
            The run does not hold the site, or it is not an array.
        CorruptRun
            It is not in the lake, though the manifest says so; reading it says so of the site's objects.
        """
        from .zarr_reads import is_shard

        self._require_array(site)
        axis, partitions = SITES[site].dims.index(SITES[site].rows), frozenset(self.manifest.sites[site])
        is_named = partial(is_shard, axis=axis, partitions=partitions)
        return self._open_array(activations_path(self.run_id), site, is_named)

    def span(self, site: str, partition: Partition) -> tuple[int, int]:
        """Return the first row of a partition on the site's long axis, and the row after its last used one."""
        start = partition.index * self.manifest.geometry.partition_rows(SITES[site])
        return start, start + (partition.n_pairs if SITES[site].rows == "pair" else partition.n_rows)

    def read(self, site: str, layer: int, partition: Partition) -> npt.NDArray[Any]:
        """Read one partition of one layer, decoded: ``[token, width]``, or ``[head, pair]`` of ``pattern``.

        Reads one shard. The dtype is the stored one (float32 for a bfloat16 run).

        Its errors are those of :meth:`read_rows`.
        """
        return self.read_rows(site, layer, range(*self.span(site, partition)))

    def read_rows(self, site: str, layer: int, rows: Rows, *, head: int | None = None) -> npt.NDArray[Any]:
        """Read some rows of one layer, decoded: ``[token, width]``, or ``[head, pair]`` of ``pattern``.

        Reads the chunks that hold a row, and the index of their shards. The dtype is the stored one (float32 for a
        bfloat16 run).

        Parameters
        ----------
        site : str
            A site that is an array.
        layer : int
            The layer, or boundary.
        rows : int64 ``[row]``, or range
            Places on the array's long axis, ascending; only used ones.
        head : int, optional
            Of ``pattern``: only that head, ``[pair]``.

        Raises
        ------
        SiteNotFound
            The run does not hold the site in a partition of the rows, or it is not an array.
        IndexError, ValueError
            There is no such layer or head, or a row is not used; the rows do not ascend.
        CorruptRun
            A shard is gone, or what is read of it is not what was written.
        """
        self._require_array(site)
        kind, rows = SITES[site], ascending(rows)
        per_partition = self.manifest.geometry.partition_rows(kind)
        end = per_partition * (1 + max(partition.index for partition in self.manifest.partitions))
        if len(rows) and not 0 <= rows[0] <= rows[-1] < end:
            raise IndexError(f"Rows of {site} in run {self.run_id} are from 0 to before {end}.")
        if not {number for number, _ in split_rows(rows, per_partition)} <= set(self.manifest.sites[site]):
            self.require_sites(site)
            raise IndexError(f"Some of the rows lie in a partition that run {self.run_id} does not have.")
        if head is not None and kind.rows == "token":
            raise IndexError(f"{site} has no heads.")
        if kind.rows == "token":
            values = read_site(self.store, self.manifest, kind, layer, rows)[0]
        else:
            heads = range(self.shape.n_heads) if head is None else (head,)
            packed = read_site(self.store, self.manifest, kind, layer, rows, series=heads)[..., 0]
            values = packed if head is None else packed[0]
        return decode(values, self.manifest.dtype)

    def _require_array(self, site: str) -> None:
        """Raise unless a site is an array, of which the run holds at least a part."""
        if site in SITES and not SITES[site].is_array:
            raise SiteNotFound(f"Site '{site}' is a table, not an array.", hint=f"Read it as run.{site}.")
        if site not in self.sites:
            self.require_sites(site)

    @property
    def resid(self) -> xarray.DataArray:
        """The residual stream at every boundary: ``(boundary, token, d_model)``."""
        return self._labelled("resid")

    @property
    def resid_pre(self) -> xarray.DataArray:
        """The residual stream before each block: ``(layer, token, d_model)``."""
        resid = self.resid.isel(boundary=slice(0, -1))
        return resid.rename(boundary="layer").rename("resid_pre")

    @property
    def resid_post(self) -> xarray.DataArray:
        """The residual stream after each block: ``(layer, token, d_model)``."""
        resid = self.resid.isel(boundary=slice(1, None)).rename(boundary="layer")
        return resid.assign_coords(layer=np.arange(self.shape.n_layers)).rename("resid_post")

    @property
    def resid_mid(self) -> xarray.DataArray:
        """resid_pre + attn_out in float32, of a model with sequential blocks.

        Raises
        ------
        SiteNotFound
            The model's blocks are parallel, or attn_out was not captured.
        """
        if self.shape.block == "parallel":
            raise SiteNotFound(
                f"Run {self.run_id} has no resid_mid: in the parallel blocks of {self.shape.family}, "
                "attention and MLP read the same residual."
            )
        middle = self.resid_pre.astype("float32") + self.attn_out.astype("float32")
        return middle.rename("resid_mid")

    @property
    def attn_out(self) -> xarray.DataArray:
        """What attention adds to the residual: ``(layer, token, d_model)``."""
        return self._labelled("attn_out")

    @property
    def mlp_out(self) -> xarray.DataArray:
        """What the MLP adds to the residual: ``(layer, token, d_model)``."""
        return self._labelled("mlp_out")

    @property
    def mlp_post(self) -> xarray.DataArray:
        """The neurons' activations, which W_out multiplies: ``(layer, token, d_mlp)``."""
        return self._labelled("mlp_post")

    @property
    def pattern(self) -> xarray.DataArray:
        """Attention weights, packed: ``(layer, head, pair)``; :meth:`attention` unpacks a document."""
        return self._labelled("pattern")

    @property
    def attn_band(self) -> pa.Table:
        """Sums of attention near the diagonal, of all partitions (``tables.ATTN_BAND``); read anew each time."""
        self.require_sites("attn_band")
        return pa.concat_tables(self.read_attn_band(partition) for partition in self.manifest.partitions)

    def read_attn_band(
        self,
        partition: Partition,
        *,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
    ) -> pa.Table:
        """Read one partition of ``attn_band``: all layers, sorted by document, layer, head, queries.

        Reads one object.

        Parameters
        ----------
        partition : Partition
            One that holds the site.
        columns : sequence of str, optional
            Some of the columns of ``tables.ATTN_BAND``; None for all.
        where : Expression, optional
            Which rows.

        Raises
        ------
        CorruptRun
            The object is gone, or is not what was written.
        """
        name = object_name(SITES["attn_band"], 0, partition.index)
        return read_part(self.store, f"{run_path(self.run_id)}/{name}", columns=columns, where=where)

    def attention(self, document: int, layer: int) -> xarray.DataArray:
        """Return one document's attention weights in one layer: float32 ``(head, query, key)``, 0 above the diagonal.

        Raises
        ------
        LookupError
            The document is not stored.
        """
        import xarray

        found = self.stored_documents.filter(pc.equal(self.stored_documents["document"], document))
        if not found.num_rows:
            raise SiteNotFound(f"Run {self.run_id} stores no document {document}.")
        n, start = int(found["n_tokens"][0].as_py()), int(found["pair_start"][0].as_py())
        packed = self.read_rows("pattern", layer, range(start, start + n_pairs(n)))
        dense = np.zeros((packed.shape[0], n, n), dtype=np.float32)
        dense[:, *np.tril_indices(n)] = packed
        return xarray.DataArray(dense, dims=("head", "query", "key"), name="pattern")

    def _labelled(self, name: str) -> xarray.DataArray:
        from .labelled import labelled

        return labelled(self, name)

    # -- the evaluation mask --------------------------------------------------------------------

    @cached_property
    def masked_tokens(self) -> pa.Table:
        """The tokens of the evaluation mask: row, document, position, token_id, next_token_id.

        See :mod:`layerlake.catalog.mask`; rows in stored order.
        """
        tokens = self.tokens
        masked = evaluation_mask(tokens["document"].to_numpy(), tokens["position"].to_numpy())
        index = np.flatnonzero(masked)
        following = tokens["token_id"].to_numpy()[index + 1]
        return tokens.take(index).append_column("next_token_id", pa.array(following, pa.int32()))
