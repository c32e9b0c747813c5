"""The network of an estimator: built here, made by the user's function, or brought along trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError

NetworkFactory: TypeAlias = Callable[[int, int], nn.Module]
NetworkChoice: TypeAlias = nn.Module | NetworkFactory | None


def hidden_sizes(hidden_layer_sizes: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of the hidden layers; a single number is one layer.

    Raises:
        InputError: They are not positive integers.
    """
    sizes = hidden_layer_sizes if isinstance(hidden_layer_sizes, Sequence) else (hidden_layer_sizes,)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(
                f"hidden_layer_sizes must be positive integers, one for each hidden layer, but they are "
                f"{hidden_layer_sizes!r}"
            )
    return tuple(sizes)


def multilayer_perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them, with random weights from torch's global generator."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs))


def make_network(choice: NetworkChoice, inputs: int, hidden: Sequence[int], outputs: int, trained: bool) -> nn.Module:
    """The network that stage one trains, or that stage two starts from where it is trained already.

    Args:
        choice: As ``module=`` of an estimator.
        inputs: Columns of X.
        hidden: Sizes of the hidden layers of the network that is built here.
        outputs: Classes, or columns of y.
        trained: Whether it is trained already; then a module is used as it is, and else a copy of it.

    Raises:
        InputError: It is neither a module nor a function that returns one, or is to be trained already and is not given.
    """
    if choice is None:
        if trained:
            raise InputError("train_module=False keeps a trained network as it is, so give it as module=")
        return multilayer_perceptron(inputs, hidden, outputs)
    if isinstance(choice, nn.Module):
        return choice if trained else copy.deepcopy(choice)
    if not callable(choice):
        raise InputError(
            f"module must be a torch.nn.Module, a function of (inputs, outputs) that returns one, or None for a multilayer "
            f"perceptron, but it is a {type(choice).__name__}"
        )
    made = choice(inputs, outputs)
    if not isinstance(made, nn.Module):
        raise InputError(f"module= returned a {type(made).__name__} instead of a torch.nn.Module")
    return made


def require_outputs(outputs: Tensor, expected: int, what: str) -> None:
    """Refuse a network whose outputs have not the size that the targets ask for.

    Args:
        outputs: The outputs for some rows.
        expected: Their size: (rows, expected), or (rows,) where that is 1.
        what: What the targets are, for the message.

    Raises:
        InputError: They have another shape.
    """
    rows = len(outputs) if outputs.ndim else 0
    if outputs.shape != (rows, expected) and not (expected == 1 and outputs.shape == (rows,)):
        raise InputError(
            f"the network gives outputs of shape {tuple(outputs.shape)} for {rows} rows, but y has {what}: they must be "
            f"({rows}, {expected})"
        )


def floating_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of a network's first floating-point parameter, which is the dtype of its inputs."""
    return next((value.dtype for value in network.parameters() if value.is_floating_point()), torch.float32)
