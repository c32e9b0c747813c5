"""The mean-field family against torch.distributions, Monte Carlo and the Kolmogorov–Smirnov test."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal

from stfbnn.errors import ArtifactError, InputError
from stfbnn.posterior import MeanField, ParameterLayout, resolve_family
from stfbnn.posterior.mean_field import MeanFieldPosterior
from stfbnn.prior import GaussianPrior

LAYOUT = ParameterLayout(("weight", "bias"), ((2, 3), (2,)))


def posterior(seed: int = 0) -> MeanFieldPosterior:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(8, generator=generator)
    return MeanFieldPosterior(LAYOUT, mean, 0.1 + torch.rand(8, generator=generator))


def prior(seed: int = 1, std: float = 0.7) -> GaussianPrior:
    return GaussianPrior(torch.randn(8, generator=torch.Generator().manual_seed(seed)), torch.tensor(std))


@given(seed=st.integers(0, 10_000), std=st.floats(0.01, 10))
@settings(max_examples=50, deadline=None)
def test_kl_equals_torch_distributions(seed: int, std: float) -> None:
    q, p = posterior(seed).double(), prior(seed + 1, std).double()
    expected = kl_divergence(
        Independent(TorchNormal(q.loc, q.std_vector()), 1), Independent(TorchNormal(p.mean, p.std.expand(8)), 1)
    )
    torch.testing.assert_close(q.kl(p), expected, rtol=1e-10, atol=1e-10)


def test_kl_equals_monte_carlo() -> None:
    q, p = posterior().double(), prior().double()
    noise = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = q.draw(noise).detach()
    ratio = TorchNormal(q.loc.detach(), q.std_vector().detach()).log_prob(w).sum(-1) - TorchNormal(
        p.mean, p.std
    ).log_prob(w).sum(-1)
    error = float(ratio.std() / len(ratio) ** 0.5)
    # Four standard errors: a right formula fails once in 16,000 seeds, and the seed is fixed.
    assert abs(float(ratio.mean()) - float(q.kl(p).detach())) < 4 * error


def test_moments_and_law_of_draws() -> None:
    q = posterior()
    w = q.draw(torch.randn(100_000, 8, generator=torch.Generator().manual_seed(3))).detach()
    # 5 standard errors of a mean and of a standard deviation at 10^5 draws.
    assert ((w.mean(0) - q.loc).abs() < 5 * q.std_vector() / 100_000**0.5).all()
    assert ((w.std(0) / q.std_vector() - 1).abs() < 5 / (2 * 100_000) ** 0.5).all()
    standard = ((w - q.loc) / q.std_vector()).detach()
    for column in range(8):
        assert stats.kstest(standard[:5000, column].numpy(), "norm").pvalue > 1e-4


def test_named_views_cover_the_vector() -> None:
    q = posterior()
    assert {name: tuple(value.shape) for name, value in q.mean().items()} == {"weight": (2, 3), "bias": (2,)}
    torch.testing.assert_close(LAYOUT.flatten(q.std()), q.std_vector().detach())
    torch.testing.assert_close(q.covariance(), torch.diag(q.std_vector().detach() ** 2))


def test_what_is_read_is_a_copy() -> None:
    q = posterior()
    before = q.loc.detach().clone()
    q.mean()["weight"].zero_()
    q.std()["weight"].zero_()
    torch.testing.assert_close(q.loc.detach(), before)


def test_draws_reach_every_parameter() -> None:
    q = posterior()
    q.draw(torch.randn(8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    for parameter in q.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_tensors_round_trip() -> None:
    q, other = posterior(0), posterior(5)
    other.load_tensors(q.tensors())
    assert torch.equal(q.loc, other.loc)
    assert torch.equal(q.log_std, other.log_std)
    assert sum(t.numel() * t.element_size() for t in q.tensors().values()) == 8 * LAYOUT.size


def test_wrong_tensors_are_refused() -> None:
    q = posterior()
    good = q.tensors()
    missing = {name: value for name, value in good.items() if name != "loc.bias"}
    with pytest.raises(ArtifactError, match=r"missing \['loc.bias'\]"):
        q.load_tensors(missing)
    with pytest.raises(ArtifactError, match=r"log_std\.weight"):
        q.load_tensors({**good, "log_std.weight": torch.zeros(3, 2)})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_initial_std_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="initial_std"):
        MeanField(initial_std=bad)


def test_the_recipe_starts_at_the_trained_weights() -> None:
    mean = torch.arange(8.0)
    q = MeanField().build(LAYOUT, mean, prior(std=0.5))
    torch.testing.assert_close(q.mean_vector().detach(), mean)
    torch.testing.assert_close(q.std_vector().detach(), torch.full((8,), 0.05))
    torch.testing.assert_close(MeanField(0.2).build(LAYOUT, mean, prior()).std_vector().detach(), torch.full((8,), 0.2))


def test_unknown_families_are_refused() -> None:
    with pytest.raises(InputError, match="mean-field"):
        resolve_family("horseshoe")
    with pytest.raises(InputError, match="recipe"):
        resolve_family(3)  # type: ignore[arg-type]


def test_a_large_covariance_is_refused_with_its_size() -> None:
    layout = ParameterLayout(("weight",), ((100, 100),))
    with pytest.raises(InputError, match="GiB"):
        MeanFieldPosterior(layout, torch.zeros(10_000), torch.ones(())).covariance()
