"""The likelihood p(y | f(x)): how a network's output becomes a log-probability of the target."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stfbnn.errors import InputError

_LOG_TWO_PI = math.log(2 * math.pi)
# Fewer rows of logits than these could be non-negative and sum to 1 by chance.
_ROWS_TO_JUDGE = 4


class Likelihood(nn.Module, ABC):
    """p(y | output); it may hold a state that inference learns, such as the noise of a regression."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs and targets that do not fit this likelihood.

        Raises:
            InputError: Shapes, dtypes, ranges or values are wrong.
        """

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y_n | output_n) in nats for every example, shape (B,), differentiable in ``outputs``."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets y ~ p(y | output) with a CPU generator; the shape of targets."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, with what was learned; JSON-able."""

    def estimate(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """What these examples say of a state that is learned, averaged over them; None where nothing is learned."""
        del outputs, targets
        return None

    def move(self, estimate: Tensor | None, weight: float) -> None:
        """Move the state that is learned by ``weight`` in (0, 1] towards an estimate; by default nothing."""
        del estimate, weight


class Categorical(Likelihood):
    """Classes 0 … K−1; the class dimension of the outputs is 1, so (B, K), or (B, K, …) for dense predictions.

    Args:
        outputs: "logits" (log-probabilities are logits too), or "probabilities" for a network that ends in a softmax.
    """

    name: ClassVar[str] = "categorical"

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
                f'gives {tuple(outputs.shape)} of {outputs.dtype}; for numbers to predict use likelihood="gaussian"'
            )
        if not bool(torch.isfinite(outputs).all()):
            raise InputError(
                "the model's outputs hold NaN or infinite values on this batch; check its weights and inputs"
            )
        if self.outputs == "probabilities" and not _normalised(outputs):
            raise InputError(
                'outputs="probabilities" was said, but the model\'s outputs do not sum to 1 over the classes'
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse probabilities in place of logits, and targets that are not class indices of the outputs."""
        self.check_outputs(outputs)
        if self.outputs == "logits" and len(outputs) >= _ROWS_TO_JUDGE and _normalised(outputs):
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
        outputs = _at_least_float32(outputs)
        if self.outputs == "logits":
            losses = F.cross_entropy(outputs, targets.long(), reduction="none")
        else:
            losses = F.nll_loss(self.log_probs(outputs), targets.long(), reduction="none")
        return -losses.flatten(1).sum(dim=1) if losses.ndim > 1 else -losses

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """By the inverse of the cumulative distribution."""
        cumulative = self.log_probs(outputs.detach()).double().exp().cumsum(dim=1)
        uniform = torch.rand(cumulative[:, :1].shape, generator=generator, dtype=torch.float64).to(outputs.device)
        return (cumulative < uniform * cumulative[:, -1:]).sum(dim=1).clamp_max(outputs.shape[1] - 1)

    def config(self) -> dict[str, Any]:
        """``outputs``."""
        return {"outputs": self.outputs}


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
        value = torch.tensor(math.nan if noise_std is None else noise_std, dtype=torch.float64)
        if noise_std is not None and not bool((torch.isfinite(value) & (value > 0)).all()):
            raise InputError(f"noise_std must be positive and finite, but it is {noise_std}")
        self.register_buffer("noise_std", value)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that are not finite floats, or do not match the noise's columns."""
        if not outputs.is_floating_point() or outputs.ndim < 1:
            raise InputError(
                f"a Gaussian likelihood needs float outputs of shape (batch, …), but the model gives "
                f"{tuple(outputs.shape)} of {outputs.dtype}"
            )
        if not bool(torch.isfinite(outputs).all()):
            raise InputError(
                "the model's outputs hold NaN or infinite values on this batch; check its weights and inputs"
            )
        if self.noise_std.numel() > 1 and (outputs.ndim != 2 or outputs.shape[1] != self.noise_std.numel()):
            raise InputError(
                f"noise_std has {self.noise_std.numel()} entries, but the model's outputs are {tuple(outputs.shape)}; "
                f"give one number for all, or one for each column"
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse targets that are not finite floats of the outputs' shape."""
        self.check_outputs(outputs)
        if not targets.is_floating_point():
            raise InputError(f"a Gaussian likelihood needs float targets, but they are {targets.dtype}; use .float()")
        if self.match(outputs, targets).shape != targets.shape:
            raise InputError(
                f"targets must have the outputs' shape {tuple(outputs.shape)}, but theirs is {tuple(targets.shape)} (they "
                f"would broadcast to a wrong loss)"
            )
        if not bool(torch.isfinite(targets).all()):
            raise InputError("targets hold NaN or infinite values; drop those examples")

    @staticmethod
    def match(outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs (B, 1) as (B,) where the targets are (B,), and the reverse; otherwise unchanged."""
        if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
            return outputs.squeeze(-1)
        if targets.ndim == outputs.ndim + 1 and targets.shape[-1] == 1:
            return outputs.unsqueeze(-1)
        return outputs

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ over outputs of −½ log 2π − log s − (y − f)² / (2 s²)."""
        outputs = _at_least_float32(self.match(outputs, targets))
        noise = self._noise(outputs)
        terms = -0.5 * ((targets - outputs) / noise).square() - noise.log() - 0.5 * _LOG_TWO_PI
        return terms.flatten(1).sum(dim=1) if terms.ndim > 1 else terms

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Output plus noise."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        return outputs.detach() + self._noise(outputs) * noise

    def estimate(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The mean squared residual, for each column where the noise is one for each; None where it is given."""
        if not self.learned:
            return None
        residual = (targets - self.match(outputs, targets)).double()
        several = residual.ndim == 2 and residual.shape[1] > 1
        per_column = several and (self.noise_std.ndim > 0 or bool(self.noise_std.isnan()))
        square = residual.square().mean(dim=0) if per_column else residual.square().mean()
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


def _normalised(rows: Tensor) -> bool:
    """Whether all rows are non-negative floats that sum to 1 along dimension 1."""
    if not rows.is_floating_point():
        return False
    rows = rows.detach().float()
    return bool((rows >= 0).all()) and bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all())


def _at_least_float32(outputs: Tensor) -> Tensor:
    # Sums of log-probabilities lose too much in half precision.
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


LikelihoodLike = str | Likelihood

_NAMED: dict[str, type[Categorical] | type[Gaussian]] = {"categorical": Categorical, "gaussian": Gaussian}


def resolve_likelihood(likelihood: LikelihoodLike, targets: Tensor) -> Likelihood:
    """Turn what ``fit(likelihood=…)`` was given into a likelihood of its own.

    Args:
        likelihood: "auto" (integer targets: categorical; float: Gaussian with learned noise), a name, or an object,
            which is copied: what inference learns does not change the user's.
        targets: The first batch's targets.

    Raises:
        InputError: The name is unknown or the object is no likelihood.
    """
    if isinstance(likelihood, Likelihood):
        return copy.deepcopy(likelihood)
    if likelihood == "auto":
        if targets.ndim == 2 and targets.shape[1] > 1 and len(targets) >= _ROWS_TO_JUDGE and _normalised(targets):
            raise InputError(
                "the targets are floats that are non-negative and sum to 1: they look like one-hot classes; give class "
                'indices with .argmax(1), or say likelihood="gaussian" if they are numbers to predict'
            )
        return Gaussian() if targets.is_floating_point() else Categorical()
    if not isinstance(likelihood, str) or likelihood not in _NAMED:
        raise InputError(
            f'likelihood={likelihood!r} is not known; choose "auto" or one of {sorted(_NAMED)}, or an object'
        )
    return _NAMED[likelihood]()


def build_likelihood(name: str, config: dict[str, Any]) -> Likelihood:
    """Build a likelihood from its name and `Likelihood.config`."""
    if name not in _NAMED:
        raise InputError(f"likelihood {name!r} is not one of {sorted(_NAMED)}")
    return _NAMED[name](**config)
