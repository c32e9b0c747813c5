"""Which module of a network is its first layer: first in execution order on an example input.

Registration order says how the author of a model wrote its constructor, not what the data meet first, so the
model is run once and watched. The first layer is the first module in execution order that owns parameters and
inside whose call no other module is called, normalisations and learned activations being passed over.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from stfbnn.batches import Inputs, as_inputs, call_model, map_tensors, tensors_of
from stfbnn.errors import InputError, LayerError
from stfbnn.randomness import seeded
from stfbnn.trunk.independence import inputs_left_alone
from stfbnn.wrappers import unwrap

_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORMALISATION_NAME = re.compile(r"(Batch|Layer|Group|Instance|RMS|Response)Norm(\dd)?$")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LISTED = 8


@dataclass(frozen=True)
class FirstLayer:
    """The layer that is to become Bayesian, by names.

    Attributes:
        name: Dotted name within the plain (unwrapped) model; "" where the model itself is the layer.
        parameters: Names of its parameters under the layer's own, such as ("weight", "bias").
        calls: How many times it is called in one forward pass.
        tied: Full names of the other places in the model that hold one of its parameter tensors: a parameter
            of another module, or the same module registered under another name.
        skipped: Normalisations and learned activations that run before it and were passed over.
    """

    name: str
    parameters: tuple[str, ...]
    calls: int
    tied: tuple[str, ...]
    skipped: tuple[str, ...]


def locate_first_layer(model: nn.Module, example_inputs: Any, layer: str | None = None) -> FirstLayer:
    """Find the first layer of ``model``, or check the one that the user names.

    The model is run once on ``example_inputs``, in eval mode and without gradients, and is left as it was: the
    mode of each submodule, buffers, hooks and the global random states.

    Args:
        model: The trained network, plain or wrapped.
        example_inputs: What the network takes, on its device: a tensor is given as ``model(x)``, a tuple as
            ``model(*xs)``, a mapping as ``model(**xs)``.
        layer: Dotted name of the layer, as ``model.named_modules()`` gives it; None to find it. Any module
            with parameters that the forward pass calls can be named, a normalisation or a block too.

    Returns:
        The layer's names, its number of calls and what was passed over.

    Raises:
        InputError: The model is no module, or it cannot be run on ``example_inputs``.
        LayerError: The model has no layer that can be made Bayesian, or the named layer cannot be.
    """
    plain = unwrap(model)
    _require_runnable(plain)
    trace = _trace(plain, as_inputs(example_inputs))
    if layer is None:
        name, skipped = _first(plain, trace)
    else:
        name, skipped = layer, ()
        _require_named(plain, name, trace)
        _require_called(plain, name, trace)
    module = plain.get_submodule(name)
    _require_samplable(name, module)
    return FirstLayer(
        name=name,
        parameters=tuple(own for own, _ in module.named_parameters()),
        calls=trace.calls[id(module)],
        tied=_tied(plain, name),
        skipped=skipped,
    )


def parametric_leaves(model: nn.Module, example_inputs: Any) -> list[str]:
    """Name the modules that own parameters and call no other module, in execution order.

    Normalisations and learned activations are among them. The model is left as it was.

    Args:
        model: The network, plain or wrapped.
        example_inputs: What the network takes, as for :func:`locate_first_layer`.

    Returns:
        Dotted names within the plain model, by first call; a module that is called twice is named once.

    Raises:
        InputError: The model is no module, or it cannot be run on ``example_inputs``.
        LayerError: The model has lazy parameters that were never initialised, or is compiled beyond inspection.
    """
    plain = unwrap(model)
    _require_runnable(plain)
    return _trace(plain, as_inputs(example_inputs)).leaves(plain)


@dataclass
class _Trace:
    """What one forward pass called: names by first call, calls by module identity, and who called others."""

    order: list[str] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)
    callers: set[int] = field(default_factory=set)
    running: list[nn.Module] = field(default_factory=list)

    def enter(self, name: str, module: nn.Module) -> None:
        if self.running:
            self.callers.add(id(self.running[-1]))
        self.running.append(module)
        if id(module) not in self.calls:
            self.order.append(name)
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1

    def leave(self) -> None:
        self.running.pop()

    def leaves(self, model: nn.Module) -> list[str]:
        modules = ((name, model.get_submodule(name)) for name in self.order)
        return [name for name, module in modules if id(module) not in self.callers and _size(module)]


def _trace(model: nn.Module, inputs: Inputs) -> _Trace:
    devices = {parameter.device for parameter in model.parameters()}
    found = {tensor.device for tensor in tensors_of(inputs)}
    # Some inputs belong on the CPU whatever the device (the lengths of packed sequences), but never all of them.
    if devices and not devices & found:
        raise InputError(
            f"example_inputs are on {_join(found)} and the model is on {_join(devices)}; move them together, "
            f"for instance with example_inputs.to({str(min(devices, key=str))!r})"
        )
    trace = _Trace()
    handles = []
    inside = {id(part) for module in model.modules() for part in _parametrization_parts(module)}
    try:
        for name, module in model.named_modules():
            if id(module) in inside:
                continue

            def before(module: nn.Module, _args: Any, name: str = name) -> None:
                trace.enter(name, module)

            def after(_module: nn.Module, _args: Any, _output: Any) -> None:
                trace.leave()

            handles.append(module.register_forward_pre_hook(before, prepend=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        # A copy: a model that writes into its inputs is refused, but not before they are written.
        copies = map_tensors(inputs, torch.clone)
        with _untouched(model), _eager(), seeded(0, "locate"), torch.no_grad(), inputs_left_alone(copies):
            try:
                call_model(model, copies)
            except Exception as error:
                raise InputError(
                    f"the model could not be run on example_inputs ({_describe(inputs)}): "
                    f"{type(error).__name__}: {error}. They must be what the model takes: a tensor is given as "
                    f"model(x), a tuple as model(*xs), a mapping as model(**xs)"
                ) from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode for a block, and afterwards each mode, buffer and self-normalising weight as it was.

    The flags are set one by one because ``train()`` and ``eval()`` may be overridden to do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # An embedding with max_norm rescales its own rows whenever they are looked up.
    weights = [
        (parameter, parameter.detach().clone())
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
        for parameter in module.parameters(recurse=False)
    ]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
            for parameter, saved in weights:
                if not torch.equal(parameter, saved):
                    parameter.copy_(saved)


def _eager() -> Any:
    # Compiled submodules would not see hooks added later. Nothing can be compiled while the compiler is not loaded,
    # and loading it takes seconds.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _first(model: nn.Module, trace: _Trace) -> tuple[str, tuple[str, ...]]:
    """The first layer's name, and what was passed over before it."""
    if not _size(model):
        raise LayerError(
            "the model has no parameters, so nothing in it can be made Bayesian; quantised layers keep their "
            "weights elsewhere: give the floating-point model"
        )
    leaves = set(trace.leaves(model))
    skipped: list[str] = []
    for name in trace.order:
        module = model.get_submodule(name)
        if hasattr(module, "_packed_params"):
            raise LayerError(
                f"the layer {name!r} ({type(module).__name__}) that the data meet first is quantised, and posteriors are over "
                f"real numbers; give the floating-point model, or name a later layer with layer="
            )
        if not _size(module):
            continue
        if isinstance(module, _NORMALISATIONS) or (name in leaves and is_passed_over(module)):
            skipped.append(name)
        elif name in leaves and not isinstance(module, torch.fx.GraphModule):
            return name, tuple(skipped)
    if skipped:
        raise LayerError(
            f"the only layers with parameters that the model calls are normalisations or activations "
            f"({_listing(skipped)}), which are passed over; to make one of them Bayesian, name it with layer="
        )
    if isinstance(model, torch.fx.GraphModule):
        raise LayerError(
            "the model is an exported graph, whose layers cannot be told apart because it calls no modules; "
            "give the model that it was exported from"
        )
    raise LayerError(
        "no module that the model calls on example_inputs has parameters of its own and calls no other module; "
        "name the module that is to become Bayesian with layer="
    )


