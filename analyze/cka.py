"""CKA between the boundaries of a run: unbiased, in minibatches (arXiv 2406.19384, Figures 5 and 14)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from .intervals import jackknife_interval
from .statistic import State, Statistic, Unit, read_rows, tidy_table

__all__ = ["CKA_VERSION", "CKA_VIEWS", "CkaOptions", "CkaStatistic", "hsic_matrix"]

CKA_VERSION = 2
CKA_VIEWS = ("cka",)

MIN_ROWS = 4
"""The unbiased estimator divides by N - 3."""

MIN_GROUPS = 4
"""Batches that a jackknife interval needs."""

_GRAM_ROWS = 128  # of the Gram matrices at a time

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CkaOptions:
    """Which tokens stand for a boundary, how they are scaled, and how they are batched."""

    samples: Literal["last_token", "tokens_per_doc"] = field(
        default="last_token",
        metadata={
            "help": "The last token of each document, in batches of documents; or, as the authors' code does, "
            "all tokens of one document as a batch."
        },
    )
    include_bos: bool = field(
        default=False,
        metadata={"help": "Whether tokens_per_doc keeps position 0, as the authors' code does."},
    )
    normed: bool = field(
        default=False,
        metadata={
            "help": "Whether each token's vector is divided by its root mean square first, as a norm would; a few "
            "tokens of enormous length then count no more than the others."
        },
    )
    batch: int = field(default=128, metadata={"help": "Documents of a batch of last tokens."})

    def __post_init__(self) -> None:
        if self.batch < MIN_ROWS:
            raise AnalysisError(
                f"A batch of {self.batch} documents is too small: the estimator needs {MIN_ROWS}."
            )


@dataclass(frozen=True, slots=True)
class CkaStatistic(Statistic[tuple[int, list[npt.NDArray[Any]]]]):
    """HSIC between all pairs of boundaries, batch by batch.

    A unit reads one batch at all boundaries together: N·(L + 1)·d_model values, and holds them once more in
    float64; the Gram matrices of all boundaries take another (L + 1)·128·N·8 bytes. The state is (L + 1)²·8
    bytes a batch. Batches follow the order of the documents, so that they do not depend on how the run is stored.
    """

    run: str
    options: CkaOptions
    batches: tuple[npt.NDArray[np.int64], ...]
    """The token rows of each batch."""
    n_left_out: int
    """Tokens in no batch, because fewer than four were left for one."""
    n_boundaries: int
    d_model: int
    centred: bool
    """Whether each token's mean over d_model is subtracted: for LayerNorm, which never sees it."""
    eps: float
    """Of the model's norms."""

    @classmethod
    def open(cls, run: Run, options: CkaOptions) -> Self:
        """Form the batches from the documents table."""
        documents = run.stored_documents.sort_by("document")
        starts = documents["row_start"].to_numpy()
        lengths = documents["n_tokens"].to_numpy()
        if options.samples == "last_token":
            last = (starts + lengths - 1)[lengths > 1]  # position 0 has no context
            batches = [last[i : i + options.batch] for i in range(0, len(last), options.batch)]
        else:
            first = 0 if options.include_bos else 1
            batches = [np.arange(start + first, start + n) for start, n in zip(starts, lengths, strict=True)]
        kept = tuple(batch.astype(np.int64) for batch in batches if len(batch) >= MIN_ROWS)
        n_left_out = sum(map(len, batches)) - sum(map(len, kept))
        shape = run.shape
        centred = shape.norm == "layernorm"
        n_boundaries = shape.n_layers + 1
        return cls(
            run.run_id, options, kept, n_left_out, n_boundaries, shape.d_model, centred, shape.norm_eps
        )

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        reads = tuple(("resid", boundary) for boundary in range(self.n_boundaries))
        return [Unit(reads, np.array([i])) for i in range(len(self.batches))]

    def keys(self, unit: Unit) -> npt.NDArray[np.int64]:
        """Return (batch, its tokens): a batch that was not full has more of them in a longer run."""
        return np.array([[batch, len(self.batches[batch])] for batch in unit.items])

    def read(self, run: Run, unit: Unit) -> tuple[int, list[npt.NDArray[Any]]]:
        """Read one batch: its number, and ``[token, d_model]`` for each boundary."""
        (batch,) = unit.items
        rows = np.sort(self.batches[batch])  # the estimator does not depend on the order within a batch
        return int(batch), [read_rows(run, site, boundary, rows) for site, boundary in unit.reads]

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (self.n_boundaries, self.n_boundaries))

    def measure(self, block: tuple[int, list[npt.NDArray[Any]]]) -> State:
        """Return the state of a batch: key (batch, its tokens), values HSIC ``[boundary, boundary]``."""
        batch, features = block
        hsic = hsic_matrix(map(self._as_normed, features))
        return State.of(np.array([[batch, len(features[0])]]), hsic[None])

    def _as_normed(self, x: npt.NDArray[Any]) -> Doubles:
        """Return what the model's norms see of each token's vector, and if asked, at the length that they give it."""
        wide = _less_mean(x, axis=1) if self.centred else x.astype(np.float64)
        if self.options.normed:
            wide /= np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + self.eps)
        return wide

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``cka``, one row for each ordered pair of boundaries."""
        n_batches, n = len(state.values), self.n_boundaries
        cka, lo, hi = (np.full((n, n), np.nan) for _ in range(3))
        reasons = np.full((n, n), "", dtype=object)
        if not n_batches:
            reasons[:] = f"no batch has {MIN_ROWS} tokens or more"
        else:
            cka = normalised(state.values.mean(axis=0))
            diagonal = np.diagonal(state.values, axis1=1, axis2=2).mean(axis=0)
            for i in np.flatnonzero(diagonal <= 0):
                why = (
                    "has no variance"
                    if diagonal[i] == 0
                    else "has an HSIC with itself that is estimated below 0"
                )
                reasons[i, :] = reasons[:, i] = f"boundary {i} {why}"
            defined = np.isfinite(cka)
            if n_batches >= MIN_GROUPS:
                total = state.values.sum(axis=0)
                without = normalised((total - state.values) / (n_batches - 1))
                lo, hi = jackknife_interval(cka, without)
                undefined = defined & ~np.isfinite(lo)
                reasons[undefined] = "no interval: without one of the batches the CKA is not defined"
            else:
                few = f"no interval: {n_batches} of the {MIN_GROUPS} batches that the jackknife needs"
                reasons[defined] = few
        n_samples = sum(map(len, self.batches))
        small = n_samples < self.d_model
        authors = self.options.samples == "tokens_per_doc" and self.options.include_bos
        columns = {
            "boundary_a": np.repeat(np.arange(n, dtype=np.int32), n),
            "boundary_b": np.tile(np.arange(n, dtype=np.int32), n),
            "n_samples": np.full(n * n, n_samples, dtype=np.int64),
            "cka": cka.ravel(),
            "cka_lo": lo.ravel(),
            "cka_hi": hi.ravel(),
            "reason": [reason or None for reason in reasons.ravel()],
            "note": [f"{n_samples} samples are fewer than the width {self.d_model}" if small else None]
            * (n * n),
            "n_batches": np.full(n * n, n_batches, dtype=np.int64),
            "n_left_out": np.full(n * n, self.n_left_out, dtype=np.int64),
        }
        params = {**self.key, "centred": self.centred, "variant": "authors" if authors else "default"}
        return {"cka": tidy_table(self.run, columns, params)}


def hsic_matrix(features: Iterable[npt.NDArray[Any]]) -> Doubles:
    """Return the unbiased HSIC₁ (linear kernel) between all pairs of representations of the same N tokens.

    Centred features and float64 Gram matrices: the estimator ignores a constant vector, but float32 Gram
    matrices of features that are not centred do not. Formula: Song et al. 2012, eq. 5; used
    for CKA by Nguyen, Raghu and Kornblith 2020, eq. 3.

    Parameters
    ----------
    features : iterable of floating ``[token, width]``
        N ≥ 4 rows each; the widths may differ.

    Returns
    -------
    float64 ``[representation, representation]``
        Exactly 0 for a representation without variance. Elsewhere negative values are legal.
    """
    centred = [_less_mean(x, axis=0) for x in features]
    n_features, n = len(centred), len(centred[0])
    products = np.zeros((n_features, n_features))
    row_sums = np.zeros((n_features, n))
    for start in range(0, n, _GRAM_ROWS):
        stop = min(start + _GRAM_ROWS, n)
        # [representation, some of the tokens, these and all after them]: what is before them is symmetric
        gram = np.stack([x[start:stop] @ x[start:].T for x in centred])
        own, after = np.arange(stop - start), gram[:, :, stop - start :]
        gram[:, own, own] = 0.0
        row_sums[:, start:stop] += gram.sum(axis=2)
        row_sums[:, stop:] += after.sum(axis=1)
        after *= np.sqrt(2.0)  # in a product of two it counts twice
        flat = gram.reshape(n_features, -1)
        products += flat @ flat.T
    sums = row_sums.sum(axis=1)
    hsic: Doubles = (
        products + np.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (row_sums @ row_sums.T)
    ) / (n * (n - 3))
    return hsic


def _less_mean(x: npt.NDArray[Any], axis: int) -> Doubles:
    """Subtract the mean along an axis; what is constant along it becomes exactly 0, not the rounding of its mean."""
    wide = x.astype(np.float64)
    varies = (wide != wide.take([0], axis)).any(axis=axis, keepdims=True)
    return np.asarray((wide - wide.mean(axis=axis, keepdims=True)) * varies)


def normalised(hsic: Doubles) -> Doubles:
    """Return HSIC_ab / sqrt(HSIC_aa·HSIC_bb): ``[…, a, b]``, NaN where a or b is not above 0."""
    own = np.diagonal(hsic, axis1=-2, axis2=-1)
    own = np.where(own > 0, own, np.nan)
    # the root of the product, not the product of the roots: sqrt(x·x) is x, so that the diagonal is exactly 1
    return np.asarray(hsic / np.sqrt(own[..., :, None] * own[..., None, :]))
