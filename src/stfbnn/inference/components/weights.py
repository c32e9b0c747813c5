"""The weights of a mixture's components: stacked on held-out data, or by their free energies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_GAP = 1e-6
_MOST_STEPS = 20_000


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


def stack(log_densities: Tensor) -> Stacking:
    """Stacking (Wolpert 1992; Yao et al. 2018): argmax_π (1/N) Σ_n log Σ_k π_k p_k(y_n) over the simplex.

    The objective is concave. Its gradient is g_k = (1/N) Σ_n p_k(y_n) / p(y_n), with Σ_k π_k g_k = 1, so that no weights
    are better than the present ones by more than max_k g_k − 1. The steps π_k ← π_k g_k (expectation maximisation) never
    make it worse, and end where that bound is below a millionth.

    Args:
        log_densities: log p_k(y_n | x_n), (K, N).
    """
    log_densities = log_densities.double()
    top = log_densities.amax(dim=0)
    densities = (log_densities - top).exp()
    weights = torch.full((len(densities),), 1 / len(densities), dtype=torch.float64)
    gradient = (densities / (weights @ densities)).mean(dim=1)
    for _ in range(_MOST_STEPS):
        if float(gradient.max()) - 1 <= _LARGEST_GAP:
            break
        weights = weights * gradient
        weights /= weights.sum()
        gradient = (densities / (weights @ densities)).mean(dim=1)
    nll = -float(((weights @ densities).log() + top).mean())
    # A vertex may still be better than what a bounded number of steps has reached.
    singles = -log_densities.mean(dim=1)
    best = int(singles.argmin())
    if float(singles[best]) < nll:
        weights = torch.zeros_like(weights)
        weights[best] = 1.0
        nll = float(singles[best])
        gradient = (densities / densities[best]).mean(dim=1)
    return Stacking(weights, nll, max(0.0, float(gradient.max()) - 1))


def mixed_nll(log_densities: Tensor, weights: Tensor) -> float:
    """−(1/N) Σ_n log Σ_k π_k p_k(y_n) for log densities (K, N) and weights (K,)."""
    logs = log_densities.double() + weights.double().log().unsqueeze(1)
    return -float(logs.logsumexp(dim=0).mean())


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
