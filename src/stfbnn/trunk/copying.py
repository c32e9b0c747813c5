"""A frozen copy of the user's network that shares every tensor with it, so that it costs no memory.

The copy is what stage two runs: it is in eval mode and needs no gradients, while the user's own modules keep their
mode, their ``requires_grad`` and their hooks. No code of the user's modules is executed to make it.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stfbnn.errors import LayerError
from stfbnn.wrappers import unwrap

_Module = TypeVar("_Module", bound=nn.Module)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a network's modules but not its tensors.

    Every parameter and buffer of the copy is another tensor object over the SAME storage: an in-place write to one is
    seen by the other. Parameters need no gradient in the copy; tensors that are tied stay tied; all modules are in
    eval mode (a later ``.train()`` on the copy is the caller's to prevent). Hooks are a part of what the model computes
    and are copied: a function stays the same function, a bound method is bound to a copy of its object.

    Args:
        model: The user's network; wrappers around it are taken off first. It is not changed.

    Returns:
        The frozen copy, in eval mode.

    Raises:
        LayerError: The network cannot be copied in this way; the message names the module or attribute and the remedy.
    """
    model = unwrap(model)
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        _require_copyable(name, module)
        _share_tensors(name, module, memo)
        if vars(module).get("_trainer") is not None:
            # Lightning's modules refer to their trainer, and through it to all data sets: the copy does not.
            memo[id(vars(module)["_trainer"])] = None
    # The memo as it is now, kept apart: deepcopy adds to the one it is given.
    shared = {id(value) for value in memo.values()}
    originals = {id(module) for module in model.modules()}
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise LayerError(
            f"the model cannot be copied{_find_obstacle(model)}: {error}. Remove or replace what cannot be copied "
            f"(open files, locks, cached activations) before making the model Bayesian"
        ) from error
    for name, parameter in result.named_parameters():
        if id(parameter) not in shared:
            raise LayerError(
                f"the module that owns {name!r} defines its own __deepcopy__, which makes new tensors instead of "
                f"sharing the model's; remove that method or let it pass its memo on to copy.deepcopy"
            )
    for name, module in result.named_modules():
        if _refers_to(vars(module).get("forward"), originals):
            raise LayerError(
                f"the forward method of {_label(name)} was replaced by a function that calls the original model, so a "
                f"copy would still run the original; undo that replacement first"
            )
        module.training = False
    return result


def _label(name: str) -> str:
    return f"module {name!r}" if name else "the model itself"


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _require_copyable(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise LayerError(
            f"{_label(name)} is a TorchScript module, whose weights cannot be substituted; pass the Python module from "
            f"which it was scripted or traced"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise LayerError(
            f"{_label(name)} rescales its own weight in place whenever it is called (max_norm={module.max_norm}), which would "
            f"change the trained model; rescale its rows once and set max_norm to None"
        )
    if module.training and type(module).train is not nn.Module.train:
        # Running an overridden train(False) on the copy could write into the shared tensors (merged adapters do that).
        raise LayerError(
            f"{_label(name)} ({type(module).__name__}) is in training mode and has a train() method of its own; "
            f"call model.eval() first, so that its switch to eval mode happens in the model itself"
        )


def _share_tensors(name: str, module: nn.Module, memo: dict[int, Any]) -> None:
    """Enter the tensors of one module into deepcopy's memo, each as a frozen alias of itself."""
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        full = _joined(name, key)
        if is_lazy(tensor):
            raise LayerError(f"{full!r} has no shape yet because its module is lazy; run the model once on an example")
        if tensor.is_meta:
            raise LayerError(f"{full!r} is on the meta device and has no values; load the model's weights first")
        if key in module._parameters:
            if tensor.is_complex():
                raise LayerError(f"parameter {full!r} is complex ({tensor.dtype}); only real networks are supported")
            memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
        else:
            memo[id(tensor)] = tensor.detach()
    for key, value in vars(module).items():
        if not isinstance(value, Tensor) or id(value) in memo:
            continue
        if not value.is_leaf:
            raise LayerError(_non_leaf_message(name, key, module))
        # A tensor that was never registered: frozen and shared like the others.
        memo[id(value)] = value.detach()


def _non_leaf_message(name: str, key: str, module: nn.Module) -> str:
    full = _joined(name, key)
    if f"{key}_g" in module._parameters or f"{key}_orig" in module._parameters:
        return (
            f"{full!r} is computed by the old torch.nn.utils.weight_norm, spectral_norm or pruning, which cannot be "
            f"copied; use torch.nn.utils.parametrizations instead, or make it permanent with remove_weight_norm, "
            f"remove_spectral_norm or prune.remove"
        )
    return (
        f"attribute {full!r} is a tensor that remembers the computation it came from, so it cannot be copied; "
        f"set it to None, or store it with .detach()"
    )


def _find_obstacle(model: nn.Module) -> str:
    """Say which attribute of which module deepcopy fails on, where it is a plain attribute."""
    structure = {"_parameters", "_buffers", "_modules"}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in structure:
                continue
            # Tensors and modules are skipped: only the attribute's own nature is asked about.
            memo = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
            try:
                copy.deepcopy(value, memo)
            except Exception:
                return f" because of attribute {_joined(name, key)!r} ({type(value).__name__})"
    return ""


def _refers_to(function: Any, originals: set[int]) -> bool:
    """Whether a replaced ``forward`` still holds one of the original modules, which deepcopy does not look for."""
    if isinstance(function, functools.partial):
        return _refers_to(function.func, originals)
    if isinstance(function, types.MethodType):
        return id(function.__self__) in originals or _refers_to(function.__func__, originals)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and _refers_to(wrapped, originals):
        return True
    if not isinstance(function, types.FunctionType):
        return False
    held: list[Any] = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a cell that was never filled
            continue
    return any(id(value) in originals or id(getattr(value, "__self__", None)) in originals for value in held)
