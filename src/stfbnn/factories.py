"""A network from what a user names: a factory in a module, and its arguments."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stfbnn.errors import InputError


def build(factory: str, arguments: Mapping[str, Any], offered: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Import a factory and call it.

    Args:
        factory: ``"package.module:factory"``; modules in the current folder are found.
        arguments: What the user says.
        offered: What is passed if the factory names it as a parameter and the user says nothing, such as ``input_shape``.

    Returns:
        The network, and all arguments that the factory was given.

    Raises:
        InputError: There is no such factory, or it fails, or returns no module.
    """
    function = _import(factory)
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = set()
    given = {**{name: value for name, value in offered.items() if name in names}, **arguments}
    try:
        model = function(**given)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{factory} failed with {type(error).__name__}: {error} (it was given {given})") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{factory} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model, given


def _import(factory: str) -> Callable[..., Any]:
    module_name, colon, attribute = factory.partition(":")
    if not (colon and module_name and attribute):
        raise InputError(
            f"--model must be 'package.module:factory', such as stfbnn.models:lenet, but it is {factory!r}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise InputError(
                f"there is no module {error.name!r}; looked in {here} and among the installed packages"
            ) from error
        raise InputError(f"the module {module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise InputError(f"importing {module_name} failed with {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, dir(found), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"{module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise InputError(
            f"{factory} is a {type(found).__name__}; name a function or a class that returns a new network when called"
        )
    function: Callable[..., Any] = found
    return function
