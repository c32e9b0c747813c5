"""The mixture q(w) = Σ_k π_k q_k(w): one component for each of the first layer's disparate optima."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stfbnn.errors import ArtifactError, InputError
from stfbnn.posterior.base import Posterior, PosteriorFamily
from stfbnn.posterior.families import COMPONENT_FAMILIES, family_recipe
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.point import PointMassPosterior
from stfbnn.prior import GaussianPrior

# Draws of each component in the estimate of the KL divergence's one part that has no closed form.
_KL_DRAWS = 32
_KL_SEED = 20
_SUM_TOLERANCE = 1e-6

Start = Literal["reinitialize", "perturb"]
Weighting = Literal["held-out", "free-energy", "equal"]


class MixturePosterior(Posterior):
    """K posteriors of one family, with weights.

    Its mean lies between the optima and is in general a poor network: predict with draws.

    Args:
        layout: How w is cut into the layer's parameters.
        components: The K posteriors q_k.
        weights: π_k, shape (K,), positive, summing to 1; None for equal ones.

    Attributes:
        components: The K posteriors.
        weights: π, shape (K,).

    Raises:
        InputError: There is no component, they are mixtures themselves or of several families, or the weights are not a
            distribution over them.
    """

    family: ClassVar[str] = "mixture"
    weights: Tensor

    def __init__(self, layout: ParameterLayout, components: Sequence[Posterior], weights: Tensor | None = None) -> None:
        super().__init__(layout)
        if not components:
            raise InputError("a mixture needs at least one component")
        if len({type(component) for component in components}) > 1 or isinstance(components[0], MixturePosterior):
            raise InputError("the components of a mixture must be of one family that is no mixture itself")
        self.components = nn.ModuleList(components)
        like = components[0].mean_vector()
        chosen = torch.full((len(components),), 1 / len(components)) if weights is None else weights
        self.register_buffer("weights", torch.empty(len(components), dtype=like.dtype, device=like.device))
        self.set_weights(chosen)

    def __len__(self) -> int:
        """K."""
        return len(self.components)

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        """Take mixture weights (K,).

        Raises:
            InputError: They are not positive and finite, or do not sum to 1.
        """
        self.weights.copy_(self._checked(weights))

    def _checked(self, weights: Tensor) -> Tensor:
        if weights.shape != (len(self),) or not bool((torch.isfinite(weights) & (weights > 0)).all()):
            raise InputError(
                f"a mixture of {len(self)} components needs as many positive weights (drop a component that is to have "
                f"none), but they are {weights.tolist()}"
            )
        total = float(weights.double().sum())
        if abs(total - 1) > _SUM_TOLERANCE:
            raise InputError(f"mixture weights must sum to 1, but they sum to {total}")
        return weights.double() / total

    @property
    def is_ensemble(self) -> bool:
        """Whether the components are point masses."""
        return all(isinstance(component, PointMassPosterior) for component in self._parts())

    @property
    def noise_size(self) -> int:
        """One number that chooses the component, and those of the component."""
        return 1 + self._parts()[0].noise_size

    def draw(self, noise: Tensor) -> Tensor:
        """A draw of component k, chosen by Φ(ε₀) against the cumulative weights; differentiable in that component."""
        uniform = torch.special.ndtr(noise[..., :1].to(self.weights.dtype))
        chosen = (uniform >= self.weights.cumsum(0)[:-1]).sum(dim=-1, keepdim=True)
        parts = self._parts()
        drawn = parts[0].draw(noise[..., 1:])
        for index, part in enumerate(parts[1:], start=1):
            drawn = torch.where(chosen == index, part.draw(noise[..., 1:]), drawn)
        return drawn

    def mean_vector(self) -> Tensor:
        """Σ_k π_k μ_k."""
        if len(self) == 1:
            return self._parts()[0].mean_vector()
        return self._average([part.mean_vector() for part in self._parts()])

    def std_vector(self) -> Tensor:
        """By the law of total variance, √(Σ_k π_k (σ_k² + (μ_k − μ)²))."""
        if len(self) == 1:
            return self._parts()[0].std_vector()
        mean = self.mean_vector()
        return self._average(
            [part.std_vector().square() + (part.mean_vector() - mean).square() for part in self._parts()]
        ).sqrt()

    def log_prob(self, weights: Tensor) -> Tensor:
        """log Σ_k π_k q_k(w).

        Raises:
            InputError: The components have no density.
        """
        logs = [log + part.log_prob(weights) for log, part in zip(self._log_weights(), self._parts(), strict=True)]
        return torch.stack(logs).logsumexp(dim=0)

    def kl(self, prior: GaussianPrior) -> Tensor:
        """KL(q‖p) = Σ_k π_k KL(q_k‖p) − J, where J = Σ_k π_k E_{q_k}[log q_k/q] is estimated and the rest is exact.

        J, the information that a draw carries about its component, lies between 0 (all components are one) and the entropy
        of π (they do not overlap). Its estimate takes fixed draws of every component, so the result is a deterministic
        function of q, unbiased over the choice of those draws but for a cut at 0. No term exceeds −log π_k, so where the
        components do not overlap, or where there is only one, there is no error; and the result lies in `kl_bounds`.

        Raises:
            InputError: The components have no density.
        """
        upper = self.kl_bounds(prior)[1]
        return upper if len(self) == 1 else upper - self._information()

    def kl_bounds(self, prior: GaussianPrior) -> tuple[Tensor, Tensor]:
        """Σ_k π_k KL_k − H(π) ≤ KL(q‖p) ≤ Σ_k π_k KL_k: the closed forms between which the divergence lies.

        Raises:
            InputError: The components have no density.
        """
        upper = self._average([part.kl(prior) for part in self._parts()])
        return upper - self.entropy_of_weights().to(upper), upper

    def entropy_of_weights(self) -> Tensor:
        """H(π) in nats; its exponential says how many components count."""
        return -(self.weights * self.weights.log()).sum()

    def covariance(self) -> Tensor:
        """By the law of total covariance, Σ_k π_k (Σ_k + (μ_k − μ)(μ_k − μ)ᵀ).

        Raises:
            InputError: The components keep no covariance, or it would not fit in memory.
        """
        mean = self.mean_vector().detach()
        total: Tensor | None = None
        for weight, part in zip(self.weights, self._parts(), strict=True):
            apart = part.mean_vector().detach() - mean
            one = weight.to(mean) * (part.covariance() + torch.outer(apart, apart))
            total = one if total is None else total + one
        assert total is not None  # noqa: S101 - there is always a component
        return total

    def set_std(self, std: Tensor) -> None:
        """Of every component."""
        for part in self._parts():
            part.set_std(std)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the components' parameters and the weights from what `tensors` gave.

        Raises:
            ArtifactError: A tensor is missing, is one too many, has another shape or dtype, or the weights are no distribution.
        """
        weights = tensors.get("weights")
        if weights is not None and weights.shape == self.weights.shape:
            try:
                self._checked(weights)
            except InputError as error:
                raise ArtifactError(str(error)) from error
        super().load_tensors(tensors)

    def config(self) -> dict[str, Any]:
        """How many components there are, of what family and with what settings."""
        return {
            "components": len(self),
            "family": self._parts()[0].family,
            "family_options": self._parts()[0].config(),
        }

    def _parts(self) -> list[Posterior]:
        # A module list forgets what its entries are.
        return list(self.components)  # type: ignore[arg-type]

    def _log_weights(self) -> Tensor:
        return self.weights.log().to(self._parts()[0].mean_vector())

    def _average(self, values: list[Tensor]) -> Tensor:
        total = self.weights[0].to(values[0]) * values[0]
        for weight, value in zip(self.weights[1:], values[1:], strict=True):
            total = total + weight.to(value) * value
        return total

    def _information(self) -> Tensor:
        parts, logs = self._parts(), self._log_weights()
        random = torch.Generator().manual_seed(_KL_SEED)
        means = []
        for index, part in enumerate(parts):
            total = torch.zeros((), dtype=logs.dtype, device=logs.device)
            for _ in range(_KL_DRAWS):
                # One at a time, so that memory does not grow with the number of draws.
                weights = part.draw(torch.randn(part.noise_size, generator=random).to(logs))
                densities = torch.stack([other.log_prob(weights) for other in parts])
                total = total + densities[index] - (logs + densities).logsumexp(dim=0)
            means.append(total / _KL_DRAWS)
        return self._average(means).clamp_min(0)


