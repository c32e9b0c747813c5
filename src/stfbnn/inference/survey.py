"""A first pass over the training data: how many there are, how curved the loss is, and whether they are usable at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, Batch, batch_size, require_finite, training_batch
from stfbnn.errors import InputError
from stfbnn.inference.loaders import length
from stfbnn.inference.minibatch import chunks
from stfbnn.inference.ranks import mean_learned, rank_path
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.processes import Processes
from stfbnn.progress import Reporter
from stfbnn.provenance import NOTHING, Provenance, ProvenanceRecorder
from stfbnn.randomness import generator

# Label draws in all, from which the curvature is averaged where the loader has few batches.
_LABEL_DRAWS = 64
_MOST_LABEL_DRAWS_A_BATCH = 16


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        num_examples: Rows that the loader gave.
        total_weight: The sum of their weights; the rows' number where they have none.
        batches: Batches that it gave.
        curvature: The generalised Gauss–Newton matrix of the mean negative log-likelihood (each example times its weight, the
            sum divided by the number of rows) at the weights: its diagonal
            (d,), or its blocks (U, k, k); None where it was not asked for.
        provenance: The examples seen; empty where they were not asked for.
        labels: How many of the targets are not left out.
        learned: What the likelihood learned of them; None where it learns nothing.
    """

    num_examples: int
    total_weight: float
    batches: int
    curvature: Tensor | None
    provenance: Provenance
    labels: int
    learned: Tensor | None

    def state(self, num_examples: int) -> dict[str, Any]:
        """What a run keeps of it, with N, which is not always the number of rows."""
        return {
            "num_examples": num_examples,
            "batches": self.batches,
            "rows": self.num_examples,
            "total_weight": self.total_weight,
            "provenance": self.provenance.to_tensor(),
        }


def checked_batch(batch: Any, target_key: str = TARGET_KEY, weight_key: str = WEIGHT_KEY) -> Batch:
    """Split a training batch and refuse one that cannot be learned from.

    Raises:
        InputError: It has no target, its sizes disagree, or it holds NaN or infinite values or bad weights.
    """
    found = training_batch(batch, target_key, weight_key)
    size = batch_size(found.inputs)
    if found.target.ndim == 0 or len(found.target) != size:
        raise InputError(f"a batch has {size} inputs, but targets of shape {tuple(found.target.shape)}")
    require_finite(found.inputs, "the inputs")
    return found


def require_weight(total: float, labels: int, what: str) -> None:
    """Refuse data of which nothing counts.

    Args:
        total: The sum of the examples' weights.
        labels: How many labels are not left out.
        what: Whose they are.

    Raises:
        InputError: One of the two is 0.
    """
    if total <= 0:
        raise InputError(f"all examples of {what} have the weight 0: there is nothing to learn or score")
    if labels == 0:
        raise InputError(f"all targets of {what} are the likelihood's ignore_index: there is nothing to learn or score")


