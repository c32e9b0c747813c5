"""Which batch norms see the output of one linear layer and nothing else sees that output.

Only then may the norm be folded into the layer. The proof is a symbolic trace (``torch.fx``) of a throw-away copy.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from stfbnn.batches import Inputs
from stfbnn.trunk.copying import shared_copy

# Exact classes that are linear in their input, with the dimension of the output channels in their weight and the number
# of dimensions of their batched output.
LINEAR_LAYERS: dict[type[nn.Module], tuple[int, int]] = {
    nn.Linear: (0, 2),
    nn.Conv1d: (0, 3),
    nn.Conv2d: (0, 4),
    nn.Conv3d: (0, 5),
    nn.ConvTranspose1d: (1, 3),
    nn.ConvTranspose2d: (1, 4),
    nn.ConvTranspose3d: (1, 5),
}

# The attributes in which a module keeps its hooks.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Dataflow:
    """What a trace says about the batch norms that were asked about.

    Attributes:
        pairs: From a norm's name to the name of the layer into which it can be folded.
        reasons: From the other norms' names to why they cannot.
    """

    pairs: Mapping[str, str]
    reasons: Mapping[str, str]


def has_hooks(module: nn.Module) -> bool:
    """Whether something other than ``type(module).forward`` sees or makes the module's output."""
    return "forward" in vars(module) or any(vars(module).get(name) for name in HOOKS)


def find_pairs(network: nn.Module, norms: Collection[str], first_layer_name: str, inputs: Inputs) -> Dataflow:
    """Find the layer into which each norm can be folded, by tracing a copy of the network symbolically.

    Args:
        network: The network; it is neither executed nor changed.
        norms: Names of its batch norms.
        first_layer_name: The layer with random weights, treated as one operation.
        inputs: An example of what the network is called with; decides which optional arguments are given.

    Returns:
        The pairs, and the reasons for the norms that are in none.
    """
    if "forward" in vars(network):
        return Dataflow({}, dict.fromkeys(norms, "the network's forward method was replaced, so it cannot be traced"))
    failure = ""
    # Second try: parts without a batch norm (attention, loops) are taken as they are and not looked into.
    for opaque in (False, True):
        probe = shared_copy(network)
        # Hooks would store stand-ins in the user's own objects; pairs whose output a hook may see are refused below.
        for hooks in (vars(module).get(name) for module in probe.modules() for name in HOOKS):
            if hooks:
                hooks.clear()
        tracer = _Tracer({module for name, module in probe.named_modules() if name == first_layer_name}, opaque)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                graph = tracer.trace(probe, concrete_args=_absent_arguments(probe, inputs))
        except Exception as error:  # a trace runs the user's code on stand-ins, so anything may be raised
            first_line = str(error).partition("\n")[0]
            failure = failure or f"the network cannot be traced ({type(error).__name__}: {first_line})"
            continue
        return _examine_graph(network, probe, graph, norms, first_layer_name)
    return Dataflow({}, dict.fromkeys(norms, failure))


class _Tracer(fx.Tracer):
    """A tracer that sees reads of buffers, and that keeps some modules whole."""

    proxy_buffer_attributes = True

    def __init__(self, whole: Collection[nn.Module], opaque: bool) -> None:
        super().__init__()
        self._whole = whole
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._whole or super().is_leaf_module(m, module_qualified_name):
            return True
        return self._opaque and not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in m.modules())


def _absent_arguments(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The optional arguments of ``forward`` that are not given, with their defaults; a stand-in would never be None."""
    signature = inspect.signature(network.forward)
    if isinstance(inputs, Mapping):
        bound = signature.bind(**inputs)
    else:
        bound = signature.bind(*inputs) if isinstance(inputs, tuple) else signature.bind(inputs)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound.arguments and parameter.default is not inspect.Parameter.empty
    }


def _examine_graph(
    network: nn.Module, probe: nn.Module, graph: fx.Graph, norms: Collection[str], first_layer_name: str
) -> Dataflow:
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    read: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
        elif node.op == "get_attr":
            read |= _owners(network, str(node.target))
    kept = {proxy.node for module in probe.modules() for proxy in _proxies_in(vars(module))}
    pairs: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for norm in norms:
        reason = _obstacle(network, norm, calls, read, kept, first_layer_name)
        if reason:
            reasons[norm] = reason
        else:
            pairs[norm] = str(calls[norm][0].args[0].target)  # type: ignore[union-attr]  # a node, by _obstacle
    return Dataflow(pairs, reasons)


def _obstacle(  # noqa: PLR0911 - a list of conditions, each with its own answer
    network: nn.Module,
    norm: str,
    calls: Mapping[str, list[fx.Node]],
    read: Collection[str],
    kept: Collection[fx.Node],
    first_layer_name: str,
) -> str:
    if len(calls[norm]) != 1:
        return f"it is called {len(calls[norm])} times"
    (node,) = calls[norm]
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return "its input is not the output of a layer"
    name = str(source.target)
    layer = network.get_submodule(name)
    if type(layer) not in LINEAR_LAYERS:
        return f"its input comes from {name!r}, a {type(layer).__name__}"
    if len(source.users) != 1 or source in kept:
        return f"the output of {name!r} is used elsewhere too"
    if len(calls[name]) != 1:
        return f"{name!r} is called {len(calls[name])} times"
    if norm in read or name in read:
        return f"the tensors of {norm if norm in read else name!r} are used elsewhere too"
    if _inside(name, first_layer_name) and name != first_layer_name:
        return f"{name!r} is a part of the first layer"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups != 1:
        return f"{name!r} is a transposed convolution with groups"
    if network.get_submodule(norm).num_features != _output_channels(layer):
        return f"it normalises another dimension than the output channels of {name!r}"
    for watched in {part for leaf in (norm, name) for part in _ancestors(leaf)}:
        if has_hooks(network.get_submodule(watched)):
            return f"{watched!r} has a hook or a forward method of its own, which may see what folding changes"
    return ""


def _owners(network: nn.Module, target: str) -> set[str]:
    """The modules that hold the tensor which a graph reads: several, where it is tied, and the graph names but one."""
    module, _, key = target.rpartition(".")
    tensor = getattr(network.get_submodule(module), key, None)
    return {
        name
        for name, owner in network.named_modules()
        if any(value is tensor for value in (*owner._parameters.values(), *owner._buffers.values()))
    }


def _output_channels(layer: nn.Module) -> Any:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _ancestors(name: str) -> Iterator[str]:
    """The module and what it is in, without the root, whose hooks see inputs and outputs alone."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _inside(name: str, container: str) -> bool:
    return not container or name == container or name.startswith(f"{container}.")


def _proxies_in(value: Any, depth: int = 3) -> Iterator[fx.Proxy]:
    """Values that the network put aside in an attribute while it was traced."""
    if isinstance(value, fx.Proxy):
        yield value
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from _proxies_in(part, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for part in value:
            yield from _proxies_in(part, depth - 1)
