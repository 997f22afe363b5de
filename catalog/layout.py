"""Where everything lies in a lake, and in what shape: pure functions of the plan.

A *partition* holds R token rows and C = R·(T+1)/2 (query, key) pairs, where T is the context length; a
document of n tokens takes n rows and n·(n+1)/2 pairs, so whole documents never need more pairs than C.
A *shard* (one object) is one partition of one layer of one site: no two writers ever share one.
A *chunk* is the unit of reading inside a shard.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .bands import N_SUMS, QUERIES
from .errors import FormatError, PlanError
from .shapes import ModelShape
from .sites import SITES, Site
from .sizes import format_nbytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "FORMAT_VERSION",
    "ArraySpec",
    "Geometry",
    "WeightSpec",
    "array_spec",
    "attn_band_nbytes",
    "bytes_per_token",
    "itemsize",
    "n_pairs",
    "object_name",
    "plan_geometry",
    "require_format",
    "shard_name",
    "weight_specs",
    "zones_name",
]

N = TypeVar("N", int, "npt.NDArray[np.int64]")

FORMAT_VERSION = 2
"""The version of the layout on disk; a lake with another one is refused."""

CHUNK_NBYTES = 1 << 20
"""Chunks are halved until they are no larger than this (1 MiB)."""

WEIGHT_CHUNK_NBYTES = 64 << 20

MAX_PARTITION_TOKENS = 8192

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}

LAKE_MARKER = "layerlake.json"


def require_format(version: object, what: str) -> None:
    """Raise unless ``what``, a lake or a run, is of the format that this version reads.

    Raises
    ------
    FormatError
        It is of a newer one, of one that only development versions wrote, or of none.
    """
    if version == FORMAT_VERSION:
        return
    is_older = isinstance(version, int) and 0 < version < FORMAT_VERSION
    hint = (
        "A development version of layerlake wrote it: capture it again." if is_older else "Upgrade layerlake."
    )
    raise FormatError(
        f"{what} has format {version}; this layerlake reads format {FORMAT_VERSION}.", hint=hint
    )


def itemsize(dtype: str) -> int:
    """Return the bytes of one stored value.

    Raises
    ------
    PlanError
        The dtype is not float16, bfloat16 or float32.
    """
    if dtype not in _ITEMSIZE:
        raise PlanError(
            f"Values cannot be stored as '{dtype}'.", hint=f"--dtype is one of {', '.join(_ITEMSIZE)}."
        )
    return _ITEMSIZE[dtype]


def n_pairs(n_tokens: N) -> N:
    """Return the number of (query, key) pairs in the causal triangle of ``n_tokens``: one document's, or each one's.

    Examples
    --------
    >>> n_pairs(3)
    6
    """
    return n_tokens * (n_tokens + 1) // 2


def bytes_per_token(shape: ModelShape, site: Site, *, context: int, dtype: str) -> float:
    """Return the uncompressed bytes that a site takes for each token, all layers together.

    For ``pattern`` this is the mean over a full window of ``context`` tokens: L·H·(T+1)/2 values. So it is
    for ``attn_band`` (:func:`attn_band_nbytes`), which takes as much for a shorter document.
    """
    if not site.is_array:
        return attn_band_nbytes(shape, 1) / context
    values = site.n_layers(shape) * site.width(shape)
    return values * itemsize(dtype) * ((context + 1) / 2 if site.rows == "pair" else 1)


def attn_band_nbytes(shape: ModelShape, n_documents: int) -> int:
    """Estimate the bytes of ``attn_band`` for some documents: the sums, 4 bytes each.

    In Parquet they compress to 0.8–0.9 of that, to less where documents are short, and the other columns
    to next to nothing; a partition's object has some 4 kB of its own.

    Examples
    --------
    >>> from layerlake.catalog.shapes import ModelShape
    >>> gpt2 = ModelShape("gpt2", 12, 768, 12, 12, 64, 3072, 50257, 1024, "sequential", "layernorm", 1e-5, "gelu_new",
    ...                   gated_mlp=False, tied_unembed=True)
    >>> attn_band_nbytes(gpt2, 1)
    20736
    """
    return n_documents * shape.n_layers * shape.n_heads * len(QUERIES) * N_SUMS * 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a run cuts tokens into partitions and chunks; fixed by its first capture."""

    partition_tokens: int
    """R: token rows of a partition."""
    context: int
    """T: the longest document, in tokens."""
    chunk_rows: dict[str, int]
    """For each site that is an array, the rows (tokens or pairs) of a chunk; divides the partition's rows."""

    @property
    def partition_pairs(self) -> int:
        """C = R·(T+1)/2: the pairs of a partition."""
        return self.partition_tokens * (self.context + 1) // 2

    def partition_rows(self, site: Site) -> int:
        """Return the rows of one partition of a site: R tokens, or C pairs."""
        return self.partition_pairs if site.rows == "pair" else self.partition_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Rebuild a geometry from :meth:`to_json`."""
        return cls(value["partition_tokens"], value["context"], dict(value["chunk_rows"]))


def plan_geometry(
    shape: ModelShape, *, context: int, dtype: str, max_memory: int, partition_tokens: int | None = None
) -> Geometry:
    """Choose R and the chunk lengths for a model.

    R is the largest power of two with R × (bytes per token of *all* arrays) ≤ ``max_memory`` / 2, at
    most 8192, unless ``partition_tokens`` says otherwise. All arrays count, captured or not, so that a
    later capture of another site fits into the same geometry.

    Raises
    ------
    PlanError
        A document of ``context`` tokens would not fit into a partition.
    """
    arrays = {name: site for name, site in SITES.items() if site.is_array}
    total = sum(bytes_per_token(shape, site, context=context, dtype=dtype) for site in arrays.values())
    if partition_tokens is None:
        fitting = max(1, int(max_memory / 2 / total))
        partition_tokens = min(MAX_PARTITION_TOKENS, 1 << (fitting.bit_length() - 1))
    if partition_tokens < context:
        needed = 1 << (context - 1).bit_length()
        raise PlanError(
            f"A partition of {partition_tokens} tokens is smaller than the context of {context} tokens.",
            hint=f"Take --partition-tokens {needed}, for which a capture needs "
            f"{format_nbytes(2 * total * needed)} of memory, or lower --context.",
        )
    if partition_tokens * (context + 1) % 2:
        raise PlanError(
            f"A partition of {partition_tokens} tokens has no whole number of pairs at context {context}.",
            hint="Make --partition-tokens even.",
        )
    pairs = partition_tokens * (context + 1) // 2
    chunk_rows = {}
    for name, site in arrays.items():
        # a chunk of `pattern` is one head's pairs; of the others, one layer's vectors
        row_nbytes = itemsize(dtype) * (1 if site.rows == "pair" else site.width(shape))
        chunk_rows[name] = _halve(pairs if site.rows == "pair" else partition_tokens, row_nbytes)
        if chunk_rows[name] > 1 and chunk_rows[name] * row_nbytes > 2 * CHUNK_NBYTES:
            raise PlanError(
                f"A partition of {partition_tokens} tokens cannot be cut into equal chunks of at most "
                f"{format_nbytes(CHUNK_NBYTES)} of {name}.",
                hint="Make --partition-tokens a power of two.",
            )
    return Geometry(partition_tokens, context, chunk_rows)


def _halve(n_rows: int, row_nbytes: int) -> int:
    """Halve a partition's rows, as long as they divide, until a chunk is no larger than 1 MiB."""
    while n_rows % 2 == 0 and n_rows * row_nbytes > CHUNK_NBYTES:
        n_rows //= 2
    return n_rows


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One site's Zarr array."""

    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]
    shards: tuple[int, int, int]
    dtype: str
    """The numpy dtype on disk: bfloat16 is stored as the bits of uint16."""
    dimension_names: tuple[str, str, str]


