"""Hold a network that was simplified against what it computed before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stfbnn.batches import Inputs, call_model, map_tensors
from stfbnn.errors import InputError
from stfbnn.randomness import generator, seeded

# How far outputs may move, relative to the largest one: some hundreds of roundings.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class FunctionCheck:
    """A network's outputs as they are now, on the example and on a perturbed copy of it.

    Attributes:
        weights: The parameters of the first layer that were used: its own, perturbed, since they will be random.

    Args:
        network: The network, which is run without gradients.
        first_layer_name: The layer whose parameters are substituted.
        inputs: The example.

    Raises:
        InputError: The network does not run on the example.
    """

    def __init__(self, network: nn.Module, first_layer_name: str, inputs: Inputs) -> None:
        noise = generator(0, "verification")
        self._network = network
        self._prefix = f"{first_layer_name}." if first_layer_name else ""
        layer = network.get_submodule(first_layer_name)
        self.weights = {name: _perturbed(value, noise) for name, value in layer.named_parameters()}
        try:
            self._probes = [(inputs, self._run(inputs, self.weights))]
        except Exception as error:
            raise InputError(f"the network does not run on the example inputs: {error}") from error
        perturbed = map_tensors(inputs, lambda tensor: _perturbed(tensor, noise))
        try:
            self._probes.append((perturbed, self._run(perturbed, self.weights)))
        except Exception:  # a network may refuse what is not a real input; the example itself is checked all the same
            return

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        """Say how the network now differs from what it was, or "" if by rounding alone.

        Args:
            weights: What now stands for ``self.weights``.
        """
        for inputs, before in self._probes:
            try:
                after = self._run(inputs, weights)
            except Exception as error:  # a module that reads what is no longer there, for one
                return f"the folded network does not run ({type(error).__name__}: {error})"
            if not before or len(after) != len(before):
                return "the network returns no floating-point tensors, by which folding could be checked"
            for one, other in zip(before, after, strict=True):
                error_size, allowed = difference(one, other)
                if not error_size <= allowed:
                    return f"the folded network differs by {error_size:.1e}, where rounding explains {allowed:.1e}"
        return ""

    def _run(self, inputs: Inputs, weights: Mapping[str, Tensor]) -> list[Tensor]:
        named = {self._prefix + name: value for name, value in weights.items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._network, named, args, kwargs, tie_weights=False)

        # Seeded, for networks that are random even in eval mode.
        with torch.no_grad(), seeded(0, "verification"):
            return list(_float_tensors(call_model(call, inputs)))


def _perturbed(tensor: Tensor, noise: torch.Generator) -> Tensor:
    """Add a tenth of a tensor's standard deviation to it; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    values = tensor.detach()
    draw = torch.randn(tensor.shape, generator=noise).to(values)
    return values + 0.1 * values.float().std(correction=0).to(values) * draw


def _float_tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a network returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_dataclass(value):
        parts = [getattr(value, part.name) for part in fields(value)]
    for part in parts:
        yield from _float_tensors(part)


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest difference of two outputs, infinite if they differ in kind, and how much rounding may explain.

    Args:
        one: What is expected.
        other: What was found.

    Returns:
        max |one − other|, and some hundreds of roundings of the largest number in ``one``.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf"), 0.0
    finite = torch.isfinite(one)
    if not torch.equal(torch.nan_to_num(one[~finite]), torch.nan_to_num(other[~finite])):
        return float("inf"), 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    reference = one[finite].double()
    allowed = _TOLERANCE.get(one.dtype, 5e-2) * float(reference.abs().max())
    return float((other[finite].double() - reference).abs().max()), allowed
