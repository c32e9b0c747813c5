"""Layers whose parameters never change, computed so that they keep nothing but those parameters for the backward pass.

PyTorch's batch norm and convolution remember their INPUT for the backward pass even where no gradient of a weight is
asked for. With frozen weights both are affine in their input, so its gradient needs the weights alone.

The modules are converted in place, by their class: names, tensors, hooks and every reference to the module stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stfbnn.errors import InputError

# The numbers of dimensions of an input that each exact class takes.
NORM_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}


class FrozenAffine(_BatchNorm):
    """Batch norm with frozen statistics, computed as the affine map y = x·scale + shift of each channel.

    scale = γ / √(running variance + ε) and shift = β − running mean · scale. The batch norm's own parameters, statistics
    and settings stay readable, but changing them no longer changes the map. Made by :func:`freeze_norm`.
    """

    scale: Tensor
    shift: Tensor
    dimensions: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that batch norm has
        """Map (N, C) or (N, C, ...) to the same shape, dtype and memory format."""
        if input.ndim not in self.dimensions:
            raise ValueError(f"expected input of {self.dimensions} dimensions, but it has {input.ndim}")
        shape = (-1, *[1] * (input.ndim - 2))
        # addcmul keeps its factor and not x, since the factor needs no gradient; mixed dtypes are computed in the wider.
        output = torch.addcmul(self.shift.view(shape), input, self.scale.view(shape))
        return output.to(input.dtype)


class FoldedNorm(nn.Identity):
    """What is left of a batch norm that was folded into the layer before it: the identity on inputs of one rank."""

    rank: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that Identity has
        """Return the input.

        Raises:
            InputError: It has another number of dimensions than at the time of folding, where channels are elsewhere.
        """
        if input.ndim != self.rank:
            raise InputError(
                f"the batch norm here was folded for inputs of {self.rank} dimensions, but one of {input.ndim} arrived; "
                f"give inputs like the example inputs, or switch folding off"
            )
        return input


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The affine map of a batch norm in eval mode.

    Args:
        norm: One of the classes of ``NORM_DIMENSIONS`` with running statistics.

    Returns:
        scale and shift, each (C,) in float64 on the CPU.
    """
    norm = cast(_BatchNorm, norm)
    assert norm.running_mean is not None  # noqa: S101 - the caller has checked, said for the type checker
    assert norm.running_var is not None  # noqa: S101
    scale = (norm.running_var.detach().cpu().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().cpu().double()
    shift = -norm.running_mean.detach().cpu().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().cpu().double()
    return scale, shift


def freeze_norm(norm: nn.Module) -> None:
    """Turn a batch norm in eval mode into a :class:`FrozenAffine`, in place."""
    statistics = cast(_BatchNorm, norm).running_var
    assert statistics is not None  # noqa: S101 - the caller has checked, said for the type checker
    scale, shift = norm_affine(norm)
    dimensions = NORM_DIMENSIONS[type(norm)]
    frozen = cast(FrozenAffine, norm)
    frozen.__class__ = FrozenAffine
    frozen.dimensions = dimensions
    # Not persistent: they follow from what the state dict already holds.
    frozen.register_buffer("scale", scale.to(statistics), persistent=False)
    frozen.register_buffer("shift", shift.to(statistics), persistent=False)


class FrozenConv1d(nn.Conv1d):
    """A 1-d convolution that keeps no input for the backward pass while its weight needs no gradient."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return _convolve(self, super()._conv_forward, input, weight, bias)


class FrozenConv2d(nn.Conv2d):
    """A 2-d convolution that keeps no input for the backward pass while its weight needs no gradient."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return _convolve(self, super()._conv_forward, input, weight, bias)


class FrozenConv3d(nn.Conv3d):
    """A 3-d convolution that keeps no input for the backward pass while its weight needs no gradient."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return _convolve(self, super()._conv_forward, input, weight, bias)


FROZEN_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
    nn.Conv3d: FrozenConv3d,
}


def freeze_convolution(layer: nn.Module) -> None:
    """Turn a convolution of an exact class of ``FROZEN_CONVOLUTIONS`` into its frozen form, in place."""
    layer.__class__ = FROZEN_CONVOLUTIONS[type(layer)]


class FrozenConvolution(torch.autograd.Function):
    """y = w ⋆ x + b with the gradient of x alone: w's adjoint, the transposed convolution, applied to that of y.

    The backward pass is made of differentiable operations, so it can be differentiated again; ``vmap`` and forward-mode
    derivatives work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        """Convolve x (N, C, ...) with weight (K, C / groups, ...)."""
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - the signature is given
        """Keep the weight, the settings and the size of the input."""
        x, weight, _, *settings = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)
        ctx.settings = settings
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """The gradient of x by the transposed convolution."""
        (gradient,) = gradients
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Rows and columns at the far edge that a stride > 1 never reached: their gradient is zero.
        unreached = [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                ctx.size, gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        ]
        result = torch.convolution(gradient, weight, None, stride, padding, dilation, True, unreached, groups)
        return result, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The map without its bias, applied to the tangent of x."""
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        return torch.convolution(tangents[0], weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


# What keeps its output for its own backward pass, so that a convolution which keeps it too takes no more memory.
_KEPT_BY_ITS_MAKER = frozenset({"ReluBackward0", "SigmoidBackward0", "TanhBackward0"})


def _convolve(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or not (torch.is_grad_enabled() and x.requires_grad) or x.ndim != weight.ndim:
        return plain(x, weight, bias)
    # The compiler takes no function with a forward-mode rule, and decides by itself what to keep.
    if torch.compiler.is_compiling():
        return plain(x, weight, bias)
    # PyTorch's own is a little faster, and where x is kept anyway it keeps nothing more.
    if type(x.grad_fn).__name__ in _KEPT_BY_ITS_MAKER:
        return plain(x, weight, bias)
    padding = _symmetric_padding(layer)
    if padding is None:
        return plain(x, weight, bias)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        # Here and not inside the function, whose backward pass runs outside of autocast.
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    settings = (layer.stride, padding, layer.dilation, layer.groups)
    result: Tensor = FrozenConvolution.apply(x, weight, bias, *settings)  # type: ignore[no-untyped-call]
    return result


def _symmetric_padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...] | None:
    """The zeros put before and after each dimension; None where "same" needs more on one side."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if isinstance(layer.padding, str):
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(n % 2 for n in total) else tuple(n // 2 for n in total)
    return layer.padding
