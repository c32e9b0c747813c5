"""Where a component starts: a first layer drawn anew, or the trained one with noise."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from stfbnn.layer_parameters import EMBEDDINGS
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture
from stfbnn.randomness import generator, seeded


def start_vector(bnn: BayesianNetwork, recipe: Mixture, seed: int) -> Tensor:
    """Weights (d,) from which a component is retrained, on the network's device.

    Args:
        bnn: The network.
        recipe: Says how they are drawn.
        seed: Of the draw.
    """
    trained = bnn.trained_vector()
    parts = perturbed(bnn, recipe.perturbation, seed) if recipe.start == "perturb" else reinitialized(bnn, seed)
    return bnn.layout.flatten(parts).to(device=bnn.device, dtype=trained.dtype)


def reinitialized(bnn: BayesianNetwork, seed: int) -> dict[str, Tensor]:
    """The layer's parameters, drawn as its own ``reset_parameters`` draws them.

    A parameter that this leaves as it was (the layer has no such method, or is parametrised by others) is drawn from a
    Gaussian with the mean and the standard deviation of its trained entries.
    """
    layer: Any = copy.deepcopy(bnn.network.get_submodule(bnn.layer_name))
    with seeded(seed, "start"), torch.no_grad(), suppress(AttributeError):
        layer.reset_parameters()
    random = generator(seed, "start", "statistics")
    drawn = {}
    for name, trained in bnn.trained.items():
        fresh = layer.get_parameter(name).detach().to(trained)
        if fresh.shape != trained.shape or torch.equal(fresh, trained):
            fresh = of_its_statistics(trained, random)
        drawn[name] = fresh.to(bnn.trained_vector().dtype)
    return drawn


def of_its_statistics(trained: Tensor, random: torch.Generator) -> Tensor:
    """A Gaussian draw with the mean and the standard deviation of a parameter's trained entries."""
    noise = torch.randn(trained.shape, generator=random).to(trained)
    return trained.mean() + trained.std(correction=0) * noise


def perturbed(bnn: BayesianNetwork, amount: float, seed: int) -> dict[str, Tensor]:
    """The trained parameters with Gaussian noise of ``amount`` times each one's root mean square."""
    random = generator(seed, "start")
    drawn = {}
    for name, value in bnn.layout.unflatten(bnn.trained_vector()).items():
        noise = torch.randn(value.shape, generator=random).to(value)
        drawn[name] = value + amount * value.square().mean().sqrt() * noise
    return drawn


def kept_where_unused(bnn: BayesianNetwork, vector: Tensor, used: Tensor) -> Tensor:
    """Give embedding rows that never had a gradient their trained values back: retraining never reached them.

    Args:
        bnn: The network.
        vector: Retrained weights (d,).
        used: Whether a weight ever had one, (d,).
    """
    layer = bnn.network.get_submodule(bnn.layer_name)
    embeddings = [part for part in layer.modules() if isinstance(part, EMBEDDINGS)]
    tables = {id(parameter) for part in embeddings for parameter in part.parameters()}
    rows = {
        name: torch.full(parameter.shape, id(parameter) in tables, device=vector.device)
        for name, parameter in layer.named_parameters()
    }
    # A bias that a folded batch norm added is not among the layout's names.
    kept = bnn.layout.flatten(rows) & ~used
    return torch.where(kept, bnn.trained_vector().to(vector), vector)
