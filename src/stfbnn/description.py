"""What a saved posterior says about the model that it belongs to, and about the inputs that the model takes.

Neither description holds weights or data: of the model hashes, of the example inputs their form and range. That is enough
to tell another model from the right one, and to make inputs on which the right one runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.batches import Inputs
from stfbnn.trunk import fingerprint, structure_fingerprint


@dataclass(frozen=True)
class ModelDescription:
    """What can be said of a model beside the values of its weights, so that a refusal can name what differs.

    Attributes:
        class_name: Its class; for messages, not compared.
        parameters: Scalars in its parameters; for messages, not compared.
        structure: Hash of names, dtypes and shapes of its parameters and persistent buffers.
        modules: Hash of the names and classes of those of its modules that PyTorch itself defines: tells a network with
            another activation from the right one, although both have the same tensors.
        buffers: Hash of the values of its persistent buffers, such as batch norm's running statistics.
    """

    class_name: str
    parameters: int
    structure: str
    modules: str
    buffers: str

    @classmethod
    def of(cls, model: nn.Module) -> ModelDescription:
        """Describe a plain (unwrapped) model."""
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return cls(
            class_name=type(model).__name__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            structure=structure_fingerprint(model),
            modules=_modules(model),
            buffers=fingerprint(model, exclude=parameters),
        )


def describe_inputs(inputs: Inputs) -> dict[str, Any] | None:
    """Describe example inputs by form, shapes, dtypes and ranges; JSON-able.

    Args:
        inputs: A tensor, a tuple or a mapping, as the model takes them.

    Returns:
        ``{"form": "tensor" | "tuple" | "mapping", "entries": …}``, or None where an entry can be described by neither a
        shape with a range nor a number (a nested structure, an object, a string, a tensor that is not finite).
    """
    entries: Any
    try:
        if isinstance(inputs, Tensor):
            entries = _describe_entry(inputs)
            return {"form": "tensor", "entries": entries}
        if isinstance(inputs, Mapping):
            entries = {str(name): _describe_entry(value) for name, value in inputs.items()}
            return {"form": "mapping", "entries": entries}
        return {"form": "tuple", "entries": [_describe_entry(value) for value in inputs]}
    except _IndescribableError:
        return None


def stand_in(description: Mapping[str, Any], device: torch.device) -> Inputs:
    """Make inputs that fit a description: the same form, shapes, dtypes and ranges, on ``device``.

    Floats vary over the whole range. Integers all take the highest value: valid as an index, as a length and as an
    attention mask alike. Booleans alternate along the last dimension, for a mask that hides everything gives NaN.

    Args:
        description: From `describe_inputs`.
        device: Where the model is.

    Raises:
        KeyError: The description is not one; so do ValueError, TypeError, AttributeError and RuntimeError say.
    """
    entries = description["entries"]
    if description["form"] == "tensor":
        tensor: Tensor = _make_entry(entries, device)
        return tensor
    if description["form"] == "mapping":
        return {name: _make_entry(entry, device) for name, entry in entries.items()}
    if description["form"] == "tuple":
        return tuple(_make_entry(entry, device) for entry in entries)
    raise ValueError(f"unknown form {description['form']!r}")


class _IndescribableError(Exception):
    """An entry has no description."""


def _describe_entry(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        if value.is_complex() or value.layout is not torch.strided:
            raise _IndescribableError
        low, high = (value.min().item(), value.max().item()) if value.numel() else (0, 0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _IndescribableError
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "dtype": dtype, "low": low, "high": high}
    # Strings are left out: one may be a text that was an example.
    is_plain = value is None or isinstance(value, bool | int)
    if is_plain or (isinstance(value, float) and math.isfinite(value)):
        return {"value": value}
    raise _IndescribableError


def _make_entry(entry: Mapping[str, Any], device: torch.device) -> Any:
    if "value" in entry:
        return entry["value"]
    shape, dtype = tuple(entry["shape"]), getattr(torch, entry["dtype"])
    low, high = entry["low"], entry["high"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    if dtype == torch.bool and low != high:
        alternating = torch.arange(shape[-1] if shape else 1, device=device) % 2 == 0
        return alternating.expand(shape).clone() if shape else alternating[0]
    if not dtype.is_floating_point:
        return torch.full(shape, high, dtype=dtype, device=device)
    # A closed form rather than random numbers, whose sequence a later version of PyTorch may change.
    wave = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).sin().reshape(shape)
    return (low + (high - low) * (0.5 + 0.5 * wave)).to(dtype).to(device)


def _modules(model: nn.Module) -> str:
    named = model.named_modules(remove_duplicate=False)
    kinds = [[name, type(module).__name__] for name, module in named if type(module).__module__.startswith("torch.nn.")]
    return hashlib.sha256(json.dumps(kinds).encode()).hexdigest()
