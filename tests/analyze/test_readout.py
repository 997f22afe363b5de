"""Distributions from the online sums, against softmax written out, and golden vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlake.analyze.readout import MEASURES, compare_distributions

Array = npt.NDArray[Any]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def of_logits(*logits: list[float], clamped: bool = False) -> list[dict[str, float]]:
    """The measures of one token whose lenses have these logits; the last is the final distribution."""
    n = len(logits[0])
    x = [np.array([row], dtype=np.float32) for row in logits]
    out = compare_distributions(np.eye(n, dtype=np.float32), x[-1], x[:-1], np.array([1]), clamped=clamped)
    return [dict(zip(MEASURES, row, strict=True)) for row in out[0]]


def test_golden_kl_has_the_right_direction() -> None:
    lens, final = of_logits([1, 1, 0], [2, 1, 0])
    assert lens["kl_final_lens_nats"] == pytest.approx(0.119629795, abs=1e-7)
    assert lens["kl_lens_final_nats"] == pytest.approx(0.123292362, abs=1e-7)
    assert final["entropy_nats"] / np.log(2) == pytest.approx(1.200892978, abs=1e-6)
    lens, _ = of_logits([0, 1, 2], [2, 1, 0])
    assert lens["kl_final_lens_nats"] == pytest.approx(1.150420765, abs=1e-6)
    assert lens["kl_lens_final_nats"] == pytest.approx(1.150420765, abs=1e-6)


def test_rank_and_agreement() -> None:
    lens, final = of_logits([3, 2, 1], [1, 2, 0])
    assert (lens["rank"], lens["top1_token"], lens["agrees"]) == (1, 0, 0)
    assert (final["rank"], final["top1_token"], final["agrees"]) == (0, 1, 1)
    assert final["kl_final_lens_nats"] == final["kl_lens_final_nats"] == 0


@pytest.mark.parametrize(
    ("n_vocab", "bias"), [(50257, 0.001503), (51200, 0.001531), (128256, 0.003834), (151936, 0.004542)]
)
def test_golden_clamp_bias_of_a_one_hot(n_vocab: int, bias: float) -> None:
    logits = np.zeros((1, n_vocab), dtype=np.float32)
    logits[0, 0] = 1000.0
    x = np.ones((1, 1), dtype=np.float32)
    out = compare_distributions(logits, x, [x], np.array([0]), clamped=True)
    assert out[0, 0, 0] / np.log(2) == pytest.approx(bias, abs=1e-6)
    assert out[0, 1, 0] == pytest.approx(0, abs=1e-9)  # the final distribution's entropy is exact


@settings(deadline=None, max_examples=25)
@given(
    n_vocab=st.sampled_from([5, 1023, 1024, 1025, 2500]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    offset=st.sampled_from([0.0, -90.0, 300.0]),
    rising=st.booleans(),
    seed=st.integers(0, 99),
)
def test_online_sums_equal_softmax(
    n_vocab: int, scale: float, offset: float, rising: bool, seed: int
) -> None:
    """Wherever the largest logit lies, and whatever constant all logits share."""
    rng = np.random.default_rng(seed)
    d, n_tokens = 6, 9
    unembed = rng.standard_normal((d + 1, n_vocab)).astype(np.float32)
    unembed[-1] = offset + (np.sort(rng.standard_normal(n_vocab)) * scale if rising else 0.0)
    xs = [rng.standard_normal((n_tokens, d + 1)).astype(np.float32) * np.float32(scale) for _ in range(3)]
    for x in xs:
        x[:, -1] = 1.0
    targets = rng.integers(0, n_vocab, n_tokens)
    out = compare_distributions(unembed, xs[-1], xs[:-1], targets)
    logits = [x.astype(np.float64) @ unembed for x in xs]
    final = log_softmax(logits[-1])
    tolerance = 1e-5 * max(1.0, abs(offset) / 10, scale)
    rows = np.arange(n_tokens)
    for i, lens in enumerate(map(log_softmax, logits)):
        p, q = np.exp(lens), np.exp(final)
        expected = {
            "entropy_nats": -(p * lens).sum(axis=1),
            "kl_final_lens_nats": (q * (final - lens)).sum(axis=1),
            "kl_lens_final_nats": (p * (lens - final)).sum(axis=1),
            "loss_nats": -lens[rows, targets],
        }
        for name, values in expected.items():
            measured = out[:, i, MEASURES.index(name)]
            np.testing.assert_allclose(measured, values, rtol=2e-5, atol=tolerance, err_msg=name)
        top = out[:, i, MEASURES.index("top1_token")].astype(int)
        assert (lens[rows, top] >= lens.max(axis=1) - tolerance).all()
        rank = out[:, i, MEASURES.index("rank")]
        margin = lens - lens[rows, targets][:, None]
        margin[rows, targets] = -np.inf
        assert ((margin > tolerance).sum(axis=1) <= rank).all()
        assert (rank <= (margin > -tolerance).sum(axis=1)).all()
