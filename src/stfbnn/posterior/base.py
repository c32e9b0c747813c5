"""The protocol that every posterior family follows: what inference, prediction and files need of q(w)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
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

    def log_prob(self, weights: Tensor) -> Tensor:
        """log q(w) in nats at weights (..., d), shape (...); for families that have a density.

        Raises:
            InputError: The family has none.
        """
        del weights
        raise InputError(f"the posterior family {self.family!r} has no density")

    def set_std(self, std: Tensor) -> None:
        """Take marginal standard deviations (d,) as the new start, without correlations; by default nothing changes.

        Inference calls it with an estimate from the data where the recipe leaves the initial width open.
        """

    def covariance(self) -> Tensor:
        """The covariance matrix (d, d), for families that have one.

        Raises:
            InputError: The family has none, or it would not fit in memory.
        """
        raise InputError(f"the posterior family {self.family!r} keeps no covariance matrix")

    def tensors(self) -> dict[str, Tensor]:
        """q's parameters and persistent buffers as named tensors for a file; detached, contiguous.

        One number a weight is kept under the layer's own names, ``"loc.weight"`` and the like, anything else as it is.
        """
        named = {}
        for prefix, owner, key, value in self._state():
            for name, tensor in owner._pack(key, value).items():
                named[prefix + name] = tensor.contiguous().clone()
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
        for prefix, owner, key, value in self._state():
            packed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            owner._unpack(key, value, packed)

    def _pack(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """One entry of the state as named tensors for a file; a family whose tensors hold more than they need overrides it."""
        if tuple(value.shape) != (self.layout.size,):
            return {key: value}
        return {f"{key}.{name}": part for name, part in self.layout.unflatten(value).items()}

    def _unpack(self, key: str, value: Tensor, packed: Mapping[str, Tensor]) -> None:
        """Write one entry of the state, in place, from what `_pack` made of it."""
        if tuple(value.shape) != (self.layout.size,):
            value.copy_(packed[key])
        else:
            value.copy_(self.layout.flatten({name: packed[f"{key}.{name}"] for name in self.layout.names}))

    def _state(self) -> Iterator[tuple[str, Posterior, str, Tensor]]:
        """Every entry of the state, detached, with the posterior that it belongs to: this one, or one inside it.

        Yields:
            That posterior's prefix ("" for this one), the posterior, the entry's name there, and its value.
        """
        owners = {
            f"{path}." if path else "": part for path, part in self.named_modules() if isinstance(part, Posterior)
        }
        for key, value in self.state_dict().items():
            prefix = max((prefix for prefix in owners if key.startswith(prefix)), key=len)
            yield prefix, owners[prefix], key.removeprefix(prefix), value.detach()


@runtime_checkable
class PosteriorFamily(Protocol):
    """A recipe for a posterior: what ``bayesianize(posterior=…)`` takes."""

    @property
    def name(self) -> str:
        """The family's name, such as ``"mean-field"``."""

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
        """Make the initial posterior, whose mean is ``mean`` (d,), the trained weights."""
