"""Numbers with Gaussian noise whose size the network predicts for each example."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood.base import (
    Likelihood,
    at_least_float32,
    match,
    per_example,
    require_finite_outputs,
    require_float_outputs,
)
from stfbnn.likelihood.gaussian import LOG_TWO_PI, require_float_targets


class HeteroscedasticGaussian(Likelihood):
    """Numbers with Gaussian noise of their own: y = μ(x) + N(0, σ²(x)), from a network with two heads.

    Outputs are (B, 2K) or (B, 2K, …): along dimension 1 first the K means, then the K log-variances log σ² (Nix and Weigend,
    1994; the logarithm as in Kendall and Gal, 2017). A network that returns the two apart joins them with
    ``bayesianize(…, output=lambda out: torch.cat(out, 1))``. Targets are (B, K, …), or (B,) where K = 1.

    The standard deviation is kept between the two limits: beyond them the density is that at the limit, and its gradient by
    the log-variance is zero, so that one draw with a wild log-variance can neither overflow nor throw inference off.

    Args:
        min_std: Lower limit of σ, in the targets' unit. The density of a target that is hit exactly is unbounded without.
        max_std: Upper limit of σ, in the targets' unit.
    """

    name: ClassVar[str] = "heteroscedastic"

    def __init__(self, min_std: float = 1e-6, max_std: float = 1e6) -> None:
        super().__init__()
        if not 0 < min_std < max_std < math.inf:
            raise InputError(f"0 < min_std < max_std < ∞ is needed, but they are {min_std} and {max_std}")
        self.min_std, self.max_std = float(min_std), float(max_std)

    def heads(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means μ and log-variances log σ² within the limits, each (B, K, …)."""
        mean, log_variance = outputs.chunk(2, dim=1)
        return mean, log_variance.clamp(2 * math.log(self.min_std), 2 * math.log(self.max_std))

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that are not finite floats with an even number of columns."""
        require_float_outputs(outputs, "a heteroscedastic likelihood")
        if outputs.ndim < 2 or outputs.shape[1] % 2:
            raise InputError(
                f"a heteroscedastic likelihood needs outputs (batch, 2K, …), K means and then K log-variances, but the model "
                f'gives {tuple(outputs.shape)}; for noise of one size use likelihood="gaussian"'
            )
        require_finite_outputs(outputs)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are not finite floats."""
        del outputs
        require_float_targets(targets, "a heteroscedastic likelihood")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse targets that are not finite floats of the means' shape."""
        self.check_outputs(outputs)
        self.check_targets(outputs, targets)
        mean = self.heads(outputs)[0]
        if match(mean, targets).shape != targets.shape:
            raise InputError(
                f"for outputs {tuple(outputs.shape)}, half of them means, targets must have the shape {tuple(mean.shape)}, "
                f"but theirs is {tuple(targets.shape)}"
            )

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ over k of −½ (log 2π + log σ_k² + (y_k − μ_k)² / σ_k²)."""
        mean, log_variance = (match(head, targets) for head in self.heads(at_least_float32(outputs)))
        terms = -0.5 * (LOG_TWO_PI + log_variance + (targets - mean).square() * (-log_variance).exp())
        return per_example(terms)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Mean plus noise, (B, K, …)."""
        mean, log_variance = self.heads(outputs.detach())
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64).to(mean)
        return mean + (0.5 * log_variance).exp() * noise

    def config(self) -> dict[str, Any]:
        """The limits."""
        return {"min_std": self.min_std, "max_std": self.max_std}
