"""Export: a fitted network as one file that needs nothing of this library, and that was seen to compute the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from stfbnn.batches import Inputs
from stfbnn.deployment import onnx_file
from stfbnn.deployment.errors import ExportError
from stfbnn.deployment.predictive_module import (
    Layout,
    PredictiveModule,
    build,
    example_rows,
    largest_difference,
    plain_network,
)
from stfbnn.deployment.tracing import NamedInputs, plain_call, quiet, traced
from stfbnn.errors import InputError
from stfbnn.files import atomic_path
from stfbnn.mixed_precision import full_precision
from stfbnn.network import BayesianNetwork

Format = Literal["onnx", "torch"]

# The entry of a .pt2 file that holds the metadata, as JSON.
METADATA_FILE = "stfbnn.json"

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
# Rows with which a graph is made, and with which a file is tried.
_TRACED_ROWS = 3
_TRIED_ROWS = (1, 3, 4)
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file, absolute.
        format: "onnx" or "torch".
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        samples: S, the number of draws in it.
        layout: "stacked" or "loop", as for `predictive_module`.
        size: In bytes.
        difference: The largest difference from PyTorch that was seen, relative to the size of the predictions; None where
            onnxruntime is not installed, so that an ONNX file was not run.
    """

    path: Path
    format: Format
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    samples: int
    layout: Literal["stacked", "loop"]
    size: int
    difference: float | None


