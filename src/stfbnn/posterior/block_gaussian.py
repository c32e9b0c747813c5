"""The block Gaussian: a full covariance within each of U equal blocks of weights, independent between blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.mean_field import MAX_COVARIANCE_SIZE, check_initial_std
from stfbnn.prior import GaussianPrior

# Matrices of the size of L that inference holds at its peak: L as stored and as used, its gradient and the average of it, the
# precision, and what a step on the precision needs (Bayes by Backprop, with Adam's two averages, comes to the same).
COPIES_IN_INFERENCE = 10
DEFAULT_MAX_BYTES = 8 * 2**30


class BlockGaussianPosterior(Posterior):
    """q(w) = ∏_u N(w_u; μ_u, L_u L_uᵀ) over U blocks of k weights each; d = U k.

    With one block it is the full-covariance Gaussian ("full"), with one for each output unit the filterwise one
    ("filterwise"). A file keeps 4 (k + 3)/2 bytes per first-layer parameter in float32.

    Args:
        layout: How w is cut into the layer's parameters.
        mean: μ, shape (d,), in the layout's order.
        std: The initial standard deviations, without correlations: a scalar or (d,), in the layout's order.
        index: Which entry of w is number j of block u, shape (U, k), of integers: a permutation of 0 … d − 1.
        family: The family's name.
        config: The recipe's settings that are needed to build this posterior again.

    Attributes:
        index: As given; a buffer that is not saved, for it follows from the layout.
        loc: The means μ, shape (d,), in the layout's order.
        raw_tril: Below the diagonal L, on it log L_jj, shape (U, k, k); what is above it is not read, and zero.

    Raises:
        InputError: ``index`` is no permutation of the layout's weights.
    """

    index: Tensor
    _place: Tensor

    def __init__(
        self,
        layout: ParameterLayout,
        mean: Tensor,
        std: Tensor,
        index: Tensor,
        family: str,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__(layout)
        in_order = torch.arange(layout.size, device=index.device)
        if index.ndim != 2 or not torch.equal(index.flatten().sort().values, in_order):
            raise InputError(
                f"index must be a matrix (blocks, weights) that names each of the {layout.size} weights once, but it is "
                f"{tuple(index.shape)}"
            )
        # One class serves two families, which differ in the index alone.
        self.family = family  # type: ignore[misc]
        self._config = dict(config)
        index = index.to(mean.device)
        self.register_buffer("index", index, persistent=False)
        # Where in block order each entry of w lies: the inverse permutation.
        self.register_buffer("_place", torch.argsort(index.flatten()), persistent=False)
        self.loc = nn.Parameter(mean.detach().clone())
        self.raw_tril = nn.Parameter(mean.new_zeros(*index.shape, index.shape[1]))
        self.set_std(std)

    @property
    def noise_size(self) -> int:
        """One number per weight, in BLOCK order: ``noise.reshape(..., U, k)`` is the blocks' noise."""
        return self.layout.size

    @property
    def scale_tril(self) -> Tensor:
        """L, shape (U, k, k): lower triangular with a positive diagonal; a new tensor, differentiable in ``raw_tril``."""
        scale = torch.tril(self.raw_tril, diagonal=-1)
        scale.diagonal(dim1=-2, dim2=-1).copy_(self._log_diagonal().exp())
        return scale

    @torch.no_grad()
    def set_scale_tril(self, scale: Tensor) -> None:
        """Take L, shape (U, k, k); what is above its diagonal is not read.

        Raises:
            InputError: The shape is another one, or an entry of the diagonal is not positive.
        """
        diagonal = scale.diagonal(dim1=-2, dim2=-1)
        if scale.shape != self.raw_tril.shape or not bool((diagonal > 0).all()):
            raise InputError(
                f"the scale must be triangular matrices {tuple(self.raw_tril.shape)} with a positive diagonal, but it is "
                f"{tuple(scale.shape)}, with a diagonal of at least {float(diagonal.min()):g}"
            )
        self.raw_tril.copy_(scale).tril_(diagonal=-1)
        self._log_diagonal().copy_(diagonal.log())

    @torch.no_grad()
    def set_std(self, std: Tensor) -> None:
        """L = diag(std), for std a scalar or (d,) in the layout's order."""
        self.raw_tril.zero_()
        self._log_diagonal().copy_(std.log().expand(self.layout.size)[self.index])

    def draw(self, noise: Tensor) -> Tensor:
        """w_u = μ_u + L_u ε_u for noise (..., d) in block order; the weights are in the layout's order."""
        blocks = noise.reshape(*noise.shape[:-1], *self.index.shape)
        deviations: Tensor = torch.einsum("uij,...uj->...ui", self.scale_tril, blocks)
        return self.loc + deviations.flatten(-2)[..., self._place]

    def mean_vector(self) -> Tensor:
        """μ."""
        return self.loc

    def std_vector(self) -> Tensor:
        """The lengths of L's rows."""
        lengths: Tensor = torch.linalg.vector_norm(self.scale_tril, dim=-1)
        return lengths.flatten()[self._place]

    def kl(self, prior: GaussianPrior) -> Tensor:
        """½ Σ_i ((Σ_ii + (μ_i − m_i)²)/s_i² − 1 + log s_i²) − Σ_u Σ_j log L_jj, in nats.

        The prior's covariance is diagonal, so it meets only Σ's diagonal; log det Σ_u = 2 Σ_j log L_jj.
        """
        ratio = (self.std_vector() / prior.std).square()
        shift = ((self.loc - prior.mean) / prior.std).square()
        log_ratio = self._log_diagonal().flatten()[self._place] - prior.std.log()
        return 0.5 * (ratio + shift - 1 - 2 * log_ratio).sum()

    def log_prob(self, weights: Tensor) -> Tensor:
        """−½ Σ_u |L_u⁻¹ (w_u − μ_u)|² − Σ log L_jj − ½ d log 2π, by triangular solves."""
        units, size = self.index.shape
        blocks = (weights - self.loc)[..., self.index].reshape(-1, units, size)
        # The draws are columns, so that L is not repeated for each of them.
        standard: Tensor = torch.linalg.solve_triangular(self.scale_tril, blocks.permute(1, 2, 0), upper=False)
        squares: Tensor = standard.square().sum(dim=(0, 1)).reshape(weights.shape[:-1])
        return -0.5 * squares - self._log_diagonal().sum() - 0.5 * self.layout.size * math.log(2 * math.pi)

    def covariance(self) -> Tensor:
        """L Lᵀ of every block in its place, and zeros between blocks.

        Raises:
            InputError: It would not fit in memory.
        """
        size = self.layout.size
        if size > MAX_COVARIANCE_SIZE:
            raise InputError(
                f"the covariance of {size} weights would take {self.loc.element_size() * size**2 / 2**30:.1f} GiB; use "
                f"posterior.scale_tril, its factor for each block, or posterior.std()"
            )
        scale = self.scale_tril.detach()
        matrix = scale.new_zeros(size, size)
        matrix[self.index.unsqueeze(2), self.index.unsqueeze(1)] = scale @ scale.mT
        return matrix

    def config(self) -> dict[str, Any]:
        """The recipe's memory limit, without which it might refuse to build this posterior again."""
        return dict(self._config)

    def _log_diagonal(self) -> Tensor:
        return self.raw_tril.diagonal(dim1=-2, dim2=-1)

    def _pack(self, key: str, value: Tensor) -> dict[str, Tensor]:
        if key != "raw_tril":
            return super()._pack(key, value)
        # Row by row: an index of all entries would take more memory than they do.
        return {key: torch.cat([value[:, row, : row + 1] for row in range(value.shape[1])], dim=1)}

    def _unpack(self, key: str, value: Tensor, packed: Mapping[str, Tensor]) -> None:
        if key != "raw_tril":
            super()._unpack(key, value, packed)
            return
        value.zero_()
        start = 0
        for row in range(value.shape[1]):
            value[:, row, : row + 1] = packed[key][:, start : start + row + 1]
            start += row + 1


