"""What a stage of training minimises and how it steps: loss, optimizer and learning-rate schedule, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from stfbnn.errors import InputError
from stfbnn.likelihood import Categorical, Gaussian

OptimizerChoice: TypeAlias = Literal["sgd", "adam", "adamw"] | Callable[[list[nn.Parameter]], Optimizer]
ScheduleChoice: TypeAlias = Literal["cosine", "constant"] | Callable[[float], float]
LossChoice: TypeAlias = Literal["auto"] | Callable[..., Tensor]

_DEFAULT_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}


def build_optimizer(
    choice: OptimizerChoice,
    parameters: list[nn.Parameter],
    lr: float | None,
    weight_decay: float | None,
    momentum: float | None,
) -> Optimizer:
    """Build the optimizer of a stage.

    Args:
        choice: A name, or a function of the parameters that returns an optimizer with its own settings.
        parameters: The trainable parameters.
        lr: Learning rate; None is 0.05 for "sgd" and 0.001 for "adam" and "adamw".
        weight_decay: None is 0; for "adam" and "sgd" an L2 penalty's factor, for "adamw" decoupled.
        momentum: For "sgd" alone; None is 0.9.

    Raises:
        InputError: The name is unknown, a number is out of range, or a setting does not belong to the choice.
    """
    if callable(choice):
        given = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise InputError(f"optimizer is a function, so {', '.join(extra)} must be set inside it, not beside it")
        built = choice(parameters)
        if not isinstance(built, Optimizer):
            raise InputError(f"optimizer= returned a {type(built).__name__} instead of a torch.optim.Optimizer")
        return built
    if choice not in _DEFAULT_RATES:
        raise InputError(f'optimizer must be "sgd", "adam", "adamw" or a function of the parameters, not {choice!r}')
    rate = _DEFAULT_RATES[choice] if lr is None else lr
    decay = 0.0 if weight_decay is None else weight_decay
    if not (math.isfinite(rate) and rate > 0 and math.isfinite(decay) and decay >= 0):
        raise InputError(f"lr must be positive and weight_decay not negative, but they are {rate} and {decay}")
    if choice == "sgd":
        inertia = 0.9 if momentum is None else momentum
        if not 0 <= inertia < 1:
            raise InputError(f"momentum must be in [0, 1), but it is {inertia}")
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=inertia)
    if momentum is not None:
        raise InputError(f'momentum belongs to optimizer="sgd"; leave it out for {choice!r}')
    return (torch.optim.Adam if choice == "adam" else torch.optim.AdamW)(parameters, lr=rate, weight_decay=decay)


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate as a function of how much of the run is done, so that it has no state.

    Attributes:
        choice: "constant" (1), "cosine" (½(1 + cos πp) over what follows the warm-up; Loshchilov and Hutter 2017), or
            a function of the fraction of the run in [0, 1].
        warmup: Fraction of the run over which the factor rises linearly to the schedule's start.

    Raises:
        InputError: The name is unknown or ``warmup`` is not in [0, 1).
    """

    choice: ScheduleChoice = "cosine"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.choice) and self.choice not in ("cosine", "constant"):
            raise InputError(
                f'schedule must be "cosine", "constant" or a function of the fraction of the run, not {self.choice!r}'
            )
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup must be a fraction of the run in [0, 1), but it is {self.warmup}")

    def factor(self, fraction: float) -> float:
        """The factor at ``fraction`` of the run.

        Raises:
            InputError: The user's function gave a negative or non-finite number.
        """
        fraction = min(max(fraction, 0.0), 1.0)
        rise = min(1.0, fraction / self.warmup) if self.warmup > 0 else 1.0
        if callable(self.choice):
            value = float(self.choice(fraction))
            if not (math.isfinite(value) and value >= 0):
                raise InputError(
                    f"schedule= gave {value} at {fraction:.3f} of the run; give a finite factor of at least 0"
                )
            return rise * value
        if self.choice == "constant":
            return rise
        after = max(0.0, fraction - self.warmup) / (1.0 - self.warmup)
        return rise * 0.5 * (1.0 + math.cos(math.pi * after))


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, a mean over its examples, with the shapes of outputs and target made to agree first.

    Attributes:
        choice: "auto" is cross entropy for integer targets and the mean squared error for float targets, each example times
            its weight and the sum divided by their number; or a function of (outputs, target), and of the weights (B,) as
            the third where a batch has any, that returns a scalar tensor, the mean over the batch.
        label_smoothing: For the cross entropy, in [0, 1).

    Raises:
        InputError: The name is unknown, or the smoothing is out of range or stands beside a function.
    """

    choice: LossChoice = "auto"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.choice) and self.choice != "auto":
            raise InputError(f'loss must be "auto" or a function of (outputs, target), not {self.choice!r}')
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), but it is {self.label_smoothing}")
        if callable(self.choice) and self.label_smoothing > 0:
            raise InputError(
                "label_smoothing belongs to the cross entropy of loss='auto'; apply it inside your function"
            )

    def check(self, outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Refuse a first batch that cannot be trained on; stricter, and slower, than what every batch is put through.

        Raises:
            InputError: Shapes, dtypes, ranges or values are wrong, or the outputs are probabilities already.
        """
        if callable(self.choice):
            self(outputs, target, weight)
        elif _is_class_target(target):
            Categorical().check(outputs, _as_classes(outputs, target).to(outputs.device))
        elif self.label_smoothing > 0:
            raise InputError("label_smoothing belongs to integer targets, but these are float")
        else:
            Gaussian().check(outputs, _require_float(target).to(outputs.device))

    def __call__(self, outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss, a scalar on the outputs' device.

        Args:
            outputs: (B, K, …) for integer targets; the target's shape for float ones.
            target: (B, …) or (B, 1); best on the CPU still, where looking at its range is free.
            weight: What each example counts, (B,); None where all count 1.

        Raises:
            InputError: The shapes do not agree, a label is outside 0 … K−1, or a function gave no scalar.
        """
        if callable(self.choice):
            loss: Any = self._own(outputs, target, weight)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(f"loss= must return a scalar tensor, the mean over the batch, but it returned {found}")
            return loss
        if _is_class_target(target):
            classes = _as_classes(outputs, target)
            Categorical().check_targets(outputs, classes)
            labels, kind = classes.long().to(outputs.device), "mean" if weight is None else "none"
            return _mean(F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing, reduction=kind), weight)
        matched = Gaussian.match(outputs, _require_float(target))
        if matched.shape != target.shape:
            raise InputError(
                f"targets must have the outputs' shape {tuple(outputs.shape)}, but theirs is {tuple(target.shape)}"
            )
        return _mean(F.mse_loss(matched, target.to(outputs), reduction="mean" if weight is None else "none"), weight)

    def _own(self, outputs: Tensor, target: Tensor, weight: Tensor | None) -> Any:
        """What the user's function says."""
        assert callable(self.choice)  # noqa: S101 - asked before, said for the type checker
        if weight is None:
            return self.choice(outputs, target.to(outputs.device))
        given = (outputs, target.to(outputs.device), weight.to(outputs.device))
        try:
            signature(self.choice).bind(*given)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the batches have weights, so loss= must be a function of (outputs, target, weight), but {error}; leave the "
                f"weights out of the batches if they are not meant for stage one"
            ) from error
        return self.choice(*given)

    @staticmethod
    def correct(outputs: Tensor, target: Tensor) -> tuple[int, int] | None:
        """How many classes are predicted right, and of how many; None where the target is no class."""
        if not _is_class_target(target) or outputs.ndim < 2 or outputs.shape[1] < 2:
            return None
        classes = target.squeeze(1) if target.ndim == outputs.ndim and target.shape[1] == 1 else target
        predicted = outputs.detach().argmax(dim=1)
        if predicted.shape != classes.shape:
            return None
        # A function may leave labels out that are no classes, such as -100.
        classes = classes.to(outputs.device)
        counted = (classes >= 0) & (classes < outputs.shape[1])
        return int((predicted == classes)[counted].sum()), int(counted.sum())


