"""A trunk that need not be in memory: its frozen parameters lie in a file, and come to an accelerator block by block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from stfbnn.errors import ArtifactError, InputError
from stfbnn.trunk.blocks import trunk_blocks
from stfbnn.trunk.fingerprint import fingerprint, raw_bytes
from stfbnn.trunk.tensor_file import TensorFile, is_storable, write_tensors

if TYPE_CHECKING:
    from stfbnn.network import BayesianNetwork

Copy = Callable[[Tensor], Tensor]
# Where the trunk is found again, so that every copy of the network has that of its own modules.
_ATTRIBUTE = "_offloaded_trunk"


def offload(bnn: BayesianNetwork, folder: str | os.PathLike[str], *, blocks: Sequence[str] | None = None) -> Path:
    """Move the frozen trunk's parameters out of memory into a file, from which they are used by memory mapping.

    On the CPU the network computes with the file's pages themselves, with the very same numbers as before: the operating
    system reads them when they are needed, may drop them when memory is short, and shares them among all processes that use
    the file. On an accelerator (``bnn.to("cuda")``, before or after) each block is copied there for its own forward pass and
    dropped after it; the backward pass copies each parameter again when it needs it.

    The memory becomes free only when nothing else holds the parameters: delete the model that was given to `bayesianize`.
    Buffers, the first layer, and parameters of unusual kinds (sparse, quantised) stay where they are. The file stays in the
    folder, and is used again for a trunk of the same values; remove it when no process uses it. Pickling the network, or a
    deep copy of it, takes the parameters back into memory.

    Args:
        bnn: The network, fitted or not; it is changed in place, with all that share its trunk.
        folder: Where the file is, or is written to, named by the trunk's fingerprint. It should be on a fast local disk.
        blocks: The modules that are copied to an accelerator as a whole, by name; None takes the entries of the network's
            lists of modules, and otherwise the parts that it calls. Parameters outside of all blocks stay on the accelerator.

    Returns:
        The file.

    Raises:
        InputError: There is no trunk, or a block cannot be one.
        OSError: The file cannot be written.
        ArtifactError: The file that is there is truncated, damaged, or holds other values.
        ModelChangedError: The user's model was changed since `bayesianize`.
    """
    bnn.check_unchanged()
    network, prefix = bnn.network, f"{bnn.layer_name}." if bnn.layer_name else ""
    chosen = trunk_blocks(network, bnn.layer_name, blocks)
    first = set(network.get_submodule(bnn.layer_name).modules())
    # A tied parameter is stored once, under its first name.
    names: dict[int, str] = {}
    places: list[tuple[nn.Module, str, Tensor, str]] = []
    for path, module in network.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and module not in first and is_storable(parameter) and parameter.numel():
                name = names.setdefault(id(parameter), f"{path}.{key}" if path else key)
                places.append((module, key, parameter, name))
    stored = {name: _in_memory_order(parameter) for _, _, parameter, name in places}
    own = {name for name, _ in network.named_parameters(remove_duplicate=False) if name.startswith(prefix)}
    file = _file_of(Path(folder).absolute(), stored, fingerprint(network, exclude=own))
    mapped = {
        name: nn.Parameter(_in_order_of(file.tensors[name], parameter), requires_grad=False)
        for _, _, parameter, name in places
    }
    stop_offloading(network)
    slots = [_Slot(module, key, mapped[name]) for module, key, _, name in places]
    trunk = OffloadedTrunk(file, slots, list(chosen.values()))
    setattr(network, _ATTRIBUTE, trunk)
    trunk.compute_on(bnn.device)
    return file.path


def offloaded_trunk(network: nn.Module) -> OffloadedTrunk | None:
    """What `offload` made of a network; None where it was not called."""
    found = vars(network).get(_ATTRIBUTE)
    return found if isinstance(found, OffloadedTrunk) else None


def stop_offloading(network: nn.Module) -> None:
    """Let a network compute with the mapped parameters like with any others; nothing is done where `offload` was not called."""
    if (trunk := offloaded_trunk(network)) is not None:
        trunk.copy_blocks(None)
        delattr(network, _ATTRIBUTE)


@dataclass(frozen=True)
class _Slot:
    """A place of a parameter in a network, and the mapped tensor that belongs there."""

    owner: nn.Module
    key: str
    mapped: nn.Parameter

    def put(self, value: Tensor) -> None:
        # Not into the dictionary: recurrent layers keep lists of their weights, which follow only so.
        setattr(self.owner, self.key, value if value is self.mapped else nn.Parameter(value, requires_grad=False))


class OffloadedTrunk:
    """The parameters of a trunk that lie in a file.

    Args:
        file: Their file.
        slots: Their places.
        blocks: The modules that are copied as a whole.

    Attributes:
        file: Their file.
    """

    def __init__(self, file: TensorFile, slots: list[_Slot], blocks: list[nn.Module]) -> None:
        self.file = file
        inside = {part: index for index, block in enumerate(blocks) for part in block.modules()}
        self._resident = [slot for slot in slots if slot.owner not in inside]
        self._slots = slots
        self._blocks = [
            (block, [slot for slot in slots if inside.get(slot.owner) == index]) for index, block in enumerate(blocks)
        ]
        self._handles: list[RemovableHandle] = []

    def compute_on(self, device: torch.device) -> None:
        """Let the network compute on a device; the CPU computes with the mapped pages themselves."""
        self.copy_blocks(None if device.type == "cpu" else partial(_copied_to, device))

    def copy_blocks(self, copy: Copy | None) -> None:
        """Let every block compute with copies of its parameters, which it has only while it runs.

        Args:
            copy: From a mapped tensor to a new one of the same strides; None for the mapped tensors themselves.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for slot in self._slots:
            slot.put(slot.mapped)
        if copy is None:
            return
        for slot in self._resident:
            slot.put(copy(slot.mapped))
        for block, slots in self._blocks:
            copies = _BlockCopies(slots, copy)
            self._handles += [
                block.register_forward_pre_hook(copies.enter, prepend=True),
                block.register_forward_hook(copies.leave, always_call=True),
            ]

    @contextmanager
    def left_behind(self, convert: Copy) -> Iterator[None]:
        """Take the parameters out of a network within a block, so that moving it does not move them.

        Raises:
            InputError: It is not moved but converted to another dtype.
        """
        for dtype in {slot.mapped.dtype for slot in self._slots}:
            if (found := convert(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise InputError(
                    f"an offloaded trunk keeps its dtype: it is {dtype} in {self.file.path}, and cannot become {found}; "
                    f"convert the model before bayesianize, and offload after it"
                )
        self.copy_blocks(None)
        for slot in self._slots:
            slot.owner._parameters[slot.key] = None
        try:
            yield
        finally:
            for slot in self._slots:
                slot.put(slot.mapped)


@dataclass
class _BlockCopies:
    """The hooks of one block: copies come before its forward pass and go after it, what autograd saves of them included."""

    slots: list[_Slot]
    copy: Copy
    origins: dict[int, nn.Parameter] = field(default_factory=dict)
    depth: int = 0
    saving: Any = None

    def enter(self, _block: nn.Module, _arguments: Any) -> None:
        """Put the copies in place."""
        self.depth += 1
        if self.depth > 1:
            return
        copies: dict[int, Tensor] = {}
        for slot in self.slots:
            mapped = slot.mapped
            if id(mapped) not in copies:
                copies[id(mapped)] = self.copy(mapped)
                self.origins[copies[id(mapped)].untyped_storage()._cdata] = mapped
            slot.put(copies[id(mapped)])
        self.saving = saved_tensors_hooks(self._pack, self._unpack)
        self.saving.__enter__()

    def leave(self, _block: nn.Module, _arguments: Any, _outputs: Any) -> None:
        """Put the mapped tensors back."""
        self.depth -= 1
        if self.depth > 0:
            return
        self.saving.__exit__()
        self.saving = None
        self.origins.clear()
        for slot in self.slots:
            slot.put(slot.mapped)

    def _pack(self, tensor: Tensor) -> Any:
        origin = self.origins.get(tensor.untyped_storage()._cdata)
        if origin is None or tensor.dtype != origin.dtype:
            return tensor
        return origin, tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        origin, size, stride, offset = saved
        return self.copy(origin).as_strided(size, stride, offset)


def _copied_to(device: torch.device, mapped: Tensor) -> Tensor:
    return mapped.to(device)


def _file_of(folder: Path, tensors: dict[str, Tensor], trunk: str) -> TensorFile:
    """The file with these tensors; written if it is not there, else compared."""
    # The fingerprint says nothing of memory formats, which decide what kernels compute with.
    layout = json.dumps([[name, list(tensor.shape)] for name, tensor in tensors.items()])
    path = folder / f"trunk-{hashlib.sha256((trunk + layout).encode()).hexdigest()[:32]}.safetensors"
    if not path.exists():
        write_tensors(path, tensors)
        return TensorFile(path)
    file = TensorFile(path)
    for name, tensor in tensors.items():
        found = file.tensors.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype or not _equal(found, tensor):
            raise ArtifactError(
                f"{path} does not hold the trunk that its name stands for: the values of {name!r} differ; it was changed or "
                f"damaged. Remove it, and it is written again"
            )
    return file


def _equal(found: Tensor, tensor: Tensor) -> bool:
    # Bytes, not numbers, so that a NaN equals itself.
    return torch.equal(raw_bytes(found), raw_bytes(tensor).cpu())


def _order(tensor: Tensor) -> list[int]:
    """Its dimensions from the slowest to the fastest in memory, as channels_last has them; row-major where it is not dense."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.ndim))


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.detach().permute(_order(tensor))


def _in_order_of(stored: Tensor, tensor: Tensor) -> Tensor:
    order = _order(tensor)
    return stored.permute(sorted(range(tensor.ndim), key=order.__getitem__))
