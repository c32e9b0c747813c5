"""Equally weighted samples, q(w) = (1/S) Σ_s δ(w − w_s): what Markov chain Monte Carlo leaves of a posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.mean_field import MAX_COVARIANCE_SIZE
from stfbnn.prior import GaussianPrior


class SampledPosterior(Posterior):
    """S weight vectors, each with the probability 1/S; 4·S bytes per first-layer parameter in float32.

    It has neither a density nor a divergence from the prior, and no parameters: `fit` cannot improve it.

    Args:
        layout: How w is cut into the layer's parameters.
        samples: The weight vectors, shape (S, d).

    Attributes:
        samples: The weight vectors, shape (S, d).

    Raises:
        InputError: ``samples`` is not a finite matrix of at least one row with a column for each weight.
    """

    family: ClassVar[str] = "samples"
    samples: Tensor

    def __init__(self, layout: ParameterLayout, samples: Tensor) -> None:
        super().__init__(layout)
        if samples.ndim != 2 or len(samples) == 0 or samples.shape[1] != layout.size:
            raise InputError(
                f"samples must be a matrix (S, {layout.size}) of S weight vectors, but its shape is {tuple(samples.shape)}"
            )
        if not samples.is_floating_point() or not bool(torch.isfinite(samples).all()):
            raise InputError(
                f"samples must be finite floats, but they are {samples.dtype} or hold NaN or infinite values"
            )
        self.register_buffer("samples", samples.detach().clone())

    def __len__(self) -> int:
        """S."""
        return len(self.samples)

    @property
    def noise_size(self) -> int:
        """One number, which chooses the sample."""
        return 1

    def draw(self, noise: Tensor) -> Tensor:
        """Sample number ⌊S Φ(ε)⌋, for noise (..., 1); no gradient flows."""
        # In double where there is one: in single precision Φ has too few values for many samples.
        dtype = torch.float32 if noise.device.type == "mps" else torch.float64
        uniform = torch.special.ndtr(noise[..., 0].to(dtype))
        index = (uniform * len(self)).long().clamp_max(len(self) - 1)
        return self.samples[index]

    def mean_vector(self) -> Tensor:
        """(1/S) Σ_s w_s."""
        return self.samples.mean(dim=0)

    def std_vector(self) -> Tensor:
        """√((1/S) Σ_s (w_s − mean)²): zeros where there is one sample."""
        return self.samples.std(dim=0, correction=0)

    def kl(self, prior: GaussianPrior) -> Tensor:
        """Not defined.

        Raises:
            InputError: Always; it is infinite.
        """
        del prior
        raise InputError(
            "a set of samples is infinitely far from any prior that has a density: it has no KL divergence. To infer a "
            'posterior with fit, call bayesianize with a family that has one, such as posterior="mean-field"'
        )

    def covariance(self) -> Tensor:
        """(1/S) Σ_s (w_s − mean)(w_s − mean)ᵀ; of rank S − 1 at most."""
        if self.layout.size > MAX_COVARIANCE_SIZE:
            raise InputError(
                f"the covariance of {self.layout.size} weights would take {4 * self.layout.size**2 / 2**30:.1f} GiB; use "
                f"posterior.std(), or the samples themselves, posterior.samples"
            )
        apart = self.samples - self.mean_vector()
        return apart.T @ apart / len(self)

    def config(self) -> dict[str, Any]:
        """How many samples there are."""
        return {"count": len(self)}


@dataclass(frozen=True)
class Samples:
    """Recipe for a set of samples, which `sample_hmc` fills; until then they all are the trained weights.

    Attributes:
        count: S.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise InputError(f"the number of samples must be a positive integer, but it is {self.count!r}")

    @property
    def name(self) -> str:
        """``"samples"``."""
        return SampledPosterior.family

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> SampledPosterior:
        """Put all mass on ``mean``."""
        del prior
        return SampledPosterior(layout, mean.expand(self.count, -1))