def array_spec(
    site: Site, shape: ModelShape, geometry: Geometry, *, dtype: str, n_partitions: int
) -> ArraySpec:
    """Return the array of a site that has room for ``n_partitions``."""
    layers, width = site.n_layers(shape), site.width(shape)
    rows, chunk = geometry.partition_rows(site), geometry.chunk_rows[site.name]
    stored = "uint16" if dtype == "bfloat16" else dtype
    if site.rows == "pair":
        return ArraySpec(
            (layers, width, n_partitions * rows), (1, 1, chunk), (1, width, rows), stored, site.dims
        )
    return ArraySpec(
        (layers, n_partitions * rows, width), (1, chunk, width), (1, rows, width), stored, site.dims
    )


def shard_name(site: Site, layer: int, partition: int) -> str:
    """Return a shard's object name inside ``activations.zarr``.

    Examples
    --------
    >>> shard_name(SITES["resid"], 5, 2), shard_name(SITES["pattern"], 5, 2)
    ('resid/c/5/2/0', 'pattern/c/5/0/2')
    """
    return (
        f"{site.name}/c/{layer}/0/{partition}"
        if site.rows == "pair"
        else f"{site.name}/c/{layer}/{partition}/0"
    )


def object_name(site: Site, layer: int, partition: int) -> str:
    """Return the name inside the run's folder of the object that holds one partition of one layer of a site.

    ``attn_band`` has all layers in one object, whatever ``layer`` is.

    Examples
    --------
    >>> object_name(SITES["resid"], 5, 2), object_name(SITES["attn_band"], 0, 2)
    ('activations.zarr/resid/c/5/2/0', 'attn_band/part-00000002.parquet')
    """
    if site.is_array:
        return f"activations.zarr/{shard_name(site, layer, partition)}"
    return f"{site.name}/part-{partition:08d}.parquet"


