"""Intervals against their definitions."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest  # type: ignore[import-untyped]

from layerlake.analyze import intervals
from layerlake.analyze.intervals import (
    bootstrap_sums,
    crossed_bootstrap,
    jackknife_interval,
    percentile_interval,
    ratio,
    wilson_interval,
)


def test_bootstrap_sums_are_sums_over_drawn_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).standard_normal((7, 3))
    drawn = np.random.default_rng(0).integers(0, 7, (1000, 7))
    expected = values[drawn].sum(axis=1)
    np.testing.assert_allclose(bootstrap_sums(values), expected, atol=1e-12)
    monkeypatch.setattr(intervals, "_BLOCK", 50)  # the same draws, a few resamples at a time
    np.testing.assert_allclose(bootstrap_sums(values), expected, atol=1e-12)


@pytest.mark.parametrize(("n_documents", "mib"), [(5_000, 24), (1 << 21, 48)])
def test_bootstrap_sums_hold_little_beyond_their_result(n_documents: int, mib: int) -> None:
    values = np.ones((n_documents, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "N_RESAMPLES", (4 << 20) // n_documents + 2)
        tracemalloc.start()
        sums = bootstrap_sums(values)
        peak = tracemalloc.get_traced_memory()[1] - sums.nbytes
        tracemalloc.stop()
    assert 0.8 < peak / (mib << 20) < 1.05


def test_bootstrap_covers_the_mean() -> None:
    covered = []
    for seed in range(60):
        values = np.random.default_rng(seed).standard_normal((60, 1)) + 5
        lo, hi = percentile_interval(bootstrap_sums(values) / 60, n_documents=60)
        covered.append(lo[0] <= 5 <= hi[0])
    assert np.mean(covered) > 0.85


def test_one_document_has_no_interval() -> None:
    lo, hi = percentile_interval(np.zeros((1000, 2)), n_documents=1)
    assert np.isnan(lo).all()
    assert np.isnan(hi).all()


def test_an_interval_needs_two_documents_and_leaves_out_draws_without_any() -> None:
    replicates = np.random.default_rng(0).standard_normal((1000, 3))
    replicates[:300, 1] = np.nan
    replicates[:, 2] = np.nan
    lo, hi = percentile_interval(replicates, n_documents=2)
    assert [lo[1], hi[1]] == np.percentile(replicates[300:, 1], [2.5, 97.5]).tolist()
    assert np.isnan([lo[2], hi[2]]).all()
    lo, hi = percentile_interval(replicates, n_documents=np.array([1, 2, 2]))
    assert np.isnan([lo[0], hi[0]]).all()
    assert np.isfinite([lo[1], hi[1]]).all()


def test_jackknife_of_a_mean_is_students_t() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0, 9.0])
    without = (values.sum() - values) / 4
    lo, hi = jackknife_interval(values.mean(), without)
    half = 2.7764451052 * values.std(ddof=1) / np.sqrt(5)  # t, 4 degrees of freedom
    np.testing.assert_allclose([lo, hi], [values.mean() - half, values.mean() + half])


def test_ratio_has_nan_for_nothing() -> None:
    np.testing.assert_array_equal(ratio([1.0, 1.0], [2.0, 0.0]), [0.5, np.nan])


def test_crossed_bootstrap_draws_seeds_and_items() -> None:
    rng = np.random.default_rng(1)
    by_seed, by_item = rng.normal(size=(4, 1)), rng.normal(size=60)
    means = crossed_bootstrap(np.stack([by_seed + by_item, np.broadcast_to(by_item, (4, 60))]))
    assert means.shape == (1000, 2)
    np.testing.assert_allclose(
        means.mean(axis=0), [by_seed.mean() + by_item.mean(), by_item.mean()], atol=0.05
    )
    expected = np.hypot(by_seed.std() / 2, by_item.std() / np.sqrt(60)), by_item.std() / np.sqrt(60)
    np.testing.assert_allclose(means.std(axis=0), expected, rtol=0.1)
    np.testing.assert_array_equal(
        means, crossed_bootstrap(np.stack([by_seed + by_item, by_item + 0 * by_seed]))
    )


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 7), (638, 638), (301, 638)])
def test_wilson_is_scipy_s(k: int, n: int) -> None:
    (lo,), (hi,) = wilson_interval(np.array([k / n]), n)
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert (lo, hi) == pytest.approx((expected.low, expected.high), abs=1e-12)
