"""The low-rank family against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence

from stfbnn.errors import InputError
from stfbnn.posterior import LowRank, LowRankPosterior, MeanField, ParameterLayout
from stfbnn.prior import GaussianPrior

LAYOUT = ParameterLayout(("weight", "bias"), ((3, 4), (3,)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(size: int, seed: int = 1, widths: bool = False) -> GaussianPrior:
    std = 0.5 + random(size, seed=seed + 1).abs() if widths else torch.tensor(0.7, dtype=torch.float64)
    return GaussianPrior(random(size, seed=seed), std)


def posterior(size: int, rank: int, seed: int = 0) -> LowRankPosterior:
    layout = ParameterLayout(("weight",), ((size,),))
    q = LowRankPosterior(layout, random(size, seed=seed), torch.ones((), dtype=torch.float64), rank)
    with torch.no_grad():
        q.log_diagonal.copy_(0.7 * random(size, seed=seed + 2))
        q.factor.copy_(random(size, rank, seed=seed + 3))
    return q


@given(size=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 1000), widths=st.booleans())
@settings(max_examples=50, deadline=None)
def test_divergence_and_density_equal_torch_distributions(size: int, rank: int, seed: int, widths: bool) -> None:
    q, p = posterior(size, rank, seed), prior(size, seed + 5, widths)
    low_rank = LowRankMultivariateNormal(q.loc, q.factor, (2 * q.log_diagonal).exp())
    dense = MultivariateNormal(q.loc, covariance_matrix=low_rank.covariance_matrix)
    other = MultivariateNormal(p.mean, covariance_matrix=torch.diag(p.std.square().expand(size)))
    torch.testing.assert_close(q.kl(p), kl_divergence(dense, other), rtol=1e-8, atol=1e-8)
    weights = random(2, 3, size, seed=seed)
    torch.testing.assert_close(q.log_prob(weights), low_rank.log_prob(weights), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(q.std_vector(), low_rank.variance.sqrt())
    torch.testing.assert_close(q.covariance(), low_rank.covariance_matrix.detach())


def test_without_directions_it_is_mean_field() -> None:
    q, p = posterior(6, 3), prior(6, widths=True)
    with torch.no_grad():
        q.factor.zero_()
    plain = MeanField().build(q.layout, q.loc.detach(), p)
    plain.set_std(q.std_vector().detach())
    torch.testing.assert_close(q.kl(p), plain.kl(p))
    torch.testing.assert_close(q.covariance(), plain.covariance())
    weights, noise = random(4, 6, seed=4), random(4, 9, seed=5)
    torch.testing.assert_close(q.log_prob(weights), plain.log_prob(weights))
    torch.testing.assert_close(q.draw(noise), plain.draw(noise[:, :6]))


def test_the_density_keeps_its_precision_where_the_directions_dominate() -> None:
    """yᵀy − yᵀVc, the textbook form of Woodbury's identity, would lose all digits here in single precision."""
    q = posterior(6, 2)
    with torch.no_grad():
        q.log_diagonal.fill_(math.log(1e-3))
        q.factor.mul_(30)
    weights = q.draw(random(5, 8, seed=4)).detach()
    exact = q.log_prob(weights)
    single = q.float().log_prob(weights.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=0.5)


def test_the_start_has_the_widths_asked_for_and_slight_fixed_correlations() -> None:
    mean, p = random(15).float(), GaussianPrior(torch.zeros(15), torch.tensor(0.5))
    q = LowRank(rank=3).build(LAYOUT, mean, p)
    torch.testing.assert_close(q.std_vector().detach(), torch.full((15,), 0.05))
    torch.testing.assert_close(q.factor.detach().square().sum(dim=1), torch.full((15,), 0.01 * 0.05**2))
    assert torch.equal(q.factor, LowRank(rank=3).build(LAYOUT, mean, p).factor)
    std = torch.linspace(0.1, 1, 15)
    q.set_std(std)
    torch.testing.assert_close(q.std_vector().detach(), std)


def test_gradients_leave_the_start() -> None:
    """With U = 0 the expected gradient by U would be zero; from the start, correlations of the target are found."""
    direction = random(15, seed=8).float()
    direction /= direction.norm()
    p = GaussianPrior(torch.zeros(15), torch.ones(()))
    q = LowRank(rank=1, initial_std=0.5).build(LAYOUT, torch.zeros(15), p)
    precision = torch.eye(15) + 50 * (torch.eye(15) - torch.outer(direction, direction))
    target = MultivariateNormal(torch.zeros(15), precision_matrix=precision)
    adam = torch.optim.Adam(q.parameters(), lr=0.02)
    for _ in range(300):
        dense = MultivariateNormal(
            q.loc, covariance_matrix=torch.diag((2 * q.log_diagonal).exp()) + q.factor @ q.factor.T
        )
        adam.zero_grad()
        kl_divergence(dense, target).backward()
        adam.step()
    found = q.factor.detach()[:, 0]
    assert abs(float(found @ direction)) / float(found.norm()) > 0.99
    assert float(found.norm()) > 0.8


def test_a_rank_above_the_number_of_weights_is_cut() -> None:
    layout = ParameterLayout(("weight",), ((1, 3),))
    q = LowRank().build(layout, torch.zeros(3), GaussianPrior(torch.zeros(3), torch.ones(())))
    assert q.rank == 3
    assert q.config() == {"rank": 3}
    assert q.noise_size == 6


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_a_bad_rank_is_refused(bad: int) -> None:
    with pytest.raises(InputError, match="rank"):
        LowRank(rank=bad)


def test_a_bad_initial_std_is_refused() -> None:
    with pytest.raises(InputError, match="initial_std"):
        LowRank(initial_std=-1.0)
    with pytest.raises(InputError, match="initial_std"):
        LowRank(initial_std="wide")  # type: ignore[arg-type]


def test_a_large_covariance_matrix_is_refused() -> None:
    layout = ParameterLayout(("weight",), ((100, 100),))
    q = LowRank(rank=1).build(layout, torch.zeros(10_000), GaussianPrior(torch.zeros(10_000), torch.ones(())))
    with pytest.raises(InputError, match=r"posterior\.factor"):
        q.covariance()
