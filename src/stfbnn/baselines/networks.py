"""The ordinary network, as a competitor: one member, no epistemic uncertainty."""

from __future__ import annotations

from typing import Any

from torch import nn

from stfbnn.baselines.predictor import (
    PLAIN,
    Reading,
    call_network,
    collect_outputs,
    evaluating,
    input_chunks,
    parameter_count,
    require_likelihood,
    require_network,
    state_bytes,
)
from stfbnn.batches import module_device
from stfbnn.likelihood import Likelihood
from stfbnn.predictive import MemberOutputs


class PointNetwork:
    """A network, run in evaluation mode as it is.

    Args:
        model: The network. It is not changed: its modes are put back after every call.
        likelihood: What its outputs mean; for a regression with the noise set, such as by `residual_noise`.
        users_network: Whether it is the network that the user has anyway, so that nothing has to be kept beyond it; False for
            one that was trained for the comparison, such as with label smoothing.
        reading: How batches and what the network returns are read.

    Raises:
        InputError: ``model`` or ``likelihood`` is of a wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        users_network: bool = True,
        reading: Reading = PLAIN,
    ) -> None:
        self.model = require_network(model)
        self.likelihood = require_likelihood(likelihood)
        self.trainable_parameters = parameter_count(model)
        self.artifact_bytes = 0 if users_network else state_bytes(model)
        self._reading = reading

    def outputs(self, data: Any) -> MemberOutputs:
        """Its raw outputs, (1, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            InputError: There are no data, or they are not finite or of a wrong form.
        """
        chunks = input_chunks(data, module_device(self.model), self._reading)
        with evaluating(self.model):
            outputs = collect_outputs(lambda _, chunk: [call_network(self.model, chunk, self._reading)], chunks)
        return MemberOutputs(outputs, self.likelihood, at_mean=True)
