"""A likelihood of the user's own, from a function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood.base import Likelihood, at_least_float32, require_finite_outputs, require_float_outputs


class CustomLikelihood(Likelihood):
    """log p(y | output) as a function; predictions keep the draws' outputs (`CustomPrediction`).

    A posterior that was inferred with it cannot be saved, for a file holds no code.

    Args:
        log_prob: ``(outputs (B, …), targets (B, …)) -> (B,)``: log p(y_n | output_n) in nats for every example, normalised
            over y (else the temperature and log densities mean nothing), differentiable in the outputs by PyTorch. Example n
            of the result depends on example n alone, for batches are cut into chunks.
        sample: ``(outputs, generator) -> targets``: draws y ~ p(y | output) with a CPU generator. Natural-gradient inference
            measures the curvature at such draws before it starts (the Fisher information); without, at the observed
            targets (the empirical Fisher), which is larger where the network fits badly: inference then starts narrower.
        check: ``(outputs, targets) -> None``: raises `InputError` for data that do not fit, before long work starts.

    Raises:
        InputError: One of them cannot be called.
    """

    name: ClassVar[str] = "custom"

    def __init__(
        self,
        log_prob: Callable[[Tensor, Tensor], Tensor],
        sample: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        check: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        for name, function in (("log_prob", log_prob), ("sample", sample), ("check", check)):
            if not callable(function) and (function is not None or name == "log_prob"):
                raise InputError(f"{name}= must be a function, but it is {function!r}")
        self._log_prob, self._sample, self._check = log_prob, sample, check

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that are not finite floats."""
        require_float_outputs(outputs, "a custom likelihood")
        require_finite_outputs(outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also ask the user's own check, and refuse a ``log_prob`` that gives no finite, differentiable number for each."""
        self.check_outputs(outputs)
        if self._check is not None:
            self._check(outputs, targets)
        with torch.enable_grad():
            given = outputs.detach().clone().requires_grad_()
            values = self.log_prob(given, targets)
        if not values.requires_grad:
            raise InputError(
                "log_prob= is not differentiable in the outputs: compute it with PyTorch, without .detach()"
            )
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                "log_prob= gives NaN or infinite values for the trained network on this batch; check the targets, or keep "
                "the density positive"
            )

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the user's function says, (B,).

        Raises:
            InputError: It does not return a float tensor of shape (B,).
        """
        values: Any = self._log_prob(at_least_float32(outputs), targets)
        if not isinstance(values, Tensor) or values.shape != outputs.shape[:1] or not values.is_floating_point():
            found = f"{tuple(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"log_prob= must return one float for each of the {len(outputs)} examples, a tensor of shape "
                f"({len(outputs)},), but it returned {found}; sum over an example's positions, not over examples"
            )
        return values

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """What the user's function draws.

        Raises:
            InputError: None was given.
        """
        if self._sample is None:
            raise InputError("this likelihood cannot draw targets: give CustomLikelihood a sample= function")
        return self._sample(outputs.detach(), generator).to(outputs.device)

    def curvature_targets(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Draws from the model, or without ``sample=`` the observed targets, which makes it the empirical Fisher."""
        return targets if self._sample is None else self.sample(outputs, generator)

    def config(self) -> dict[str, Any]:
        """The functions' names, which tell one from another but cannot build them again."""
        functions = {"log_prob": self._log_prob, "sample": self._sample, "check": self._check}
        return {name: None if function is None else _name(function) for name, function in functions.items()}

    def rebuilt(self, config: dict[str, Any]) -> CustomLikelihood:
        """The same: it has no state."""
        del config
        return copy.deepcopy(self)


def _name(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
