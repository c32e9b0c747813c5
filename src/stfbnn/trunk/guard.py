"""Notice that the user's network was changed after its frozen trunk was taken from it.

The trunk shares the user's tensors, so training on, loading other weights or replacing a layer would leave a posterior
that belongs to no network. The check is cheap enough for every call: dictionary look-ups and version counters.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stfbnn.errors import ModelChangedError
from stfbnn.trunk.fingerprint import raw_bytes
from stfbnn.wrappers import unwrap

_REMEDY = (
    "The posterior belongs to the network as it was. Call bayesianize again on the network as it is now, or load the "
    "original weights into it and load the saved posterior onto it"
)


@dataclass(slots=True)
class _Entry:
    """One tensor as it was: the object, an alias that outlives ``tensor.data = ...``, and what a write would change."""

    key: str
    tensor: Tensor
    alias: Tensor
    version: int | None
    pointer: int | None

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> _Entry:
        return cls(key, tensor, tensor.detach(), None if tensor.is_inference() else tensor._version, _pointer(tensor))


@dataclass(slots=True)
class _Owner:
    """One module of the user's network, held weakly, with its tensors and children."""

    name: str
    module: weakref.ref[nn.Module]
    parameters: list[_Entry] = field(default_factory=list)
    buffers: list[_Entry] = field(default_factory=list)
    children: list[tuple[str, weakref.ref[nn.Module]]] = field(default_factory=list)


class ChangeGuard:
    """Remembers a network's tensors and raises when one of them was changed.

    Counted as a change: a parameter, buffer or submodule that was replaced or removed, a write in place (an optimiser's
    step, a forward pass of batch norm in training mode), another dtype. Not counted: moving the network to another
    device or memory format, an equal tensor in the place of the old one, mode, ``requires_grad``, wrapping a submodule
    with ``torch.compile``. Not seen: a write through ``parameter.data`` in place, which raises no version counter, and
    additional modules; :func:`stfbnn.trunk.fingerprint` is the full check.

    The modules are held weakly: once the user's network is deleted nothing can change and :meth:`check` passes. A copy
    of the guard watches the same network; a guard that was pickled watches nothing, since its network stayed behind.

    Args:
        model: The user's network; wrappers around it are taken off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: list[_Owner] = []
        for name, module in unwrap(model).named_modules():
            owner = _Owner(name, weakref.ref(module))
            owner.parameters = [_Entry.of(key, value) for key, value in module._parameters.items() if value is not None]
            owner.buffers = [_Entry.of(key, value) for key, value in module._buffers.items() if value is not None]
            owner.children = [(key, weakref.ref(child)) for key, child in module._modules.items() if child is not None]
            self._owners.append(owner)

    @property
    def model(self) -> nn.Module | None:
        """The network that is watched; None once it is deleted, and for a guard that was pickled."""
        return next((owner.module() for owner in self._owners if not owner.name), None)

    def check(self) -> None:
        """Compare the network with what it was; well under a microsecond per tensor where nothing has changed.

        Raises:
            ModelChangedError: A tensor or submodule was changed; the message names the first one.
        """
        dead = False
        for owner in self._owners:
            module = owner.module()
            if module is None:
                dead = True
                continue
            for values, entries in ((module._parameters, owner.parameters), (module._buffers, owner.buffers)):
                for entry in entries:
                    now = values.get(entry.key)
                    if (
                        now is not entry.tensor
                        or (entry.version is not None and now._version != entry.version)
                        or (entry.pointer is not None and now.data_ptr() != entry.pointer)
                    ):
                        _examine(owner.name, entry, now)
            for key, child in owner.children:
                part = module._modules.get(key)
                if part is None or part is not child():
                    _examine_child(owner.name, key, child(), part)
        if dead:
            # Their tensors would otherwise stay in memory.
            self._owners = [owner for owner in self._owners if owner.module() is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> ChangeGuard:
        twin = ChangeGuard.__new__(ChangeGuard)
        twin._owners = self._owners
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_owners": []}


def _pointer(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and wrapper tensors have no single storage
        return None


def _full_name(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _examine(owner: str, entry: _Entry, now: Tensor | None) -> None:
    """The slow look at a tensor that is not what it was: moved, or really changed?"""
    name = _full_name(owner, entry.key)
    if now is None:
        _fail(f"tensor {name!r} was removed from the model")
    if entry.version is not None and entry.tensor._version != entry.version:
        _fail(f"tensor {name!r} of the model was written in place (by training, or by loading weights into it)")
    if now.dtype != entry.alias.dtype:
        _fail(f"tensor {name!r} of the model was converted from {entry.alias.dtype} to {now.dtype}")
    if now.is_meta or now.shape != entry.alias.shape or not _equal(now, entry.alias):
        _fail(f"tensor {name!r} of the model was replaced by another one")
    moved = _Entry.of(entry.key, now)
    entry.tensor, entry.alias, entry.version, entry.pointer = moved.tensor, moved.alias, moved.version, moved.pointer


def _examine_child(owner: str, key: str, before: nn.Module | None, now: nn.Module | None) -> None:
    if before is None or now is None or unwrap(now) is not unwrap(before):
        _fail(f"module {_full_name(owner, key)!r} of the model was {'removed' if now is None else 'replaced'}")


def _equal(left: Tensor, right: Tensor) -> bool:
    # Bytes, not numbers, so that a NaN equals itself.
    return torch.equal(raw_bytes(left).cpu(), raw_bytes(right).cpu())


def _fail(what: str) -> NoReturn:
    raise ModelChangedError(f"{what} after the model was made Bayesian. {_REMEDY}")