def counted_labels(likelihood: Likelihood, targets: Tensor) -> Tensor | None:
    """Whether each label counts, in the targets' shape; None where all do."""
    weights = likelihood.label_weights(targets)
    return None if weights is None else weights > 0


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
    weight_key: str = WEIGHT_KEY,
    processes: Processes | None = None,
) -> Survey:
    """Go over the data once at fixed weights.

    The curvature is the Fisher information, which for likelihoods in their natural parameter is the generalised Gauss–Newton
    matrix: with labels drawn from the model itself, the scores of different examples are independent with mean zero, so the
    square of a minibatch's summed gradient has the sum of the examples' squared gradients as its expectation. Where a
    likelihood cannot draw labels, the observed ones give the empirical Fisher information instead. An example's weight, and
    what its observed labels count, multiply its part of the matrix, so its score is multiplied by their root.

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
        weight_key: The entry of the examples' weights in mappings.
        processes: The ranks among which the data are shared out; None where this is the only one.

    Returns:
        What is in the data of all ranks.

    Raises:
        InputError: The loader is empty, a batch is not usable, or nothing in it counts; or the ranks have different numbers
            of batches.
    """
    processes = Processes() if processes is None else processes
    recorder = ProvenanceRecorder()
    weights = (bnn.trained_vector() if weights is None else weights).to(bnn.posterior.mean_vector()).detach()
    total = torch.zeros_like(weights) if blocks is None else weights.new_zeros(*blocks.shape, blocks.shape[1])
    random = generator(seed, "survey", *rank_path(processes))
    draws = _label_draws(loader, processes.count)
    learned: Tensor | None = None
    examples = batches = labels = 0
    total_weight = 0.0
    for given in loader:
        batch = checked_batch(given, target_key, weight_key)
        if record:
            recorder.add(batch.inputs)
        for part in chunks(batch.to(bnn.device), bnn.device):
            vector = weights.clone().requires_grad_(curvature)
            with torch.set_grad_enabled(curvature):
                outputs = bnn.outputs(vector, part.inputs)
            likelihood.check(outputs.detach(), part.target)
            examples += len(part)
            counted = counted_labels(likelihood, part.target)
            labels += part.target.numel() if counted is None else int(counted.sum())
            counts = part.total_weight
            if counts == 0:
                continue
            total_weight += counts
            # A running mean over all examples; the first chunk sets what was not given.
            estimate = likelihood.estimate(outputs.detach(), part.target, part.weight)
            likelihood.move(estimate, counts / total_weight)
            if estimate is not None:
                learned = estimate if learned is None else learned.lerp(estimate, counts / total_weight)
            if curvature:
                for gradient in _label_gradients(outputs, part, vector, likelihood, random, draws):
                    if blocks is None:
                        total.addcmul_(gradient, gradient, value=1 / draws)
                    else:
                        rows = gradient[blocks]
                        total.baddbmm_(rows.unsqueeze(2), rows.unsqueeze(1), alpha=1 / draws)
        batches += 1
        bar.advance()
    if batches == 0:
        raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
    curved = total.div_(examples) if curvature else None
    found = Survey(examples, total_weight, batches, curved, recorder.finish(), labels, learned)
    if processes.several:
        found = _of_all_ranks(found, processes)
        likelihood.move(found.learned, 1.0)
    require_weight(found.total_weight, found.labels, "train_loader")
    return found


def _of_all_ranks(own: Survey, processes: Processes) -> Survey:
    """One survey from those of all ranks."""
    learned, weight = mean_learned(own.learned, own.total_weight, processes)
    parts = processes.gather((own.num_examples, own.batches, own.labels, own.provenance.to_tensor()))
    batches = [part[1] for part in parts]
    if len(set(batches)) > 1:
        raise InputError(
            f"train_loader gives the ranks different numbers of batches, {batches}, but all take every step together; let "
            f"the sampler fill up or drop the last examples, as torch's DistributedSampler does"
        )
    examples = sum(part[0] for part in parts)
    curvature = None
    if own.curvature is not None:
        curvature = processes.sum(own.curvature * own.num_examples) / examples
    seen = NOTHING
    for part in parts:
        seen = seen.union(Provenance.from_tensor(part[3]))
    labels = sum(part[2] for part in parts)
    return Survey(examples, weight, batches[0], curvature, seen, labels, learned)


def _label_gradients(
    outputs: Tensor, part: Batch, vector: Tensor, likelihood: Likelihood, random: torch.Generator, draws: int
) -> Iterator[Tensor]:
    root = Batch(part.inputs, part.target, None if part.weight is None else part.weight.sqrt())
    for index in range(draws):
        with torch.enable_grad():
            loss = root.weighted(likelihood.curvature_log_prob(outputs, part.target, random)).sum()
        (gradient,) = torch.autograd.grad(loss, vector, retain_graph=index + 1 < draws)
        yield gradient


def _label_draws(loader: Iterable[Any], ranks: int) -> int:
    batches = ranks * (length(loader) or _LABEL_DRAWS)
    return min(_MOST_LABEL_DRAWS_A_BATCH, max(1, math.ceil(_LABEL_DRAWS / batches)))
