"""The mean-field Gaussian: independent weights, q(w) = ∏ N(w_i; μ_i, σ_i²)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.prior import GaussianPrior

# A covariance matrix is only formed for a look at small layers; 8192² floats are 256 MiB.
MAX_COVARIANCE_SIZE = 8192


class MeanFieldPosterior(Posterior):
    """Independent Gaussian weights; 8 bytes per first-layer parameter in float32.

    Attributes:
        loc: The means μ, shape (d,).
        log_std: The logarithms of the standard deviations, log σ, shape (d,); so σ is positive whatever an
            optimiser does.
    """

    family: ClassVar[str] = "mean-field"

    def __init__(self, layout: ParameterLayout, mean: Tensor, std: Tensor) -> None:
        super().__init__(layout)
        self.loc = nn.Parameter(mean.detach().clone())
        self.log_std = nn.Parameter(std.detach().log().expand_as(mean).clone())

    @property
    def noise_size(self) -> int:
        """One number per weight."""
        return self.layout.size

    def draw(self, noise: Tensor) -> Tensor:
        """w = μ + σ ε (Kingma & Welling 2014)."""
        return self.loc + self.log_std.exp() * noise

    def mean_vector(self) -> Tensor:
        """μ."""
        return self.loc

    def std_vector(self) -> Tensor:
        """σ."""
        return self.log_std.exp()

    def kl(self, prior: GaussianPrior) -> Tensor:
        """Σ_i log(s_i/σ_i) + (σ_i² + (μ_i − m_i)²) / (2 s_i²) − ½, in nats."""
        ratio = (2 * (self.log_std - prior.std.log())).exp()
        shift = ((self.loc - prior.mean) / prior.std).square()
        return 0.5 * (ratio + shift - 1 - 2 * (self.log_std - prior.std.log())).sum()

    def log_prob(self, weights: Tensor) -> Tensor:
        """Σ_i log N(w_i; μ_i, σ_i²)."""
        standard = (weights - self.loc) / self.log_std.exp()
        return -(0.5 * standard.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    @torch.no_grad()
    def set_std(self, std: Tensor) -> None:
        """σ."""
        self.log_std.copy_(std.log())

    def covariance(self) -> Tensor:
        """The diagonal matrix of σ²."""
        if self.layout.size > MAX_COVARIANCE_SIZE:
            raise InputError(
                f"the covariance of {self.layout.size} weights would take {4 * self.layout.size**2 / 2**30:.1f} GiB; "
                f"a mean-field posterior's is diagonal: use posterior.std()"
            )
        return torch.diag(self.std_vector().detach().square())

    def config(self) -> dict[str, Any]:
        """Nothing beside the tensors."""
        return {}


@dataclass(frozen=True)
class MeanField:
    """Recipe for a mean-field Gaussian posterior.

    Attributes:
        initial_std: σ at the start of inference, for all weights; None leaves it to inference, which estimates one from
            the curvature of the loss (before that, σ is a tenth of the prior's). The natural-gradient engine always does.
    """

    initial_std: float | None = None

    def __post_init__(self) -> None:
        check_initial_std(self.initial_std)

    @property
    def name(self) -> str:
        """``"mean-field"``."""
        return MeanFieldPosterior.family

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> MeanFieldPosterior:
        """Make the posterior N(mean, initial_std²)."""
        std = 0.1 * prior.std if self.initial_std is None else torch.as_tensor(self.initial_std)
        return MeanFieldPosterior(layout, mean, std.to(mean))


def check_initial_std(initial_std: float | None) -> None:
    """Refuse an initial width that is not positive and finite; None leaves it to inference.

    Raises:
        InputError: It is not.
    """
    if initial_std is None:
        return
    # Of any type: recipes are also made from files and from the command line.
    given: object = initial_std
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
        raise InputError(f"initial_std must be positive and finite, but it is {given!r}")
