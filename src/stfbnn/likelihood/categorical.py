"""Classes: p(k | output) = softmax(output)_k."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stfbnn.errors import InputError
from stfbnn.likelihood.base import (
    Likelihood,
    at_least_float32,
    normalised,
    per_example,
    require_finite_outputs,
)

# Fewer rows of logits than these could be non-negative and sum to 1 by chance.
ROWS_TO_JUDGE = 4


class Categorical(Likelihood):
    """Classes 0 … K−1; the class dimension of the outputs is 1, so (B, K), or (B, K, …) for dense predictions.

    Args:
        outputs: "logits" (log-probabilities are logits too), or "probabilities" for a network that ends in a softmax.
    """

    name: ClassVar[str] = "categorical"
    has_logits: ClassVar[bool] = True

    def __init__(self, outputs: Literal["logits", "probabilities"] = "logits") -> None:
        super().__init__()
        if outputs not in ("logits", "probabilities"):
            raise InputError(f'outputs must be "logits" or "probabilities", but it is {outputs!r}')
        self.outputs = outputs

    def log_probs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(k | output) for every class, the logits divided by ``temperature``; shape of ``outputs``."""
        logits = outputs if self.outputs == "logits" else outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
        return F.log_softmax(logits / temperature, dim=1)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that cannot be class scores.

        Raises:
            InputError: They have no class dimension, are not finite, or do not sum to 1 though they were said to.
        """
        if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.is_floating_point():
            raise InputError(
                f"a categorical likelihood needs float outputs (batch, classes, …) with at least 2 classes, but the model "
                f'gives {tuple(outputs.shape)} of {outputs.dtype}; for numbers to predict use likelihood="gaussian", '
                f'for counts "poisson", for labels that are 0 or 1 "bernoulli"'
            )
        require_finite_outputs(outputs)
        if self.outputs == "probabilities" and not normalised(outputs):
            raise InputError(
                'outputs="probabilities" was said, but the model\'s outputs do not sum to 1 over the classes'
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse probabilities in place of logits, and targets that are not class indices of the outputs."""
        self.check_outputs(outputs)
        if self.outputs == "logits" and len(outputs) >= ROWS_TO_JUDGE and normalised(outputs):
            raise InputError(
                "the model's outputs are non-negative and sum to 1: they look like probabilities, not logits; remove the "
                'final softmax, or say likelihood=stfbnn.Categorical(outputs="probabilities")'
            )
        expected = (outputs.shape[0], *outputs.shape[2:])
        if tuple(targets.shape) == (*expected, 1):
            raise InputError(
                f"targets have the shape {tuple(targets.shape)}; remove the last dimension with .squeeze(-1)"
            )
        if tuple(targets.shape) != expected:
            raise InputError(
                f"targets must be class indices of shape {expected} for outputs {tuple(outputs.shape)}, but their shape "
                f"is {tuple(targets.shape)}; turn one-hot targets into indices with argmax"
            )
        self.check_targets(outputs, targets)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are not integers in [0, K)."""
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(f"class targets must be integers, but they are {targets.dtype}; convert them with .long()")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise InputError(
                f"class targets must lie in 0 … {outputs.shape[1] - 1} (the model has {outputs.shape[1]} outputs), but "
                f"they span {low} … {high}"
            )

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of log p over an example's positions (one for a plain classifier)."""
        outputs = at_least_float32(outputs)
        if self.outputs == "logits":
            losses = F.cross_entropy(outputs, targets.long(), reduction="none")
        else:
            losses = F.nll_loss(self.log_probs(outputs), targets.long(), reduction="none")
        return -per_example(losses)

    def label_log_probs(self, outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of the class at each position, (B, …)."""
        return self.log_probs(outputs, temperature).gather(1, targets.long().unsqueeze(1)).squeeze(1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """By the inverse of the cumulative distribution."""
        cumulative = self.log_probs(outputs.detach()).double().exp().cumsum(dim=1)
        uniform = torch.rand(cumulative[:, :1].shape, generator=generator, dtype=torch.float64).to(outputs.device)
        return (cumulative < uniform * cumulative[:, -1:]).sum(dim=1).clamp_max(outputs.shape[1] - 1)

    def config(self) -> dict[str, Any]:
        """``outputs``."""
        return {"outputs": self.outputs}