def zones_name(site: Site, layer: int, partition: int) -> str:
    """Return the name inside the run's folder of the object that holds the zones of one shard.

    Examples
    --------
    >>> zones_name(SITES["resid"], 5, 2)
    'zones/resid/5/part-00000002.parquet'
    """
    return f"zones/{site.name}/{layer}/part-{partition:08d}.parquet"


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight's Zarr array: float32, raw."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]


def weight_specs(shape: ModelShape) -> dict[str, WeightSpec]:
    """Return the weights that the analyses need, by the names of ``Run.weight``; chunks are at most 64 MiB."""
    d, f, v, n = shape.d_model, shape.d_mlp, shape.n_vocab, shape.n_layers
    rows = max(1, WEIGHT_CHUNK_NBYTES // (4 * d))
    return {
        "W_U": WeightSpec((d, v), (d, min(v, rows))),
        "b_U": WeightSpec((v,), (v,)),
        "ln_final.w": WeightSpec((d,), (d,)),
        "ln_final.b": WeightSpec((d,), (d,)),
        "W_out": WeightSpec((n, f, d), (1, min(f, rows), d)),
        "b_out": WeightSpec((n, d), (n, d)),
    }


# Paths inside a lake. Everything that names an object comes from here.


def model_path(model_id: str) -> str:
    """Return the folder of a model."""
    return f"models/{model_id}"


def run_path(run_id: str) -> str:
    """Return the folder of a run."""
    return f"runs/{run_id}"


def log_path(run_id: str, number: int) -> str:
    """Return the object of one manifest snapshot."""
    return f"{run_path(run_id)}/log/{number:08d}.json"


def activations_path(run_id: str) -> str:
    """Return the Zarr group of a run."""
    return f"{run_path(run_id)}/activations.zarr"


def part_path(run_id: str, table: str, part: str) -> str:
    """Return one Parquet part of a run's table (documents, tokens, objects)."""
    return f"{run_path(run_id)}/{table}/{part}.parquet"


def wip_path(run_id: str, capture_id: str) -> str:
    """Return the folder of an open capture."""
    return f"{run_path(run_id)}/wip/{capture_id}"


def frozen_plan_path(run_id: str, capture_id: str) -> str:
    """Return the object that says that a capture is begun."""
    return f"{wip_path(run_id, capture_id)}/plan.json"


def finding_path(view: str, digest: str, part: int = 0) -> str:
    """Return one Parquet part of a finding's table."""
    return f"findings/{view}/{digest}/part-{part:05d}.parquet"
