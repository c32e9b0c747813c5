"""Which prediction a likelihood has: the one place to name a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson
from stfbnn.predictive.base import Sums
from stfbnn.predictive.bernoulli import BernoulliSums
from stfbnn.predictive.categorical import CategoricalSums
from stfbnn.predictive.custom import CustomPrediction
from stfbnn.predictive.gaussian import GaussianPrediction, HeteroscedasticPrediction
from stfbnn.predictive.kept_draws import Build, DrawSums
from stfbnn.predictive.poisson import PoissonPrediction

MakeSums = Callable[[Any, float], Sums]


def _kept(build: Build) -> MakeSums:
    return lambda likelihood, _: DrawSums(likelihood, build)


_SUMS: dict[type, MakeSums] = {
    Categorical: CategoricalSums,
    Bernoulli: BernoulliSums,
    Gaussian: _kept(GaussianPrediction.from_draws),
    HeteroscedasticGaussian: _kept(HeteroscedasticPrediction.from_draws),
    Poisson: _kept(PoissonPrediction.from_draws),
    # One of the user's own.
    Likelihood: _kept(CustomPrediction.from_draws),
}


def sums_for(likelihood: Likelihood, temperature: float) -> Sums:
    """What adds up the draws of one chunk to a prediction; for a class of the user's own, that of its nearest base class.

    Args:
        likelihood: What the outputs mean.
        temperature: τ, by which every draw's logits are divided.

    Raises:
        InputError: τ is not 1 though the outputs are no logits.
    """
    if temperature != 1 and not likelihood.has_logits:
        raise InputError(
            f"a predictive temperature divides logits, and the outputs of a {likelihood.name} likelihood are none; leave "
            f"predictive_temperature at 1"
        )
    kind = next(kind for kind in type(likelihood).__mro__ if kind in _SUMS)
    return _SUMS[kind](likelihood, temperature)
