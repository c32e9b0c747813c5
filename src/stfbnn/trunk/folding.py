"""Make a frozen trunk fast and lean without changing what it computes.

Batch norm in eval mode is an affine map of each channel. Where the trace of the network proves that nothing else sees
the layer before it, the map goes into that layer's weights; otherwise it is computed in place of the norm. Convolutions
stop keeping their inputs for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from stfbnn.batches import Inputs, as_inputs
from stfbnn.errors import InputError, LayerError
from stfbnn.trunk.dataflow import LINEAR_LAYERS, find_pairs
from stfbnn.trunk.frozen_ops import (
    FROZEN_CONVOLUTIONS,
    NORM_DIMENSIONS,
    FoldedNorm,
    freeze_convolution,
    freeze_norm,
    norm_affine,
)
from stfbnn.trunk.verification import FunctionCheck


class FirstLayerAffine(NamedTuple):
    """The map y = x·scale + shift of the first layer's output channels that the caller now has to apply; each (C,)."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class FoldingReport:
    """What :func:`fold` did, by the names of modules.

    Attributes:
        folded: Batch norms whose map went into the weights of a layer, with that layer.
        local: Batch norms that are computed as an affine map in their place, with the reason why they were not folded.
        left: Batch norms that stay as they were, with the reason.
        convolutions: Convolutions that no longer keep their input.
        first_layer_affine: Set if the norm after the FIRST layer was taken out. The network is then right only with
            parameters from :func:`apply_first_layer_affine` in place of that layer's own.
    """

    folded: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    convolutions: tuple[str, ...] = ()
    first_layer_affine: FirstLayerAffine | None = None

    def record(self) -> dict[str, Any] | None:
        """What was folded, JSON-able; None where the network is as it came, so that inputs are not needed to restore it."""
        if not (self.folded or self.local or self.left or self.convolutions):
            return None
        return {
            "folded": dict(self.folded),
            "local": sorted(self.local),
            "left": sorted(self.left),
            "convolutions": len(self.convolutions),
        }

    def summary(self) -> str:
        """Say in a few lines what was done and why the rest was not."""
        count = len(self.folded) + len(self.local) + len(self.left)
        lines = [
            f"{count} batch norms: {len(self.folded)} folded into the layer before them, {len(self.local)} computed as "
            f"an affine map, {len(self.left)} left as they were; {len(self.convolutions)} convolutions keep no input"
        ]
        if self.first_layer_affine is not None:
            lines.append("  the norm after the first layer is applied to that layer's weights")
        lines += [f"  {name} was not folded: {reason}" for name, reason in self.local.items()]
        lines += [f"  {name} was left: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fold(network: nn.Module, first_layer_name: str, example_inputs: Inputs, enabled: bool = True) -> FoldingReport:
    """Simplify a frozen network in place, keeping its function.

    The function is kept for every input of the same kind as the example (same optional arguments, same ranks), for every
    value of the first layer's parameters, and through ``.to(device)``, ``.to(memory_format=...)`` and vmap. New weights
    are new tensors: storage that is shared with the user's network is never written. After folding, the network is
    compared with what it was, on the example and on a perturbed copy of it, with perturbed weights in the first layer;
    if they differ by more than rounding, all folding is undone. Values that a forward method stores outside of tensors'
    flow (in a global, say) are not looked at.

    Args:
        network: A copy made by :func:`stfbnn.trunk.shared_copy`.
        first_layer_name: The layer whose parameters are substituted at each call; "" if the network is that layer. It
            and what is inside it are left alone, but for a frozen bias of zeros where it has none and needs one.
        example_inputs: A tensor for ``network(x)``, a tuple for ``network(*x)``, a mapping for ``network(**x)``.
        enabled: False leaves the network as it is.

    Returns:
        What was done.

    Raises:
        LayerError: There is no module of that name.
        InputError: The network is not a frozen copy in eval mode, or does not run on the example.
    """
    try:
        network.get_submodule(first_layer_name)
    except AttributeError as error:
        raise LayerError(f"the network has no module {first_layer_name!r}; choose a name of named_modules()") from error
    _require_frozen(network)
    if not enabled:
        return FoldingReport()

    def outside(name: str) -> bool:
        return bool(first_layer_name) and name != first_layer_name and not name.startswith(f"{first_layer_name}.")

    norms: list[str] = []
    left: dict[str, str] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = _why_left(module) if outside(name) else "it belongs to the first layer"
            if reason:
                left[name] = reason
            else:
                norms.append(name)
    folded, local, affine = _fold_norms(network, norms, first_layer_name, as_inputs(example_inputs))
    for name in local:
        freeze_norm(network.get_submodule(name))
    convolutions = [
        name for name, module in network.named_modules() if type(module) in FROZEN_CONVOLUTIONS and outside(name)
    ]
    for name in convolutions:
        freeze_convolution(network.get_submodule(name))
    return FoldingReport(folded, local, left, tuple(convolutions), affine)


def apply_first_layer_affine(
    layer: nn.Module, parameters: Mapping[str, Tensor], scale: Tensor, shift: Tensor
) -> dict[str, Tensor]:
    """Put the batch norm that followed the first layer into a draw of that layer's parameters; differentiable.

    BN(W ⋆ x + b) = (scale·W) ⋆ x + (scale·b + shift), scale along the output channels.

    Args:
        layer: The first layer in the folded network: a Linear, convolution or transposed convolution.
        parameters: Its parameters by their own names ("weight", "bias"); one that is missing is taken from ``layer``.
        scale: (C,), from :attr:`FoldingReport.first_layer_affine`.
        shift: (C,).

    Returns:
        The parameters to substitute, always with a bias, in the weight's dtype and on its device. Keep scale and shift on
        that device (as buffers of what calls this), or they are copied there at each call.

    Raises:
        LayerError: ``layer`` is of another kind.
    """
    if type(layer) not in LINEAR_LAYERS:
        raise LayerError(
            f"a {type(layer).__name__} takes no folded batch norm; expected one of "
            f"{', '.join(kind.__name__ for kind in LINEAR_LAYERS)}"
        )
    own = layer._parameters
    weight, bias = parameters.get("weight", own["weight"]), parameters.get("bias", own["bias"])
    assert weight is not None  # noqa: S101 - such a layer has a weight, said for the type checker
    scale, shift = scale.to(weight), shift.to(weight)
    shifted = shift if bias is None else bias * scale + shift
    return {**parameters, "weight": weight * _along_output(layer, scale), "bias": shifted}


def _along_output(layer: nn.Module, scale: Tensor) -> Tensor:
    channel, rank = LINEAR_LAYERS[type(layer)]
    shape = [1] * rank
    shape[channel] = -1
    return scale.view(shape)


def _require_frozen(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            raise InputError(f"parameter {name!r} requires a gradient; fold takes a copy made by shared_copy(model)")
    for name, module in network.named_modules():
        if module.training:
            raise InputError(f"module {name!r} is in training mode; fold takes a copy made by shared_copy(model)")


def _why_left(norm: nn.modules.batchnorm._BatchNorm) -> str:
    if type(norm) not in NORM_DIMENSIONS:
        return f"its class {type(norm).__name__} may compute something else"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics and normalises by those of each batch"
    return ""


def _fold_norms(
    network: nn.Module, norms: list[str], first_layer_name: str, inputs: Inputs
) -> tuple[Mapping[str, str], dict[str, str], FirstLayerAffine | None]:
    """Fold what can be folded, check it, and say what was folded into what and why the rest was not."""
    if not norms:
        return {}, {}, None
    flow = find_pairs(network, norms, first_layer_name, inputs)
    unfolded = dict(flow.reasons)
    if not flow.pairs:
        return {}, unfolded, None
    check = FunctionCheck(network, first_layer_name, inputs)
    first_layer = network.get_submodule(first_layer_name)
    affine: FirstLayerAffine | None = None
    with ExitStack() as undo:
        for norm, layer in flow.pairs.items():
            done = _fold_pair(network.get_submodule(norm), network.get_submodule(layer), first_layer, undo)
            affine = done or affine
        weights = check.weights
        if affine is not None:
            weights = apply_first_layer_affine(first_layer, weights, *affine)
        problem = check.problem(weights)
        if not problem:
            undo.pop_all()
            return flow.pairs, unfolded, affine
    return {}, unfolded | dict.fromkeys(flow.pairs, problem), None


def _fold_pair(norm: nn.Module, layer: nn.Module, first_layer: nn.Module, undo: ExitStack) -> FirstLayerAffine | None:
    """Take one norm out; put its map into the layer, or return it if the layer is the first; note how to go back."""
    scale, shift = norm_affine(norm)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None  # noqa: S101 - such a layer has a weight, said for the type checker
    undo.callback(_restore, layer, weight, bias, norm, type(norm))
    affine: FirstLayerAffine | None = None
    if layer is first_layer:
        affine = FirstLayerAffine(scale.to(weight), shift.to(weight))
        if bias is None:
            layer.register_parameter("bias", nn.Parameter(torch.zeros_like(affine.shift), requires_grad=False))
    else:
        own = {"weight": weight.cpu().double()} | ({} if bias is None else {"bias": bias.cpu().double()})
        for key, value in apply_first_layer_affine(layer, own, scale, shift).items():
            layer.register_parameter(key, nn.Parameter(value.to(weight), requires_grad=False))
    norm.__class__ = FoldedNorm
    cast(FoldedNorm, norm).rank = LINEAR_LAYERS[type(layer)][1]
    return affine


def _restore(
    layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None, norm: nn.Module, kind: type[nn.Module]
) -> None:
    layer._parameters.update({"weight": weight, "bias": bias})
    norm.__class__ = kind
    del norm.rank
