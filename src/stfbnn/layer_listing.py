"""Which layers of a network could become Bayesian, in the order in which data meet them, and what each would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from stfbnn.locate import is_passed_over, parametric_leaves
from stfbnn.wrappers import unwrap

# A mean-field posterior is saved as a mean and a standard deviation in float32.
BYTES_A_PARAMETER = 8
# A layer whose posterior takes more than this is worth a word: 4 million parameters.
_LARGE_BYTES = 32_000_000
_SUGGESTED = 3


@dataclass(frozen=True)
class LayerChoice:
    """A layer that could become Bayesian.

    Attributes:
        name: What ``bayesianize(layer=…)`` takes.
        kind: Its class.
        parameters: How many numbers would become random.
        share: Of the whole network's parameters.
        artifact_bytes: What a mean-field posterior over it takes on disk, about.
        passed_over: Whether it is a normalisation or a learned activation, which is never taken unless it is named.
    """

    name: str
    kind: str
    parameters: int
    share: float
    artifact_bytes: int
    passed_over: bool


def layer_choices(model: nn.Module, example_inputs: Any) -> list[LayerChoice]:
    """List the layers that own parameters, in execution order; the first that is not passed over is `bayesianize`'s choice.

    Args:
        model: The trained network, plain or wrapped; it is left as it was.
        example_inputs: A small batch as the model takes it, as for `bayesianize`.

    Returns:
        Every module with parameters that calls no other module, by its first call.

    Raises:
        InputError: The model is no module, or does not run on ``example_inputs``.
        LayerError: The model's layers cannot be told apart.
    """
    plain = unwrap(model)
    total = sum(parameter.numel() for parameter in plain.parameters())
    found = []
    for name in parametric_leaves(plain, example_inputs):
        module = plain.get_submodule(name)
        size = sum(parameter.numel() for parameter in module.parameters())
        found.append(
            LayerChoice(
                name=name,
                kind=type(module).__name__,
                parameters=size,
                share=size / total,
                artifact_bytes=BYTES_A_PARAMETER * size,
                passed_over=is_passed_over(module),
            )
        )
    return found


def advice_on_size(model: nn.Module, example_inputs: Any, layer: str) -> str | None:
    """What to say of a first layer whose posterior would be large, with smaller layers near it; None where it is not.

    Embeddings of large vocabularies are the case in mind: most of their rows are not in the training data, and keep their
    trained value, and still all of them have to be stored.
    """
    size = sum(parameter.numel() for parameter in model.get_submodule(layer).parameters())
    if size * BYTES_A_PARAMETER <= _LARGE_BYTES:
        return None
    choices = layer_choices(model, example_inputs)
    names = [choice.name for choice in choices]
    # Those that the data meet later; what ran before it was passed over.
    after = choices[names.index(layer) + 1 :] if layer in names else choices
    smaller = [one for one in after if not one.passed_over and one.artifact_bytes <= _LARGE_BYTES][:_SUGGESTED]
    listing = ", ".join(
        f"layer={one.name!r} ({one.kind}, {one.parameters:,}: {_size(one.artifact_bytes)})" for one in smaller
    )
    remedy = f"; smaller layers that the data meet next: {listing}" if smaller else ""
    kind = type(model.get_submodule(layer)).__name__
    return (
        f"the first layer {layer!r} ({kind}) has {size:,} parameters, whose posterior takes {_size(BYTES_A_PARAMETER * size)} "
        f"to save{remedy}"
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"
