"""Counts, against torch.distributions and scipy."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Poisson as TorchPoisson

from stfbnn.errors import InputError
from stfbnn.likelihood import Poisson, build_likelihood

RANDOM = torch.Generator().manual_seed(0)
LOG_RATES = torch.randn(30, 2, generator=RANDOM)
COUNTS = torch.randint(0, 9, (30, 2), generator=RANDOM)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float64])
def test_density(dtype: torch.dtype) -> None:
    likelihood = Poisson()
    likelihood.check(LOG_RATES, COUNTS.to(dtype))
    expected = TorchPoisson(LOG_RATES.exp()).log_prob(COUNTS.float()).sum(1)
    torch.testing.assert_close(likelihood.log_prob(LOG_RATES, COUNTS.to(dtype)), expected)


def test_density_is_normalised() -> None:
    log_rates = torch.tensor([0.5], dtype=torch.float64).expand(200)
    total = Poisson().log_prob(log_rates, torch.arange(200)).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-12)


def test_a_column_of_rates_meets_a_vector_of_counts() -> None:
    likelihood = Poisson()
    likelihood.check(LOG_RATES[:, :1], COUNTS[:, 0])
    found = likelihood.log_prob(LOG_RATES[:, :1], COUNTS[:, 0])
    torch.testing.assert_close(found, likelihood.log_prob(LOG_RATES[:, 0], COUNTS[:, 0]))


def test_samples_have_the_right_law() -> None:
    drawn = Poisson().sample(torch.full((20_000, 1), math.log(2.5)), torch.Generator().manual_seed(0))
    Poisson().check_targets(drawn, drawn)
    found = torch.bincount(drawn.long().flatten(), minlength=9).double()
    observed = torch.cat([found[:8], found[8:].sum(0, keepdim=True)]).numpy()
    law = stats.poisson(2.5)
    expected = [20_000 * law.pmf(k) for k in range(8)] + [20_000 * law.sf(7)]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (LOG_RATES, COUNTS - 5, "negative"),
        (LOG_RATES, COUNTS + 0.5, "whole numbers"),
        (LOG_RATES, COUNTS * math.nan, "whole numbers"),
        (LOG_RATES, COUNTS / 0.0, "whole numbers"),
        (LOG_RATES, COUNTS > 3, "bool"),
        (LOG_RATES, COUNTS[:, 0], "broadcast"),
        (LOG_RATES + 40, COUNTS, "logarithms of the rates"),
        (LOG_RATES * math.nan, COUNTS, "outputs hold NaN"),
        (COUNTS, COUNTS, "float outputs"),
    ],
)
def test_refuses(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Poisson().check(outputs, targets)


def test_config_builds_it_again() -> None:
    assert isinstance(build_likelihood("poisson", Poisson().config()), Poisson)
