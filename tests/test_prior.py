"""Priors: their scale, their centre, and empirical Bayes against a numerical optimum."""

import pytest
import torch
from scipy.optimize import minimize_scalar

from stfbnn.errors import InputError
from stfbnn.posterior import ParameterLayout
from stfbnn.posterior.mean_field import MeanFieldPosterior
from stfbnn.prior import GaussianPrior, Normal, resolve_prior

WEIGHTS = torch.tensor([3.0, -4.0, 0.0, 0.0])


def test_names() -> None:
    rms = resolve_prior("rms").build(WEIGHTS)
    assert float(rms.std) == 2.5
    assert torch.equal(rms.mean, torch.zeros(4))
    pretrained = resolve_prior("pretrained").build(WEIGHTS)
    assert torch.equal(pretrained.mean, WEIGHTS)
    assert float(pretrained.std) == 2.5
    assert float(resolve_prior(0.3).build(WEIGHTS).std) == pytest.approx(0.3)
    assert resolve_prior("empirical-bayes").build(WEIGHTS).learned


def test_empirical_bayes_minimises_the_kl() -> None:
    torch.manual_seed(0)
    q = MeanFieldPosterior(ParameterLayout(("w",), ((50,),)), torch.randn(50), 0.1 + torch.rand(50)).double()
    p = GaussianPrior(torch.zeros(50).double(), torch.tensor(1.0).double(), learned=True)

    def kl(log_std: float) -> float:
        p.std.fill_(float(torch.tensor(log_std).exp()))
        return float(q.kl(p).detach())

    best = minimize_scalar(kl, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x
    p.update(q.loc.detach(), q.std_vector().detach())
    assert float(p.std.log()) == pytest.approx(best, abs=1e-6)


def test_a_learned_scale_around_the_trained_weights_is_refused() -> None:
    with pytest.raises(InputError, match="collapses"):
        Normal(center="pretrained", learned=True)


def test_zero_weights_give_no_scale() -> None:
    with pytest.raises(InputError, match="all zero"):
        resolve_prior("rms").build(torch.zeros(4))


@pytest.mark.parametrize("bad", [0, -0.1, float("nan"), float("inf"), True, "wide", None, [1.0]])
def test_bad_priors_are_refused(bad: object) -> None:
    with pytest.raises(InputError):
        resolve_prior(bad)  # type: ignore[arg-type]


def test_a_bad_centre_is_refused() -> None:
    with pytest.raises(InputError, match="center"):
        Normal(center="somewhere")  # type: ignore[arg-type]
