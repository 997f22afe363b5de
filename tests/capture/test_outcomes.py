"""What is measured of two distributions, against golden vectors and against PyTorch in double precision."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from layerlake.capture import outcomes
from layerlake.capture.outcomes import Baseline, Outcomes, baseline_nbytes


def baseline(logits: torch.Tensor, targets: torch.Tensor) -> Baseline:
    """A baseline whose residual streams are the logits themselves."""
    blocks: Any = SimpleNamespace(
        norm=lambda x: x,
        unembed=torch.clone,
        model=SimpleNamespace(shape=SimpleNamespace(n_vocab=logits.shape[1])),
    )
    return Baseline(blocks, logits, targets)


def test_golden_vectors() -> None:
    """EXPERIMENTS §6.8: the two directions differ, and a swapped one shows."""
    a, b, c = torch.tensor([[2.0, 1, 0]]), torch.tensor([[1.0, 1, 0]]), torch.tensor([[0.0, 1, 2]])
    target = torch.tensor([0])
    of_a, of_b = baseline(a, target), baseline(b, target)
    assert of_a.compare(b).kl_nats[0] == pytest.approx(0.119629795, abs=2e-7)
    assert of_b.compare(a).kl_nats[0] == pytest.approx(0.123292362, abs=2e-7)
    assert of_a.compare(c).kl_nats[0] == pytest.approx(1.150420765, abs=5e-7)
    assert baseline(c, target).compare(a).kl_nats[0] == pytest.approx(1.150420765, abs=5e-7)
    assert of_a.outcomes.entropy_bits[0] == pytest.approx(1.200892978, abs=2e-7)
    assert of_a.outcomes.loss_nats[0] == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + math.e + 1)))
    assert of_a.compare(c).top1[0] == 2


def test_a_distribution_is_exactly_nothing_apart_from_itself() -> None:
    logits = 30 * torch.randn((40, 500), generator=torch.Generator().manual_seed(0))
    own = baseline(logits, torch.zeros(40, dtype=torch.int64))
    again = own.compare(logits)
    assert (again.kl_nats == 0).all()
    for name in Outcomes.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(own.outcomes, name))


def test_one_hot_has_no_entropy() -> None:
    """Not the 0.0015 bits of a clamp at 1e-9, and not a bit more for a large vocabulary."""
    logits = torch.zeros((1, 151_936))
    logits[0, 7] = 200
    found = baseline(logits, torch.tensor([7])).outcomes
    assert found.entropy_bits[0] == 0
    assert found.loss_nats[0] == 0


@pytest.mark.parametrize("chunk_nbytes", [1, 4 * 300 * 7, 1 << 30])
def test_whatever_is_made_at_a_time(monkeypatch: pytest.MonkeyPatch, chunk_nbytes: int) -> None:
    monkeypatch.setattr(outcomes, "_CHUNK_NBYTES", {"cpu": chunk_nbytes})
    chance = torch.Generator().manual_seed(1)
    p, q = (4 * torch.randn((23, 300), generator=chance) for _ in range(2))
    targets = torch.randint(0, 300, (23,), generator=chance)
    found = baseline(p, targets).compare(q)
    log_p, log_q = (x.double().log_softmax(dim=1) for x in (p, q))
    expected = {
        "kl_nats": (log_p.exp() * (log_p - log_q)).sum(dim=1),
        "loss_nats": -log_q[torch.arange(23), targets],
        "entropy_bits": -(log_q.exp() * log_q).sum(dim=1) / math.log(2),
    }
    for name, values in expected.items():
        assert getattr(found, name).dtype == np.float32
        np.testing.assert_allclose(getattr(found, name), values.numpy(), rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(found.top1, q.argmax(dim=1).numpy())


def test_small_divergences_are_not_lost_in_the_rounding() -> None:
    """Of a divergence of 5e-9 nats the plain sum would be wrong by a millionth, and negative every second time."""
    chance = torch.Generator().manual_seed(2)
    p = torch.randn((8, 5000), generator=chance)
    q = p + 1e-4 * torch.randn(p.shape, generator=chance)
    log_p, log_q = (x.double().log_softmax(dim=1) for x in (p, q))
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy()
    found = baseline(p, torch.zeros(8, dtype=torch.int64)).compare(q).kl_nats
    assert expected.max() < 1e-7
    assert np.abs(found - expected).max() < 2e-7
    assert found.min() > -2e-7


def test_what_it_takes() -> None:
    assert baseline_nbytes(1000, 50_257, "cpu") == 4 * 1000 * 50_257 + 3 * (32 << 20)
