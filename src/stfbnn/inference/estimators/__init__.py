"""Estimators of a minibatch's E_q[−log p(y|x,w)] and of its gradient: how the noise of q is drawn."""

from __future__ import annotations

from stfbnn.batches import Inputs
from stfbnn.errors import InputError
from stfbnn.inference.estimators.across_ranks import AcrossRanks
from stfbnn.inference.estimators.base import Estimate, Estimator, LayerForward, Minibatch, Sampler
from stfbnn.inference.estimators.layer_outputs import Flipout, LocalReparameterization
from stfbnn.inference.estimators.weight_samples import PerExample, SharedSample, outputs_of_each
from stfbnn.network import BayesianNetwork

__all__ = [
    "ESTIMATORS",
    "AcrossRanks",
    "Estimate",
    "Estimator",
    "Flipout",
    "LayerForward",
    "LocalReparameterization",
    "Minibatch",
    "PerExample",
    "Sampler",
    "SharedSample",
    "outputs_of_each",
    "resolve_estimator",
]

ESTIMATORS: dict[str, type[Estimator]] = {
    "shared": SharedSample,
    "antithetic": SharedSample,
    "per-example": PerExample,
    "flipout": Flipout,
    "local-reparameterization": LocalReparameterization,
}


def resolve_estimator(
    estimator: str | Estimator, draws: int | None, bnn: BayesianNetwork, example: Inputs
) -> Estimator:
    """Turn what ``fit(estimator=…, draws=…)`` was given into an estimator that suits the network.

    Args:
        estimator: "auto", a name, or an object. "auto" takes local reparameterisation where that is exact, else an
            antithetic pair of shared draws.
        draws: Passes through the network for one estimate; None takes the estimator's own number. An odd number is drawn
            independently, an even one in antithetic pairs, but for "shared", which never pairs.
        bnn: The network.
        example: A few rows of inputs.

    Raises:
        InputError: It is unknown, or not right for the network's first layer or posterior family.
    """
    if isinstance(estimator, Estimator):
        if draws is not None:
            raise InputError(f"draws={draws} belongs to an estimator that is given by name; say it in {estimator!r}")
        estimator.check(bnn, example)
        return estimator
    if estimator == "auto":
        try:
            return resolve_estimator("local-reparameterization", draws, bnn, example)
        except InputError:
            return resolve_estimator("antithetic", draws, bnn, example)
    if estimator not in ESTIMATORS:
        raise InputError(f'estimator={estimator!r} is not known; choose "auto" or one of {sorted(ESTIMATORS)}')
    count = (1 if estimator == "shared" else 2) if draws is None else draws
    if estimator == "antithetic" and isinstance(count, int) and count % 2:
        raise InputError(f"draws must be even for antithetic pairs, but it is {count}")
    pairs = estimator != "shared" and isinstance(count, int) and count % 2 == 0
    chosen = ESTIMATORS[estimator](count, pairs)
    chosen.check(bnn, example)
    return chosen
