"""Counts: y ~ Poisson(exp(output))."""

from __future__ import annotations

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

# A trained network that expects e³⁰ ≈ 10¹³ counts gives rates, not their logarithms.
_MOST_LOG_RATE = 30.0


class Poisson(Likelihood):
    """Counts 0, 1, 2, …; outputs (B,), (B, 1) or (B, K, …) are the logarithms of the rates, independent per output."""

    name: ClassVar[str] = "poisson"

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that are not finite floats."""
        require_float_outputs(outputs, "a Poisson likelihood")
        require_finite_outputs(outputs)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are not counts; they may be integers or floats."""
        del outputs
        if targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(f"a Poisson likelihood needs counts, but the targets are {targets.dtype}")
        if targets.is_floating_point() and not bool((torch.isfinite(targets) & (targets == targets.round())).all()):
            raise InputError(
                "a Poisson likelihood needs whole numbers, but some targets are not (or are NaN or infinite); for other "
                'numbers use likelihood="gaussian"'
            )
        if bool((targets < 0).any()):
            raise InputError(f"counts cannot be negative, but the smallest target is {targets.min().item()}")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse targets that are not counts of the outputs' shape, and outputs that are too large for log-rates."""
        self.check_outputs(outputs)
        if bool((outputs > _MOST_LOG_RATE).any()):
            raise InputError(
                f"the model's largest output is {float(outputs.max()):.4g}, and a Poisson likelihood takes outputs as the "
                f"logarithms of the rates; if they are rates, take their logarithm with output= of bayesianize"
            )
        require_matching(outputs, targets)
        self.check_targets(outputs, targets)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ over outputs of y η − exp(η) − log Γ(y + 1), η being the output."""
        log_rate = match(at_least_float32(outputs), targets)
        counts = targets.to(log_rate)
        return per_example(counts * log_rate - log_rate.exp() - torch.lgamma(counts + 1))

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Counts, in the outputs' dtype."""
        rates = outputs.detach().cpu().double().exp()
        return torch.poisson(rates, generator=generator).to(outputs)

    def config(self) -> dict[str, Any]:
        """Nothing to configure."""
        return {}
