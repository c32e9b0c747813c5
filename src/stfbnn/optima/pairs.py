"""How different two optima of a layer are: in their weights, and in what they predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from stfbnn.optima.paths import Path

# Columns of weights that are taken to float64 at once.
_COLUMNS = 2**20


@dataclass(frozen=True)
class Pair:
    """What lies between two optima.

    Attributes:
        first: Number of the one.
        second: Number of the other.
        relative_distance: See `relative_distances`.
        cosine_distance: 1 − their cosine similarity; see `cosine_similarities`.
        disagreement: Share of the examples on which their labels differ; None where they predict no labels.
        total_variation: Mean distance of their predictive distributions; None where that has no closed form.
        line: The loss on the straight line between them.
        curve: The loss on the curve that was fitted between them; None where none was.
    """

    first: int
    second: int
    relative_distance: float
    cosine_distance: float
    disagreement: float | None
    total_variation: float | None
    line: Path
    curve: Path | None


def relative_distances(weights: Tensor) -> Tensor:
    """|w_i − w_j| / ((|w_i| + |w_j|) / 2), the distance of every two weight vectors beside their mean length.

    It is 0 for equal vectors, √2 for orthogonal ones of one length, and at most 2.

    Args:
        weights: (K, d).

    Returns:
        (K, K), symmetric, in float64 on the CPU; 0 between two vectors that are zero.

    Raises:
        InputError: The weights are not K finite vectors.
    """
    _require_vectors(weights)
    squares = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    lengths = torch.zeros(len(weights), dtype=torch.float64)
    for part in torch.split(weights.detach(), _COLUMNS, dim=1):
        here = part.double().cpu()
        # Not by |a|² + |b|² − 2 a·b, which loses the distance of vectors that are close.
        squares += torch.cdist(here, here, compute_mode="donot_use_mm_for_euclid_dist").square()
        lengths += here.square().sum(dim=1)
    lengths = lengths.sqrt()
    mean = (lengths[:, None] + lengths) / 2
    return torch.where(mean > 0, squares.sqrt() / mean, 0.0)


def cosine_similarities(weights: Tensor, center: Tensor | None = None) -> Tensor:
    """(w_i − c)·(w_j − c) / (|w_i − c| |w_j − c|), the cosine of the angle at ``center`` between every two weight vectors.

    Args:
        weights: (K, d).
        center: c, (d,), such as the trained weights; None for the origin.

    Returns:
        (K, K), symmetric, in float64 on the CPU; 0 where one of the two is at the center, for it has no direction then.

    Raises:
        InputError: The weights are not K finite vectors, or the center is not one of their size.
    """
    _require_vectors(weights)
    if center is not None and (center.shape != weights.shape[1:] or not bool(torch.isfinite(center).all())):
        raise InputError(
            f"the center must be a finite vector of shape {tuple(weights.shape[1:])}, but its shape is {tuple(center.shape)}"
        )
    products = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    origin = torch.zeros_like(weights[0]) if center is None else center
    parts = zip(torch.split(weights.detach(), _COLUMNS, dim=1), torch.split(origin.detach(), _COLUMNS), strict=True)
    for part, middle in parts:
        here = part.double().cpu() - middle.double().cpu()
        products += here @ here.T
    lengths = products.diagonal().sqrt()
    scale = lengths[:, None] * lengths
    return torch.where(scale > 0, products / scale, 0.0).clamp(-1.0, 1.0)


def disagreements(outputs: Tensor, likelihood: Likelihood, counted: Tensor | None = None) -> Tensor | None:
    """Share of the labels that every two networks predict differently.

    Args:
        outputs: Of K networks for N examples, (K, N, …).
        likelihood: What the outputs mean.
        counted: Which labels count, in the targets' shape, such as those that are not to be ignored; None for all.

    Returns:
        (K, K), symmetric, in float64 on the CPU; None where the outputs are no scores of labels.

    Raises:
        InputError: The outputs do not fit the likelihood, or ``counted`` does not fit them.
    """
    _require_outputs(outputs, likelihood)
    if isinstance(likelihood, Categorical):
        labels = [_flat(likelihood.canonical(one).argmax(dim=1), counted) for one in outputs.cpu()]
    elif isinstance(likelihood, Bernoulli):
        labels = [_flat(likelihood.logits(one) > 0, counted) for one in outputs.cpu()]
    else:
        return None
    return _pairwise(labels, lambda one, other: float((one != other).double().mean()))


def total_variations(outputs: Tensor, likelihood: Likelihood, counted: Tensor | None = None) -> Tensor | None:
    """Mean total variation distance between the predictive distributions of every two networks.

    For classes it is ½ Σ_c |p_c − q_c|, for a label that is there or not |p − q|, both averaged over all labels where an
    example has several; for numbers with one Gaussian noise 2 Φ(δ/2) − 1, δ being the Mahalanobis distance √Σ ((f − g)/s)² of
    an example's outputs, averaged over the examples.

    Args:
        outputs: Of K networks for N examples, (K, N, …).
        likelihood: What the outputs mean.
        counted: As for `disagreements`; numbers all count.

    Returns:
        (K, K), symmetric, in [0, 1], in float64 on the CPU; None for other likelihoods, where it has no such form.

    Raises:
        InputError: The outputs do not fit the likelihood, ``counted`` does not fit them, or a noise that is learned is not
            known yet.
    """
    _require_outputs(outputs, likelihood)
    if isinstance(likelihood, Gaussian):
        noise = likelihood.noise_std.detach().cpu()
        if bool(noise.isnan().any()):
            raise InputError("the size of the Gaussian noise is not known: fit the likelihood first, or give noise_std")
        # One noise for each column of (N, C), or one for all.
        scaled = [
            (one.double() / noise).flatten(1) if one.ndim > 1 else one.double()[:, None] / noise
            for one in outputs.cpu()
        ]
        return _pairwise(scaled, _gaussian_distance)
    if isinstance(likelihood, Categorical):
        probs = [_class_rows(likelihood.log_probs(one.double()).exp(), counted) for one in outputs.cpu()]
        return _pairwise(probs, lambda one, other: 0.5 * float((one - other).abs().sum(dim=1).mean()))
    if isinstance(likelihood, Bernoulli):
        shares = [_flat(likelihood.logits(one.double()).sigmoid(), counted) for one in outputs.cpu()]
        return _pairwise(shares, lambda one, other: float((one - other).abs().mean()))
    return None


def _gaussian_distance(one: Tensor, other: Tensor) -> float:
    """2 Φ(δ/2) − 1 = erf(δ / √8), averaged over the rows."""
    return float(torch.erf((one - other).norm(dim=1) / math.sqrt(8)).mean())


def _pairwise(each: list[Tensor], measure: Callable[[Tensor, Tensor], float]) -> Tensor:
    """A symmetric matrix with zeros on its diagonal."""
    found = torch.zeros(len(each), len(each), dtype=torch.float64)
    for one, other in combinations(range(len(each)), 2):
        found[one, other] = found[other, one] = measure(each[one], each[other])
    return found


def _class_rows(probs: Tensor, counted: Tensor | None) -> Tensor:
    """One row for each label that counts, from (N, C, …)."""
    rows = probs.movedim(1, -1).flatten(0, -2)
    return rows if counted is None else rows[_mask(counted, len(rows))]


def _flat(values: Tensor, counted: Tensor | None) -> Tensor:
    """One entry for each label that counts."""
    flat = values.flatten()
    return flat if counted is None else flat[_mask(counted, len(flat))]


def _mask(counted: Tensor, labels: int) -> Tensor:
    if counted.dtype != torch.bool or counted.numel() != labels or not bool(counted.any()):
        raise InputError(
            f"counted must say True or False for each of {labels} labels, and True for at least one, but it is "
            f"{tuple(counted.shape)} of {counted.dtype} with {int(counted.sum())} that count"
        )
    return counted.flatten().cpu()


def _require_vectors(weights: Tensor) -> None:
    if weights.ndim != 2 or 0 in weights.shape or not weights.is_floating_point():
        raise InputError(
            f"weights must be float vectors, (K, d), but they are {tuple(weights.shape)} of {weights.dtype}"
        )
    if not bool(torch.isfinite(weights).all()):
        raise InputError("weights hold NaN or infinite values; leave out the run that diverged")


def _require_outputs(outputs: Tensor, likelihood: Likelihood) -> None:
    if outputs.ndim < 2 or 0 in outputs.shape:
        raise InputError(
            f"outputs must be those of K networks for N examples, (K, N, …), but their shape is {tuple(outputs.shape)}"
        )
    for one in outputs:
        likelihood.check_outputs(one)
