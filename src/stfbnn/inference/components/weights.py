"""The weights of a mixture's components: stacked on held-out data, or by their free energies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stfbnn.predictive.weighting import mean_over_examples

_LARGEST_GAP = 1e-6
_MOST_STEPS = 5_000
# A mixture's weights are positive.
_NO_WEIGHT = 1e-12


@dataclass(frozen=True)
class Stacking:
    """Weights that maximise the mean log of the weighted density.

    Attributes:
        weights: π, (K,), in float64.
        nll: −(1/N) Σ_n log Σ_k π_k p_k(y_n), nats per example.
        gap: The most by which any other weights could lower it.
    """

    weights: Tensor
    nll: float
    gap: float


def stack(log_densities: Tensor, weights: Tensor | None = None) -> Stacking:
    """Stacking (Wolpert 1992; Yao et al. 2018): argmax_π (1/N) Σ_n log Σ_k π_k p_k(y_n) over the simplex.

    The objective is concave. Its gradient is g_k = (1/N) Σ_n p_k(y_n) / p(y_n), with Σ_k π_k g_k = 1, so that no weights
    are better than the present ones by more than max_k g_k − 1. The steps π_k ∝ π_k g_k^η never make it worse with η = 1
    (expectation maximisation); longer ones are taken as long as they do not either. They end where the bound is below a
    millionth.

    Args:
        log_densities: log p_k(y_n | x_n), (K, N).
        weights: What each example counts in the means over n, (N,); None where all count the same.
    """
    log_densities = log_densities.double()
    top = log_densities.amax(dim=0)
    densities = (log_densities - top).exp()
    shares = torch.full((len(densities),), 1 / len(densities), dtype=torch.float64)
    mixed, stride = shares @ densities, 1.0
    gradient = mean_over_examples(densities / mixed, weights)
    for _ in range(_MOST_STEPS):
        if float(gradient.max()) - 1 <= _LARGEST_GAP:
            break
        step = shares * gradient**stride
        step /= step.sum()
        there = step @ densities
        if stride > 1 and not float(mean_over_examples((there / mixed).log(), weights)) >= 0:
            stride = max(1.0, stride / 4)
            continue
        shares, mixed, stride = step, there, 1.5 * stride
        gradient = mean_over_examples(densities / mixed, weights)
    nll = -float(mean_over_examples(mixed.log() + top, weights))
    # A vertex may still be better than what a bounded number of steps has reached.
    singles = -mean_over_examples(log_densities, weights)
    best = int(singles.argmin())
    if float(singles[best]) < nll:
        shares = torch.zeros_like(shares)
        shares[best] = 1.0
        nll = float(singles[best])
        gradient = mean_over_examples(densities / densities[best], weights)
    return Stacking(shares, nll, max(0.0, float(gradient.max()) - 1))


def free_energy_weights(free_energies: Tensor, num_examples: int, temperature: float) -> Tensor:
    """π_k ∝ exp(−(N/T) F_k), the weights that minimise a mixture's free energy where its components do not overlap.

    There KL(q‖p) = Σ π_k KL_k − H(π), so that F = Σ π_k F_k − (T/N) H(π): least at these weights, with the value
    −(T/N) log Σ_k exp(−(N/T) F_k), which is never above the least F_k. They are nearly one-hot, for F is per example and N/T
    is large.

    Args:
        free_energies: F_k, nats per example, (K,).
        num_examples: N.
        temperature: T.
    """
    return (-(num_examples / temperature) * free_energies.double()).softmax(dim=0)


@dataclass(frozen=True)
class Choice:
    """Which components a mixture keeps.

    Attributes:
        weights: π, (K,), in float64; 0 for those that are dropped.
        reasons: Why each one is dropped; "" for those that are kept.
    """

    weights: Tensor
    reasons: tuple[str, ...]

    @property
    def kept(self) -> list[int]:
        """The numbers of those that are kept."""
        return [number for number, reason in enumerate(self.reasons) if not reason]


def weigh_by_held_out(
    log_densities: Tensor, max_excess: float, min_weight: float, weights: Tensor | None = None
) -> Choice:
    """Drop what never became good, stack, drop what then has next to no weight, and stack the rest anew.

    A component that is poor throughout may have some weight all the same, where number 0 is so sure of its errors that
    anything helps: that is for a temperature to repair, not for a component.

    Args:
        log_densities: log p_k(y_n | x_n) on held-out data, (K, N).
        max_excess: A component that is worse than number 0 by more than this, nats per example, never became good.
        min_weight: Any component of less weight is dropped.
        weights: What each example counts, (N,); None where all count the same.
    """
    scores = -mean_over_examples(log_densities, weights)
    reasons = [
        _never_good("held-out NLL", score, float(scores[0])) if score - float(scores[0]) > max_excess else ""
        for score in scores.tolist()
    ]
    kept = [number for number, reason in enumerate(reasons) if not reason]
    while True:
        found = stack(log_densities[kept], weights).weights
        least = []
        for number, weight in zip(kept, found.tolist(), strict=True):
            if weight < max(min_weight, _NO_WEIGHT):
                reasons[number] = f"adds nothing to the others: its weight would be {weight:.1g}"
            else:
                least.append(number)
        if least == kept:
            return Choice(_spread(found, kept, len(scores)), tuple(reasons))
        kept = least


def weigh_equally(scores: Tensor, max_excess: float, what: str) -> Choice:
    """Equal weights for all but the components that never became good.

    Args:
        scores: What each component reached, nats per example, (K,); the lower the better.
        max_excess: The most by which a component may be worse than the best.
        what: The scores' name.
    """
    best = float(scores.min())
    reasons = tuple("" if score - best <= max_excess else _never_good(what, score, best) for score in scores.tolist())
    kept = [number for number, reason in enumerate(reasons) if not reason]
    equal = torch.full((len(kept),), 1 / len(kept), dtype=torch.float64)
    return Choice(_spread(equal, kept, len(reasons)), reasons)


def weigh_by_free_energy(free_energies: Tensor, num_examples: int, temperature: float, min_weight: float) -> Choice:
    """`free_energy_weights`, without those below ``min_weight``; other arguments as there."""
    weights = free_energy_weights(free_energies, num_examples, temperature)
    reasons = tuple(
        "" if weight >= max(min_weight, _NO_WEIGHT) else f"its free energy gives it the weight {weight:.1g}"
        for weight in weights.tolist()
    )
    kept = [number for number, reason in enumerate(reasons) if not reason]
    return Choice(_spread(weights[kept] / weights[kept].sum(), kept, len(reasons)), reasons)


def _spread(weights: Tensor, kept: list[int], count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_copy(0, torch.tensor(kept), weights)


def _never_good(what: str, score: float, other: float) -> str:
    return f"never became good: its {what} is {score:.3f}, against {other:.3f}"
