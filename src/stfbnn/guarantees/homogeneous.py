"""The limit of a network far away: f(αx)/α → g∞(Wx) as α → ∞, as a function that can be computed.

g∞ is the network without its biases and shifts, and with every activation replaced by its limit. It is computed by walking
through the graph of the network's operations in double precision with the rules of `stfbnn.guarantees.homogeneous_rules`, which
name the module of any operation that they do not know.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.func import functional_call

from stfbnn.batches import Inputs, OutputFunction, batch_size, call_model, map_tensors, output_tensor, tensors_of
from stfbnn.deployment.tracing import NamedInputs, quiet
from stfbnn.errors import InputError
from stfbnn.guarantees.homogeneous_rules import NoLimitError, Positions, Ray, RefusalError, apply
from stfbnn.mixed_precision import full_precision
from stfbnn.network import BayesianNetwork
from stfbnn.trunk import shared_copy

# Where the limit is compared with the network: from the first to the second distance, the error has to fall with 1/α (by a
# thousand; less where smooth activations have not settled), or be rounding.
_NEAR, _FAR = 1e3, 1e6
_FALL = 30.0
_ROUNDING = 1e-5


class HomogeneousLimit:
    """g∞ of a Bayesian network, for any of its first-layer weights.

    The ray may start anywhere: for lim f(o + αx)/α the origin o is a shift of the first layer's (and of every other
    bypassing layer's) input, (W(o + αx) + b)/α → Wx, and so drops out like a bias.

    Args:
        bnn: The network; it need not be fitted.
        example: Directions of as many rows as each call is to have, floats.

    Attributes:
        rows: The number of rows that each call takes.

    Raises:
        NoLimitError: An operation has no known limit, or the network's graph cannot be seen; the message names the module.
        InputError: An input is no float tensor.
    """

    def __init__(self, bnn: BayesianNetwork, example: Inputs) -> None:
        kinds = {tensor.dtype for tensor in tensors_of(example) if not tensor.is_floating_point()}
        if kinds:
            raise InputError(
                f"directions must be floats, but there are inputs of {', '.join(map(str, kinds))}: token numbers and masks "
                f"cannot be scaled, so they have no limit far away"
            )
        bnn.check_unchanged()
        self._bnn = bnn
        # Where double precision is not to be had, on the CPU.
        self.device = torch.device("cpu") if bnn.device.type == "mps" else bnn.device
        self._network = _in_double(bnn.network, self.device)
        self.rows = batch_size(example)
        example = self.prepared(example)
        self._named = NamedInputs(_Outputs(self._network, bnn.output), example, self._network)
        self._program = self._traced(example)
        self._last_uses = _last_uses(self._program.graph)

    def prepared(self, inputs: Inputs) -> Inputs:
        """Inputs in double precision, where this computes."""
        return map_tensors(inputs, lambda tensor: tensor.detach().to(self.device, torch.float64))

    def parameters(self, vector: Tensor) -> dict[str, Tensor]:
        """The network's parameters that first-layer weights (d,) stand for, by name, to be used for many batches."""
        with torch.no_grad(), full_precision(self._bnn.device):
            found = self._bnn.substitution(vector)
        return {name: value.detach().to(self.device, torch.float64) for name, value in found.items()}

    @torch.no_grad()
    def outputs(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
        """g∞, and the largest absolute number on the way to it, to which its rounding error is relative.

        Args:
            parameters: From `parameters`.
            inputs: From `prepared`, of `rows` rows.

        Returns:
            The outputs' limit, in the outputs' shape, float64; and a number.

        Raises:
            NoLimitError: An operation has no known limit.
        """
        with full_precision(self.device):
            result, peak = self._walk(self._arguments(parameters, inputs))
        if isinstance(result, Ray):
            return result.limit, peak
        # What does not grow with the input vanishes beside it.
        return torch.zeros_like(result), peak

    @torch.no_grad()
    def network_outputs(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """f itself in double precision."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._network, dict(parameters), args, kwargs, tie_weights=False)

        with full_precision(self.device):
            return output_tensor(call_model(call, inputs), self._bnn.output)

    def check(self, vectors: Sequence[Tensor], inputs: Inputs) -> float:
        """See on some weights and inputs that f(αx)/α does approach g∞.

        Args:
            vectors: First-layer weights, (d,) each.
            inputs: From `prepared`, of `rows` rows.

        Returns:
            The largest |f(αx)/α − g∞| at α = 10⁶, relative to the largest |g∞| there.

        Raises:
            NoLimitError: It does not, so that the rules miss something that this network does.
        """
        near = far = size = 0.0
        for vector in vectors:
            parameters = self.parameters(vector)
            limit, _ = self.outputs(parameters, inputs)
            errors = [self._error(parameters, inputs, limit, distance) for distance in (_NEAR, _FAR)]
            near, far = max(near, errors[0]), max(far, errors[1])
            size = max(size, float(limit.abs().max()))
        if not far <= max(_ROUNDING * size, near / _FALL):
            raise NoLimitError(
                f"the network's outputs divided by the distance do not approach the limit that was computed: the error is "
                f"{near:.3g} at α = {_NEAR:g} and {far:.3g} at α = {_FAR:g}, where the limit's size is {size:.3g}. It "
                f"may decide by the values of its tensors, or normalise within forward; no far-field statement can be made"
            )
        return far / size if size > 0 else far

    def _error(self, parameters: Mapping[str, Tensor], inputs: Inputs, limit: Tensor, distance: float) -> float:
        away = map_tensors(inputs, lambda tensor: tensor * distance)
        error = (self.network_outputs(parameters, away) / distance - limit).abs().max()
        # NaN compares as neither, and is to be refused.
        return float(error) if bool(torch.isfinite(error)) else float("inf")

    def _traced(self, example: Inputs) -> Any:
        tensors = self._named.tensors(example)
        args, kwargs = ((), tensors) if isinstance(example, Mapping) else (tuple(tensors.values()), {})
        try:
            with quiet(), warnings.catch_warnings(), torch.no_grad(), full_precision(self.device):
                warnings.simplefilter("ignore")
                program = torch.export.export(self._named, args, kwargs, strict=False)
                # Without a decomposition, so that operations keep their names: in-place writes alone are taken out.
                return program.run_decompositions({})
        except Exception as error:  # the user's modules and the tracer raise errors of every kind
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise NoLimitError(
                f"the network's operations cannot be seen in double precision, so no limit can be computed "
                f"({type(error).__name__}: {first[:300]}); its forward must neither decide by the values of its tensors nor "
                f"cast them to another precision"
            ) from error

    def _arguments(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Any]:
        """What each input of the graph stands for."""
        replaced = {id(self._network.get_parameter(name)): value for name, value in parameters.items()}
        rays = iter(self._named.tensors(inputs).values())
        state, constants = self._program.state_dict, self._program.constants
        arguments: dict[str, Any] = {}
        for spec in self._program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                # What is no tensor is a constant of the graph already.
                arguments[spec.arg.name] = Ray(next(rays))
            elif spec.kind == InputKind.PARAMETER:
                tensor = self._named.get_parameter(spec.target)
                arguments[spec.arg.name] = replaced.get(id(tensor), tensor)
            else:
                arguments[spec.arg.name] = state[spec.target] if spec.target in state else constants[spec.target]
        return arguments

    def _walk(self, arguments: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """The limit of the graph's output, operation by operation."""
        known: dict[fx.Node, Any] = {}
        peak = torch.zeros((), dtype=torch.float64, device=self.device)
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                known[node] = arguments[node.name]
            elif node.op == "output":
                return known[node.args[0][0]], peak
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = self._step(node, args, kwargs)
                if isinstance(known[node], Ray) and known[node].limit.numel():
                    peak = torch.maximum(peak, known[node].limit.abs().amax())
            # Of large networks all values at once would not fit in memory.
            for done in self._last_uses.get(node, ()):
                del known[done]
        raise NoLimitError("the network's graph has no output")

    def _step(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if not isinstance(target, torch._ops.OpOverload):
            raise NoLimitError(f"{_place(node)} cannot be treated: {node.target} is no plain operation")
        name = target._schema.name.rpartition("::")[2]
        if name == "_assert_tensor_metadata":
            # Of the tracer's own, about the precision that it saw.
            return None
        values = {argument.name: argument.default_value for argument in target._schema.arguments}
        values |= dict(zip(values, args, strict=False)) | dict(kwargs)
        if name == "view":
            # The strides of a limit need not be those that were traced.
            target, values = torch.ops.aten.reshape.default, {"self": values["self"], "shape": values["size"]}
        try:
            result = apply(target, name, values)
        except RefusalError as refusal:
            raise NoLimitError(f"{_place(node)} cannot be treated far from the data: {refusal}") from refusal
        if isinstance(result, Positions):
            raise NoLimitError(f"{_place(node)} cannot be treated far from the data: it returns positions, not values")
        return result


class _Outputs(nn.Module):
    """The network with its tensor of outputs taken out of what it returns."""

    def __init__(self, network: nn.Module, output: OutputFunction | None) -> None:
        super().__init__()
        self.network = network
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return output_tensor(self.network(*args, **kwargs), self._output)


def _in_double(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy in double precision whose tied parameters are apart, for only the first layer's are to be replaced."""
    copied = shared_copy(network).to(device, torch.float64)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return copied


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node those whose values nobody reads after it."""
    last = {node: node for node in graph.nodes}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node, end in last.items():
        uses.setdefault(end, []).append(node)
    return uses


def _place(node: fx.Node) -> str:
    """The module that an operation belongs to, as the user knows it."""
    stack = [entry for entry in (node.meta.get("nn_module_stack") or {}).values() if entry[0].startswith("module.")]
    if not stack:
        return "the network"
    path, kind = stack[-1]
    name = path.removeprefix("module.").removeprefix("network").removeprefix(".")
    label = f"module {name!r}" if name else "the model's own forward"
    return f"{label} ({str(getattr(kind, '__name__', kind)).rpartition('.')[2]})"
