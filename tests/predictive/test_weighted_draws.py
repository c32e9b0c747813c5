"""Draws that count differently: a weight of 2 is that draw twice, and equal weights are none."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Laplace

from stfbnn.errors import InputError
from stfbnn.likelihood import (
    Bernoulli,
    Categorical,
    CustomLikelihood,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
)
from stfbnn.predictive import Prediction, sums_for

REALS = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))


def laplace(outputs: Tensor, targets: Tensor) -> Tensor:
    return Laplace(outputs[:, :2], 1.0).log_prob(targets).sum(1)


# Each with targets for outputs (6, 4).
KINDS: dict[str, tuple[Likelihood, Tensor]] = {
    "categorical": (Categorical(), torch.tensor([0, 1, 2, 3, 0, 1])),
    "bernoulli": (Bernoulli(), torch.randint(0, 2, (6, 4), generator=torch.Generator().manual_seed(0))),
    "gaussian": (Gaussian(noise_std=[0.5, 1.0, 2.0, 0.1]), torch.cat([REALS, REALS], 1)),
    "heteroscedastic": (HeteroscedasticGaussian(), REALS),
    "poisson": (Poisson(), torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0))),
    "custom": (CustomLikelihood(laplace), REALS),
}
QUANTITIES = ("probs", "entropy", "mean", "std", "aleatoric", "epistemic", "labels", "confidence")
DRAWS = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(2))

kinds = pytest.mark.parametrize("kind", KINDS)


def added(kind: str, parts: list[tuple[Tensor, Tensor | None]]) -> Prediction:
    sums = sums_for(KINDS[kind][0], 1.0)
    for outputs, weights in parts:
        sums.add(outputs, weights)
    return sums.finish(at_mean=False)


def quantities(prediction: Prediction, targets: Tensor) -> dict[str, Tensor]:
    found = {"log_density": prediction.log_density(targets)}
    for name in QUANTITIES:
        try:
            found[name] = getattr(prediction, name)
        except (InputError, AttributeError):
            continue
    return found


def assert_same(kind: str, one: Prediction, other: Prediction, tolerance: float) -> None:
    first, second = (quantities(prediction, KINDS[kind][1]) for prediction in (one, other))
    assert first.keys() == second.keys()
    assert len(first) > 1
    for name, values in first.items():
        torch.testing.assert_close(values, second[name], atol=tolerance, rtol=tolerance, msg=f"{kind} {name}")


@kinds
@given(counts=st.lists(st.integers(1, 3), min_size=2, max_size=5), scale=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_a_weight_is_a_number_of_copies(kind: str, counts: list[int], scale: float) -> None:
    draws = DRAWS[: len(counts)].double()
    copies = draws.repeat_interleave(torch.tensor(counts), dim=0)
    weighted = added(kind, [(draws, scale * torch.tensor(counts, dtype=torch.float64))])
    assert weighted.samples == len(counts)
    assert_same(kind, weighted, added(kind, [(copies, None)]), 1e-10)


@kinds
def test_one_by_one_is_all_at_once(kind: str) -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64)
    at_once = added(kind, [(DRAWS, weights)])
    apart = added(kind, [(DRAWS[i : i + 1], weights[i : i + 1]) for i in range(5)])
    assert_same(kind, at_once, apart, 0.0)


@kinds
def test_equal_weights_are_no_weights(kind: str) -> None:
    plain = added(kind, [(DRAWS, None)])
    assert_same(kind, plain, added(kind, [(DRAWS, torch.ones(5))]), 0.0)
    # In sums, 1/5 rounds; kept draws know that all are equal.
    tolerance = 1e-12 if kind in ("categorical", "bernoulli") else 0.0
    fifths = torch.full((5,), 0.2, dtype=torch.float64)
    assert_same(kind, plain, added(kind, [(DRAWS, fifths)]), tolerance)


@kinds
def test_weights_change_the_answer(kind: str) -> None:
    plain = added(kind, [(DRAWS, None)])
    skewed = added(kind, [(DRAWS, torch.tensor([10.0, 1, 1, 1, 1]))])
    targets = KINDS[kind][1]
    assert not torch.allclose(plain.log_density(targets), skewed.log_density(targets))


@kinds
def test_chunks_are_joined(kind: str) -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64)
    parts = [added(kind, [(DRAWS[:, rows], weights)]) for rows in (slice(0, 2), slice(2, 6))]
    joined = Prediction.concatenate(parts)
    assert len(joined) == 6
    assert_same(kind, joined, added(kind, [(DRAWS, weights)]), 1e-12)


@kinds
def test_the_density_does_not_see_the_order_of_examples(kind: str) -> None:
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    targets = KINDS[kind][1]
    plain = added(kind, [(DRAWS, None)]).log_density(targets)
    assert plain.shape == (6,)
    torch.testing.assert_close(added(kind, [(DRAWS[:, order], None)]).log_density(targets[order]), plain[order])


@kinds
@pytest.mark.parametrize(
    "weights",
    [torch.ones(4), torch.tensor([1.0, 1, 1, 1, 0]), torch.tensor([1.0, 1, 1, 1, -1]), torch.full((5,), torch.nan)],
)
def test_bad_weights_are_refused(kind: str, weights: Tensor) -> None:
    with pytest.raises(InputError, match="5 draws need as many positive weights"):
        added(kind, [(DRAWS, weights)])


@kinds
def test_draws_that_are_not_finite_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="NaN"):
        added(kind, [(DRAWS * torch.nan, None)])


@kinds
def test_predictions_are_on_the_cpu_and_frozen(kind: str) -> None:
    prediction = added(kind, [(DRAWS, None)])
    tensors = [getattr(prediction, field.name) for field in fields(prediction)]
    assert all(tensor.device.type == "cpu" for tensor in tensors if isinstance(tensor, Tensor))
    assert replace(prediction, at_mean=True).at_mean


def test_a_predictive_temperature_needs_logits() -> None:
    for kind in ("gaussian", "heteroscedastic", "poisson", "custom"):
        with pytest.raises(InputError, match="logits"):
            sums_for(KINDS[kind][0], 2.0)
    for kind in ("categorical", "bernoulli"):
        sums = sums_for(KINDS[kind][0], 2.0)
        sums.add(DRAWS)
        expected = added(kind, [(DRAWS / 2, None)])
        assert_same(kind, sums.finish(at_mean=False), expected, 1e-12)
