"""Clauses on the divergence from the prior and on the density: each is checked against draws, and against the other.

A family without a density, or without a finite divergence, declares that by raising an InputError: then these clauses do not
apply to it. A family whose divergence has no closed form may estimate it, if a method ``kl_bounds(prior)`` gives numbers
between which it lies; then estimate and truth must both lie there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stfbnn.prior import GaussianPrior
from stfbnn.testing.setting import PRIOR_STD, Setting, if_defined, require, require_slopes


def kl_is_a_scalar(setting: Setting) -> None:
    """kl is one finite number, not negative, for a prior with one width or with one for each weight."""
    for posterior in (setting.built(), setting.posterior()):
        for prior in _priors(setting):
            value = if_defined(lambda posterior=posterior, prior=prior: posterior.kl(prior))  # type: ignore[misc]
            require(value.shape == (), f"kl has the shape {tuple(value.shape)}")
            require(0 <= float(value.detach()) < math.inf, f"kl is {float(value.detach())}")


def kl_differs_between_priors_as_it_must(setting: Setting) -> None:
    """KL(q‖p₁) − KL(q‖p₂) = E_q[log p₂ − log p₁], which follows from q's mean and widths: summed, in nats, to rounding."""
    posterior = setting.posterior()
    first, *others = _priors(setting)
    base = if_defined(lambda: posterior.kl(first)).detach()
    mean, std = posterior.mean_vector().detach(), posterior.std_vector().detach()
    for other in others:
        found = float(posterior.kl(other).detach() - base)
        expected = float(_cross_entropy(mean, std, other) - _cross_entropy(mean, std, first))
        require(
            abs(found - expected) <= 1e-8 * (abs(expected) + abs(float(base))),
            f"between two priors kl changes by {found:.8g} nats, but E_q[log p₂ − log p₁] is {expected:.8g}",
        )


def kl_is_that_of_draws(setting: Setting) -> None:
    """kl = E_q[log q − log p], where there is a density."""
    posterior, prior = setting.posterior(), setting.prior()
    value = if_defined(lambda: posterior.kl(prior)).detach()
    drawn = setting.weights(posterior)
    ratios = (if_defined(lambda: posterior.log_prob(drawn)) - _log_prior(drawn, prior)).detach()
    bounds = getattr(posterior, "kl_bounds", None)
    if bounds is None:
        setting.require_agreement("E_q[log q − log p]", ratios, value)
        return
    low, high = (bound.detach() for bound in bounds(prior))
    require(
        float(low) <= float(value) <= float(high), f"kl is {value:.6g}, but its bounds are {low:.6g} and {high:.6g}"
    )
    setting.require_agreement("E_q[log q − log p], cut to the bounds of kl", ratios, ratios.mean().clamp(low, high))


def kl_gradients_are_slopes(setting: Setting) -> None:
    """The gradients of kl by the parameters are right."""
    posterior, prior = setting.posterior(), setting.prior()
    if_defined(lambda: posterior.kl(prior))
    require_slopes(setting, "kl", posterior, lambda: posterior.kl(prior))


def kl_falls_towards_the_prior(setting: Setting) -> None:
    """A posterior that is built at the prior's mean is nearer to it than one that is built three widths off."""
    prior = setting.prior()
    near = setting.family.build(setting.layout, prior.mean, prior)
    far = setting.family.build(setting.layout, prior.mean + 3 * PRIOR_STD, prior)
    low = float(if_defined(lambda: near.kl(prior)).detach())
    high = float(far.kl(prior).detach())
    require(low < high, f"kl is {low:.6g} at the prior's mean, and {high:.6g} three of its widths off")


def density_has_the_right_shape(setting: Setting) -> None:
    """log_prob takes weights (..., d) to finite numbers (...), each that of its own weights."""
    posterior = setting.posterior()
    drawn = posterior.draw(setting.noise(posterior, 2, 3)).detach()
    together = if_defined(lambda: posterior.log_prob(drawn))
    require(tuple(together.shape) == (2, 3), f"log_prob of weights {tuple(drawn.shape)} is {tuple(together.shape)}")
    require(bool(torch.isfinite(together).all()), "log_prob of a draw is not finite")
    apart = torch.stack([posterior.log_prob(one) for one in drawn.flatten(0, 1)]).reshape(2, 3)
    off = float((together - apart).detach().abs().max())
    require(off <= 1e-8 * (1 + float(apart.detach().abs().max())), f"stacking weights changes log_prob by {off:.3g}")


def density_is_that_of_draws(setting: Setting) -> None:
    """log_prob is normalised, and the density of the draws.

    For any density r, E_q[r/(q + r)] = E_r[q/(q + r)], both being ∫ q r/(q + r) (Bennett 1976; Meng & Wong 1996). Both sides
    are means of numbers between 0 and 1, so the comparison holds for heavy tails too; r is a Gaussian near q: of the draws'
    own moments, shifted, and narrower.
    """
    posterior = setting.posterior()
    fitted, drawn = setting.weights(posterior, "fit"), setting.weights(posterior)
    log_drawn = if_defined(lambda: posterior.log_prob(drawn)).detach()
    scale, failed = torch.linalg.cholesky_ex(fitted.T.cov())
    require(not int(failed), "the draws lie in a subspace, so they have no density, but log_prob is there")
    shift = setting.random(setting.layout.size, purpose="shift")
    for name, offset, width in (("of the same moments", 0.0, 1.0), ("shifted", 0.5, 1.0), ("narrower", 0.0, 0.7)):
        near: Any = torch.distributions.MultivariateNormal(
            fitted.mean(dim=0) + offset * scale @ shift / shift.norm(), scale_tril=width * scale, validate_args=False
        )
        other = (
            near.loc + setting.random(setting.draws, setting.layout.size, purpose=f"near {name}") @ near.scale_tril.T
        )
        here = (near.log_prob(drawn) - log_drawn).sigmoid()
        there = (posterior.log_prob(other).detach() - near.log_prob(other)).sigmoid()
        error = ((here.var() + there.var()) / setting.draws).sqrt()
        what = f"the overlap of log_prob with a Gaussian {name}, seen from the draws,"
        setting.require_close(what, here.mean(), there.mean(), error)


def _priors(setting: Setting) -> list[GaussianPrior]:
    widths = torch.linspace(0.4, 1.2, setting.layout.size, dtype=torch.float64)
    return [setting.prior(), setting.prior(1.3, purpose="another prior"), setting.prior(widths)]


def _cross_entropy(mean: Tensor, std: Tensor, prior: GaussianPrior) -> Tensor:
    """E_q[−log p] but for a constant."""
    second_moment = std.square() + (mean - prior.mean).square()
    return (prior.std.log() + 0.5 * second_moment / prior.std.square()).sum()


def _log_prior(weights: Tensor, prior: GaussianPrior) -> Tensor:
    normal: Any = torch.distributions.Normal(prior.mean, prior.std)
    logs: Tensor = normal.log_prob(weights)
    return logs.sum(dim=-1)


CLAUSES = (
    kl_is_a_scalar,
    kl_differs_between_priors_as_it_must,
    kl_is_that_of_draws,
    kl_gradients_are_slopes,
    kl_falls_towards_the_prior,
    density_has_the_right_shape,
    density_is_that_of_draws,
)
