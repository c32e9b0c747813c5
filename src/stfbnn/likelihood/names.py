"""Likelihoods by name: for ``fit(likelihood=…)`` and for files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood.base import Likelihood, normalised
from stfbnn.likelihood.bernoulli import Bernoulli
from stfbnn.likelihood.categorical import ROWS_TO_JUDGE, Categorical
from stfbnn.likelihood.custom import CustomLikelihood
from stfbnn.likelihood.gaussian import Gaussian
from stfbnn.likelihood.heteroscedastic import HeteroscedasticGaussian
from stfbnn.likelihood.poisson import Poisson

LikelihoodLike = str | Likelihood

_NAMED: dict[str, Callable[..., Likelihood]] = {
    kind.name: kind for kind in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian, Poisson)
}


def resolve_likelihood(likelihood: LikelihoodLike, targets: Tensor) -> Likelihood:
    """Turn what ``fit(likelihood=…)`` was given into a likelihood of its own.

    Args:
        likelihood: "auto" (integer targets: categorical; bool: Bernoulli; float: Gaussian with learned noise), a name, or an
            object, which is copied: what inference learns does not change the user's.
        targets: The first batch's targets.

    Raises:
        InputError: The name is unknown or the object is no likelihood.
    """
    if isinstance(likelihood, Likelihood):
        return copy.deepcopy(likelihood)
    if likelihood == "auto":
        if targets.ndim == 2 and targets.shape[1] > 1 and len(targets) >= ROWS_TO_JUDGE and normalised(targets):
            raise InputError(
                "the targets are floats that are non-negative and sum to 1: they look like one-hot classes; give class "
                'indices with .argmax(1), or say likelihood="gaussian" if they are numbers to predict'
            )
        if targets.dtype == torch.bool:
            return Bernoulli()
        return Gaussian() if targets.is_floating_point() else Categorical()
    if not isinstance(likelihood, str) or likelihood not in _NAMED:
        raise InputError(
            f'likelihood={likelihood!r} is not known; choose "auto" or one of {sorted(_NAMED)}, or an object, such as '
            f"stfbnn.CustomLikelihood(log_prob=…)"
        )
    return _NAMED[likelihood]()


def build_likelihood(name: str, config: dict[str, Any]) -> Likelihood:
    """Build a likelihood from its name and `Likelihood.config`.

    Raises:
        InputError: The name is unknown, or that of a user's functions.
    """
    if name == CustomLikelihood.name:
        raise InputError("a custom likelihood is made of functions, which a file cannot hold")
    if name not in _NAMED:
        raise InputError(f"likelihood {name!r} is not one of {sorted(_NAMED)}")
    return _NAMED[name](**config)
