"""The inference engines by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.bayes_by_backprop import BayesByBackprop
from stfbnn.inference.engine import Engine
from stfbnn.inference.variational_newton import VariationalNewton
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (VariationalNewton, BayesByBackprop)}


def check_engine(name: str, options: Mapping[str, Any], posterior: Posterior, prior: GaussianPrior) -> None:
    """Refuse an unknown engine, one that cannot infer this family, and settings that it does not have or accept.

    Raises:
        InputError: Says what is known.
    """
    if name not in ENGINES:
        raise InputError(f"engine={name!r} is not known; choose one of {sorted(ENGINES)}")
    known = inspect.signature(ENGINES[name]).parameters
    settings = [key for key, parameter in known.items() if parameter.default is not inspect.Parameter.empty]
    unknown = sorted(set(options) - set(settings))
    if unknown:
        raise InputError(f"engine_options has {unknown}, but the engine {name!r} has the settings {settings}")
    # On a copy, since an engine sets the posterior's width when it is made.
    trial = copy.deepcopy(posterior)
    build_engine(name, trial, prior, 1, 1, torch.zeros_like(trial.mean_vector()), options)


def build_engine(
    name: str,
    posterior: Posterior,
    prior: GaussianPrior,
    num_examples: int,
    batches: int,
    curvature: Tensor,
    options: Mapping[str, Any],
) -> Engine:
    """Make an engine.

    Args:
        name: "natural-gradient" or "bayes-by-backprop".
        posterior: What it infers.
        prior: p(w).
        num_examples: N.
        batches: Steps in an epoch.
        curvature: Diagonal Gauss–Newton estimate, (d,), for engines that use one.
        options: The engine's settings.

    Raises:
        InputError: A setting is out of range, or the engine cannot infer this family.
    """
    if name == VariationalNewton.name:
        return VariationalNewton(posterior, prior, num_examples, batches, curvature, **options)
    return BayesByBackprop(posterior, prior, num_examples, **options)
