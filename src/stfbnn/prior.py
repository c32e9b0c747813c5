"""The prior p(w) over the first layer's parameters: an isotropic Gaussian, at zero or at the trained weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError


class GaussianPrior(nn.Module):
    """p(w) = N(m, s² I).

    Attributes:
        mean: m, shape (d,).
        std: s, a scalar tensor.
        learned: Whether inference updates s by empirical Bayes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, learned: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())
        self.learned = learned

    @torch.no_grad()
    def update(self, mean: Tensor, std: Tensor) -> None:
        """Set s to the value that maximises the evidence lower bound for a Gaussian q: s² = mean(σ² + (μ − m)²).

        Args:
            mean: The posterior's means μ, shape (d,).
            std: The posterior's marginal standard deviations σ, shape (d,).
        """
        second_moment = std.double().square() + (mean - self.mean).double().square()
        self.std.copy_(second_moment.mean().sqrt())


@dataclass(frozen=True)
class Normal:
    """Recipe for a Gaussian prior.

    Attributes:
        std: Its standard deviation s; "rms" takes the root mean square of the layer's trained weights.
        center: "zero", or "pretrained" for the trained weights.
        learned: Learn s by empirical Bayes, starting from ``std``; only for a prior centred on zero (centred on the
            trained weights the evidence peaks at s = 0, and the posterior collapses).
    """

    std: float | Literal["rms"] = "rms"
    center: Literal["zero", "pretrained"] = "zero"
    learned: bool = False

    def __post_init__(self) -> None:
        if self.std != "rms" and not (isinstance(self.std, int | float) and 0 < self.std < math.inf):
            raise InputError(f'the prior\'s std must be positive and finite, or "rms", but it is {self.std!r}')
        if self.center not in ("zero", "pretrained"):
            raise InputError(f'the prior\'s center must be "zero" or "pretrained", but it is {self.center!r}')
        if self.learned and self.center == "pretrained":
            raise InputError(
                "a prior centred on the trained weights cannot learn its scale: the evidence peaks at scale 0 and the "
                'posterior collapses; use prior="empirical-bayes" (centred on zero) or a fixed scale'
            )

    def build(self, weights: Tensor) -> GaussianPrior:
        """Make the prior for a layer.

        Args:
            weights: The layer's trained weights, shape (d,).

        Raises:
            InputError: ``std`` is "rms", and the weights are all zero.
        """
        if self.std == "rms":
            std = float(weights.double().square().mean().sqrt())
            if std == 0:
                raise InputError(
                    "the layer's weights are all zero, so they give no scale; pass the prior's std, a number"
                )
        else:
            std = float(self.std)
        mean = weights if self.center == "pretrained" else torch.zeros_like(weights)
        return GaussianPrior(mean, weights.new_tensor(std), self.learned)

    def config(self) -> dict[str, Any]:
        """The recipe as a JSON-able dict."""
        return asdict(self)


PriorLike = float | str | Normal

_NAMED = {
    "rms": Normal(),
    "pretrained": Normal(center="pretrained"),
    "empirical-bayes": Normal(learned=True),
}


def resolve_prior(prior: PriorLike) -> Normal:
    """Turn what ``bayesianize(prior=…)`` was given into a recipe.

    Args:
        prior: A standard deviation, one of "rms", "pretrained", "empirical-bayes", or a recipe.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(prior, Normal):
        return prior
    if isinstance(prior, str):
        if prior not in _NAMED:
            raise InputError(f"prior={prior!r} is not known; choose one of {sorted(_NAMED)} or give a number")
        return _NAMED[prior]
    if isinstance(prior, bool) or not isinstance(prior, int | float):
        raise InputError(f"prior must be a number, a name or stfbnn.Normal(…), but it is a {type(prior).__name__}")
    return Normal(std=float(prior))