def export(
    bnn: BayesianNetwork,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    samples: int = 32,
    seed: int = 0,
    format: Format = "onnx",  # noqa: A002 - what everybody calls it
    layout: Layout = "auto",
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write the averaged predictive to a file: the trunk's weights once, and the first layer's under S posterior draws.

    The file takes the model's inputs, in batches of any size (other dimensions are those of the example), and returns what
    `predict` with the same ``samples`` and ``seed`` does. For classes and labels: "probs", and in nats "entropy", "aleatoric",
    "epistemic"; for numbers and counts: "mean", "std", and the variances "aleatoric" and "epistemic". The predictive
    temperature is in it. Inputs are called as the entries of a mapping are, else as the parameters of the model's ``forward``.

    Before it appears, the file is run on the example, on batches of several sizes, and compared with PyTorch. An older file of
    that name is replaced. Library version, the model's fingerprint, likelihood, both temperatures, S, the seed and the number
    of outputs are in ``metadata_props`` of an ONNX file, and as JSON in the entry ``stfbnn.json`` of a .pt2 file
    (``torch.export.load(path, extra_files={"stfbnn.json": ""})``).

    Args:
        bnn: The network, after `fit`.
        path: The file: ``….onnx``, or ``….pt2`` for "torch".
        example_inputs: One or more examples as the model takes them. They are not in the file.
        samples: S, posterior draws. A mixture's are dealt out to its components, at least one to each.
        seed: Which draws.
        format: "onnx", for onnxruntime and its like; "torch" for ``torch.export.load(path).module()``.
        layout: "stacked" runs the trunk once on S·B rows, "loop" once for each draw (S times as many operations in the file,
            less memory); "auto" takes the first where the network allows it.
        opset: Version of ONNX's operators, at least 18; None for PyTorch's default.
        metadata: More entries, such as names of the classes.

    Returns:
        What was written.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: An argument is wrong, a package is missing, the file would be too large for its format, or the likelihood is
            of the user's own making.
        ExportError: No graph can be made of the network, or the file does not compute the same; no file is left.
    """
    target = _target(path, format, opset)
    extra = _checked_metadata(metadata)
    bnn = plain_network(bnn)
    bnn.require_fitted()
    if format == "onnx":
        onnx_file.check_ready(opset)
        onnx_file.check_size(bnn.network, bnn.trained, samples)
    # A surrounding autocast, for which predictions may have been made, is not to be traced into the file.
    module, loop = build(bnn, example_inputs, samples, seed, layout)
    with full_precision(torch.device("cpu")):
        expected = plain_call(loop, example_rows(example_inputs, max(_TRIED_ROWS)))
        entries = {**_entries(bnn, module, seed, expected), **extra}
        named, program = traced(module, example_rows(example_inputs, _TRACED_ROWS), bnn.network)
    difference: float | None = None
    with full_precision(torch.device("cpu")), atomic_path(target) as temporary:
        if format == "onnx":
            names = onnx_file.write(program, temporary, named.names, module.outputs, opset, entries)
            if onnx_file.has_runtime():
                difference = _try(_onnx_call(temporary, named, names), example_inputs, expected)
        else:
            names = named.names
            _write_program(program, temporary, entries)
            difference = _try(_torch_call(temporary, named), example_inputs, expected)
    return Exported(
        target, format, names, module.outputs, module.samples, module.layout, target.stat().st_size, difference
    )


def _target(path: str | os.PathLike[str], kind: str, opset: int | None) -> Path:
    if kind not in _SUFFIXES:
        raise InputError(f'format must be "onnx" or "torch", but it is {kind!r}')
    if opset is not None and kind != "onnx":
        raise InputError('opset is a version of ONNX\'s operators, and format is "torch"; leave it away')
    target = Path(path).absolute()
    if target.suffix.lower() != _SUFFIXES[kind]:
        raise InputError(f'a file of format "{kind}" must end in {_SUFFIXES[kind]}, but it is {str(path)!r}')
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the name of a file")
    return target


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    entries = dict(metadata or {})
    if not all(isinstance(text, str) for pair in entries.items() for text in pair):
        raise InputError(f"metadata must be texts by names, but they are {entries!r}; write numbers with str()")
    return entries


def _entries(
    bnn: BayesianNetwork, module: PredictiveModule, seed: int, expected: Mapping[str, Tensor]
) -> dict[str, str]:
    """What describes the file, all as text."""
    first = next(iter(expected.values()))
    try:
        library = version("stfbnn")
    except PackageNotFoundError:
        library = "unknown"
    return {
        "stfbnn_version": library,
        "model": bnn.model_description.class_name,
        "model_fingerprint": bnn.model_fingerprint,
        "first_layer": bnn.layer_name,
        "posterior": bnn.posterior.family,
        "likelihood": module.likelihood.name,
        "temperature": repr(bnn.temperature),
        "predictive_temperature": repr(float(bnn.predictive_temperature)),
        "samples": str(module.samples),
        "seed": str(seed),
        # Classes, labels or numbers of an example.
        "output_count": str(first.shape[1] if first.ndim > 1 else 1),
        "layout": module.layout,
    }


def _try(call: Callable[[Inputs], dict[str, Tensor]], example_inputs: Any, expected: Mapping[str, Tensor]) -> float:
    """Run what was written at several sizes of batch, and give the largest difference.

    Raises:
        ExportError: It is too large.
    """
    worst = 0.0
    for rows in _TRIED_ROWS:
        part = {name: value[:rows] for name, value in expected.items()}
        difference = largest_difference(call(example_rows(example_inputs, rows)), part)
        if not difference <= _TOLERANCE:
            raise ExportError(
                f"on a batch of {rows} the exported network differs from PyTorch by {difference:.1e}, where "
                f"{_TOLERANCE:.0e} is allowed; no file was written. Do its predictions for an example depend on the rest of "
                f"the batch, or on random numbers?"
            )
        worst = max(worst, difference)
    return worst


def _onnx_call(path: Path, named: NamedInputs, names: tuple[str, ...]) -> Callable[[Inputs], dict[str, Tensor]]:
    runtime = onnx_file.Runtime(path)
    return lambda inputs: runtime(dict(zip(names, named.tensors(inputs).values(), strict=True)))


def _write_program(program: ExportedProgram, path: Path, entries: Mapping[str, str]) -> None:
    # An example is not the file's business.
    program.example_inputs = None
    with quiet(), path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(entries)})


def _torch_call(path: Path, named: NamedInputs) -> Callable[[Inputs], dict[str, Tensor]]:
    with quiet(), path.open("rb") as file:
        loaded = torch.export.load(file).module()

    def call(inputs: Inputs) -> dict[str, Tensor]:
        tensors = named.tensors(inputs)
        with torch.no_grad():
            result: dict[str, Tensor] = loaded(**tensors) if isinstance(inputs, Mapping) else loaded(*tensors.values())
        return result

    return call
