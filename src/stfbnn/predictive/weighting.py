"""Averages over posterior draws, and over examples, that may count differently: as a mixture's components do, or by weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stfbnn.errors import InputError


def draw_weights(weights: Tensor | None, count: int) -> list[float]:
    """The weights of ``count`` draws as numbers; 1 each where none are given.

    Raises:
        InputError: They are not positive and finite, or not one a draw.
    """
    if weights is None:
        return [1.0] * count
    if tuple(weights.shape) != (count,) or not bool((torch.isfinite(weights) & (weights > 0)).all()):
        raise InputError(
            f"{count} draws need as many positive weights, but they are {weights.tolist()} of shape {tuple(weights.shape)}"
        )
    numbers: list[float] = weights.double().tolist()
    return numbers


def normalised(weights: list[float]) -> Tensor | None:
    """Weights divided by their sum, (S,) in float64; None where all are equal."""
    if len(set(weights)) == 1:
        return None
    return torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)


def average(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the draws, in float64.

    Args:
        values: (S, …).
        weights: Normalised, (S,); None for equal ones.
    """
    values = values.double()
    return values.mean(dim=0) if weights is None else torch.tensordot(weights, values, dims=1)


def variance(values: Tensor, weights: Tensor | None) -> Tensor:
    """Variance over the draws (divided by S, not S − 1: they are all there is), in float64; arguments as of `average`."""
    values = values.double()
    if weights is None:
        return values.var(dim=0, correction=0)
    return average((values - average(values, weights)).square(), weights)


def log_average(logs: Tensor, weights: Tensor | None) -> Tensor:
    """log Σ_s w_s exp(logs_s), by logsumexp.

    Args:
        logs: (S, …), in float64.
        weights: Normalised, (S,); None for equal ones.
    """
    if weights is None:
        return logs.logsumexp(dim=0) - math.log(len(logs))
    return (logs + weights.log().reshape(-1, *[1] * (logs.ndim - 1))).logsumexp(dim=0)


def mean_over_examples(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the last dimension, in float64.

    Args:
        values: (…, N).
        weights: What each counts, (N,), not negative, of positive sum; None for equal ones.
    """
    values = values.double()
    if weights is None:
        return values.mean(dim=-1)
    weights = weights.to(values)
    return (values * weights).sum(dim=-1) / weights.sum()


def mean_and_error(values: Tensor, weights: Tensor | None) -> tuple[float, float]:
    """Weighted mean over examples, and its standard error by linearisation, √(N/(N−1) Σ_n (w_n (v_n − v̄))²), Σ w = 1.

    Args:
        values: One an example, (N,).
        weights: As of `mean_over_examples`.

    Returns:
        Both; the error of a single example is infinite.
    """
    mean, count = mean_over_examples(values, weights), len(values)
    shares = torch.full((count,), 1 / count, dtype=torch.float64) if weights is None else weights.cpu().double()
    spread = float((shares / shares.sum() * (values.cpu().double() - mean.cpu())).square().sum())
    return float(mean), math.sqrt(spread * count / (count - 1)) if count > 1 else math.inf
