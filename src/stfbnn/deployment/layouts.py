"""Two ways of running S weight sets of the first layer in front of one trunk, both without a copy of the trunk's weights.

`LoopedNetwork` runs the whole network once for each draw. `StackedNetwork` gives it the inputs S times over, as one batch of
S·B rows, in which the s-th part meets draw s: the trunk runs once, so a graph of it is hardly larger than the network's own.
The second needs a network that treats its examples apart and keeps them in order; whether it does is seen by comparing the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from stfbnn.batches import OutputFunction, output_tensor
from stfbnn.trunk import shared_copy

LayoutName = Literal["stacked", "loop"]


class CannotStackError(Exception):
    """Draws cannot stand beside each other in one batch of this network; says why."""


class WeightSets(nn.Module):
    """The first layer's parameters under each draw, each tensor a buffer of its own.

    Not stacked to one tensor, for a graph would have to cut it up again at each run.

    Args:
        sets: For every draw the parameters, by the layer's own names.
    """

    def __init__(self, sets: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self._names = tuple(sets[0])
        self._count = len(sets)
        for index, weights in enumerate(sets):
            for name, value in weights.items():
                self.register_buffer(_buffer(index, name), value)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: getattr(self, _buffer(index, name)) for name in self._names}


class LoopedNetwork(nn.Module):
    """The network, once for every draw.

    Args:
        network: The frozen network.
        layer_name: Its first layer; "" where it is that layer.
        sets: The first layer's weights.
        output: How to take the tensor of predictions out of what the network returns.
    """

    layout: ClassVar[LayoutName] = "loop"

    def __init__(self, network: nn.Module, layer_name: str, sets: WeightSets, output: OutputFunction | None) -> None:
        super().__init__()
        self.network, self.sets = network, sets
        self.layer_name, self.output = layer_name, output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs (S·B, …), draw after draw, for inputs of B rows."""
        return torch.cat([self.one(index, *args, **kwargs) for index in range(len(self.sets))])

    def one(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs (B, …) of one draw."""
        prefix = f"{self.layer_name}." if self.layer_name else ""
        weights = {prefix + name: value for name, value in self.sets[index].items()}
        return output_tensor(functional_call(self.network, weights, args, kwargs, tie_weights=False), self.output)


class StackedNetwork(nn.Module):
    """The network, once on S·B rows.

    Args:
        looped: The same network, from which this one takes all tensors and no module.
        axes: Where the first layer has its rows.
        called_once: Whether the network calls the first layer once only, so that what reaches it is alike for all draws.
    """

    layout: ClassVar[LayoutName] = "stacked"

    def __init__(self, looped: LoopedNetwork, axes: BatchAxes, called_once: bool) -> None:
        super().__init__()
        self.network, self.output = shared_copy(looped.network), looped.output
        layer: Any = self.network.get_submodule(looped.layer_name)
        self.first_layer = _StackedLayer(layer, looped.sets, axes, called_once)
        # The method, not the module, which would become a part of the layer. The layer's own parameters stay in place, for
        # other modules may read their dtype, or be tied to them.
        layer.forward = self.first_layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs (S·B, …), draw after draw, for inputs of B rows."""
        times = len(self.first_layer.sets)
        self.first_layer.rows = row_count(args, kwargs)
        many = [_repeated(value, times) for value in args]
        named = {name: _repeated(value, times) for name, value in kwargs.items()}
        return output_tensor(self.network(*many, **named), self.output)


@dataclass(frozen=True)
class BatchAxes:
    """Where the first layer has its rows.

    Attributes:
        arguments: For every leaf of its arguments the dimension along which the rows lie; None where it is no tensor, or one
            that all rows share.
        results: The same for what it returns; None where it is no tensor, "shared" for one without rows, such as embedded
            positions.
    """

    arguments: tuple[int | None, ...]
    results: tuple[int | Literal["shared"] | None, ...]

    @classmethod
    def found(cls, layer: nn.Module, run: Callable[[int], object], rows: int) -> BatchAxes:
        """Compare the shapes that the layer meets at two sizes of batch.

        Args:
            layer: The first layer, inside the network.
            run: Runs the network on so many rows.
            rows: How many to begin with.

        Raises:
            CannotStackError: The layer is called in several ways.
        """
        smaller, larger = (_calls(layer, run, size) for size in (rows, rows + 1))
        found = {
            cls(
                tuple(_axis(*leaves) for leaves in zip(before.arguments, after.arguments, strict=False)),
                tuple(
                    "shared" if axis is None and shape is not None else axis
                    for shape, axis in (
                        (leaves[0], _axis(*leaves)) for leaves in zip(before.results, after.results, strict=False)
                    )
                ),
            )
            for before, after in zip(smaller, larger, strict=False)
        }
        if len(found) != 1 or len(smaller) != len(larger):
            raise CannotStackError("the first layer is called in several ways")
        return found.pop()


class _StackedLayer(nn.Module):
    """The first layer with S sets of weights: rows s·B … (s+1)·B − 1 of its output belong to draw s.

    It runs the layer, and it alone, S times. One operation for all draws (``torch.vmap``) was tried: a runtime gains nothing
    by it, and for many kinds of layers the exporter then fixes the batch size.

    Attributes:
        rows: B of the call that is running.
    """

    def __init__(self, layer: nn.Module, sets: WeightSets, axes: BatchAxes, called_once: bool) -> None:
        super().__init__()
        self.layer, self.sets = shared_copy(layer), sets
        # They run around the call of the layer that this one stands in for.
        self.layer._forward_hooks.clear()
        self.layer._forward_pre_hooks.clear()
        self.rows = 0
        self._axes, self._called_once = axes, called_once

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the first layer takes, on S·B rows, and return what it returns."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        if len(leaves) != len(self._axes.arguments):
            raise CannotStackError("the first layer is called in several ways")
        apart = [self._apart(leaf, axis) for leaf, axis in zip(leaves, self._axes.arguments, strict=True)]
        each, result_form = [], None
        for index in range(len(self.sets)):
            own_args, own_kwargs = pytree.tree_unflatten([part[index] for part in apart], form)
            result = functional_call(self.layer, self.sets[index], own_args, own_kwargs, tie_weights=False)
            values, result_form = pytree.tree_flatten(result)
            each.append(values)
        parts = zip(*each, strict=True)
        joined = [self._joined(part, axis) for part, axis in zip(parts, self._axes.results, strict=True)]
        assert result_form is not None  # noqa: S101 - there is always a draw, said for the type checker
        return pytree.tree_unflatten(joined, result_form)

    def _apart(self, leaf: Any, axis: int | None) -> Sequence[Any]:
        """What each draw is given of a leaf."""
        times = len(self.sets)
        if axis is None:
            return [leaf] * times
        apart = leaf.reshape(*leaf.shape[:axis], times, -1, *leaf.shape[axis + 1 :])
        if self._called_once:
            return [apart.select(axis, 0)] * times
        return [apart.select(axis, index) for index in range(times)]

    def _joined(self, parts: Sequence[Any], axis: int | Literal["shared"] | None) -> Any:
        if axis is None:
            return parts[0]
        if axis != "shared":
            return torch.cat(list(parts), dim=axis)
        # The network would have it broadcast against its rows; now it differs between them.
        one_row = [part if part.shape[:1] == (1,) else part.unsqueeze(0) for part in parts]
        return torch.cat([row.repeat(self.rows, *[1] * (row.ndim - 1)) for row in one_row])


@dataclass(frozen=True)
class _Call:
    """The shapes of the leaves of a call's arguments and results; None for what is no tensor."""

    arguments: list[torch.Size | None]
    results: list[torch.Size | None]


def row_count(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """B, the first dimension of the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).shape[0]


def _calls(layer: nn.Module, run: Callable[[int], object], rows: int) -> list[_Call]:
    seen: list[_Call] = []

    def watch(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen.append(_Call(_shapes((args, kwargs)), _shapes(result)))

    handle = layer.register_forward_hook(watch, with_kwargs=True)
    try:
        run(rows)
    finally:
        handle.remove()
    return seen


def _shapes(value: Any) -> list[torch.Size | None]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(value)]


def _axis(smaller: torch.Size | None, larger: torch.Size | None) -> int | None:
    """The one dimension in which two shapes differ; None where they do not."""
    if smaller is None or larger is None or smaller == larger:
        return None
    differing = [axis for axis, (one, other) in enumerate(zip(smaller, larger, strict=False)) if one != other]
    if len(smaller) != len(larger) or len(differing) != 1:
        raise CannotStackError("a tensor at the first layer has the examples along several dimensions")
    return differing[0]


def _repeated(value: Any, times: int) -> Any:
    # Not by expand and reshape, whose strides leave the exporter with conditions on the batch size.
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value


def _buffer(index: int, name: str) -> str:
    # Names of buffers hold no dots.
    return f"draw{index}_{name.replace('.', '_')}"
