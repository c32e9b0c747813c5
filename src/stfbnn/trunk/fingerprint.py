"""Hashes of a network's tensors: is this the network that a posterior was inferred for?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """Hash the values of a network's state.

    What counts is what a state dict would hold: all parameters and the persistent buffers, a tied tensor under each of
    its names. Device, memory layout, mode and ``requires_grad`` do not count; dtype does.

    Args:
        model: The network.
        exclude: Full names of parameters or buffers that are left out, such as the first layer's own.

    Returns:
        64 hexadecimal digits: SHA-256 over name, dtype, shape and bytes of each tensor, sorted by name.

    Raises:
        InputError: A name in ``exclude`` does not exist, or a tensor has no values (meta device).
    """
    digest = hashlib.sha256()
    for name, tensor in _state(model, exclude):
        if tensor.is_meta:
            raise InputError(
                f"{name!r} is on the meta device and has no values to hash; load the model's weights first"
            )
        digest.update(_header(name, tensor))
        digest.update(raw_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()


def structure_fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """Hash names, dtypes and shapes of a network's state, but not its values.

    Two networks that differ in this are different architectures; two that agree here and differ in
    :func:`fingerprint` are one architecture with other weights.

    Args:
        model: The network.
        exclude: Full names that are left out.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: A name in ``exclude`` does not exist.
    """
    digest = hashlib.sha256()
    for name, tensor in _state(model, exclude):
        digest.update(_header(name, tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Tensor:
    """The values of a tensor in row-major order as one flat tensor of bytes, on the tensor's device."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _state(model: nn.Module, exclude: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{key}" if prefix else key] = tensor
    unknown = sorted(set(exclude) - set(tensors))
    if unknown:
        raise InputError(
            f"exclude names {unknown}, which the model does not have; it has {sorted(tensors)[:8]} and more"
        )
    for name in sorted(set(tensors) - set(exclude)):
        yield name, tensors[name]


def _header(name: str, tensor: Tensor) -> bytes:
    # As JSON, so that no two different headers run into the same bytes.
    return json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
