"""The prior p(w) over the first layer's parameters: a Gaussian of independent weights, at zero or at the trained weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.provenance import Provenance

if TYPE_CHECKING:
    # The posteriors know the prior, so their package cannot be imported from here.
    from stfbnn.posterior.layout import ParameterLayout


class GaussianPrior(nn.Module):
    """p(w) = ∏ N(w_i; m_i, s_i²), with one s for all weights, or one for each of the layer's parameters.

    Args:
        mean: m, shape (d,).
        std: The scales: a scalar, or (G,) with ``groups``.
        learned: Whether inference updates them by empirical Bayes.
        groups: The sizes of the G consecutive groups of weights that share a scale; None for one scale for all.

    Attributes:
        mean: m, shape (d,).
        std: s, a scalar where all weights share it, else (d,); to be broadcast against (d,).
        learned: As given.
        groups: As given.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, learned: bool = False, groups: Sequence[int] | None = None) -> None:
        super().__init__()
        self.learned = learned
        self.groups = None if groups is None else tuple(groups)
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", self._spread(std.detach()).clone())

    @property
    def scales(self) -> Tensor:
        """The scales, shape (G,): one for each group, a single one where all weights share it."""
        if self.groups is None:
            return self.std.reshape(1)
        return torch.stack([part[0] for part in torch.split(self.std, list(self.groups))])

    @torch.no_grad()
    def set_scales(self, scales: Tensor) -> None:
        """Take scales (G,)."""
        self.std.copy_(self._spread(scales.reshape(()) if self.groups is None else scales))

    def log_prob(self, weights: Tensor) -> Tensor:
        """log p(w) in nats at weights (..., d), shape (...); differentiable in them."""
        standard = (weights - self.mean) / self.std
        return -(0.5 * standard.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def update(self, mean: Tensor, std: Tensor) -> None:
        """Set each scale to the value that maximises the evidence lower bound: s² = mean(σ² + (μ − m)²) over its weights.

        KL(q‖p) depends on s through Σ log s + (σ² + (μ − m)²)/(2 s²) alone, whatever the correlations of q, and this is
        where it is least.

        Args:
            mean: The posterior's means μ, shape (d,).
            std: The posterior's marginal standard deviations σ, shape (d,).
        """
        second_moment = std.double().square() + (mean - self.mean).double().square()
        parts = torch.split(second_moment, list(self.groups or [len(second_moment)]))
        self.set_scales(torch.stack([part.mean() for part in parts]).sqrt())

    def _spread(self, scales: Tensor) -> Tensor:
        """Scales (G,) as one number a weight, (d,)."""
        if self.groups is None:
            return scales
        return torch.repeat_interleave(scales, torch.tensor(self.groups, device=scales.device))


@dataclass(frozen=True)
class ScaleChoice:
    """How a recipe's scale was picked by data, as `suggest_prior` notes it.

    Attributes:
        seen: The examples that the pick depends on; None where that is not known.
        candidates: Among how many scales.
    """

    seen: Provenance | None
    candidates: int


@dataclass(frozen=True)
class Normal:
    """Recipe for a Gaussian prior.

    Attributes:
        std: Its standard deviation s: a number; "rms", the root mean square of all the layer's trained weights;
            "rms-per-parameter", that of each of the layer's parameters ("weight", "bias") for itself; or a mapping with a
            number for each parameter, such as ``{"weight": 0.1, "bias": 1.0}``.
        center: "zero", or "pretrained" for the trained weights.
        learned: Learn s by empirical Bayes, starting from ``std``: one s for all weights, or one for each parameter where
            ``std`` has one for each. Only for a prior centred on zero (centred on the trained weights the evidence peaks at
            s = 0, and the posterior collapses).
        choice: How data picked the scale, where `suggest_prior` did; no part of ``config`` and of comparisons.

    Raises:
        InputError: A setting is not one of these, or a scale is not positive and finite.
    """

    std: float | Literal["rms", "rms-per-parameter"] | Mapping[str, float] = "rms"
    center: Literal["zero", "pretrained"] = "zero"
    learned: bool = False
    choice: ScaleChoice | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.choice is not None and not isinstance(self.choice, ScaleChoice):
            raise InputError(
                f"the prior's choice is what suggest_prior notes, but it is a {type(self.choice).__name__}"
            )
        if isinstance(self.std, Mapping):
            if not self.std:
                raise InputError(
                    "the prior's std is an empty mapping; give one number for each of the layer's parameters"
                )
            for name, scale in self.std.items():
                _require_scale(scale, f"the prior's std of {name!r} must be positive and finite")
            # A copy that nobody else can change.
            object.__setattr__(self, "std", {name: float(scale) for name, scale in self.std.items()})
        elif self.std not in ("rms", "rms-per-parameter"):
            _require_scale(
                self.std,
                'the prior\'s std must be positive and finite, "rms", "rms-per-parameter", or a mapping from the layer\'s '
                "parameters to numbers",
            )
        if self.center not in ("zero", "pretrained"):
            raise InputError(f'the prior\'s center must be "zero" or "pretrained", but it is {self.center!r}')
        if self.learned and self.center == "pretrained":
            raise InputError(
                "a prior centred on the trained weights cannot learn its scale: the evidence peaks at scale 0 and the "
                'posterior collapses; use prior="empirical-bayes" (centred on zero) or a fixed scale'
            )

    @property
    def per_parameter(self) -> bool:
        """Whether each of the layer's parameters has a scale of its own."""
        return self.std == "rms-per-parameter" or isinstance(self.std, Mapping)

    def build(self, weights: Tensor, layout: ParameterLayout) -> GaussianPrior:
        """Make the prior for a layer.

        Args:
            weights: The layer's trained weights, shape (d,).
            layout: How they are cut into the layer's parameters.

        Raises:
            InputError: ``std`` takes its scale from weights that are all zero, or is a mapping that does not name just the
                layer's parameters.
        """
        mean = weights if self.center == "pretrained" else torch.zeros_like(weights)
        if not self.per_parameter:
            scale = rms(weights, "the layer's weights") if self.std == "rms" else self.std
            return GaussianPrior(mean, weights.new_tensor(scale), self.learned)
        if isinstance(self.std, Mapping):
            _require_names(self.std, layout)
            scales = [self.std[name] for name in layout.names]
        else:
            scales = [rms(part, f"the layer's {name!r}") for name, part in layout.unflatten(weights).items()]
        return GaussianPrior(mean, weights.new_tensor(scales), self.learned, layout.sizes)

    def config(self) -> dict[str, Any]:
        """The recipe as a JSON-able dict."""
        std = dict(self.std) if isinstance(self.std, Mapping) else self.std
        return {"std": std, "center": self.center, "learned": self.learned}


PriorLike = float | str | Mapping[str, float] | Normal

_NAMED = {
    "rms": Normal(),
    "rms-per-parameter": Normal(std="rms-per-parameter"),
    "pretrained": Normal(center="pretrained"),
    "empirical-bayes": Normal(learned=True),
}


def resolve_prior(prior: PriorLike) -> Normal:
    """Turn what ``bayesianize(prior=…)`` was given into a recipe.

    Args:
        prior: A standard deviation, a mapping with one for each of the layer's parameters, one of "rms",
            "rms-per-parameter", "pretrained", "empirical-bayes", or a recipe.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(prior, Normal):
        return prior
    if isinstance(prior, str):
        if prior not in _NAMED:
            raise InputError(f"prior={prior!r} is not known; choose one of {sorted(_NAMED)} or give a number")
        return _NAMED[prior]
    if isinstance(prior, Mapping):
        return Normal(std=prior)
    if isinstance(prior, bool) or not isinstance(prior, int | float):
        raise InputError(f"prior must be a number, a name or stfbnn.Normal(…), but it is a {type(prior).__name__}")
    return Normal(std=float(prior))


def rms(weights: Tensor, what: str) -> float:
    """The root mean square of some trained weights, for a scale.

    Args:
        weights: Of any shape.
        what: What they are, for the message.

    Raises:
        InputError: They are all zero.
    """
    found = float(weights.double().square().mean().sqrt())
    if found == 0:
        raise InputError(
            f"{what} are all zero, so they give no scale; pass the prior's std, a number for each parameter"
        )
    return found


def _require_scale(scale: object, message: str) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise InputError(f"{message}, but it is {scale!r}")


def _require_names(std: Mapping[str, float], layout: ParameterLayout) -> None:
    missing, unknown = (
        [name for name in layout.names if name not in std],
        [name for name in std if name not in layout.names],
    )
    if missing or unknown:
        raise InputError(
            f"the prior's std must name the layer's parameters, which are {list(layout.names)}: missing {missing}, unknown "
            f"{unknown}"
        )
