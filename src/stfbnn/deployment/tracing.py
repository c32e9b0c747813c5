"""The graph of a predictive module, with a batch of any size and inputs under the model's own names."""

from __future__ import annotations

import inspect
import keyword
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from stfbnn.batches import Inputs, call_model
from stfbnn.deployment.errors import ExportError
from stfbnn.deployment.predictive_module import PredictiveModule
from stfbnn.errors import InputError

# What PyTorch's exporter tells its own developers. Copying its trees of inputs calls what it deprecates; and LSTM, GRU and RNN
# set their list of weights anew in each functional call, to the same weights.
_TOLD_TO_OTHERS: tuple[tuple[str, type[Warning]], ...] = (
    (r".*LeafSpec.* is deprecated", FutureWarning),
    (r"The tensor attributes? .*_flat_weights", UserWarning),
)
# They report operators of packages that are not there, and what could not be simplified.
_CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")


class NamedInputs(nn.Module):
    """A module that takes the tensors of some inputs by names, and holds what else there is (None, flags) as constants.

    Args:
        module: Called as the model is.
        inputs: Inputs as the model takes them.
        model: Whose ``forward`` has the names of inputs that are not a mapping.

    Attributes:
        names: The names of the tensors, in order.

    Raises:
        InputError: A mapping has a key that is no name.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, model: nn.Module) -> None:
        super().__init__()
        self.module = module
        slots: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else _slots(inputs, model)
        bad = [name for name in slots if not str(name).isidentifier() or keyword.iskeyword(name)]
        if bad:
            raise InputError(f"inputs of an exported network need names such as 'input_ids', but {bad} are none")
        self.names = tuple(name for name, value in slots.items() if isinstance(value, Tensor))
        constants = {name: value for name, value in slots.items() if name not in self.names}
        signature = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.names]
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            values = {name: given[name] if name in given else constants[name] for name in slots}
            return module(**values) if isinstance(inputs, Mapping) else module(*values.values())

        # The exporter names inputs by the signature.
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def tensors(self, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors of other inputs of the same form, by their names."""
        if isinstance(inputs, Mapping):
            return {name: inputs[name] for name in self.names}
        values = (inputs,) if isinstance(inputs, Tensor) else inputs
        return dict(zip(self.names, (value for value in values if isinstance(value, Tensor)), strict=True))


def traced(module: PredictiveModule, inputs: Inputs, model: nn.Module) -> tuple[NamedInputs, ExportedProgram]:
    """Trace a predictive module.

    Args:
        module: On the CPU.
        inputs: At least two rows, on the CPU; a size of 1 would not stand for others.
        model: Whose ``forward`` has the names of inputs that are not a mapping.

    Returns:
        What has the names, and the graph.

    Raises:
        ExportError: No graph can be made of the network, or none for all sizes of batch.
    """
    named = NamedInputs(module, inputs, model)
    tensors = named.tensors(inputs)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in named.names}
    by_position = not isinstance(inputs, Mapping)
    args, kwargs = (tuple(tensors.values()), {}) if by_position else ((), tensors)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(named, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the user's modules and the tracer raise errors of every kind
        raise ExportError(_reason(error)) from error
    for node in program.graph.nodes:
        # Lines of source with the paths of this machine.
        node.meta.pop("stack_trace", None)
    return named, program


@contextmanager
def quiet() -> Iterator[None]:
    """Within a block, keep from the user what the exporter tells its own developers."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message, category in _TOLD_TO_OTHERS:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def plain_call(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What a module that is called as the model is returns, without gradients."""
    with torch.no_grad():
        result: dict[str, Tensor] = call_model(module, inputs)
    return result


def _slots(inputs: Tensor | tuple[Any, ...], model: nn.Module) -> dict[str, Any]:
    """Inputs by the names of the parameters of the model's ``forward``."""
    values = (inputs,) if isinstance(inputs, Tensor) else inputs
    return dict(zip(_parameter_names(model.forward, len(values)), values, strict=True))


def _parameter_names(forward: Callable[..., Any], count: int) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [one.name for one in inspect.signature(forward).parameters.values() if one.kind in positional][:count]
    return [*names, *(f"input_{index}" for index in range(len(names), count))]


def _reason(error: Exception) -> str:
    """What in the network is in the way, in the user's words where it is a thing that is known."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    told = f"({type(error).__name__}: {first[:300]})"
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        return (
            f"no graph can be made of this network: its forward decides by the values of its tensors, such as by an if, a "
            f"loop or .item(); write that with torch.where, or with shapes instead of values {told}"
        )
    if "specialized" in text or "Constraints violated" in text:
        return (
            f"the graph of this network would hold for one size of batch only: its forward uses the batch size as a fixed "
            f"number, such as in a view or a loop over examples; write -1 or x.shape[0] there {told}"
        )
    return f"PyTorch can make no graph of this network {told}"