@dataclass(frozen=True)
class Mixture:
    """Recipe for a mixture, and how its components are found.

    Component 0 starts from the trained weights. Every other one starts elsewhere, its first layer is retrained alone, and
    then it is inferred at the temperature that was chosen with component 0.

    Attributes:
        components: K, at most; `fit` drops what never becomes good.
        family: Of every component: a name or a recipe. "point" makes an ensemble of first layers.
        family_options: The settings of a family that is given by name.
        start: "reinitialize" draws the first layer anew as it was drawn before training; "perturb" adds noise to the trained
            weights, which finds nearer and often better optima.
        perturbation: The noise's standard deviation for "perturb", in units of each parameter's root mean square.
        retrain_epochs: The most epochs of retraining; it ends earlier once the objective hardly improves. None takes as many
            as make about 250 steps, from 2 to 10.
        retrain_learning_rate: Adam's rate at the start of retraining, in units of the trained weights' root mean square over
            the square root of a unit's number of inputs: about the share by which a step may change a pre-activation.
        inference_epochs: Epochs of inference for the components after number 0; None takes those of `fit`. They start from a
            retrained optimum with the curvature there, so that one or two cost little accuracy where `fit` is given many.
        weighting: "held-out" stacks: it maximises the mean log of the mixture's predictive density on ``val_loader``;
            without one the weights are equal, and `fit` warns. "free-energy" takes π_k ∝ exp(−(N/T) F_k), which minimises the
            mixture's own free energy where components do not overlap, and is nearly one-hot. "equal" asks for equal weights.
        max_excess: A component whose held-out NLL is higher than that of component 0 by more than this, nats per example, never
            became good, and is dropped; with equal weights, one whose NLL (its training objective where nothing is held out)
            is higher than the best one's by more than this.
        min_weight: On held-out data, a component of less weight than this adds nothing to the others, and is dropped.

    Raises:
        InputError: A setting is out of range.
    """

    components: int = 4
    family: str | PosteriorFamily = "mean-field"
    family_options: Mapping[str, Any] = field(default_factory=dict)
    start: Start = "reinitialize"
    perturbation: float = 1.0
    retrain_epochs: int | None = None
    retrain_learning_rate: float = 1.0
    inference_epochs: int | None = None
    weighting: Weighting = "held-out"
    max_excess: float = 0.5
    min_weight: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("components", "retrain_epochs", "inference_epochs"):
            value = getattr(self, name)
            if value is None and name != "components":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, but it is {value!r}")
        for name in ("perturbation", "retrain_learning_rate", "max_excess"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise InputError(f"{name} must be positive and finite, but it is {value!r}")
        share: Any = self.min_weight
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1 / self.components:
            raise InputError(
                f"min_weight must be at least 0 and below 1/{self.components}, the equal weight, but it is {self.min_weight!r}"
            )
        for name, known in (("start", Start), ("weighting", Weighting)):
            if getattr(self, name) not in known.__args__:  # type: ignore[attr-defined]
                raise InputError(f"{name} must be one of {list(known.__args__)}, but it is {getattr(self, name)!r}")  # type: ignore[attr-defined]
        if self.component_family().name == PointMassPosterior.family and self.weighting == "free-energy":
            raise InputError(
                'weighting="free-energy" needs components that have a density, which point masses have not; use "held-out"'
            )

    @property
    def name(self) -> str:
        """``"mixture"``."""
        return MixturePosterior.family

    def component_family(self) -> PosteriorFamily:
        """The recipe of one component.

        Raises:
            InputError: The family is unknown, a mixture, or has not these options.
        """
        if isinstance(self.family, Mixture) or self.family == self.name:
            raise InputError("the components of a mixture cannot be mixtures; give one mixture of more components")
        recipe = family_recipe(self.family, COMPONENT_FAMILIES)
        if not isinstance(self.family_options, Mapping):
            raise InputError(f"family_options must be a mapping of settings by name, but it is {self.family_options!r}")
        if not self.family_options:
            return recipe
        if not isinstance(self.family, str):
            raise InputError(f"family_options belong to a family that is given by name, not to {self.family!r}")
        try:
            chosen: PosteriorFamily = type(recipe)(**self.family_options)
        except TypeError as error:
            raise InputError(
                f"family_options={dict(self.family_options)!r} do not fit {self.family!r}: {error}"
            ) from error
        return chosen

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> MixturePosterior:
        """Make K equal components at ``mean``, equally weighted: before inference the mixture is its component 0."""
        family = self.component_family()
        return MixturePosterior(layout, [family.build(layout, mean, prior) for _ in range(self.components)])


def components_of(posterior: Posterior) -> list[Posterior]:
    """The components of a mixture, or the posterior itself as the only one."""
    return posterior._parts() if isinstance(posterior, MixturePosterior) else [posterior]
