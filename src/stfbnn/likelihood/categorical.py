"""Classes: p(k | output) = softmax(output)_k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stfbnn.errors import InputError
from stfbnn.likelihood.base import (
    Likelihood,
    as_factors,
    at_least_float32,
    normalised,
    per_example,
    positive_numbers,
    require_finite_outputs,
)

# Fewer rows of logits than these could be non-negative and sum to 1 by chance.
ROWS_TO_JUDGE = 4


class Categorical(Likelihood):
    """Classes 0 … K−1, one for an example, or one for each of its positions (dense predictions: pixels, tokens).

    The class dimension of the outputs is 1, as PyTorch's cross entropy has it: (B, K), or (B, K, …) with targets (B, …). For
    heads that give (B, …, K), such as token classifiers, say ``class_dim=-1``. Predictions have the classes at dimension 1 in
    either case. Given the weights the positions are independent, so an example's log-probability is the sum over them.

    Args:
        outputs: "logits" (log-probabilities are logits too), or "probabilities" for a network that ends in a softmax.
        ignore_index: Targets with this value are left out: they count in no objective, log density, score or figure (PyTorch's
            convention is -100, and 255 is common for images). An example whose positions are all left out has log-probability
            0. It may be one of the classes; the network's probability of that class stays as it is.
        class_weights: w_k > 0, one for each class: inference then maximises Σ w_y log p(y | x), as
            ``torch.nn.functional.cross_entropy(weight=…, reduction="sum")`` minimises its negative. That is a change of the
            objective alone: probabilities stay those of the draws, and log densities and held-out scores are not weighted.
        class_dim: Where the network has the classes: 1, or -1 for the last dimension.
    """

    name: ClassVar[str] = "categorical"
    has_logits: ClassVar[bool] = True

    def __init__(
        self,
        outputs: Literal["logits", "probabilities"] = "logits",
        *,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        class_dim: Literal[1, -1] = 1,
    ) -> None:
        super().__init__()
        if outputs not in ("logits", "probabilities"):
            raise InputError(f'outputs must be "logits" or "probabilities", but it is {outputs!r}')
        if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
            raise InputError(f"ignore_index must be an integer, such as -100, or None, but it is {ignore_index!r}")
        if isinstance(class_dim, bool) or class_dim not in (1, -1):
            raise InputError(f"class_dim must be 1, or -1 for the last dimension, but it is {class_dim!r}")
        self.outputs, self.ignore_index, self.class_dim = outputs, ignore_index, class_dim
        self.class_weights = None if class_weights is None else positive_numbers(class_weights, "class_weights")

    def canonical(self, outputs: Tensor) -> Tensor:
        """The outputs with the classes at dimension 1."""
        return outputs if self.class_dim == 1 else outputs.movedim(-1, 1)

    def log_probs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(k | output) for every class, (B, K, …), the logits divided by ``temperature``."""
        outputs = self.canonical(outputs)
        logits = outputs if self.outputs == "logits" else outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
        return F.log_softmax(logits / temperature, dim=1)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that cannot be class scores.

        Raises:
            InputError: They have no class dimension, are not finite, do not sum to 1 though they were said to, or have another
                number of classes than ``class_weights``.
        """
        if outputs.ndim < 2 or outputs.shape[self.class_dim] < 2 or not outputs.is_floating_point():
            raise InputError(
                f"a categorical likelihood needs float outputs {self._form} with at least 2 classes, but the model "
                f'gives {tuple(outputs.shape)} of {outputs.dtype}; for numbers to predict use likelihood="gaussian", '
                f'for counts "poisson", for labels that are 0 or 1 "bernoulli"'
            )
        require_finite_outputs(outputs)
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[self.class_dim]:
            raise InputError(
                f"class_weights has {len(self.class_weights)} numbers, but the model has {outputs.shape[self.class_dim]} "
                f"classes (its outputs are {tuple(outputs.shape)}, taken as {self._form})"
            )
        if self.outputs == "probabilities" and not normalised(self.canonical(outputs)):
            raise InputError(
                'outputs="probabilities" was said, but the model\'s outputs do not sum to 1 over the classes'
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse probabilities in place of logits, and targets that are not class indices of the outputs."""
        self.check_outputs(outputs)
        if self.outputs == "logits" and len(outputs) >= ROWS_TO_JUDGE and normalised(self.canonical(outputs)):
            raise InputError(
                "the model's outputs are non-negative and sum to 1: they look like probabilities, not logits; remove the "
                'final softmax, or say likelihood=stfbnn.Categorical(outputs="probabilities")'
            )
        self._check_shape(outputs, targets)
        self.check_targets(outputs, targets)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are neither integers in [0, K) nor ``ignore_index``."""
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(f"class targets must be integers, but they are {targets.dtype}; convert them with .long()")
        known = targets if self.ignore_index is None else targets[targets != self.ignore_index]
        if known.numel() == 0:
            return
        low, high = int(known.min()), int(known.max())
        classes = outputs.shape[self.class_dim]
        if low < 0 or high >= classes:
            raise InputError(
                f"class targets must lie in 0 … {classes - 1} (the model has {classes} outputs), but they span {low} … "
                f"{high}; if one value marks labels to leave out, say likelihood=stfbnn.Categorical(ignore_index=…)"
            )

    def label_weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each position's class, 0 where the target is ``ignore_index``; None where all count 1."""
        if self.class_weights is None and self.ignore_index is None:
            return None
        counted = self._counted(targets)
        if self.class_weights is None:
            return counted.float()
        weights = as_factors(self.class_weights, targets.device)
        return weights[torch.where(counted, targets, 0).long()] * counted

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of w_y log p(y) over an example's positions (one for a plain classifier)."""
        outputs = at_least_float32(outputs)
        weights = self.label_weights(targets)
        if weights is not None:
            return per_example(weights.to(outputs) * self.label_log_probs(outputs, targets))
        if self.outputs == "logits":
            losses = F.cross_entropy(self.canonical(outputs), targets.long(), reduction="none")
        else:
            losses = F.nll_loss(self.log_probs(outputs), targets.long(), reduction="none")
        return -per_example(losses)

    def label_log_probs(self, outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of the class at each position, (B, …); 0 where the target is ``ignore_index``."""
        return picked(self.log_probs(outputs, temperature), targets, self.ignore_index)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """By the inverse of the cumulative distribution."""
        cumulative = self.log_probs(outputs.detach()).double().exp().cumsum(dim=1)
        uniform = torch.rand(cumulative[:, :1].shape, generator=generator, dtype=torch.float64).to(outputs.device)
        return (cumulative < uniform * cumulative[:, -1:]).sum(dim=1).clamp_max(cumulative.shape[1] - 1)

    def curvature_log_prob(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """log p of labels drawn from the model, times the root of what the observed ones count, summed over positions."""
        weights = self.label_weights(targets)
        if weights is None:
            return super().curvature_log_prob(outputs, targets, generator)
        labels = self.curvature_targets(outputs.detach(), targets, generator)
        # A label that is drawn counts, whatever its value.
        terms = picked(self.log_probs(at_least_float32(outputs)), labels, None)
        return per_example(weights.sqrt().to(terms) * terms)

    def config(self) -> dict[str, Any]:
        """``outputs``, and what else is not as by default."""
        settings: dict[str, Any] = {"outputs": self.outputs}
        if self.ignore_index is not None:
            settings["ignore_index"] = self.ignore_index
        if self.class_weights is not None:
            settings["class_weights"] = list(self.class_weights)
        if self.class_dim != 1:
            settings["class_dim"] = self.class_dim
        return settings

    @property
    def _form(self) -> str:
        return "(batch, classes, …)" if self.class_dim == 1 else "(batch, …, classes)"

    def _counted(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool) if self.ignore_index is None else targets != self.ignore_index

    def _check_shape(self, outputs: Tensor, targets: Tensor) -> None:
        found, expected = tuple(targets.shape), (*outputs.shape[:1], *self.canonical(outputs).shape[2:])
        if found == (*expected, 1):
            raise InputError(f"targets have the shape {found}; remove the last dimension with .squeeze(-1)")
        if found == expected:
            return
        other = (*outputs.shape[:1], *outputs.shape[2:]) if self.class_dim == -1 else outputs.shape[:-1]
        if outputs.ndim > 2 and found == tuple(other):
            raise InputError(
                f"for outputs {tuple(outputs.shape)}, taken as {self._form}, targets must have the shape {expected}, but "
                f"theirs is {found}: the network seems to have its classes in the other place, so say "
                f"likelihood=stfbnn.Categorical(class_dim={-self.class_dim})"
            )
        raise InputError(
            f"targets must be class indices of shape {expected} for outputs {tuple(outputs.shape)}, but their shape "
            f"is {found}; turn one-hot targets into indices with argmax"
        )


def picked(log_probs: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Each position's entry of ``log_probs`` (B, K, …) at the target's class, (B, …); 0 where that is ``ignore_index``."""
    if ignore_index is None:
        return log_probs.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    left_out = targets == ignore_index
    found = log_probs.gather(1, torch.where(left_out, 0, targets).long().unsqueeze(1)).squeeze(1)
    return torch.where(left_out, 0.0, found)
