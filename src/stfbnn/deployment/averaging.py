"""From the outputs of all draws to what a deployed network returns: plain tensors, by the formulas of `predict`.

`predict` adds up draws in float64 and checks every output. Here all is in the network's own dtype (at least float32) and in
operations that every runtime has, so that it can be traced, compiled and written to a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson
from stfbnn.likelihood.base import at_least_float32

CLASS_OUTPUTS = ("probs", "entropy", "aleatoric", "epistemic")
NUMBER_OUTPUTS = ("mean", "std", "aleatoric", "epistemic")


class Averaging:
    """The average over S draws that belongs to a likelihood.

    Args:
        likelihood: What the outputs mean.
        temperature: τ, by which every draw's logits are divided.

    Attributes:
        names: Of the tensors that `__call__` returns, in order: "probs", "entropy", "aleatoric", "epistemic" (in nats) for
            classes and labels; "mean", "std" and the variances "aleatoric", "epistemic" for numbers and counts.
        temperature: τ.

    Raises:
        InputError: The likelihood is of the user's own making, so that nobody but the user knows what to average.
    """

    def __init__(self, likelihood: Likelihood, temperature: float) -> None:
        kind = next((kind for kind in type(likelihood).__mro__ if kind in _AVERAGES), None)
        if kind is None:
            raise InputError(
                f"a {type(likelihood).__name__} is a likelihood of your own, and what is to be averaged over the draws is "
                f"known for Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian and Poisson only; predict and its "
                f".draws are there for it"
            )
        self._likelihood, self.temperature = likelihood, temperature
        self._average = _AVERAGES[kind]
        self.names = CLASS_OUTPUTS if likelihood.has_logits else NUMBER_OUTPUTS

    def __call__(self, outputs: Tensor, draws: int, rows: int, shares: Tensor | None) -> dict[str, Tensor]:
        """Average the outputs of all draws.

        Args:
            outputs: (S·B, …), draw after draw.
            draws: S.
            rows: B.
            shares: What each draw counts, (S,), summing to 1; None where all count the same.

        Returns:
            The tensors by their names, each (B, …).
        """
        over = _OverDraws(draws, rows, shares)
        return self._average(self._likelihood, at_least_float32(outputs), over, self.temperature)


class _OverDraws:
    """Averages along the draws of tensors (S·B, …) that hold one draw after another."""

    def __init__(self, draws: int, rows: int, shares: Tensor | None) -> None:
        self._draws, self._rows, self._shares = draws, rows, shares

    def mean(self, values: Tensor) -> Tensor:
        """(S·B, …) to (B, …)."""
        return self._average(self._apart(values))

    def mean_and_variance(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(S·B, …) to two of (B, …); the variance is divided by S, not S − 1, for the draws are all there is."""
        each = self._apart(values)
        mean = self._average(each)
        return mean, self._average((each - mean).square())

    def _apart(self, values: Tensor) -> Tensor:
        return values.reshape(self._draws, self._rows, *values.shape[1:])

    def _average(self, each: Tensor) -> Tensor:
        if self._shares is None:
            return each.mean(dim=0)
        return (each * self._shares.to(each).reshape(-1, *[1] * (each.ndim - 1))).sum(dim=0)


def _entropies(total: Tensor, aleatoric: Tensor) -> dict[str, Tensor]:
    """Total = aleatoric + epistemic, the mutual information of outcome and weights; rounding below zero is cut off."""
    return {"entropy": total, "aleatoric": aleatoric, "epistemic": (total - aleatoric).clamp_min(0)}


def _classes(likelihood: Categorical, outputs: Tensor, over: _OverDraws, temperature: float) -> dict[str, Tensor]:
    log_probs = likelihood.log_probs(outputs, temperature)
    each = log_probs.exp()
    probs = over.mean(each)
    aleatoric = over.mean(-(each * log_probs).sum(dim=1))
    return {"probs": probs, **_entropies(_surprise(probs).sum(dim=1), aleatoric)}


def _labels(likelihood: Bernoulli, outputs: Tensor, over: _OverDraws, temperature: float) -> dict[str, Tensor]:
    each = likelihood.logits(outputs, temperature).sigmoid()
    probs = over.mean(each)
    return {"probs": probs, **_entropies(_two_way(probs), over.mean(_two_way(each)))}


def _two_way(probs: Tensor) -> Tensor:
    """Entropy of a label that is there with these probabilities."""
    return _surprise(probs) + _surprise(1 - probs)


def _surprise(probs: Tensor) -> Tensor:
    """−p log p, which is 0 at p = 0."""
    return -probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def _numbers(mean: Tensor, aleatoric: Tensor, epistemic: Tensor) -> dict[str, Tensor]:
    """The law of total variance."""
    return {"mean": mean, "std": (aleatoric + epistemic).sqrt(), "aleatoric": aleatoric, "epistemic": epistemic}


def _one_noise(likelihood: Gaussian, outputs: Tensor, over: _OverDraws, _: float) -> dict[str, Tensor]:
    mean, epistemic = over.mean_and_variance(outputs)
    # Multiplied, not expanded: that it has a row for each example is then written in the graph.
    return _numbers(mean, torch.ones_like(mean) * likelihood.noise_std.square().to(mean), epistemic)


def _own_noise(likelihood: HeteroscedasticGaussian, outputs: Tensor, over: _OverDraws, _: float) -> dict[str, Tensor]:
    means, log_variances = likelihood.heads(outputs)
    mean, epistemic = over.mean_and_variance(means)
    return _numbers(mean, over.mean(log_variances.exp()), epistemic)


def _counts(likelihood: Poisson, outputs: Tensor, over: _OverDraws, _: float) -> dict[str, Tensor]:
    del likelihood
    mean, epistemic = over.mean_and_variance(outputs.exp())
    return _numbers(mean, mean, epistemic)


_AVERAGES: dict[type, Callable[[Any, Tensor, _OverDraws, float], dict[str, Tensor]]] = {
    Categorical: _classes,
    Bernoulli: _labels,
    Gaussian: _one_noise,
    HeteroscedasticGaussian: _own_noise,
    Poisson: _counts,
}
