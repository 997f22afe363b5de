"""CKA: golden vectors, a brute-force estimator, and where it is not defined."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.analyze.cka import CkaOptions, CkaStatistic, hsic_matrix
from layerlake.analyze.reduce import compute_tables
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]
Stored = Callable[[Run, str], Array]

i, j = np.arange(8)[:, None], np.arange(3)[None]
X = np.sin(3 * i + j)
Y = np.cos(2 * i + 1.5 * j[:, :2]) + 0.1 * i


def hsic(x: Array, y: Array) -> float:
    """The unbiased estimator (Song et al. 2012, eq. 5), written out."""
    n = len(x)
    K, L = x @ x.T, y @ y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return float((np.trace(K @ L) + middle - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3)))


def test_golden_vectors() -> None:
    matrix = hsic_matrix([X, Y])
    expected = [[2.3000369897, -0.3099236085], [-0.3099236085, 0.5824703378]]
    np.testing.assert_allclose(matrix, expected, atol=1e-9)
    assert matrix[0, 1] / np.sqrt(matrix[0, 0] * matrix[1, 1]) == pytest.approx(-0.2677628629, abs=1e-9)


def test_golden_vectors_survive_an_offset_in_float32() -> None:
    x, y = (X + 100).astype(np.float32), (Y - 50).astype(np.float32)
    assert hsic_matrix([x, y])[0, 1] == pytest.approx(-0.30992, abs=1e-4)


def test_equals_the_u_statistic_over_tuples() -> None:
    """HSIC₁ is the mean of (K_st)(L_st + L_uv - 2 L_su) over distinct 4-tuples (Song et al. 2012)."""
    x, y = X[:6], Y[:6]
    K, L = x @ x.T, y @ y.T
    terms = [
        K[s, t] * (L[s, t] + L[u, v] - 2 * L[s, u]) for s, t, u, v in itertools.permutations(range(6), 4)
    ]
    assert hsic_matrix([x, y])[0, 1] == pytest.approx(np.mean(terms), abs=1e-12)


def test_more_tokens_than_a_block_of_the_gram_matrix() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 5)), rng.standard_normal((300, 4))
    matrix = hsic_matrix([x, y])
    np.testing.assert_allclose(matrix[0], [hsic(x, x), hsic(x, y)], rtol=1e-10, atol=1e-12)


def seen_by_norm(x: Array, run: Run, *, normed: bool) -> Array:
    if run.shape.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + run.shape.norm_eps) if normed else x


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "expected_batches"),
    [
        (CkaOptions(batch=6), 4),
        (CkaOptions(batch=6, normed=True), 4),
        (CkaOptions(batch=9), 3),
        (CkaOptions(samples="tokens_per_doc"), 11),
        (CkaOptions(samples="tokens_per_doc", include_bos=True), 16),
    ],
)
def test_cka_equals_one_shot_numpy(
    make_run: Callable[..., Run],
    shape: ModelShape,
    stored: Stored,
    *,
    norm: Literal["layernorm", "rmsnorm"],
    dtype: str,
    options: CkaOptions,
    expected_batches: int,
) -> None:
    lengths = (5, 4, 9, 3) * 5 + (6, 2)
    run = make_run(shape=replace(shape, norm=norm), dtype=dtype, lengths=lengths, partition_tokens=32)
    resid = seen_by_norm(stored(run, "resid"), run, normed=options.normed)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if options.samples == "last_token":
        batches = [ends[k : k + options.batch] - 1 for k in range(0, len(ends), options.batch)]
    else:
        first = int(not options.include_bos)
        batches = [np.arange(a + first, b) for a, b in zip(starts, ends, strict=True)]
    kept = [batch for batch in batches if len(batch) >= 4]
    assert len(kept) == expected_batches
    n = run.shape.n_layers + 1
    per_batch = np.array([[[hsic(x[b], y[b]) for y in resid] for x in resid] for b in kept])

    def cka(matrices: Array) -> Array:
        mean = matrices.mean(axis=0)
        return np.asarray(mean / np.sqrt(np.outer(np.diag(mean), np.diag(mean))))

    table = compute_tables(CkaStatistic.open, run, options)["cka"].to_pandas()
    assert table[["boundary_a", "boundary_b"]].to_numpy().tolist() == [
        [a, b] for a in range(n) for b in range(n)
    ]
    whole = cka(per_batch)
    np.testing.assert_allclose(table["cka"], whole.ravel(), atol=1e-9)
    assert (table["n_samples"] == sum(map(len, kept))).all()
    assert (table["n_left_out"] == sum(map(len, batches)) - sum(map(len, kept))).all()
    if expected_batches < 4:
        assert table["cka_lo"].isna().all()
        assert table["reason"].str.contains("3 of the 4 batches").all()
        return
    without = np.array([cka(np.delete(per_batch, k, axis=0)) for k in range(len(kept))])
    groups = len(kept)
    error = np.sqrt((groups - 1) / groups * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    t = {4: 3.18244631, 11: 2.22813885, 16: 2.13144955}[groups]
    np.testing.assert_allclose(table["cka_lo"], (whole - t * error).ravel(), atol=1e-8)
    np.testing.assert_allclose(table["cka_hi"], (whole + t * error).ravel(), atol=1e-8)
    diagonal = table[table["boundary_a"] == table["boundary_b"]]
    assert (diagonal[["cka", "cka_lo", "cka_hi"]] == 1).all(axis=None)
    assert (table["variant"] == ("authors" if options.include_bos else "default")).all()
    assert (table["centred"] == (norm == "layernorm")).all()
    assert (table["normed"] == options.normed).all()


def cka_of(run: Run, **options: Any) -> Array:
    table = compute_tables(CkaStatistic.open, run, CkaOptions(**options))["cka"]
    return np.asarray(table["cka"].to_numpy())


@pytest.mark.parametrize(("norm", "same"), [("layernorm", True), ("rmsnorm", False)])
def test_what_layernorm_never_sees_does_not_count(
    make_run: Callable[..., Run], shape: ModelShape, norm: Literal["layernorm", "rmsnorm"], *, same: bool
) -> None:
    """The same number added to all dimensions of a token."""
    rng = np.random.default_rng(0)
    resid = rng.standard_normal((3, 64, shape.d_model)).astype(np.float32)
    moved = resid + 30 * rng.standard_normal((1, 64, 1)).astype(np.float32)
    given: dict[str, Any] = {"shape": replace(shape, norm=norm), "lengths": (4,) * 16}
    before, after = (
        cka_of(make_run(name=name, values={"resid": x}, **given))
        for name, x in (("before", resid), ("after", moved))
    )
    assert (np.abs(after - before).max() < 1e-5) == same
    assert (after.min() > 0.9) != same


def test_normed_tokens_of_enormous_length_do_not_decide(
    make_run: Callable[..., Run], shape: ModelShape
) -> None:
    """Two unrelated boundaries that share four massive tokens."""
    resid = np.random.default_rng(0).standard_normal((3, 256, shape.d_model)).astype(np.float32)
    resid[:, 3:19:4, 0] = 1e4  # the last tokens of four documents
    run = make_run(shape=shape, lengths=(4,) * 64, values={"resid": resid})
    assert cka_of(run)[1] > 0.99  # boundaries 0 and 1
    assert abs(cka_of(run, normed=True)[1]) < 0.2


@pytest.mark.parametrize(
    ("norm", "size"), [("rmsnorm", (1, 8)), ("layernorm", (1, 8)), ("layernorm", (64, 1))]
)
def test_a_boundary_without_variance_is_null_and_says_why(
    make_run: Callable[..., Run],
    shape: ModelShape,
    norm: Literal["layernorm", "rmsnorm"],
    size: tuple[int, int],
) -> None:
    """x_0 is the same for all tokens, or dimensions: the mean of equal numbers, rounded, must not pass for variance."""
    rng = np.random.default_rng(0)
    resid = rng.standard_normal((3, 64, shape.d_model)).astype(np.float32)
    resid[0] = rng.standard_normal(size)
    run = make_run(shape=replace(shape, norm=norm), lengths=(4,) * 16, values={"resid": resid})
    rows = compute_tables(CkaStatistic.open, run, CkaOptions(batch=4))["cka"].to_pylist()
    for row in rows:
        constant = 0 in (row["boundary_a"], row["boundary_b"])
        assert (row["cka"] is None) == constant
        assert (row["reason"] == "boundary 0 has no variance") == constant


def test_too_few_documents_are_null_and_say_why(make_run: Callable[..., Run]) -> None:
    rows = compute_tables(CkaStatistic.open, make_run(lengths=(5, 6, 7)), CkaOptions())["cka"].to_pylist()
    assert len(rows) == 9
    for row in rows:
        assert row["cka"] is None
        assert row["cka_lo"] is None
        assert row["reason"] == "no batch has 4 tokens or more"
        assert (row["n_samples"], row["n_left_out"], row["n_batches"]) == (0, 3, 0)


def test_fewer_samples_than_width_are_noted(make_run: Callable[..., Run], shape: ModelShape) -> None:
    notes = {
        width: compute_tables(
            CkaStatistic.open,
            make_run(shape=replace(shape, d_model=width), name=f"w{width}", lengths=(4,) * 8),
            CkaOptions(),
        )["cka"]["note"].to_pylist()[0]
        for width in (8, 9)
    }
    assert notes == {8: None, 9: "8 samples are fewer than the width 9"}


def test_a_batch_must_be_large_enough() -> None:
    with pytest.raises(AnalysisError, match="too small"):
        CkaOptions(batch=3)
