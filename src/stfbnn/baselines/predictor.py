"""What every competitor is to a comparison: likelihood, raw outputs of its members, and what it costs to have.

And what the competitors that run ordinary networks share: the network in evaluation mode, inputs in chunks, results on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stfbnn.batches import (
    TARGET_KEY,
    WEIGHT_KEY,
    Inputs,
    OutputFunction,
    batch_size,
    call_model,
    join_rows,
    map_tensors,
    output_tensor,
    rechunk,
    to_device,
)
from stfbnn.draws import chunk_rows
from stfbnn.errors import InputError
from stfbnn.likelihood import Gaussian, Likelihood
from stfbnn.prediction import input_batches
from stfbnn.predictive import MemberOutputs


@runtime_checkable
class Predictor(Protocol):
    """A method, ready to predict: ``predictor.outputs(data).at(τ)`` is its prediction.

    Attributes:
        likelihood: What the raw outputs mean.
        trainable_parameters: Numbers that were learned for it, all members together.
        artifact_bytes: What must be kept to predict, beyond the network that the user already has.
    """

    @property
    def likelihood(self) -> Likelihood:
        """What the raw outputs mean."""

    @property
    def trainable_parameters(self) -> int:
        """Numbers that were learned for it, all members together."""

    @property
    def artifact_bytes(self) -> int:
        """What must be kept to predict, beyond the network that the user already has."""

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs of all members, on the CPU; ``data`` as for ``stfbnn.predict``.

        Raises:
            InputError: There are no data, or they are not finite or of a wrong form.
        """


@dataclass(frozen=True)
class Reading:
    """How batches, and what a network returns, are read; the defaults are those of ``stfbnn.fit`` and ``stfbnn.predict``.

    Attributes:
        output: How to take the tensor of outputs out of what the network returns, where that is neither a tensor nor has
            ``.logits``.
        target_key: The target's entry in a loader's mappings, removed before the network is called.
        weight_key: The entry of the examples' weights, likewise.
        has_targets: False for loaders whose batches are tuples of inputs without a target.
    """

    output: OutputFunction | None = None
    target_key: str = TARGET_KEY
    weight_key: str = WEIGHT_KEY
    has_targets: bool = True


PLAIN = Reading()
"""As everywhere in the library where nothing else is said."""


def require_likelihood(likelihood: Any) -> Likelihood:
    """Refuse what is no likelihood that can predict.

    Raises:
        InputError: It is no `Likelihood`, or a Gaussian one whose noise nobody has set.
    """
    if not isinstance(likelihood, Likelihood):
        raise InputError(
            f"likelihood must be an object such as stfbnn.Categorical() or stfbnn.Gaussian(noise_std=0.1), but it is "
            f"{likelihood!r}"
        )
    if isinstance(likelihood, Gaussian) and bool(likelihood.noise_std.isnan().any()):
        raise InputError(
            "the Gaussian likelihood has no noise yet; give one, such as "
            "Gaussian(noise_std=residual_noise(outputs, targets)) with outputs and targets of held-out examples"
        )
    return likelihood


def require_network(model: Any) -> nn.Module:
    """Refuse what is no network.

    Raises:
        InputError: It is no `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    return model


def require_count(value: Any, what: str, least: int = 1) -> int:
    """Refuse what is no integer of at least ``least``; ``what`` is the argument's name.

    Raises:
        InputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} must be an integer of at least {least}, but it is {value!r}")
    return value


