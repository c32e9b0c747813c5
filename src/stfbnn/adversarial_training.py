"""Adversarial training of stage one: every batch is attacked before the network learns from it (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.batches import OutputFunction, call_model, output_tensor
from stfbnn.errors import InputError
from stfbnn.threat import InputSpace, Threat


@dataclass(frozen=True)
class AdversarialTraining:
    """Projected gradient ascent on the loss of each batch, from a random start.

    The attack sees the network in evaluation mode, so that batch norm's statistics are those of the examples that are learned
    from and dropout does not hide the gradient. It takes ``steps`` further passes forward and backward a batch: training takes
    about 1 + steps times as long.

    Attributes:
        threat: How far an input may be moved, in the units of ``space``.
        steps: Of the ascent.
        step_size: Of one step, in units of ε.
        space: Where inputs live, and how the loader normalised them.

    Raises:
        InputError: ``steps`` or ``step_size`` is not positive.
    """

    threat: Threat
    steps: int = 7
    step_size: float = 0.25
    space: InputSpace = field(default_factory=InputSpace)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be a positive integer, but it is {self.steps!r}")
        if not 0 < self.step_size < float("inf"):
            raise InputError(f"step_size must be positive, in units of epsilon, but it is {self.step_size!r}")

    def describe(self) -> dict[str, Any]:
        """All settings, fit for JSON."""
        return asdict(self)

    def check(self, inputs: Any) -> None:
        """Refuse inputs that cannot be attacked.

        Raises:
            InputError: They are not one tensor of floats, or, taken back to the input space, do not lie in it.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise InputError(
                "adversarial training needs batches whose inputs are one tensor of floats, but they are "
                f"{inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__}"
            )
        self.space.check(self.space.from_network(inputs))

    def attack(
        self,
        model: nn.Module,
        inputs: Tensor,
        loss: Callable[[Tensor], Tensor],
        output: OutputFunction | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Inputs that raise the loss, normalised as those given.

        Args:
            model: The network; its modes are put back.
            inputs: (B, …), normalised, on the network's device.
            loss: From the network's outputs to the mean loss of the batch.
            output: How to take the outputs out of what the network returns.
            autocast: The precision of the passes.
        """
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            raw = self.space.from_network(inputs)
            if self.threat.norm == "linf":
                start = torch.empty_like(raw).uniform_(-self.threat.epsilon, self.threat.epsilon)
            else:
                noise = torch.randn_like(raw)
                start = noise * self._per_row(self.threat.epsilon / _lengths(noise), raw)
            moved = self.threat.project(raw + start, raw, self.space)
            for _ in range(self.steps):
                moved.requires_grad_(True)
                with torch.enable_grad():
                    with autocast():
                        outputs = output_tensor(call_model(model, self.space.to_network(moved)), output)
                    (gradient,) = torch.autograd.grad(loss(outputs), moved)
                size = self.step_size * self.threat.epsilon
                with torch.no_grad():
                    if self.threat.norm == "linf":
                        step = size * gradient.sign()
                    else:
                        step = gradient * self._per_row(size / _lengths(gradient), raw)
                    moved = self.threat.project(moved.detach() + step, raw, self.space)
            return self.space.to_network(moved.detach())
        finally:
            for module, mode in modes:
                module.training = mode

    @staticmethod
    def _per_row(values: Tensor, like: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (like.ndim - 1))


def _lengths(values: Tensor) -> Tensor:
    """Euclidean lengths of the rows; of a row of zeros one that keeps it at zero."""
    return values.flatten(1).square().sum(dim=1).sqrt().clamp_min(torch.finfo(values.dtype).tiny)
