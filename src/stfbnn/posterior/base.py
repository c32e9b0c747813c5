"""The protocol that every posterior family follows: what inference, prediction and files need of q(w)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from stfbnn.errors import ArtifactError, InputError
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.prior import GaussianPrior


class Posterior(nn.Module, ABC):
    """A distribution q(w) over all parameters of the first layer, as a vector w of length d.

    Draws are reparameterised: ``w = draw(noise)`` with standard normal noise, differentiable in q's own parameters
    (which are this module's ``nn.Parameter`` s).

    Attributes:
        layout: How w is cut into the layer's named parameters.
    """

    family: ClassVar[str]

    def __init__(self, layout: ParameterLayout) -> None:
        super().__init__()
        self.layout = layout

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """How many standard normal numbers one draw takes."""

    @abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise (..., noise_size) into weights (..., d)."""

    @abstractmethod
    def mean_vector(self) -> Tensor:
        """E_q[w], shape (d,)."""

    @abstractmethod
    def std_vector(self) -> Tensor:
        """The marginal standard deviations of q, shape (d,)."""

    @abstractmethod
    def kl(self, prior: GaussianPrior) -> Tensor:
        """KL(q‖p) in nats, SUMMED over all d parameters; a scalar, differentiable in q's parameters."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What, beside the tensors, is needed to build this posterior again; JSON-able."""

    def mean(self) -> dict[str, Tensor]:
        """The posterior means, under the layer's own parameter names; detached copies."""
        return self.layout.unflatten(self.mean_vector().detach().clone())

    def std(self) -> dict[str, Tensor]:
        """The marginal posterior standard deviations, under the layer's own parameter names; detached copies."""
        return self.layout.unflatten(self.std_vector().detach().clone())

    def covariance(self) -> Tensor:
        """The covariance matrix (d, d), for families that have one.

        Raises:
            InputError: The family has none, or it would not fit in memory.
        """
        raise InputError(f"the posterior family {self.family!r} keeps no covariance matrix")

    def tensors(self) -> dict[str, Tensor]:
        """q's parameters as named tensors for a file: ``"loc.weight"`` and the like; detached, contiguous."""
        named = {}
        for key, value in self.named_parameters():
            for name, part in self.layout.unflatten(value.detach()).items():
                named[f"{key}.{name}"] = part.contiguous().clone()
        return named

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take q's parameters from what `tensors` gave.

        Raises:
            ArtifactError: A tensor is missing, is one too many, or has another shape or dtype; names which.
        """
        expected = self.tensors()
        if set(tensors) != set(expected):
            missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
            raise ArtifactError(
                f"the posterior's tensors differ from the layer's: missing {missing}, unexpected {extra}"
            )
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
                raise ArtifactError(
                    f"the posterior's tensor {name!r} is {tuple(tensor.shape)} of {tensor.dtype}, but the layer needs "
                    f"{tuple(expected[name].shape)} of {expected[name].dtype}"
                )
        for key, value in self.named_parameters():
            joined = self.layout.flatten({name: tensors[f"{key}.{name}"] for name in self.layout.names})
            value.detach().copy_(joined)


@runtime_checkable
class PosteriorFamily(Protocol):
    """A recipe for a posterior: what ``bayesianize(posterior=…)`` takes."""

    @property
    def name(self) -> str:
        """The family's name, such as ``"mean-field"``."""

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
        """Make the initial posterior, whose mean is ``mean`` (d,), the trained weights."""
