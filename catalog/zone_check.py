"""Hold the zones of a shard against its values, found anew from their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .inspection import open_sealed_parquet
from .manifest import Manifest
from .problem import Deviation, require
from .sites import Site

__all__ = ["ZoneCheck"]


class ZoneCheck:
    """What the zones of one shard should say; it is shown the shard chunk by chunk.

    Parameters
    ----------
    site, layer, partition : Site, int, int
        Which shard.
    manifest : Manifest
        The run.
    """

    def __init__(self, site: Site, layer: int, partition: int, manifest: Manifest) -> None:
        self._site, self._layer, self._dtype = site, layer, manifest.dtype
        self._is_pair, self._has_units = site.rows == "pair", site.width_name == "d_mlp"
        self._width = 1 if self._is_pair else site.width(manifest.shape)
        chunk_rows = manifest.geometry.chunk_rows[site.name]
        used = manifest.partition(partition)
        n_chunks = -(-(used.n_pairs if self._is_pair else used.n_rows) // chunk_rows)
        first = partition * (manifest.geometry.partition_rows(site) // chunk_rows)
        self._chunks = list(range(first, first + n_chunks))
        self._found: dict[str, list[Any]] = {
            name: [] for name in ("min", "max", "norm_min", "norm_max", "n_nonfinite", "unit_max")
        }

    def look(self, bits: npt.NDArray[np.unsignedinteger[Any]], n_nonfinite: int) -> None:
        """Note what the used values of the next chunk hold (:func:`layerlake.catalog.arrays.verify_shard`)."""
        order = lows = highs = _reordered(bits.view(f"i{bits.itemsize}")).reshape(-1, self._width)
        values = self._decoded(bits).reshape(-1, self._width)
        if n_nonfinite:
            is_finite, limits = np.isfinite(values), np.iinfo(order.dtype)
            lows, highs = np.where(is_finite, order, limits.max), np.where(is_finite, order, limits.min)
            values = values[is_finite.all(axis=1)]
        largest = self._numbers(highs.max(axis=0))
        with np.errstate(over="ignore"):
            norms = np.sqrt(np.vecdot(values, values)) if not self._is_pair else values[:0, 0]
        found = {
            "min": self._numbers(lows.min(keepdims=True)).item(),
            "max": np.fmax.reduce(largest),
            "norm_min": norms.min() if len(norms) else np.nan,
            "norm_max": norms.max() if len(norms) else np.nan,
            "n_nonfinite": n_nonfinite,
            "unit_max": largest if self._has_units else None,
        }
        for name, value in found.items():
            self._found[name].append(value)

    def _numbers(self, order: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the floats of such an order, NaN in place of what no float has."""
        numbers = self._decoded(_reordered(order).view(f"u{order.itemsize}"))
        return np.where(np.isfinite(numbers), numbers, np.float32(np.nan))

    def _decoded(self, bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self._dtype == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.view(self._dtype).astype(np.float32)

    def verify(self, content: bytes) -> None:
        """Hold the zones against what was found.

        Raises
        ------
        Deviation
            They are of another shard, or contradict it.
        """
        table = open_sealed_parquet(content).read()
        n_series = len(self._found["n_nonfinite"]) // len(self._chunks)
        heads = [head if self._is_pair else None for head in range(n_series) for _ in self._chunks]
        places = {
            "site": [self._site.name] * len(heads), "layer": [self._layer] * len(heads), "head": heads,
            "chunk": self._chunks * n_series, "n_nonfinite": self._found["n_nonfinite"],
        }  # fmt: skip
        for name, expected in places.items():
            require(name, expected, table[name].to_pylist())
        tolerance = self._width * 2.0**-23  # of two sums of the same squares, in float32
        for name in ("min", "max", "norm_min", "norm_max"):
            stored = table[name].to_numpy()
            self._require_near(
                name, np.array(self._found[name]), stored, tolerance if "norm" in name else 0.0
            )
        require("columns", self._has_units, "unit_max" in table.column_names)
        if self._has_units:
            stored = table["unit_max"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self._require_near(
                "unit_max", np.stack(self._found["unit_max"]), stored.reshape(-1, self._width), 0.0
            )

    def _require_near(
        self, name: str, expected: npt.NDArray[Any], stored: npt.NDArray[Any], tolerance: float
    ) -> None:
        """Raise Deviation that tells of the first chunk that differs."""
        is_near = np.isclose(stored, expected, rtol=tolerance, atol=0.0, equal_nan=True)
        for row in np.flatnonzero(~is_near.reshape(len(expected), -1).all(axis=1))[:1]:
            place = int(np.argmin(is_near[row])) if is_near.ndim > 1 else ...
            chunk = self._chunks[row % len(self._chunks)]
            raise Deviation(f"{name} of chunk {chunk}", expected[row][place], stored[row][place])


def _reordered(integers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the bits of floats as integers of the same order, and those as bits again.

    Of negative floats, all bits but the sign count the other way.
    """
    limits = np.iinfo(integers.dtype)
    found = integers >> (limits.bits - 1)
    found &= limits.max
    found ^= integers
    return found
