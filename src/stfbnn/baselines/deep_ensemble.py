"""Deep ensemble: the average of networks that were trained from different starts (Lakshminarayanan et al., 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
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
from stfbnn.batches import module_device, to_device
from stfbnn.errors import InputError
from stfbnn.likelihood import Likelihood
from stfbnn.predictive import MemberOutputs


class DeepEnsemble:
    """Several networks, which count the same; their probabilities are averaged, for a regression their densities.

    Args:
        models: At least two networks, of the same or of different architectures and with buffers of their own, whose outputs
            mean the same. They are not changed: their modes are put back after every call.
        likelihood: What the outputs mean; for a regression with the noise set.
        users_networks: How many of them, the first ones, the user has anyway, so that they are not counted in
            ``artifact_bytes``.
        reading: How batches and what the networks return are read.

    Raises:
        InputError: There are fewer than two networks, one of them stands there twice, or an argument is of a wrong kind.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        likelihood: Likelihood,
        *,
        users_networks: int = 1,
        reading: Reading = PLAIN,
    ) -> None:
        # A sequential network is a collection, too: of its layers.
        if isinstance(models, nn.Sequential) or not isinstance(models, Iterable):
            raise InputError(
                f"models must be a list of networks, but it is a {type(models).__name__}; give at least two"
            )
        self.models = tuple(require_network(model) for model in models)
        if len(self.models) < 2:
            raise InputError(
                f"an ensemble needs at least two networks, but there are {len(self.models)}; take PointNetwork for one"
            )
        if len({id(model) for model in self.models}) < len(self.models):
            raise InputError("a network stands in the ensemble twice; train as many networks as it is to have members")
        if isinstance(users_networks, bool) or not 0 <= users_networks <= len(self.models):
            raise InputError(
                f"users_networks must be an integer from 0 to {len(self.models)}, the number of networks, but it is "
                f"{users_networks!r}"
            )
        self.likelihood = require_likelihood(likelihood)
        self.trainable_parameters = sum(map(parameter_count, self.models))
        self.artifact_bytes = sum(map(state_bytes, self.models[users_networks:]))
        self._reading = reading

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs of every network, (S, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            InputError: There are no data, they are not finite or of a wrong form, or the networks' outputs differ in shape.
        """
        chunks = input_chunks(data, module_device(self.models[0]), self._reading)
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(evaluating(model))
            outputs = collect_outputs(
                lambda _, chunk: (
                    call_network(model, to_device(chunk, module_device(model)), self._reading) for model in self.models
                ),
                chunks,
            )
        return MemberOutputs(outputs, self.likelihood)
