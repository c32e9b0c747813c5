"""The precision of a Gaussian posterior as natural-gradient inference tracks it: a diagonal, or one matrix for each block.

With λ = N/T, q = N(m, (λS)⁻¹), S = H + δ: H is the expected Hessian of the mean negative log-likelihood, δ the prior's
precision over λ. Both classes here keep S positive definite by construction, and write q's width whenever S changes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.estimators import Sampler
from stfbnn.posterior import MeanFieldPosterior, Posterior
from stfbnn.posterior.block_gaussian import BlockGaussianPosterior
from stfbnn.prior import GaussianPrior

# H may be negative; it is kept above this multiple of δ when δ shrinks.
_LOWEST = -0.5
# ½ of this is the most that noise may make S grow, as a share of how fast it decays; W² is averaged over about ten moves.
_GROWTH, _RECENT = 0.5, 0.1
# Where rounding makes a block of S indefinite, its eigenvalues are raised to this share of δ: q is at most ten times as wide
# as p.
_LEAST = 0.01


class Precision(Protocol):
    """What the engine needs of S."""

    delta: Tensor

    def mean(self) -> Tensor:
        """The posterior's mean (d,) itself, to be moved in place."""

    def begin(self, temperature: float) -> None:
        """Set the width of q that H gives at temperature T, under the prior as it is now."""

    def sampler(self) -> Sampler:
        """q with the mean and its scale as leaves, in this order."""

    def update(self, scale_gradient: Tensor, rate: float) -> None:
        """Move S by ``rate`` towards what the gradient by the scale says of H."""

    def newton(self, direction: Tensor) -> Tensor:
        """S⁻¹ ``direction``, (d,)."""

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


