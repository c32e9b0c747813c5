"""A first pass over the training data: how many there are, how curved the loss is, and whether they are usable at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, require_finite, split_batch, to_device
from stfbnn.errors import InputError
from stfbnn.inference.loaders import length
from stfbnn.inference.minibatch import chunks
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.progress import Reporter
from stfbnn.provenance import Provenance, ProvenanceRecorder
from stfbnn.randomness import generator

# Label draws in all, from which the curvature is averaged where the loader has few batches.
_LABEL_DRAWS = 64
_MOST_LABEL_DRAWS_A_BATCH = 16


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        num_examples: Rows that the loader gave.
        batches: Batches that it gave.
        curvature: The generalised Gauss–Newton matrix of the mean negative log-likelihood at the weights: its diagonal
            (d,), or its blocks (U, k, k); None where it was not asked for.
        provenance: The examples seen; empty where they were not asked for.
    """

    num_examples: int
    batches: int
    curvature: Tensor | None
    provenance: Provenance


def checked_batch(batch: Any, target_key: str) -> tuple[Inputs, Tensor]:
    """Split a training batch and refuse one that cannot be learned from.

    Raises:
        InputError: It has no target, its sizes disagree, or it holds NaN or infinite values.
    """
    inputs, target = split_batch(batch, target_key)
    assert target is not None  # noqa: S101 - split_batch raises without
    if target.ndim == 0 or target.shape[0] != batch_size(inputs):
        raise InputError(f"a batch has {batch_size(inputs)} inputs, but targets of shape {tuple(target.shape)}")
    require_finite(inputs, "the inputs")
    return inputs, target


def survey(
    bnn: BayesianNetwork,
    loader: Iterable[Any],
    likelihood: Likelihood,
    target_key: str,
    seed: int,
    curvature: bool,
    record: bool,
    bar: Reporter,
    *,
    blocks: Tensor | None = None,
    weights: Tensor | None = None,
) -> Survey:
    """Go over the data once at fixed weights.

    The curvature is the Fisher information, which for likelihoods in their natural parameter is the generalised Gauss–Newton
    matrix: with labels drawn from the model itself, the scores of different examples are independent with mean zero, so the
    square of a minibatch's summed gradient has the sum of the examples' squared gradients as its expectation. Where a
    likelihood cannot draw labels, the observed ones give the empirical Fisher information instead.

    Args:
        bnn: The network, at its trained weights.
        loader: The training data.
        likelihood: Its noise, where learned, is set to the residuals' size.
        target_key: The target's entry in mappings.
        seed: Of the drawn labels.
        curvature: Whether to estimate the curvature.
        record: Whether to record which examples were seen.
        bar: To be advanced once a batch.
        blocks: Which weights make up each block, (U, k), where the curvature is wanted in blocks.
        weights: Where to look, (d,); None for the trained weights.

    Raises:
        InputError: The loader is empty, or a batch is not usable.
    """
    recorder = ProvenanceRecorder()
    weights = (bnn.trained_vector() if weights is None else weights).to(bnn.posterior.mean_vector()).detach()
    total = torch.zeros_like(weights) if blocks is None else weights.new_zeros(*blocks.shape, blocks.shape[1])
    random = generator(seed, "survey")
    draws = _label_draws(loader)
    examples = batches = 0
    for batch in loader:
        inputs, target = checked_batch(batch, target_key)
        if record:
            recorder.add(inputs)
        inputs, target = to_device(inputs, bnn.device), target.to(bnn.device)
        for part, part_target in chunks(inputs, target, bnn.device):
            vector = weights.clone().requires_grad_(curvature)
            with torch.set_grad_enabled(curvature):
                outputs = bnn.outputs(vector, part)
            likelihood.check(outputs.detach(), part_target)
            examples += len(part_target)
            # A running mean over all examples; the first chunk sets what was not given.
            likelihood.move(likelihood.estimate(outputs.detach(), part_target), len(part_target) / examples)
            if curvature:
                for gradient in _label_gradients(outputs, part_target, vector, likelihood, random, draws):
                    if blocks is None:
                        total.addcmul_(gradient, gradient, value=1 / draws)
                    else:
                        rows = gradient[blocks]
                        total.baddbmm_(rows.unsqueeze(2), rows.unsqueeze(1), alpha=1 / draws)
        batches += 1
        bar.advance()
    if batches == 0:
        raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
    found = total.div_(examples) if curvature else None
    return Survey(examples, batches, found, recorder.finish())


def _label_gradients(
    outputs: Tensor, target: Tensor, vector: Tensor, likelihood: Likelihood, random: torch.Generator, draws: int
) -> Iterator[Tensor]:
    for index in range(draws):
        labels = likelihood.curvature_targets(outputs.detach(), target, random)
        each = likelihood.log_prob(outputs, labels)
        if labels is target:
            # The scores of observed labels do not have mean zero; random signs remove their cross terms from the square.
            each = each * (2 * torch.randint(0, 2, (len(target),), generator=random) - 1).to(each)
        loss = each.sum()
        (gradient,) = torch.autograd.grad(loss, vector, retain_graph=index + 1 < draws)
        yield gradient


def _label_draws(loader: Iterable[Any]) -> int:
    batches = length(loader) or _LABEL_DRAWS
    return min(_MOST_LABEL_DRAWS_A_BATCH, max(1, math.ceil(_LABEL_DRAWS / batches)))
