"""How a component does: on the training data, and beside component 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stfbnn.batches import WEIGHT_KEY
from stfbnn.draws import Draws
from stfbnn.errors import InputError
from stfbnn.inference.minibatch import chunks
from stfbnn.inference.survey import checked_batch
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Posterior
from stfbnn.predictive import Prediction
from stfbnn.processes import Processes
from stfbnn.randomness import seeded


@torch.no_grad()
def training_nll(
    bnn: BayesianNetwork,
    loader: Iterable[Any],
    likelihood: Likelihood,
    target_key: str,
    samples: int,
    seed: int,
    weight_key: str = WEIGHT_KEY,
    processes: Processes | None = None,
) -> float:
    """E_q[−log p(y | x, w)] over the training data, nats per example: the mean over draws, in one pass.

    Examples count by their weights; the sum is divided by their number. Of several ranks each gives its own part, in which the
    few that fill it up to the others' length count again.

    Args:
        bnn: The network.
        loader: The training data, or this rank's part of them.
        likelihood: p(y | output).
        target_key: The target's entry in mappings.
        samples: Draws, the same for every example.
        seed: Of the draws, and of what the loader draws.
        weight_key: The weights' entry in mappings.
        processes: The ranks; None for one.
    """
    draws = Draws(bnn, samples, seed)
    total, examples = 0.0, 0.0
    with seeded(seed, "training-nll"):
        for batch in loader:
            for part in chunks(checked_batch(batch, target_key, weight_key).to(bnn.device), bnn.device):
                for outputs in draws.outputs(part.inputs):
                    logs = torch.stack([part.weighted(likelihood.log_prob(draw, part.target)) for draw in outputs])
                    total -= float(logs.double().sum()) / draws.count
                examples += len(part)
    if processes is not None and processes.several:
        total, examples = processes.sum(torch.tensor([total, examples], dtype=torch.float64)).tolist()
    return total / examples


def distance(posterior: Posterior, other: Posterior) -> float:
    """‖μ − μ₀‖ / ‖μ₀‖ between the means of two posteriors, the second being the measure."""
    mean, center = posterior.mean_vector().detach(), other.mean_vector().detach()
    return float((mean - center).norm() / center.norm())


def disagreement(prediction: Prediction, other: Prediction, counted: Tensor | None = None) -> float | None:
    """How far two predictions of the same examples differ.

    Args:
        prediction: One.
        other: The other one.
        counted: Which labels are compared, in their shape; None for all.

    Returns:
        For labels, the share that differ; for numbers, the root mean square difference of the means over that of the second
        one's standard deviations; None where there are neither.
    """
    mine, theirs = getattr(prediction, "labels", None), getattr(other, "labels", None)
    if mine is not None and theirs is not None:
        differ = (mine != theirs).double()
        return float((differ if counted is None else differ[counted]).mean())
    try:
        gap, width = prediction.mean - other.mean, other.std  # type: ignore[attr-defined]
    except (AttributeError, InputError):
        return None
    return float((gap.double().square().mean() / width.double().square().mean()).sqrt())