class DiagonalPrecision:
    """S = h + δ, (d,) numbers (Khan et al. 2018; Lin, Schmidt & Khan 2020).

    The gradient by σ is ∂ℓ̄/∂σ = ĥσ, so ĥ = (∂ℓ̄/∂σ)/σ whatever estimator it comes from, and

        h ← (1−ρ) h + ρ ĥ + ½ ρ² (h−ĥ)² / (h+δ),

    whose last term keeps h + δ positive.
    """

    def __init__(
        self, posterior: MeanFieldPosterior, prior: GaussianPrior, num_examples: int, curvature: Tensor
    ) -> None:
        self._posterior, self._prior, self._num_examples = posterior, prior, num_examples
        self._curvature = curvature.detach().clone()
        self._effective = 1.0
        self.delta = torch.ones_like(curvature)

    def mean(self) -> Tensor:
        """m."""
        return self._posterior.loc.detach()

    def begin(self, temperature: float) -> None:
        """h stays; δ follows T and the prior."""
        self._effective = self._num_examples / temperature
        self.delta = _delta(self._prior, self._effective)
        self._curvature.clamp_(min=_LOWEST * self.delta)
        self._set_std()

    def narrow(self, largest: float) -> None:
        """Raise h until no σ is above ``largest``."""
        self._curvature.clamp_(min=1 / (self._effective * largest**2) - self.delta)
        self._set_std()

    def sampler(self) -> Sampler:
        """w = m + σε."""
        loc = self._posterior.mean_vector().detach().requires_grad_()
        std = self._posterior.std_vector().detach().requires_grad_()
        return Sampler((loc, std), lambda noise: loc + std * noise, lambda: (loc, std), self._posterior.noise_size)

    @torch.no_grad()
    def update(self, scale_gradient: Tensor, rate: float) -> None:
        """One step of the formula above."""
        difference = self._curvature - scale_gradient / self._posterior.std_vector()
        correction = 0.5 * rate**2 * difference.square() / (self._curvature + self.delta)
        self._curvature.sub_(rate * difference).add_(correction)
        self._set_std()

    def newton(self, direction: Tensor) -> Tensor:
        """direction / (h + δ)."""
        return direction / (self._curvature + self.delta)

    def state(self) -> dict[str, Any]:
        """h, and T and δ as they are."""
        return {"curvature": self._curvature.clone(), "effective": self._effective, "delta": self.delta.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """h; σ comes back with the posterior."""
        self._curvature.copy_(state["curvature"])
        self._effective, self.delta = float(state["effective"]), state["delta"].to(self._curvature)

    def _set_std(self) -> None:
        self._posterior.set_std((self._effective * (self._curvature + self.delta)).rsqrt())


class BlockPrecision:
    """S is one matrix (k, k) for each of U blocks of weights (Lin, Schmidt & Khan 2020).

    With w = m + Lε and Σ = LLᵀ, the gradient by L has the expectation HL, so H is estimated by sym(L⁻ᵀ (∂ℓ̄/∂L)ᵀ), and

        G = sym(L⁻ᵀ (∂ℓ̄/∂L)ᵀ) + δ − S,   S ← S + ρG + ½ρ² G S⁻¹ G,

    which is ½ S + ½ (S+ρG) S⁻¹ (S+ρG) and so positive definite. For wide blocks the gradients of several steps are averaged
    before S moves, since a step costs O(U k³).

    The square of a noisy G makes S grow, by ½ρ² W² in units of S, while it decays by ρ. So that the noise does not feed on
    itself, ρ is kept below a bound that follows from a running mean of W², from the moves before (a bound by the move itself
    would favour small gradients and bias S).

    Args:
        posterior: A block Gaussian.
        prior: The Gaussian prior.
        num_examples: N.
        curvature: H₀, (U, k, k).
        shrinkage: How far H₀ is moved towards its diagonal. What a trained network's curvature leaves open is far too wide
            to start from where the network is overconfident; from the narrow side S finds its size with little noise.
        every: Minibatches whose gradients are averaged before S moves.
    """

    def __init__(
        self,
        posterior: BlockGaussianPosterior,
        prior: GaussianPrior,
        num_examples: int,
        curvature: Tensor,
        shrinkage: float,
        every: int,
    ) -> None:
        self._posterior, self._prior, self._num_examples = posterior, prior, num_examples
        self._every = every
        self._effective = 1.0
        self._index = posterior.index
        self._place = torch.argsort(posterior.index.flatten())
        self._curvature: Tensor | None = curvature
        self._shrinkage = shrinkage
        self._precision = torch.empty(0)
        self._gradient: Tensor | None = None
        self._square: Tensor | None = None
        self._kept = 1.0
        self._count = 0
        self.delta = torch.ones_like(posterior.mean_vector())

    def mean(self) -> Tensor:
        """m."""
        return self._posterior.loc.detach()

    def begin(self, temperature: float) -> None:
        """H stays; δ follows T and the prior. What was averaged for the next move of S is dropped, where T is a new one."""
        averaged = self._averaged() if self._num_examples / temperature == self._effective else None
        hessian = self._hessian()
        self._effective = self._num_examples / temperature
        self.delta = _delta(self._prior, self._effective).expand_as(self.delta)
        delta = self.delta[self._index]
        lowest = hessian.clone()
        lowest.diagonal(dim1=-2, dim2=-1).sub_(_LOWEST * delta)
        _raise(hessian, torch.linalg.cholesky_ex(lowest).info != 0, delta, _LOWEST)
        self._precision = hessian
        self._precision.diagonal(dim1=-2, dim2=-1).add_(delta)
        self._set_scale()
        if averaged is None:
            self._gradient, self._kept, self._count = None, 1.0, 0
        else:
            # As gradients by the new L: a prior that is learned changes every epoch, which may be too short for a move of S.
            self._gradient = averaged.mT @ self._posterior.scale_tril.detach()

    def sampler(self) -> Sampler:
        """w = m + Lε, block by block."""
        loc = self._posterior.mean_vector().detach().requires_grad_()
        scale = self._posterior.scale_tril.detach().requires_grad_()
        units, size = self._index.shape

        def draw(noise: Tensor) -> Tensor:
            blocks = noise.reshape(*noise.shape[:-1], units, size, 1)
            deviation = (scale @ blocks).reshape(*noise.shape[:-1], units * size)
            return loc + deviation[..., self._place]

        def moments() -> tuple[Tensor, Tensor]:
            return loc, scale.square().sum(dim=-1).sqrt().flatten()[self._place]

        return Sampler((loc, scale), draw, moments, self._posterior.noise_size)

    @torch.no_grad()
    def update(self, scale_gradient: Tensor, rate: float) -> None:
        """Average the gradients; every so often, one step of the formulas above."""
        self._gradient = scale_gradient if self._gradient is None else self._gradient + scale_gradient
        self._kept *= 1 - rate
        self._count += 1
        if self._count < self._every:
            return
        scale, averaged = self._posterior.scale_tril.detach(), self._averaged()
        assert averaged is not None  # noqa: S101 - one was added above
        found = averaged / self._count
        change = (found + found.mT) / 2 - self._precision
        change.diagonal(dim1=-2, dim2=-1).add_(self.delta[self._index])
        moved = change @ scale
        # S⁻½ G S⁻½ up to a rotation, and the largest diagonal entry of its square, which is what noise makes S grow by.
        square = (self._effective * (scale.mT @ moved)).square().sum(dim=-1).amax(dim=-1)
        share = (1 - self._kept) * torch.ones_like(square)
        if self._square is None:
            self._square = square
        share = torch.minimum(share, _GROWTH / self._square).reshape(-1, 1, 1)
        self._square = self._square.lerp(square, _RECENT)
        self._precision.add_(share * change).add_(0.5 * share**2 * self._effective * (moved @ moved.mT))
        if not bool(torch.isfinite(self._precision).all()):
            raise InputError(
                "the posterior's precision diverged: average over more minibatches with "
                "engine_options={'curvature_every': …}, over more draws a step with draws=…, or lower curvature_rate"
            )
        self._gradient, self._kept, self._count = None, 1.0, 0
        self._set_scale()

    def newton(self, direction: Tensor) -> Tensor:
        """S⁻¹ direction = λ L Lᵀ direction, in every block."""
        scale = self._posterior.scale_tril.detach()
        blocks = direction[self._index].unsqueeze(-1)
        return (self._effective * (scale @ (scale.mT @ blocks))).flatten()[self._place]

    def state(self) -> dict[str, Any]:
        """S (H₀ before the start), what was averaged for its next move, and T and δ as they are."""
        return {
            "curvature": self._curvature,
            "effective": self._effective,
            "delta": self.delta.clone(),
            "precision": self._precision.clone(),
            "averaged": None if self._gradient is None else self._gradient.clone(),
            "square": None if self._square is None else self._square.clone(),
            "kept": self._kept,
            "count": self._count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back S; L comes back with the posterior."""

        def placed(value: Tensor | None) -> Tensor | None:
            # A checkpoint is read onto the CPU.
            return None if value is None else value.to(self._posterior.mean_vector())

        self._curvature, self._gradient = placed(state["curvature"]), placed(state["averaged"])
        self._precision, self._square = state["precision"].to(self._posterior.mean_vector()), placed(state["square"])
        self._kept, self._count = float(state["kept"]), int(state["count"])
        self._effective, self.delta = float(state["effective"]), state["delta"].to(self._posterior.mean_vector())

    def _averaged(self) -> Tensor | None:
        """L⁻ᵀ (∂ℓ̄/∂L)ᵀ, summed over the minibatches since S moved; None where there are none."""
        if self._gradient is None:
            return None
        scale = self._posterior.scale_tril.detach()
        found: Tensor = torch.linalg.solve_triangular(scale.mT, self._gradient.mT, upper=True)
        return found

    def _hessian(self) -> Tensor:
        if self._curvature is not None:
            hessian, self._curvature = self._curvature * (1 - self._shrinkage), None
            diagonal = hessian.diagonal(dim1=-2, dim2=-1)
            return hessian.diagonal_scatter(diagonal / (1 - self._shrinkage), dim1=-2, dim2=-1)
        self._precision.diagonal(dim1=-2, dim2=-1).sub_(self.delta[self._index])
        return self._precision

    @torch.no_grad()
    def _set_scale(self) -> None:
        # The Cholesky factor of S in reverse order, S = U Uᵀ with U upper triangular, has U⁻ᵀ/√λ as the factor of Σ.
        lower, info = torch.linalg.cholesky_ex(self._precision.flip(-2, -1))
        if bool(info.any()):
            _raise(self._precision, info != 0, self.delta[self._index], _LEAST)
            lower = torch.linalg.cholesky(self._precision.flip(-2, -1))
        upper = lower.flip(-2, -1)
        eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
        inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
        self._posterior.set_scale_tril(inverse.mT / self._effective**0.5)


def precision_of(
    posterior: Posterior,
    prior: GaussianPrior,
    num_examples: int,
    curvature: Tensor,
    *,
    shrinkage: float = 0.0,
    every: int | None = None,
) -> Precision | None:
    """The precision to track for a posterior, or None where the family has no natural-gradient update here.

    Args:
        posterior: q.
        prior: p.
        num_examples: N.
        curvature: H₀: (d,), or (U, k, k) for block Gaussians.
        shrinkage: How far the blocks of H₀ are moved towards their diagonal.
        every: Minibatches averaged for one move of a block's S; None takes 1 for blocks of up to 32 weights, k/16 beyond.
    """
    if isinstance(posterior, MeanFieldPosterior):
        return DiagonalPrecision(posterior, prior, num_examples, curvature)
    if isinstance(posterior, BlockGaussianPosterior):
        size = posterior.index.shape[1]
        every = every or max(1, size // 16 if size > 32 else 1)
        return BlockPrecision(posterior, prior, num_examples, curvature, shrinkage, every)
    return None


def _delta(prior: GaussianPrior, effective: float) -> Tensor:
    return (effective * prior.std.square()).reciprocal().to(prior.mean)


def _raise(matrices: Tensor, which: Tensor, delta: Tensor, least: float) -> None:
    """Raise, in place, the eigenvalues of δ^(−½) M δ^(−½) that are below ``least``, in the blocks that ``which`` marks."""
    if not bool(which.any()):
        return
    root = delta[which].sqrt()
    outer = root.unsqueeze(-1) * root.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(matrices[which] / outer)
    # Also no smaller than what the type's rounding of the largest allows.
    rounding = 100 * torch.finfo(values.dtype).eps * values[..., -1:]
    values = torch.where(values < least, torch.clamp(rounding, min=least), values)
    matrices[which] = outer * ((vectors * values.unsqueeze(-2)) @ vectors.mT)
