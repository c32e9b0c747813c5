"""Predictions of 0-or-1 labels, against direct computation and bounds that always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli
from stfbnn.predictive import BernoulliPrediction, sums_for

LOGITS = 2 * torch.randn(7, 30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.randint(0, 2, (30, 3), generator=torch.Generator().manual_seed(1))


def predicted(logits: torch.Tensor, temperature: float = 1.0, at_mean: bool = False) -> BernoulliPrediction:
    sums = sums_for(Bernoulli(), temperature)
    sums.add(logits)
    prediction = sums.finish(at_mean)
    assert isinstance(prediction, BernoulliPrediction)
    return prediction


def test_quantities() -> None:
    pred = predicted(LOGITS)
    probs = LOGITS.sigmoid()
    torch.testing.assert_close(pred.probs, probs.mean(0))
    total = torch.as_tensor(stats.bernoulli(probs.mean(0).numpy()).entropy())
    torch.testing.assert_close(pred.entropy, total)
    torch.testing.assert_close(pred.aleatoric, torch.as_tensor(stats.bernoulli(probs.numpy()).entropy()).mean(0))
    torch.testing.assert_close(pred.epistemic, pred.entropy - pred.aleatoric)
    assert torch.equal(pred.labels, (probs.mean(0) > 0.5).long())
    torch.testing.assert_close(pred.confidence, torch.maximum(probs.mean(0), 1 - probs.mean(0)))
    densities = torch.distributions.Bernoulli(probs.mean(0)).log_prob(LABELS.double()).sum(1)
    torch.testing.assert_close(pred.log_density(LABELS), densities)
    torch.testing.assert_close(pred.log_density(LABELS.bool()), densities)
    assert len(pred) == 30
    assert pred.samples == 7


@given(
    st.lists(
        st.lists(st.floats(-800, 800), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None)
def test_entropy_is_aleatoric_plus_what_weights_would_tell(logits: list[list[float]]) -> None:
    pred = predicted(torch.tensor(logits, dtype=torch.float64).unsqueeze(1))
    assert (pred.aleatoric >= 0).all()
    assert (pred.entropy >= pred.aleatoric - 1e-12).all()
    assert (pred.entropy <= math.log(2) + 1e-12).all()
    torch.testing.assert_close(pred.entropy, pred.aleatoric + pred.epistemic, atol=1e-12, rtol=0)


def test_a_sure_prediction_keeps_its_small_probability() -> None:
    pred = predicted(torch.full((2, 1), 300.0))
    assert float(pred.probs) == 1
    assert float(pred.log_density(torch.tensor([0]))) == pytest.approx(-300)
    assert float(pred.entropy) == pytest.approx(0, abs=1e-12)
    # Beyond what a double holds, too.
    wild = predicted(torch.full((2, 1), 1e5))
    assert float(wild.log_density(torch.tensor([0]))) == pytest.approx(-1e5)
    assert torch.isfinite(wild.entropy).all()


def test_shapes_and_columns() -> None:
    flat, column = predicted(LOGITS[:, :, 0]), predicted(LOGITS[:, :, :1])
    assert flat.probs.shape == (30,)
    assert column.probs.shape == (30, 1)
    expected = flat.log_density(LABELS[:, 0])
    torch.testing.assert_close(column.log_density(LABELS[:, 0]), expected)
    torch.testing.assert_close(column.log_density(LABELS[:, :1]), expected)
    torch.testing.assert_close(flat.log_density(LABELS[:, :1]), expected)


def test_at_the_mean_nothing_is_epistemic() -> None:
    assert (predicted(LOGITS[:1], at_mean=True).epistemic == 0).all()


def test_what_is_undefined_or_does_not_fit_is_refused() -> None:
    pred = predicted(LOGITS)
    for name in ("mean", "std"):
        with pytest.raises(InputError, match="regression"):
            getattr(pred, name)
    with pytest.raises(InputError, match="0 or 1"):
        pred.log_density(LABELS + 1)
    with pytest.raises(InputError, match="shape"):
        pred.log_density(LABELS[:, 0])