def is_passed_over(leaf: nn.Module) -> bool:
    """Whether a leaf is a normalisation (another library's by its name and thin weights) or a learned activation."""
    if isinstance(leaf, (*_NORMALISATIONS, nn.PReLU)):
        return True
    named = any(_NORMALISATION_NAME.search(kind.__name__) for kind in type(leaf).__mro__)
    return named and all(sum(size > 1 for size in parameter.shape) <= 1 for parameter in leaf.parameters())


def _require_runnable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise LayerError("the model is a TorchScript module, whose layers cannot be replaced; give the original model")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise LayerError(
                f"{name!r} belongs to a lazy module that was never initialised, so the model is not "
                f"trained; run it once on real inputs, train it or load its weights, and try again"
            )
        if tensor.is_meta:
            raise LayerError(f"{name!r} is on the meta device and has no values; load the model's weights")


def _require_named(model: nn.Module, layer: str, trace: _Trace) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if layer not in names:
        close = difflib.get_close_matches(layer, [name for name in names if name], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        leaves = _listing(trace.leaves(model))
        raise LayerError(f"the model has no module {layer!r}; {hint}Layers with parameters, as called: {leaves}")
    if not any(True for _ in model.get_submodule(layer).parameters()):
        kind = type(model.get_submodule(layer)).__name__
        raise LayerError(f"layer {layer!r} ({kind}) has no parameters, so it cannot become Bayesian; name another")


def _require_called(model: nn.Module, layer: str, trace: _Trace) -> None:
    if id(model.get_submodule(layer)) in trace.calls:
        return
    leaves = trace.leaves(model)
    users = [name for name in leaves if layer.startswith(f"{name}." if name else "")]
    reason = (
        f"{users[0]!r} reads its parameters without calling it, so name {users[0]!r} instead"
        if users
        else "the forward pass does not reach it; name one of those that it calls"
    )
    raise LayerError(
        f"layer {layer!r} is never called when the model runs on example_inputs: {reason}. "
        f"Called, in order: {_listing(leaves)}"
    )


def _require_samplable(name: str, module: nn.Module) -> None:
    another = "; name another layer with layer="
    seen: dict[tuple[torch.device, int], str] = {}
    for own, parameter in module.named_parameters():
        where = f"layer {name!r} ({type(module).__name__}): parameter {own!r}"
        if parameter.is_complex():
            raise LayerError(f"{where} is complex ({parameter.dtype}), and posteriors are over real numbers{another}")
        if parameter.dtype not in _DTYPES:
            raise LayerError(
                f"{where} is {parameter.dtype}, a quantised or integer type, and posteriors are over real numbers; "
                f"give the floating-point model, or name another layer with layer="
            )
        if not bool(torch.isfinite(parameter).all()):
            raise LayerError(f"{where} holds NaN or infinite values, so the model is not usable; train it again")
        if parameter.numel() and (twin := seen.setdefault(_address(parameter), own)) != own:
            raise LayerError(
                f"{where} lies in the memory of {twin!r} without being the same Parameter, so that one of two draws would be "
                f"lost; tie them by assigning the Parameter itself{another}"
            )
    for part in module.modules():
        if getattr(part, "max_norm", None) is not None:
            raise LayerError(
                f"layer {name!r} rescales its own weight in place (max_norm={part.max_norm}), which cannot be done "
                f"to sampled weights; set max_norm to None{another}"
            )
        if getattr(part, "padding_idx", None) is not None and is_parametrized(part, "weight"):
            raise LayerError(
                f"layer {name!r} computes an embedding's weight by a parametrization, under which its row for padding cannot "
                f"be kept; make the parametrization permanent with torch.nn.utils.parametrize.remove_parametrizations{another}"
            )


def _tied(model: nn.Module, name: str) -> tuple[str, ...]:
    prefix = f"{name}." if name else ""
    # By address too: two Parameter objects may be made over one memory.
    addresses = {_address(parameter) for parameter in model.get_submodule(name).parameters() if parameter.numel()}
    places = model.named_parameters(remove_duplicate=False)
    return tuple(
        place
        for place, parameter in places
        if not place.startswith(prefix) and parameter.numel() and _address(parameter) in addresses
    )


def _address(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()


def _parametrization_parts(module: nn.Module) -> Iterator[nn.Module]:
    # Reading a parametrised weight calls modules; they are part of the layer and not layers of their own.
    if is_parametrized(module):
        parts = module.parametrizations
        if isinstance(parts, nn.Module):
            yield from parts.modules()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe(inputs: Inputs) -> str:
    return ", ".join(f"{str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}" for tensor in tensors_of(inputs))


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown or "none"


def _join(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))
