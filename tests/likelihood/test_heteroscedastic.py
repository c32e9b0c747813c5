"""Gaussian noise whose size is predicted, against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from stfbnn.errors import InputError
from stfbnn.likelihood import Gaussian, HeteroscedasticGaussian, build_likelihood

RANDOM = torch.Generator().manual_seed(0)
OUTPUTS = torch.randn(20, 6, generator=RANDOM, dtype=torch.float64)
TARGETS = torch.randn(20, 3, generator=RANDOM, dtype=torch.float64)


def test_density() -> None:
    normal = Normal(OUTPUTS[:, :3], (OUTPUTS[:, 3:] / 2).exp())
    likelihood = HeteroscedasticGaussian()
    likelihood.check(OUTPUTS, TARGETS)
    torch.testing.assert_close(likelihood.log_prob(OUTPUTS, TARGETS), normal.log_prob(TARGETS).sum(1))


def test_dense_density() -> None:
    outputs, targets = torch.randn(4, 2, 5), torch.randn(4, 1, 5)
    HeteroscedasticGaussian().check(outputs, targets)
    expected = Normal(outputs[:, :1], (outputs[:, 1:] / 2).exp()).log_prob(targets).sum((1, 2))
    torch.testing.assert_close(HeteroscedasticGaussian().log_prob(outputs, targets), expected)


def test_equal_noise_is_the_gaussian_likelihood() -> None:
    outputs = torch.cat([OUTPUTS[:, :3], torch.full((20, 3), 2 * math.log(0.7))], 1)
    expected = Gaussian(noise_std=0.7).log_prob(OUTPUTS[:, :3], TARGETS)
    torch.testing.assert_close(HeteroscedasticGaussian().log_prob(outputs, TARGETS), expected)


def test_one_mean_meets_a_vector_of_targets() -> None:
    likelihood = HeteroscedasticGaussian()
    outputs, targets = OUTPUTS[:, [0, 3]], TARGETS[:, 0]
    likelihood.check(outputs, targets)
    expected = likelihood.log_prob(outputs, targets[:, None])
    assert expected.shape == (20,)
    torch.testing.assert_close(likelihood.log_prob(outputs, targets), expected)


@given(log_variance=st.floats(-(2.0**99), 2.0**99, width=32), residual=st.floats(-(2.0**20), 2.0**20, width=32))
def test_no_log_variance_overflows(log_variance: float, residual: float) -> None:
    outputs = torch.tensor([[0.0, log_variance]], requires_grad=True)
    value = HeteroscedasticGaussian().log_prob(outputs, torch.tensor([residual]))
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_beyond_the_limits_the_density_is_that_at_the_limit() -> None:
    likelihood = HeteroscedasticGaussian(min_std=0.1, max_std=10.0)
    targets = torch.tensor([0.3, 0.3])
    found = likelihood.log_prob(torch.tensor([[0.0, -50.0], [0.0, 50.0]]), targets)
    torch.testing.assert_close(found, Normal(0.0, torch.tensor([0.1, 10.0])).log_prob(targets))


def test_samples_have_the_right_law() -> None:
    outputs = torch.tensor([[1.0, -2.0, 2 * math.log(0.5), 2 * math.log(3.0)]]).expand(20_000, 4)
    drawn = HeteroscedasticGaussian().sample(outputs, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2)
    std = torch.tensor([0.5, 3.0])
    assert ((drawn.mean(0) - torch.tensor([1.0, -2.0])).abs() < 5 * std / math.sqrt(20_000)).all()
    assert ((drawn.std(0) / std - 1).abs() < 5 / math.sqrt(40_000)).all()


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (OUTPUTS[:, :5], TARGETS, "2K"),
        (OUTPUTS[:, 0], TARGETS[:, 0], "2K"),
        (OUTPUTS, OUTPUTS, r"\(20, 3\)"),
        (OUTPUTS, TARGETS[:, 0], r"\(20, 3\)"),
        (OUTPUTS, TARGETS.long(), "float targets"),
        (OUTPUTS, TARGETS / 0, "infinite"),
        (OUTPUTS * math.nan, TARGETS, "outputs hold NaN"),
        (OUTPUTS.long(), TARGETS, "float outputs"),
    ],
)
def test_refuses(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeteroscedasticGaussian().check(outputs, targets)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_bad_limits_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="min_std"):
        HeteroscedasticGaussian(low, high)


def test_config_builds_it_again() -> None:
    config = {"min_std": 0.01, "max_std": 5.0}
    assert build_likelihood("heteroscedastic", HeteroscedasticGaussian(**config).config()).config() == config
