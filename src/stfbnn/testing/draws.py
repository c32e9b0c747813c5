"""Clauses on draws: their shape, their gradients, and the moments that the posterior claims for them."""

from __future__ import annotations

import torch
from torch import Tensor

from stfbnn.testing.setting import NotApplicableError, Setting, if_defined, require, require_slopes


def noise_size_is_a_count(setting: Setting) -> None:
    """noise_size is an integer of at least 0."""
    size = setting.posterior().noise_size
    require(isinstance(size, int) and not isinstance(size, bool) and size >= 0, f"noise_size is {size!r}")


def draws_have_the_right_shape(setting: Setting) -> None:
    """Noise (..., noise_size) becomes finite weights (..., d)."""
    posterior = setting.posterior()
    for leading in ((), (4,), (2, 3)):
        drawn = posterior.draw(setting.noise(posterior, *leading))
        expected = (*leading, setting.layout.size)
        require(tuple(drawn.shape) == expected, f"noise {(*leading, posterior.noise_size)} became {tuple(drawn.shape)}")
        require(bool(torch.isfinite(drawn).all()), "a drawn weight is not finite")


def stacked_draws_are_draws(setting: Setting) -> None:
    """Drawing stacked noise is stacking the draws."""
    posterior = setting.posterior()
    noise = setting.noise(posterior, 7)
    together, apart = posterior.draw(noise), torch.stack([posterior.draw(one) for one in noise])
    off = float((together - apart).detach().abs().max())
    require(off <= 1e-9, f"a draw from stacked noise is up to {off:.3g} off the draw from its own noise")


def draws_follow_from_the_noise(setting: Setting) -> None:
    """The same noise gives the same weights, and nothing else that is random is used."""
    posterior = setting.posterior()
    noise = setting.noise(posterior, 5)
    before = torch.random.get_rng_state()
    first, second = posterior.draw(noise), posterior.draw(noise)
    require(torch.equal(before, torch.random.get_rng_state()), "draw uses torch's global generator")
    require(torch.equal(first, second), "the same noise gave different weights")


def draws_reach_every_parameter(setting: Setting) -> None:
    """Every parameter has a gradient from a draw, as inference needs."""
    posterior = setting.posterior()
    parameters = {name: value for name, value in posterior.named_parameters() if value.requires_grad}
    if not parameters:
        raise NotApplicableError("the family has no parameters to optimise")
    one = posterior.draw(setting.noise(posterior))
    require(one.requires_grad, "a draw is not differentiable in the posterior's parameters: was it detached?")
    found = torch.autograd.grad(one.sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, found, strict=True) if gradient is None]
    require(not unused, f"a draw does not depend on the parameters {unused}")
    drawn = posterior.draw(setting.noise(posterior, 64))
    found = torch.autograd.grad(drawn.square().sum(), list(parameters.values()))
    still = [name for name, gradient in zip(parameters, found, strict=True) if not bool((gradient != 0).any())]
    require(not still, f"the gradient of 64 draws by the parameters {still} is zero")


def draw_gradients_are_slopes(setting: Setting) -> None:
    """The gradients of draws by the parameters are right."""
    posterior = setting.posterior()
    noise, factors = setting.noise(posterior, 5), setting.random(5, setting.layout.size, purpose="factors")

    def drawn() -> Tensor:
        return (posterior.draw(noise) * factors).sum()

    require_slopes(setting, "a draw", posterior, drawn)


def mean_is_that_of_draws(setting: Setting) -> None:
    """mean_vector is the draws' mean."""
    posterior = setting.posterior()
    mean = posterior.mean_vector().detach()
    require(tuple(mean.shape) == (setting.layout.size,), f"mean_vector has the shape {tuple(mean.shape)}")
    setting.require_agreement("the draws' mean", setting.weights(posterior), mean)


def std_is_that_of_draws(setting: Setting) -> None:
    """std_vector is the draws' marginal standard deviation."""
    posterior = setting.posterior()
    mean, std = posterior.mean_vector().detach(), posterior.std_vector().detach()
    require(tuple(std.shape) == (setting.layout.size,), f"std_vector has the shape {tuple(std.shape)}")
    require(bool((std >= 0).all()), f"a standard deviation is negative: {std.tolist()}")
    squares = (setting.weights(posterior) - mean).square()
    setting.require_agreement("the draws' variance", squares, std.square())


def covariance_is_that_of_draws(setting: Setting) -> None:
    """covariance, where there is one, is symmetric, is std_vector squared on its diagonal, and that of the draws."""
    posterior = setting.posterior()
    covariance = if_defined(posterior.covariance).detach()
    size = setting.layout.size
    require(tuple(covariance.shape) == (size, size), f"covariance has the shape {tuple(covariance.shape)}")
    require(torch.allclose(covariance, covariance.T, rtol=1e-9, atol=1e-15), "covariance is not symmetric")
    squares = posterior.std_vector().detach().square()
    require(
        torch.allclose(covariance.diagonal(), squares, rtol=1e-9, atol=1e-15),
        "the diagonal of covariance is not std_vector squared",
    )
    apart = setting.weights(posterior) - posterior.mean_vector().detach()
    # Row by row: all products of all draws at once would take much memory.
    for row in range(size):
        setting.require_agreement(
            f"row {row} of the draws' covariance", apart[:, row : row + 1] * apart, covariance[row]
        )


CLAUSES = (
    noise_size_is_a_count,
    draws_have_the_right_shape,
    stacked_draws_are_draws,
    draws_follow_from_the_noise,
    draws_reach_every_parameter,
    draw_gradients_are_slopes,
    mean_is_that_of_draws,
    std_is_that_of_draws,
    covariance_is_that_of_draws,
)
