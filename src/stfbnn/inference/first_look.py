"""The first batch of the training data: enough to find most mistakes, before anything long begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from stfbnn.batches import Batch, Inputs, module_device, to_device
from stfbnn.draws import Draws
from stfbnn.errors import InputError
from stfbnn.inference.loaders import kept_generators
from stfbnn.inference.minibatch import chunks
from stfbnn.inference.survey import checked_batch
from stfbnn.likelihood import Likelihood, LikelihoodLike, resolve_likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.randomness import seeded
from stfbnn.trunk import require_apart


def first_look(
    bnn: BayesianNetwork,
    loader: Iterable[Any],
    likelihood: LikelihoodLike,
    seed: int,
    target_key: str,
    weight_key: str,
) -> tuple[Likelihood, Inputs]:
    """Settle the likelihood, and refuse data on which the network cannot be inferred.

    Returns:
        The likelihood, on the network's device, and two rows of inputs.

    Raises:
        InputError: The loader is empty, the model does not run on the batch or mixes its examples, or the targets do not fit.
    """
    first = first_batch(loader, seed, target_key, weight_key)
    chosen = resolve_likelihood(likelihood, first.target).to(bnn.device)
    part = chunks(first, bnn.device)[0].to(bnn.device)
    try:
        outputs = next(Draws(bnn, 1, seed, "mean", "loop").outputs(part.inputs))[0]
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the model does not run on the first batch of train_loader: {error}") from error
    chosen.check(outputs, part.target)
    weights = bnn.trained_vector().to(bnn.posterior.mean_vector())
    require_apart(lambda inputs: bnn.outputs(weights, inputs), part.inputs)
    return chosen, part.rows(0, 2).inputs


def first_batch(loader: Iterable[Any], seed: int, target_key: str, weight_key: str) -> Batch:
    """The first batch, checked; the loader is read anew afterwards, with the generators as they were.

    Raises:
        InputError: There is none, or it cannot be used.
    """
    with seeded(seed, "first-look"), kept_generators(loader):
        batch = next(iter(loader), None)
    if batch is None:
        raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
    return checked_batch(batch, target_key, weight_key)


def two_rows(batch: Batch, model: nn.Module) -> Inputs:
    """Two of a batch's inputs (one where there is no second), on the model's device: enough to find a layer."""
    return to_device(batch.rows(0, min(2, len(batch))).inputs, module_device(model))
