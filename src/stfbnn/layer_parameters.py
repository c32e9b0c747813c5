"""What about a layer's parameters is not free to vary: rows set aside for padding, and parameters that are held twice."""

from __future__ import annotations

from torch import nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def has_embeddings(layer: nn.Module) -> bool:
    """Whether a layer is an embedding, or a block that holds one."""
    return any(isinstance(part, EMBEDDINGS) for part in layer.modules())


def differentiate_densely(layer: nn.Module) -> None:
    """Make the embeddings in a frozen copy of a layer fit for sampled weights, in place.

    Sparse gradients do not flow into a vector of weights, and rescaled ones are not gradients of the loss.
    """
    for part in layer.modules():
        if isinstance(part, EMBEDDINGS):
            part.sparse = part.scale_grad_by_freq = False


def twins(layer: nn.Module) -> dict[str, str]:
    """The further names of parameters that a layer holds more than once, with the name under which each is inferred."""
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    every = layer.named_parameters(remove_duplicate=False)
    return {name: names[id(parameter)] for name, parameter in every if names[id(parameter)] != name}


def padding_rows(layer: nn.Module) -> dict[str, list[int]]:
    """The rows that the embeddings in a layer set aside for padding, by the names of their weights."""
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    rows: dict[str, set[int]] = {}
    for part in layer.modules():
        if isinstance(part, EMBEDDINGS) and part.padding_idx is not None:
            rows.setdefault(names[id(part.weight)], set()).add(part.padding_idx)
    return {name: sorted(index) for name, index in rows.items()}
