"""The blocks of a trunk: the modules whose parameters are needed together, one block after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from stfbnn.errors import InputError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def trunk_blocks(network: nn.Module, first_layer_name: str, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Cut a network behind its first layer into blocks, none of which is inside another.

    A block is a module that is called as a whole. The entries of ``Sequential``, ``ModuleList`` and ``ModuleDict`` are blocks
    of their own, and so are the children of whatever contains such a list, or the first layer. Parameters that a module which
    was taken apart owns itself are in no block.

    Args:
        network: The network.
        first_layer_name: The random layer, which is in no block.
        names: The blocks' names where others are wanted; parameters outside of them are in none.

    Returns:
        The blocks by name, in registration order; a module that is in several places is there once.

    Raises:
        InputError: A name is unknown, without parameters, inside another, or of a module with the first layer inside; or there
            is nothing behind the first layer.
    """
    first = network.get_submodule(first_layer_name)
    if names is None:
        blocks = dict(_descend("", network, first))
        if not blocks:
            raise InputError(f"the network has no parameters behind its first layer {first_layer_name!r}")
        return blocks
    modules = dict(network.named_modules())
    inner: dict[nn.Module, str] = {}
    for name in names:
        if name not in modules:
            raise InputError(f"blocks names {name!r}, which the network does not have; choose from its named_modules()")
        if not any(True for _ in modules[name].parameters()):
            raise InputError(f"blocks names {name!r}, which has no parameters; leave it out")
        if set(modules[name].modules()) & set(first.modules()):
            raise InputError(f"blocks names {name!r}, which shares modules with the first layer {first_layer_name!r}")
        for part in modules[name].modules():
            if part in inner:
                raise InputError(f"the blocks {inner[part]!r} and {name!r} overlap; name only one of them")
            inner[part] = name
    return {name: modules[name] for name in names}


def _descend(name: str, module: nn.Module, first: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()
    stack = [(name, module)]
    while stack:
        name, module = stack.pop()
        if module in seen or module is first or not any(True for _ in module.parameters()):
            continue
        seen.add(module)
        if _is_taken_apart(module, first):
            prefix = f"{name}." if name else ""
            stack += reversed([(prefix + key, child) for key, child in module.named_children()])
        else:
            yield name, module


def _is_taken_apart(module: nn.Module, first: nn.Module) -> bool:
    if module is first or type(module) in _CONTAINERS:
        return True
    # A parametrised module's own lists are no parts that it calls one after another.
    return not is_parametrized(module) and any(_is_taken_apart(child, first) for child in module.children())
