"""Predictive modules as ONNX files, and such files run."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from stfbnn.deployment.errors import ExportError
from stfbnn.deployment.tracing import quiet
from stfbnn.errors import InputError

# PyTorch has operators of this version on; older ones come from a conversion that often fails.
OLDEST_OPSET = 18
# A file is one protocol buffer, of which 2 GB is the most; the graph needs some of it.
_MOST_BYTES = 2**31 - 2**24


def check_ready(opset: int | None) -> None:
    """Refuse what cannot be written, before anything long begins.

    Raises:
        InputError: A package is missing, or the version of the operators is none that can be written.
    """
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"export to ONNX needs the package {name}: pip install 'stfbnn[onnx]'") from error
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or opset < OLDEST_OPSET):
        raise InputError(f"opset must be an integer of at least {OLDEST_OPSET}, or None, but it is {opset!r}")


def check_size(network: nn.Module, layer: Mapping[str, Tensor], samples: int) -> None:
    """Refuse weights that do not fit in one file.

    Args:
        network: The whole network.
        layer: The parameters of its first layer.
        samples: Under how many draws.

    Raises:
        InputError: They do not.
    """
    size = _bytes((*network.parameters(), *network.buffers())) + samples * _bytes(layer.values())
    if size > _MOST_BYTES:
        raise InputError(
            f"the weights and {samples} draws of the first layer are {size / 2**30:.1f} GB, and an ONNX file holds 2 GB; take "
            f"fewer samples, make a smaller layer Bayesian with bayesianize(…, layer=), or use the format "
            f'"torch", which has no such limit'
        )


def write(
    program: ExportedProgram,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int | None,
    metadata: Mapping[str, str],
) -> tuple[str, ...]:
    """Write a graph.

    Args:
        program: The graph.
        path: The file.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opset: Version of ONNX's operators; None for PyTorch's default.
        metadata: Goes into the file's ``metadata_props``.

    Returns:
        The names that the inputs have in the file, where names of outputs are taken.

    Raises:
        ExportError: An operation of the network has no counterpart in ONNX, or not in this version of it.
    """
    names = tuple(f"{name}_input" if name in outputs else name for name in inputs)
    try:
        with quiet():
            written: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(names),
                output_names=list(outputs),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the converters of single operations raise errors of every kind
        raise ExportError(f"this network cannot be written as ONNX {_reason(error)}") from error
    model = written.model
    if opset is not None and model.opset_imports[""] != opset:
        raise ExportError(f"this network needs operators of ONNX {model.opset_imports['']}; leave opset away")
    _tidy(model)
    model.metadata_props.update(metadata)
    written.save(str(path), external_data=False)
    return names


class Runtime:
    """A written file in onnxruntime.

    Args:
        path: The file.

    Raises:
        ExportError: The runtime does not take it.
    """

    def __init__(self, path: Path) -> None:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own classes derive from nothing that it documents
            raise ExportError(f"onnxruntime does not take the file: {_first_line(error)}") from error

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by their names.

        Raises:
            ExportError: The runtime fails on it.
        """
        try:
            # An input on which nothing depends is not in the graph.
            wanted = {one.name for one in self._session.get_inputs()}
            feeds = {name: tensor.numpy() for name, tensor in tensors.items() if name in wanted}
            values = self._session.run(None, feeds)
        except Exception as error:  # as above
            raise ExportError(f"onnxruntime fails on the file: {_first_line(error)}") from error
        names = [one.name for one in self._session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def _tidy(model: Any) -> None:
    """Call the batch by its name, and leave out what the exporter noted of its own work: paths and lines of source."""
    values = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for node in model.graph.all_nodes():
        values.update(node.outputs)
        node.metadata_props.clear()
    batch = str(model.graph.inputs[0].shape[0])
    for value in values:
        value.metadata_props.clear()
        if value.shape is not None and not value.shape.is_static():
            renamed = [re.sub(rf"\b{re.escape(batch)}\b", "batch", str(dim)) for dim in value.shape]
            value.shape = type(value.shape)([int(dim) if dim.isdecimal() else dim for dim in renamed])
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reason(error: BaseException) -> str:
    """The innermost error, which names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"({type(error).__name__}: {_first_line(error)[:300]})"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
