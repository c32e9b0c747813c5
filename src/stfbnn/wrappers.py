"""Looking through what a model may be wrapped in: parallel, compiled, or set up by a trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from stfbnn.errors import InputError


def unwrap(model: nn.Module) -> nn.Module:
    """Take a model out of what it is wrapped in, however deep.

    Known are ``DataParallel``, ``DistributedDataParallel``, what ``torch.compile`` returns and what Lightning
    Fabric's ``setup`` returns (by either of the two package names that it ships under).

    Args:
        model: A module, wrapped or plain.

    Returns:
        The plain module, which shares everything with the wrapped one.

    Raises:
        InputError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    while True:
        inner: Any = None
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        # The compiler's and Fabric's classes are known by their marks: importing either is slow or optional.
        elif type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            inner = model._orig_mod
        elif type(model).__name__ == "_FabricModule" and "_forward_module" in model._modules:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
