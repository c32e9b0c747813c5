"""What becomes of each operation of a network as its input grows without bound: the rules behind `HomogeneousLimit`.

A value v(α) of a network on the input αx is CONSTANT if it does not depend on α, and a RAY with the limit r if v(α)/α → r as
α → ∞. Every rule below takes an operation whose limit is a known function of its arguments' limits, and each is an instance of
one of two facts.

1. op(αr)/α = op(r) for α > 0 (ReLU, pooling, reshaping, products with constants), and op is Lipschitz, so that
   |op(v(α))/α − op(r)| ≤ L·|v(α)/α − r| → 0.
2. |op(v) − op₀(v)| ≤ C for all v, where op₀ is of the first kind (a bias, GELU against ReLU, log-softmax against v − max v):
   then op(v(α))/α and op₀(v(α))/α have the same limit, for C/α → 0.

All else is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stfbnn.errors import InputError


class NoLimitError(InputError):
    """A network holds something of which no limit at infinity is known; the message names the module and the reason."""


class RefusalError(Exception):
    """An operation has no rule for such arguments; says why, without the place."""


@dataclass(frozen=True)
class Ray:
    """A value that grows in proportion to the input, with lim v(α)/α."""

    limit: Tensor


@dataclass(frozen=True)
class Positions:
    """Where maxima are: neither constant nor a ray, so that nothing may be computed from them."""


Values: TypeAlias = dict[str, Any]
Rule: TypeAlias = Callable[[Any, Values], Any]

_SELU_SCALE = 1.0507009873554805

# Positively homogeneous and Lipschitz in their first argument, all others being constants.
_HOMOGENEOUS = (
    "relu leaky_relu prelu _prelu_kernel abs neg positive alias detach clone contiguous lift_fresh_copy dropout "
    "feature_dropout view _unsafe_view reshape flatten unflatten permute transpose t numpy_T movedim unsqueeze squeeze expand "
    "repeat tile roll flip rot90 slice select narrow index index_select gather diagonal split split_with_sizes chunk unbind "
    "unfold im2col mean sum cumsum amax amin topk max_pool1d max_pool2d max_pool3d max_pool2d_with_indices "
    "max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pixel_shuffle "
    "pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_linear1d upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d"
)
# Sums and choices of several arguments: a constant among these counts for nothing beside a ray.
_ADDITIVE = {
    "add": ("self", "other"),
    "sub": ("self", "other"),
    "rsub": ("self", "other"),
    "maximum": ("self", "other"),
    "minimum": ("self", "other"),
    "where": ("self", "other"),
    "cat": ("tensors",),
    "stack": ("tensors",),
    "masked_fill": ("self", "value"),
    "select_scatter": ("self", "src"),
    "slice_scatter": ("self", "src"),
    "index_put": ("self", "values"),
    "copy": ("self", "src"),
    "fill": ("self", "value"),
}
# Products of two arguments, to which a third is added.
_PRODUCTS = {
    "mul": ("self", "other", None),
    "mm": ("self", "mat2", None),
    "bmm": ("self", "mat2", None),
    "mv": ("self", "vec", None),
    "matmul": ("self", "other", None),
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "baddbmm": ("batch1", "batch2", "self"),
    "addcmul": ("tensor1", "tensor2", "self"),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        ("input", "weight", "bias"),
    ),
}
# Within a constant of something homogeneous, in their first argument.
_NEARLY: dict[str, Callable[[Tensor, Values], Tensor]] = {
    **dict.fromkeys(
        ("gelu", "silu", "mish", "softplus", "hardswish", "celu", "threshold"), lambda ray, _: ray.clamp_min(0)
    ),
    "elu": lambda ray, values: ray.clamp_min(0) * values["scale"],
    "selu": lambda ray, _: ray.clamp_min(0) * _SELU_SCALE,
    **dict.fromkeys(("log_sigmoid", "log_sigmoid_forward"), lambda ray, _: ray.clamp_max(0)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), lambda ray, values: ray - ray.amax(values["dim"], keepdim=True)),
    "logsumexp": lambda ray, values: ray.amax(values["dim"], keepdim=values["keepdim"]),
}
# Of a tensor they take the shape alone.
_SHAPE_ONLY = frozenset(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"))

_NORMALISES = "it divides by a size of its own input, so that the output does not grow with the input"
_BOUNDED = "it is bounded, so that what follows it does not grow with the input"
_REFUSED = {
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _NORMALISES),
    **dict.fromkeys(("group_norm", "native_group_norm", "instance_norm", "local_response_norm"), _NORMALISES),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit"), f"with statistics of the batch {_NORMALISES}"),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), "a softmax is bounded; let the network return logits"),
    "scaled_dot_product_attention": "attention is a product of a bounded softmax with what it weighs",
    **dict.fromkeys(("relu6", "hardtanh", "tanh", "sigmoid", "hardsigmoid", "softsign", "erf", "sin", "cos"), _BOUNDED),
    "glu": "it is a product with a sigmoid gate",
    **dict.fromkeys(("embedding", "embedding_bag"), "its inputs are numbers of rows, which have no direction"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "a recurrent layer has bounded gates, or grows with each step"),
    "lerp": "interpolation has no rule here; write it as a sum of products",
}  # fmt: skip


def apply(op: Any, name: str, values: Values) -> Any:
    """The limit of one operation.

    Args:
        op: An operator of PyTorch, called by the names of its schema's arguments.
        name: Its name without overload, such as "conv2d".
        values: All its arguments by name; rays are `Ray`.

    Returns:
        A `Ray` or what the operation returns for constants; in a tuple where it returns several.

    Raises:
        RefusalError: No limit is known.
    """
    if any(isinstance(value, Positions) for value in _leaves(values)):
        raise RefusalError("it computes with the positions of maxima")
    if not any(isinstance(value, Ray) for value in _leaves(values)) or name in _SHAPE_ONLY:
        return op(**_limits(values))
    if name not in _RULES:
        raise RefusalError(_REFUSED.get(name, f"of the operation {name!r} no limit at infinity is known"))
    return _rays(_RULES[name](op, values))


def _homogeneous(op: Any, values: Values) -> Any:
    _require_only(values, (next(iter(values)),))
    if values.get("training", values.get("train", False)):
        raise RefusalError("it is random, as in training mode")
    return op(**_limits(values))


def _extreme(op: Any, values: Values) -> Any:
    """Of two tensors, or along a dimension of one."""
    return _additive(op, values, ("self", "other")) if "other" in values else _homogeneous(op, values)


def _additive(op: Any, values: Values, names: tuple[str, ...]) -> Any:
    _require_only(values, names)
    return op(**_limits({key: _without_constants(value) if key in names else value for key, value in values.items()}))


def _product(op: Any, values: Values, names: tuple[str, str, str | None]) -> Any:
    first, second, added = names
    _require_only(values, tuple(name for name in names if name is not None))
    rays = [name for name in (first, second) if isinstance(values[name], Ray)]
    if len(rays) > 1:
        raise RefusalError("it multiplies two activations, which grows faster than the input")
    changed = dict(values)
    if not rays:
        # Only what is added grows.
        changed[first] = _zero(values[first])
    if added is not None and values[added] is not None:
        changed[added] = _without_constants(values[added])
    return op(**_limits(changed))


def _einsum(op: Any, values: Values) -> Any:
    if sum(isinstance(value, Ray) for value in values["tensors"]) > 1:
        raise RefusalError("it multiplies two activations, which grows faster than the input")
    return op(**_limits(values))


def _quotient(op: Any, values: Values) -> Any:
    if isinstance(values["other"], Ray):
        raise RefusalError("it divides by an activation")
    if values.get("rounding_mode") is not None:
        raise RefusalError("it rounds")
    return op(**_limits(values))


def _nearly(_: Any, values: Values, limit: Callable[[Tensor, Values], Tensor]) -> Tensor:
    name = next(iter(values))
    _require_only(values, (name,))
    return limit(values[name].limit, values)


def _clamp(_: Any, values: Values) -> Tensor:
    _require_only(values, ("self",))
    low, high = values.get("min"), values.get("max")
    if low is not None and high is not None:
        raise RefusalError(_BOUNDED)
    bound = high if low is None else low
    if isinstance(bound, Tensor):
        raise RefusalError("its bounds are tensors; use torch.maximum or torch.minimum")
    _zero(bound)
    ray: Tensor = values["self"].limit
    return ray.clamp_max(0) if low is None else ray.clamp_min(0)


def _pad(op: Any, values: Values) -> Any:
    _require_only(values, ("self",))
    if values.get("mode", "constant") == "constant" and values.get("value"):
        raise RefusalError(f"it pads with the constant {values['value']}, not with zeros")
    return op(**_limits(values))


def _batch_norm(op: Any, values: Values) -> Any:
    """γ/√(v + ε) of each channel; running mean and β drop out."""
    _require_only(values, ("input",))
    if values.get("training", False) or values["running_var"] is None:
        raise RefusalError(_REFUSED["batch_norm"])
    scale: Tensor = (values["running_var"] + values["eps"]).rsqrt()
    if values["weight"] is not None:
        scale = scale * values["weight"]
    ray: Tensor = values["input"].limit
    result = ray * scale.view(-1, *[1] * (ray.ndim - 2))
    # One of its forms also returns statistics, empty in evaluation mode.
    return (result,) if len(op._schema.returns) > 1 else result


def _cast(_: Any, values: Values) -> Tensor:
    """A limit is computed in double precision, whatever the network casts to."""
    dtype = values.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise RefusalError(f"it rounds activations to {dtype}")
    ray: Tensor = values["self"].limit
    return ray


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_HOMOGENEOUS.split(), _homogeneous),
    **{name: partial(_additive, names=names) for name, names in _ADDITIVE.items()},
    **{name: partial(_product, names=names) for name, names in _PRODUCTS.items()},
    **{name: partial(_nearly, limit=limit) for name, limit in _NEARLY.items()},
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("to", "_to_copy"), _cast),
    **dict.fromkeys(("max", "min"), _extreme),
    "div": _quotient,
    "einsum": _einsum,
}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for part in value:
        yield from _leaves(part)


def _limits(value: Any) -> Any:
    """With every ray replaced by its limit."""
    if isinstance(value, Mapping):
        return {key: _limits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_limits(part) for part in value]
    return value.limit if isinstance(value, Ray) else value


def _rays(result: Any) -> Any:
    if isinstance(result, list | tuple):
        return tuple(map(_rays, result))
    if not isinstance(result, Tensor):
        return result
    return Ray(result) if result.is_floating_point() else Positions()


def _require_only(values: Values, names: tuple[str, ...]) -> None:
    for key, value in values.items():
        if key not in names and any(isinstance(part, Ray) for part in _leaves(value)):
            raise RefusalError(f"its argument {key!r} depends on the network's input")


def _without_constants(value: Any) -> Any:
    """Zeros in place of constants, for lim c/α = 0 where c is finite."""
    if isinstance(value, list | tuple):
        return [_without_constants(part) for part in value]
    return value if isinstance(value, Ray) else _zero(value)


def _zero(value: Any) -> Any:
    finite = bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)
    if not finite:
        raise RefusalError("it sets activations to an infinite constant")
    return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)
