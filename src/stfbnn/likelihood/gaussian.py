"""Numbers with Gaussian noise of one size for all examples."""

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
    require_matching,
)

LOG_TWO_PI = math.log(2 * math.pi)


class Gaussian(Likelihood):
    """Numbers with Gaussian noise: y = output + N(0, noise_std²), independent per output.

    Args:
        noise_std: Standard deviation of the noise, in the targets' unit: a number for all outputs, or a list with one
            for each column of the outputs. None learns it from the residuals' size at the start.
        learned: Learn it: its value maximises the expected log-likelihood, noise² = E_q[residual²].
    """

    name: ClassVar[str] = "gaussian"
    noise_std: Tensor

    def __init__(self, noise_std: float | list[float] | None = None, learned: bool | None = None) -> None:
        super().__init__()
        self.learned = (noise_std is None) if learned is None else learned
        if noise_std is None and not self.learned:
            raise InputError("a Gaussian likelihood that learns nothing needs noise_std, a positive number")
        try:
            value = torch.tensor(math.nan if noise_std is None else noise_std, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"noise_std must be a number, or one for each output, but it is {noise_std!r}") from error
        if noise_std is not None and not bool((torch.isfinite(value) & (value > 0)).all()):
            raise InputError(f"noise_std must be positive and finite, but it is {noise_std}")
        self.register_buffer("noise_std", value)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that are not finite floats, or do not match the noise's columns."""
        require_float_outputs(outputs, "a Gaussian likelihood")
        require_finite_outputs(outputs)
        if self.noise_std.numel() > 1 and (outputs.ndim != 2 or outputs.shape[1] != self.noise_std.numel()):
            raise InputError(
                f"noise_std has {self.noise_std.numel()} entries, but the model's outputs are {tuple(outputs.shape)}; "
                f"give one number for all, or one for each column"
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse targets that are not finite floats of the outputs' shape."""
        self.check_outputs(outputs)
        self.check_targets(outputs, targets)
        require_matching(outputs, targets)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are not finite floats."""
        del outputs
        require_float_targets(targets, "a Gaussian likelihood")

    match = staticmethod(match)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ over outputs of −½ log 2π − log s − (y − f)² / (2 s²)."""
        outputs = at_least_float32(self.match(outputs, targets))
        noise = self._noise(outputs)
        terms = -0.5 * ((targets - outputs) / noise).square() - noise.log() - 0.5 * LOG_TWO_PI
        return per_example(terms)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Output plus noise."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        return outputs.detach() + self._noise(outputs) * noise

    def estimate(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor | None:
        """The mean squared residual, for each column where the noise is one for each; None where it is given."""
        if not self.learned:
            return None
        residual = (targets - self.match(outputs, targets)).double()
        several = residual.ndim == 2 and residual.shape[1] > 1
        per_column = several and (self.noise_std.ndim > 0 or bool(self.noise_std.isnan()))
        square = residual.square()
        if weights is None:
            square = square.mean(dim=0) if per_column else square.mean()
        else:
            # Weights of mean 1, one for each row.
            factors = (weights / weights.mean()).to(square).reshape(-1, *[1] * (square.ndim - 1))
            square = (factors * square).mean(dim=0) if per_column else (factors * square).mean()
        # A perfect fit would make the density unbounded.
        return square.clamp_min(1e-12 * targets.double().var(correction=0).clamp_min(1e-12))

    def move(self, estimate: Tensor | None, weight: float) -> None:
        """Exponential average of the squared residuals; the first estimate is taken whole where no noise was given."""
        if estimate is None:
            return
        unknown = bool(self.noise_std.isnan().any())
        self.noise_std = (
            estimate.sqrt() if unknown else ((1 - weight) * self.noise_std.square() + weight * estimate).sqrt()
        )

    def config(self) -> dict[str, Any]:
        """The noise as it is now, and whether it was learned."""
        noise = None if bool(self.noise_std.isnan().any()) else self.noise_std.tolist()
        return {"noise_std": noise, "learned": self.learned}

    def _noise(self, outputs: Tensor) -> Tensor:
        # One noise for (B,) outputs that were squeezed from (B, 1).
        noise = self.noise_std.to(outputs)
        return noise.squeeze() if noise.numel() == 1 else noise


def require_float_targets(targets: Tensor, what: str) -> None:
    """Refuse targets that are not finite floats.

    Raises:
        InputError: They are not.
    """
    if not targets.is_floating_point():
        raise InputError(f"{what} needs float targets, but they are {targets.dtype}; use .float()")
    if not bool(torch.isfinite(targets).all()):
        raise InputError("targets hold NaN or infinite values; drop those examples")
