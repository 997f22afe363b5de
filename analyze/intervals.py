"""Intervals: the bootstrap over documents, or over seeds and items; the jackknife over groups; Wilson's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "N_RESAMPLES",
    "bootstrap_sums",
    "crossed_bootstrap",
    "jackknife_interval",
    "percentile_interval",
    "ratio",
    "standard_error",
    "wilson_interval",
]

N_RESAMPLES = 1000
"""B: resamples of the documents."""

_SEED = 0
_BLOCK = 1 << 20  # draws held at a time, 24 bytes each


def ratio(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return a/b, NaN (which a table shows as NULL) where b is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(a, dtype=np.float64), b)
    quotient = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=quotient, where=bottom != 0)
    return quotient


def bootstrap_sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the sums over resampled documents, from which any ratio of sums has its interval.

    Each of the B = 1000 resamples draws as many documents as there are, with replacement (seed 0). All
    columns see the same draws. Costs B·documents·columns multiplications; holds 24 MiB beyond its result, or 24
    bytes a document where there are more than a million.

    Parameters
    ----------
    values : float64 ``[document, column]``
        Sums over each document: of a metric, and of the count that it is divided by.

    Returns
    -------
    float64 ``[resample, column]``
        What the sum over all documents is in each resample.
    """
    n = len(values)
    rng = np.random.default_rng(_SEED)
    sums = np.empty((N_RESAMPLES, values.shape[1]))
    step = max(1, _BLOCK // max(n, 1))
    for start in range(0, N_RESAMPLES, step):
        size = min(step, N_RESAMPLES - start)
        drawn = rng.integers(0, n, (size, n))
        drawn += n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = times @ values
    return sums


def percentile_interval(
    replicates: npt.NDArray[np.float64], *, n_documents: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the 95 % percentile interval of replicates ``[resample, …]``: two arrays ``[…]``.

    A resample may hold none of the few documents that a quantity is measured in: its replicate is NaN and is left
    out, so that the interval is one given that there is such a document.

    Parameters
    ----------
    replicates : float64 ``[resample, …]``
        The quantities in each resample.
    n_documents : int or int ``[…]``
        In how many documents each is measured. Where they are fewer than two there is nothing to resample, and the
        interval is NaN, which a table shows as NULL.
    """
    ends = np.full((2, *replicates.shape[1:]), np.nan)
    measured = (np.asarray(n_documents) >= 2) & np.isfinite(replicates).any(axis=0)
    ends[:, measured] = np.nanpercentile(replicates[:, measured], [2.5, 97.5], axis=0)
    lo, hi = ends
    return lo, hi


def jackknife_interval(
    estimate: npt.NDArray[np.float64], without: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the 95 % interval of the delete-a-group jackknife: two arrays ``[…]``.

    Student's t with G - 1 degrees of freedom around the estimate, with the standard error
    sqrt((G - 1)/G · Σ (θ_(g) - mean θ_(·))²). For estimators that a bootstrap would bias, such as CKA.

    Parameters
    ----------
    estimate : float64 ``[…]``
        θ from all groups.
    without : float64 ``[group, …]``
        θ_(g): the estimate without group g.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    n_groups = len(without)
    spread = without - without.mean(axis=0)
    error = np.sqrt((n_groups - 1) / n_groups * np.square(spread).sum(axis=0))
    reach = stdtrit(n_groups - 1, 0.975) * error
    return estimate - reach, estimate + reach


def crossed_bootstrap(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the means over resampled seeds and items, which vary independently: ``[resample, …]``.

    Each of the B = 1000 resamples draws as many seeds, and as many items, as there are, with replacement
    (seed 0), and takes the mean over all pairs of them. All rows see the same draws. Source: Owen 2007, "The
    pigeonhole bootstrap".

    Parameters
    ----------
    values : float64 ``[…, seed, item]``
        What a seed gives for an item.
    """
    *rows, n_seeds, n_items = values.shape
    rng = np.random.default_rng(_SEED)
    seeds, items = (rng.multinomial(n, np.full(n, 1 / n), N_RESAMPLES) / n for n in (n_seeds, n_items))
    means = np.empty((N_RESAMPLES, *rows))
    for row in np.ndindex(*rows):
        means[:, *row] = np.vecdot(seeds @ values[row], items)
    return means


def standard_error(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the standard error of a mean over the last axis, from the sample's own spread; NaN of fewer than two.

    Examples
    --------
    >>> float(standard_error(np.array([1.0, 2.0, 3.0, 4.0])).round(4))
    0.6455
    """
    n = values.shape[-1]
    return np.asarray(
        values.std(axis=-1, ddof=1) / np.sqrt(n) if n > 1 else np.full(values.shape[:-1], np.nan)
    )


def wilson_interval(
    share: npt.NDArray[np.float64], n: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the 95 % interval of shares of n trials: two arrays ``[…]``, within 0 and 1.

    Source: Wilson 1927; it covers also where a share is near 0 or 1, unlike share ± 1.96 standard errors.

    Examples
    --------
    >>> lo, hi = wilson_interval(np.array([0.5, 1.0]), 10)
    >>> lo.round(3).tolist(), hi.round(3).tolist()
    ([0.237, 0.722], [0.763, 1.0])
    """
    from scipy.special import ndtri

    z2 = ndtri(0.975) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return centre - reach, centre + reach