def check_settings(initial_std: float | None, max_bytes: int) -> None:
    """Refuse a recipe's settings that are out of range.

    Raises:
        InputError: The initial width is not positive and finite, or the limit is no positive integer.
    """
    check_initial_std(initial_std)
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise InputError(f"max_bytes must be a positive integer, but it is {max_bytes!r}")


def initial_std(chosen: float | None, mean: Tensor, prior: GaussianPrior) -> Tensor:
    """A recipe's initial width, or a tenth of the prior's."""
    return (0.1 * prior.std if chosen is None else torch.tensor(chosen)).to(mean)


def require_memory(family: str, blocks: int, size: int, element: int, max_bytes: int) -> None:
    """Refuse covariances for which inference would not fit in memory, before any is made.

    Args:
        family: The family's name.
        blocks: U.
        size: k.
        element: Bytes of one number.
        max_bytes: The limit.

    Raises:
        InputError: They take more.
    """
    needed = COPIES_IN_INFERENCE * element * blocks * size**2
    if needed <= max_bytes:
        return
    matrices = f"{blocks} covariances of {size} weights each" if blocks > 1 else f"the covariance of {size} weights"
    less = '"low-rank" or "mean-field"' if blocks > 1 else '"filterwise", "low-rank" or "mean-field"'
    raise InputError(
        f"a {family} posterior over this layer, {matrices}, would take about {needed / 2**30:.3g} GiB during inference, more "
        f"than max_bytes = {max_bytes / 2**30:.3g} GiB; take posterior={less}, or a recipe with a larger max_bytes"
    )