def residual_noise(outputs: Tensor, targets: Tensor) -> float | list[float]:
    """The noise of a regression as held-out residuals show it: √mean (y − f)².

    For a Gaussian likelihood of one prediction f it is the noise of highest likelihood. Of an average of several members the
    residuals hold the members' spread, too, so that it is an upper estimate there.

    Args:
        outputs: What is predicted, (N,), (N, 1) or (N, K): of members, their mean.
        targets: (N,), (N, 1) or (N, K), in the same unit, of examples that the network was not trained on.

    Returns:
        One number, or for K > 1 columns a list of K; fit for ``stfbnn.Gaussian(noise_std=…)``.

    Raises:
        InputError: The shapes do not agree, there are no examples, or a number is not finite.
    """
    matched = Gaussian.match(outputs, targets)
    if matched.shape != targets.shape or targets.ndim not in (1, 2) or not targets.numel():
        raise InputError(
            f"outputs and targets must be of one shape, (N,), (N, 1) or (N, K) with N at least 1, but they are "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        )
    values = targets.double().cpu()
    square = (values - matched.double().cpu()).square()
    if not bool(square.isfinite().all()):
        raise InputError("outputs or targets hold NaN or infinite values, so that their residuals have no size")
    # Where every residual is zero the density would be unbounded.
    floor = 1e-12 * values.var(correction=0).clamp_min(1e-12)
    noise = (
        square.flatten(1).mean(dim=0).clamp_min(floor).sqrt()
        if values.ndim == 2
        else square.mean().clamp_min(floor).sqrt()
    )
    return noise.tolist() if noise.numel() > 1 else float(noise)


def parameter_count(model: nn.Module) -> int:
    """Numbers in the parameters that require a gradient; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and the persistent buffers; what shares memory counts once."""
    distinct = {(value.data_ptr(), value.numel()): value for value in model.state_dict().values() if value.numel()}
    return sum(value.numel() * value.element_size() for value in distinct.values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block; every module has its own mode again after it."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_chunks(data: Any, device: torch.device, reading: Reading = PLAIN) -> Iterator[Inputs]:
    """The inputs in ``data``, checked, in chunks on ``device`` whose bounds do not depend on how the data were batched.

    A chunk may be a view of the user's data; `call_network` copies it, for a network may change its inputs in place.

    Args:
        data: A tensor, tuple or mapping of inputs; or a loader of batches, whose targets and weights are left out.
        device: The device of the network; with the shape of one example it gives the rows of a chunk.
        reading: How batches are read.

    Raises:
        InputError: There are no data, or they are not finite or of a wrong form.
    """
    batches = input_batches(data, reading.has_targets, reading.target_key, reading.weight_key)
    first = next(batches, None)
    if first is None:
        raise InputError("there is nothing to predict: the loader gave no batch")

    def everything() -> Iterator[Inputs]:
        yield first
        yield from batches

    for chunk in rechunk(everything(), chunk_rows(first, device)):
        yield to_device(chunk, device)


def call_network(network: Callable[..., Any], inputs: Inputs, reading: Reading = PLAIN) -> Tensor:
    """The raw outputs of one chunk, (B, …), on the network's device.

    Args:
        network: A module, or a function that is called like one.
        inputs: B rows on its device. They are copied first, for a network may change them in place.
        reading: How to take the tensor out of what the network returns.

    Raises:
        InputError: It returns no tensor, or not one row for each example.
    """
    outputs = output_tensor(call_model(network, map_tensors(inputs, torch.clone)), reading.output)
    if outputs.shape[:1] != (batch_size(inputs),):
        raise InputError(
            f"the network must return one row for each of the {batch_size(inputs)} examples, but its outputs have shape "
            f"{tuple(outputs.shape)}"
        )
    return outputs


@torch.no_grad()
def collect_outputs(run: Callable[[int, Inputs], Iterable[Tensor]], chunks: Iterable[Inputs]) -> Tensor:
    """Run all members on every chunk, without gradients.

    Args:
        run: From the number of a chunk and the chunk of B rows to the outputs of the members, one after another, (B, …) each.
        chunks: As of `input_chunks`.

    Returns:
        Outputs of all members, (S, N, …), on the CPU.

    Raises:
        InputError: The members' outputs differ in shape.
    """
    parts = []
    for index, chunk in enumerate(chunks):
        members = [outputs.cpu() for outputs in run(index, chunk)]
        shapes = [tuple(outputs.shape) for outputs in members]
        odd = next((number for number, shape in enumerate(shapes) if shape != shapes[0]), None)
        if odd is not None:
            raise InputError(
                f"all members must give outputs of one shape, but member 0 gives {shapes[0]} and member {odd} {shapes[odd]}"
            )
        parts.append(torch.stack(members))
    return join_rows(parts, "the members' outputs", 1)
