"""The point mass: all weight on one vector, the limit σ → 0 of every other family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.mean_field import MAX_COVARIANCE_SIZE
from stfbnn.prior import GaussianPrior


class PointMassPosterior(Posterior):
    """A deterministic first layer; 4 bytes per first-layer parameter in float32.

    It has no density, and no finite divergence from a prior that has one. On its own it is the network retrained; as a
    component of a mixture it makes an ensemble of first layers over one trunk.

    Attributes:
        loc: The weights, shape (d,).
    """

    family: ClassVar[str] = "point"

    def __init__(self, layout: ParameterLayout, mean: Tensor) -> None:
        super().__init__(layout)
        self.loc = nn.Parameter(mean.detach().clone())

    @property
    def noise_size(self) -> int:
        """None: every draw is the same."""
        return 0

    def draw(self, noise: Tensor) -> Tensor:
        """The weights themselves, for noise (..., 0) as (..., d)."""
        return self.loc.expand(*noise.shape[:-1], self.layout.size)

    def mean_vector(self) -> Tensor:
        """The weights."""
        return self.loc

    def std_vector(self) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.loc)

    def kl(self, prior: GaussianPrior) -> Tensor:
        """Not defined.

        Raises:
            InputError: Always; it is infinite.
        """
        del prior
        raise InputError("a point mass is infinitely far from any prior that has a density: it has no KL divergence")

    def covariance(self) -> Tensor:
        """Zeros."""
        if self.layout.size > MAX_COVARIANCE_SIZE:
            raise InputError(
                f"the covariance of {self.layout.size} weights would take {4 * self.layout.size**2 / 2**30:.1f} GiB; a point "
                f"mass's is zero"
            )
        return self.loc.new_zeros(self.layout.size, self.layout.size).detach()

    def config(self) -> dict[str, Any]:
        """Nothing beside the tensors."""
        return {}


@dataclass(frozen=True)
class PointMass:
    """Recipe for a point mass: no inference, only the retraining of the first layer (maximum a posteriori)."""

    @property
    def name(self) -> str:
        """``"point"``."""
        return PointMassPosterior.family

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> PointMassPosterior:
        """Put all mass on ``mean``."""
        del prior
        return PointMassPosterior(layout, mean)