def _mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """The mean over examples of each one's mean loss times its weight."""
    if weight is None:
        return loss
    each = loss.flatten(1).mean(dim=1) if loss.ndim > 1 else loss
    return (each * weight.to(each)).mean()


def _is_class_target(target: Tensor) -> bool:
    return not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)


def _as_classes(outputs: Tensor, target: Tensor) -> Tensor:
    """Class indices in the shape that the outputs ask for; (B, 1, …) becomes (B, …)."""
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise InputError(
            f"the targets are integers, so the outputs must be (batch, classes, …) with at least 2 classes, but they "
            f"are {tuple(outputs.shape)}; for one output give float targets, and for two classes with one logit also "
            f"loss=torch.nn.functional.binary_cross_entropy_with_logits"
        )
    classes = target.squeeze(1) if target.ndim == outputs.ndim and target.shape[1] == 1 else target
    expected = (outputs.shape[0], *outputs.shape[2:])
    if tuple(classes.shape) != expected:
        raise InputError(
            f"targets must be class indices of shape {expected} for outputs {tuple(outputs.shape)}, but their shape is "
            f"{tuple(target.shape)}; turn one-hot targets into indices with argmax"
        )
    return classes


def _require_float(target: Tensor) -> Tensor:
    if not target.is_floating_point():
        raise InputError(f"targets must be integers (classes) or floats, but they are {target.dtype}; convert them")
    return target
