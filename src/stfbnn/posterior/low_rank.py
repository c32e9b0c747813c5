"""The low-rank Gaussian: independent widths, and a few directions along which all weights vary together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.mean_field import MAX_COVARIANCE_SIZE, check_initial_std
from stfbnn.prior import GaussianPrior
from stfbnn.randomness import generator

# Of each weight's initial variance, the share that the common directions carry: where it is 0, the free energy is stationary
# in them, and gradients would never find any.
_INITIAL_SHARE = 0.01
_SEED = 0


class LowRankPosterior(Posterior):
    """q(w) = N(μ, D² + U Uᵀ), D diagonal and U of r columns; 4 (2 + r) bytes per first-layer parameter in float32.

    All of it costs O(d r²), by the matrix determinant lemma and the Woodbury identity.

    Attributes:
        loc: The means μ, shape (d,).
        log_diagonal: log D, shape (d,).
        factor: U, shape (d, r).
    """

    family: ClassVar[str] = "low-rank"

    def __init__(self, layout: ParameterLayout, mean: Tensor, std: Tensor, rank: int) -> None:
        super().__init__(layout)
        self.loc = nn.Parameter(mean.detach().clone())
        self.log_diagonal = nn.Parameter(torch.zeros_like(mean))
        self.factor = nn.Parameter(mean.new_zeros(layout.size, rank))
        self.set_std(std)

    @property
    def rank(self) -> int:
        """r."""
        return self.factor.shape[1]

    @property
    def noise_size(self) -> int:
        """d + r: first one number per weight, then one per direction."""
        return self.layout.size + self.rank

    def draw(self, noise: Tensor) -> Tensor:
        """w = μ + D ε₁ + U ε₂."""
        own, common = torch.split(noise, [self.layout.size, self.rank], dim=-1)
        weights: Tensor = self.loc + self.log_diagonal.exp() * own + common @ self.factor.T
        return weights

    def mean_vector(self) -> Tensor:
        """μ."""
        return self.loc

    def std_vector(self) -> Tensor:
        """√(D_i² + Σ_j U_ij²)."""
        return self._variances().sqrt()

    @torch.no_grad()
    def set_std(self, std: Tensor) -> None:
        """Take marginal standard deviations, a scalar or (d,).

        A hundredth of each variance goes to the directions, which start at fixed random values: exactly without
        correlations, no gradient would lead to any.
        """
        random = torch.randn(self.factor.shape, generator=generator(_SEED, "low-rank", *self.factor.shape))
        rows = nn.functional.normalize(random.to(self.factor), dim=1)
        self.factor.copy_(math.sqrt(_INITIAL_SHARE) * std.expand_as(self.loc).unsqueeze(1) * rows)
        self.log_diagonal.copy_(std.log() + 0.5 * math.log(1 - _INITIAL_SHARE))

    def kl(self, prior: GaussianPrior) -> Tensor:
        """½ Σ_i ((Σ_ii + (μ_i − m_i)²)/s_i² − 1 + log s_i²) − ½ log det Σ, in nats.

        log det Σ = Σ_i log D_i² + log det(I + Uᵀ D⁻² U), by the matrix determinant lemma.
        """
        ratio = self._variances() / prior.std.square()
        shift = ((self.loc - prior.mean) / prior.std).square()
        log_ratio = self.log_diagonal - prior.std.log()
        return 0.5 * (ratio + shift - 1 - 2 * log_ratio).sum() - self._half_log_determinant(self._capacitance()[1])

    def log_prob(self, weights: Tensor) -> Tensor:
        """log N(w; μ, D² + U Uᵀ).

        With y = D⁻¹(w − μ), V = D⁻¹U and c = (I + VᵀV)⁻¹Vᵀy, the Woodbury identity gives (w−μ)ᵀΣ⁻¹(w−μ) = yᵀy − yᵀVc, which
        equals |y − Vc|² + |c|²: a sum instead of a difference, so nothing cancels.
        """
        scaled, cholesky = self._capacitance()
        standard = ((weights - self.loc) * (-self.log_diagonal).exp()).reshape(-1, self.layout.size)
        common = torch.cholesky_solve((standard @ scaled).T, cholesky).T
        squares = (standard - common @ scaled.T).square().sum(dim=1) + common.square().sum(dim=1)
        half_log_determinant = self.log_diagonal.sum() + self._half_log_determinant(cholesky)
        constant = 0.5 * self.layout.size * math.log(2 * math.pi)
        return -0.5 * squares.reshape(weights.shape[:-1]) - half_log_determinant - constant

    def covariance(self) -> Tensor:
        """D² + U Uᵀ.

        Raises:
            InputError: It would not fit in memory.
        """
        size = self.layout.size
        if size > MAX_COVARIANCE_SIZE:
            raise InputError(
                f"the covariance of {size} weights would take {self.loc.element_size() * size**2 / 2**30:.1f} GiB; use its "
                f"parts, posterior.log_diagonal and posterior.factor, or posterior.std()"
            )
        factor = self.factor.detach()
        return torch.diag((2 * self.log_diagonal.detach()).exp()) + factor @ factor.T

    def config(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def _variances(self) -> Tensor:
        return (2 * self.log_diagonal).exp() + self.factor.square().sum(dim=1)

    def _capacitance(self) -> tuple[Tensor, Tensor]:
        """V = D⁻¹U and the Cholesky factor of I + VᵀV."""
        scaled = self.factor * (-self.log_diagonal).exp().unsqueeze(1)
        eye = torch.eye(self.rank, dtype=scaled.dtype, device=scaled.device)
        return scaled, torch.linalg.cholesky(eye + scaled.T @ scaled)

    @staticmethod
    def _half_log_determinant(cholesky: Tensor) -> Tensor:
        return cholesky.diagonal().log().sum()


@dataclass(frozen=True)
class LowRank:
    """Recipe for a low-rank plus diagonal Gaussian.

    Attributes:
        rank: r, the number of directions. A layer of fewer weights gets as many as it has weights: more would add nothing.
        initial_std: Marginal σ at the start of inference, for all weights; None leaves it to inference, which estimates one
            from the curvature of the loss (before that, σ is a tenth of the prior's).

    Raises:
        InputError: A setting is out of range.
    """

    rank: int = 8
    initial_std: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank must be a positive integer, but it is {self.rank!r}")
        check_initial_std(self.initial_std)

    @property
    def name(self) -> str:
        """``"low-rank"``."""
        return LowRankPosterior.family

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> LowRankPosterior:
        """Make the posterior with this mean and, but for slight correlations, initial_std² I as its covariance."""
        std = 0.1 * prior.std if self.initial_std is None else torch.tensor(self.initial_std)
        return LowRankPosterior(layout, mean, std.to(mean), min(self.rank, layout.size))
