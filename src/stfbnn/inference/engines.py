"""The inference engines by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.bayes_by_backprop import BayesByBackprop
from stfbnn.inference.engine import Engine
from stfbnn.inference.estimators import Estimator
from stfbnn.inference.laplace import Laplace
from stfbnn.inference.maximum_a_posteriori import MaximumAPosteriori
from stfbnn.inference.variational_newton import VariationalNewton
from stfbnn.posterior import MeanFieldPosterior, PointMassPosterior, Posterior
from stfbnn.posterior.block_gaussian import BlockGaussianPosterior
from stfbnn.prior import GaussianPrior

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (VariationalNewton, BayesByBackprop, Laplace, MaximumAPosteriori)
}


def resolve_engine(name: str, posterior: Posterior) -> str:
    """The engine's name; "auto" is natural gradient for every family that has the update, else Bayes by Backprop.

    Raises:
        InputError: It is unknown.
    """
    if name == "auto" and isinstance(posterior, PointMassPosterior):
        return MaximumAPosteriori.name
    if name == "auto":
        tracked = isinstance(posterior, MeanFieldPosterior | BlockGaussianPosterior)
        return VariationalNewton.name if tracked else BayesByBackprop.name
    if name not in ENGINES:
        raise InputError(f'engine={name!r} is not known; choose "auto" or one of {sorted(ENGINES)}')
    return name


def check_engine(
    name: str, options: Mapping[str, Any], posterior: Posterior, prior: GaussianPrior, estimator: Estimator
) -> None:
    """Refuse an engine that cannot infer this family, and settings that it does not have or accept.

    Raises:
        InputError: Says what is known.
    """
    if isinstance(posterior, PointMassPosterior) and name != MaximumAPosteriori.name:
        raise InputError(
            f'a point mass is not inferred but retrained, so engine={name!r} has no use; use engine="auto"'
        )
    known = inspect.signature(ENGINES[name]).parameters
    settings = [
        key
        for key, parameter in known.items()
        if parameter.default is not inspect.Parameter.empty and key != "curvature"
    ]
    unknown = sorted(set(options) - set(settings))
    if unknown:
        raise InputError(f"engine_options has {unknown}, but the engine {name!r} has the settings {settings}")
    build_engine(name, posterior, prior, 1, 1, no_curvature(posterior), estimator, options)


def blocks_of(posterior: Posterior) -> Tensor | None:
    """Which weights make up each block (U, k) of a block Gaussian, whose curvature has to be known block by block."""
    return posterior.index if isinstance(posterior, BlockGaussianPosterior) else None


def no_curvature(posterior: Posterior) -> Tensor:
    """Zeros in the shape of the curvature that a posterior's engines take, without the memory of it."""
    blocks, mean = blocks_of(posterior), posterior.mean_vector().detach()
    return mean.new_zeros(()).expand(mean.shape if blocks is None else (*blocks.shape, blocks.shape[1]))


def build_engine(
    name: str,
    posterior: Posterior,
    prior: GaussianPrior,
    num_examples: int,
    batches: int,
    curvature: Tensor | None,
    estimator: Estimator,
    options: Mapping[str, Any],
) -> Engine:
    """Make an engine; the posterior stays as it is until `Engine.begin`.

    Args:
        name: "natural-gradient", "bayes-by-backprop" or "laplace".
        posterior: What it infers.
        prior: p(w).
        num_examples: N.
        batches: Steps in an epoch.
        curvature: Gauss–Newton estimate, (d,) or (U, k, k) for block Gaussians; None where Bayes by Backprop is to start
            from the widths that the recipe set.
        estimator: Of E_q[NLL] and its gradients.
        options: The engine's settings.

    Raises:
        InputError: A setting is out of range, or the engine cannot infer this family.
    """
    if name == MaximumAPosteriori.name:
        return MaximumAPosteriori(posterior, prior, num_examples, estimator, **options)
    if name == BayesByBackprop.name:
        if curvature is not None and curvature.ndim > 1:
            blocks = blocks_of(posterior)
            assert blocks is not None  # noqa: S101 - only block Gaussians have a curvature in blocks
            diagonal = torch.empty_like(posterior.mean_vector())
            diagonal[blocks] = curvature.diagonal(dim1=-2, dim2=-1).to(diagonal)
            curvature = diagonal
        return BayesByBackprop(posterior, prior, num_examples, estimator, curvature, **options)
    assert curvature is not None  # noqa: S101 - always surveyed for these
    if name == Laplace.name:
        return Laplace(posterior, prior, num_examples, estimator, curvature, **options)
    return VariationalNewton(posterior, prior, num_examples, estimator, batches, curvature, **options)
