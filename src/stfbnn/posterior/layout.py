"""How the named parameters of the first layer lie in one flat vector, and how its noise is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the first layer's parameters, in the order in which they fill a vector of length d.

    Attributes:
        names: The layer's own parameter names, such as ``("weight", "bias")``.
        shapes: Their shapes, in the same order.
        transposed_groups: For a transposed convolution the number of its groups: its weight has the shape
            (in, out / groups, …), so that its output units are not its rows. None for every other layer.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed_groups: int | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], layer: nn.Module | None = None) -> ParameterLayout:
        """The layout of ``parameters``, in their order, which belong to ``layer``."""
        groups = layer.groups if isinstance(layer, nn.modules.conv._ConvTransposeNd) else None
        return cls(tuple(parameters), tuple(tuple(tensor.shape) for tensor in parameters.values()), groups)

    @property
    def size(self) -> int:
        """d, the number of scalar parameters."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of scalars of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Join named tensors to one vector (d,)."""
        return torch.cat([parameters[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut vectors (..., d) into named tensors (..., *shape); views, so gradients flow."""
        leading = vector.shape[:-1]
        parts = torch.split(vector, list(self.sizes), dim=-1)
        return {
            name: part.reshape((*leading, *shape))
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }
