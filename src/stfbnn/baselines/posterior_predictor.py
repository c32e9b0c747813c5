"""A Bayesian network as a competitor among others: its posterior draws are the members."""

from __future__ import annotations

from typing import Any

from stfbnn.baselines.predictor import PLAIN, Reading, require_count
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import member_outputs
from stfbnn.predictive import MemberOutputs


class BayesianPredictor:
    """The draws of a fitted Bayesian network, over whichever of its weights are random.

    Args:
        bnn: The network, after ``stfbnn.fit`` or a baseline's own fit.
        samples: Posterior draws.
        seed: Which draws.
        reading: How batches are read; what the network returns is read as ``bayesianize`` was told.

    Raises:
        InputError: ``samples`` or ``seed`` is no such integer.
        NotFittedError: The posterior has not been inferred.
    """

    def __init__(self, bnn: BayesianNetwork, samples: int = 32, seed: int = 0, reading: Reading = PLAIN) -> None:
        bnn.require_fitted()
        self.bnn = bnn
        self.samples, self.seed = require_count(samples, "samples"), require_count(seed, "seed", least=0)
        self.reading = reading

    @property
    def likelihood(self) -> Likelihood:
        """With the noise that inference found, for a regression."""
        return self.bnn.require_fitted()

    @property
    def trainable_parameters(self) -> int:
        """The posterior's own: two for each random weight of a mean-field Gaussian."""
        return sum(parameter.numel() for parameter in self.bnn.posterior.parameters())

    @property
    def artifact_bytes(self) -> int:
        """Those of the posterior's tensors, as a file keeps them."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.bnn.posterior.tensors().values())

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs of all draws, (S, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            ModelChangedError: The user's model was changed since the posterior was inferred.
            InputError: There are no data, or they are not finite or of a wrong form.
        """
        return member_outputs(
            self.bnn,
            data,
            samples=self.samples,
            seed=self.seed,
            has_targets=self.reading.has_targets,
            target_key=self.reading.target_key,
        )
