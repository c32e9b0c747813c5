"""What is attacked: any predictor as a set of members that can be differentiated with respect to the inputs.

A network is one member, an ensemble several, a posterior or dropout as many as one likes to draw. The *deployed* members are
those whose average answers users; an attacker may know them (for a posterior: the seed of ``predict``), or only the
distribution they come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.baselines.deep_ensemble import DeepEnsemble
from stfbnn.baselines.mc_dropout import MCDropout, dropping
from stfbnn.baselines.networks import PointNetwork
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import call_network, evaluating
from stfbnn.batches import module_device
from stfbnn.draws import Draws, chunk_rows
from stfbnn.errors import InputError
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import components_of
from stfbnn.predictive.categorical import CategoricalPrediction, CategoricalSums
from stfbnn.predictive.weighting import log_average
from stfbnn.randomness import seeded
from stfbnn.threat import InputSpace

MemberFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Members:
    """Some members of a predictor.

    Attributes:
        functions: From normalised inputs (B, …) to raw outputs (B, K), differentiable.
        shares: What each counts, (S,), summing to 1; None where all count the same.
    """

    functions: tuple[MemberFunction, ...]
    shares: Tensor | None = None

    def __len__(self) -> int:
        return len(self.functions)


class Victim(ABC):
    """A classifier under attack.

    Args:
        likelihood: What raw outputs mean.
        space: Where inputs live.
        temperature: τ, which divides every member's logits.
        device: Where it computes.

    Attributes:
        random: Whether members are drawn, so that an attacker can draw others than the deployed ones.
        by_place: Whether what a member says of an example depends on its place among others: gradient attacks then run the
            very chunks of `predict`.
    """

    random: bool
    by_place: bool = False

    def __init__(self, likelihood: Categorical, space: InputSpace, temperature: float, device: torch.device) -> None:
        self.likelihood, self.space, self.temperature, self.device = likelihood, space, temperature, device

    @abstractmethod
    def deployed(self) -> Members:
        """The members whose average answers users."""

    @abstractmethod
    def draw(self, count: int, seed: int) -> Members:
        """``count`` members drawn by ``seed``, the same for the same seed; the deployed ones where nothing is drawn."""

    def member_log_probs(self, inputs: Tensor, members: Members) -> Iterable[Tensor]:
        """log p(k | x, member) of one member after another, (B, K) each in float64, with gradients to ``inputs``.

        Args:
            inputs: (B, …) in the input space, on the victim's device.
            members: Whose.
        """
        given = self.space.to_network(inputs)
        for function in members.functions:
            yield self.likelihood.log_probs(_in_double(function(given)), self.temperature)

    def log_predictive(self, inputs: Tensor, members: Members) -> Tensor:
        """log of the members' average probability, (B, K) in float64, with gradients to ``inputs``."""
        logs = torch.stack(list(self.member_log_probs(inputs, members)))
        shares = None if members.shares is None else members.shares.to(logs)
        return log_average(logs, shares)

    @torch.no_grad()
    def predict(self, inputs: Tensor, members: Members | None = None) -> CategoricalPrediction:
        """The prediction of the deployed members, or of others; in chunks, without gradients, on the CPU.

        Args:
            inputs: (N, …) in the input space, on any device.
            members: None for the deployed ones.

        Raises:
            InputError: The outputs are no class scores (B, K).
        """
        chosen = self.deployed() if members is None else members
        rows = chunk_rows(inputs, self.device)
        parts = []
        for chunk in torch.split(inputs, rows):
            given = self.space.to_network(chunk.to(self.device))
            sums = CategoricalSums(self.likelihood, self.temperature)
            for index, function in enumerate(chosen.functions):
                outputs = function(given)
                if outputs.ndim != 2:
                    raise InputError(
                        f"attacks are for one label an example, from outputs (B, K), but the outputs have shape "
                        f"{tuple(outputs.shape)}"
                    )
                sums.add(outputs.unsqueeze(0), None if chosen.shares is None else chosen.shares[index : index + 1])
            parts.append(sums.finish(at_mean=False))
        whole = CategoricalPrediction.concatenate(parts)
        assert isinstance(whole, CategoricalPrediction)  # noqa: S101 - parts of one kind
        return whole


class PosteriorVictim(Victim):
    """A Bayesian network: its members are posterior draws, those of ``stfbnn.predict`` at the same seed the deployed ones.

    Args:
        bnn: After `fit`.
        space: Where inputs live.
        samples: Deployed draws.
        seed: Which.
        temperature: None for the network's own τ.

    Raises:
        NotFittedError: The posterior has not been inferred.
        InputError: It is no classifier.
    """

    def __init__(
        self,
        bnn: BayesianNetwork,
        space: InputSpace,
        samples: int = 32,
        seed: int = 0,
        temperature: float | None = None,
    ) -> None:
        likelihood = _require_classes(bnn.require_fitted())
        tau = bnn.predictive_temperature if temperature is None else temperature
        super().__init__(likelihood, space, tau, bnn.device)
        bnn.check_unchanged()
        self._bnn = bnn
        # Point masses draw nothing, also where a mixture's noise would choose among them: all are always there.
        self.random = any(part.noise_size for part in components_of(bnn.posterior))
        self._deployed = self.draw(samples, seed)

    def deployed(self) -> Members:
        """The draws of ``predict``."""
        return self._deployed

    def draw(self, count: int, seed: int) -> Members:
        """The first draws of another seed."""
        draws = Draws(self._bnn, count, seed)
        functions = tuple(partial(self._run, draws.vector(index)) for index in range(draws.count))
        return Members(functions, draws.shares)

    def _run(self, vector: Tensor, inputs: Tensor) -> Tensor:
        return self._bnn.outputs(vector, inputs)


class NetworksVictim(Victim):
    """One network or several: nothing is drawn.

    Args:
        models: The networks, all on one device.
        likelihood: What their outputs mean.
        space: Where inputs live.
        temperature: τ; that of temperature scaling, for one.
    """

    random = False

    def __init__(
        self, models: Iterable[nn.Module], likelihood: Categorical, space: InputSpace, temperature: float = 1.0
    ) -> None:
        networks = tuple(models)
        super().__init__(_require_classes(likelihood), space, temperature, module_device(networks[0]))
        self._members = Members(tuple(partial(_run_network, network) for network in networks))

    def deployed(self) -> Members:
        """The networks."""
        return self._members

    def draw(self, count: int, seed: int) -> Members:
        """The networks: there are no others."""
        del count, seed
        return self._members


class DropoutVictim(Victim):
    """Monte Carlo dropout. A mask follows from its number and an example's place in the chunk, as in `MCDropout`.

    Args:
        predictor: The method.
        space: Where inputs live.
        temperature: τ.
    """

    random = True
    by_place = True

    def __init__(self, predictor: MCDropout, space: InputSpace, temperature: float = 1.0) -> None:
        super().__init__(_require_classes(predictor.likelihood), space, temperature, module_device(predictor.model))
        self._predictor = predictor

    def deployed(self) -> Members:
        """As many masks as the method averages, by its own seed."""
        return self.draw(self._predictor.samples, self._predictor.seed)

    def draw(self, count: int, seed: int) -> Members:
        """Masks of another seed."""
        return Members(tuple(partial(self._run, seed, index) for index in range(count)))

    def _run(self, seed: int, index: int, inputs: Tensor) -> Tensor:
        model = self._predictor.model
        with evaluating(model), dropping(model), seeded(seed, "attacked dropout", index):
            return call_network(model, inputs)


def victim(
    predictor: Any,
    *,
    space: InputSpace | None = None,
    temperature: float | None = None,
    samples: int = 32,
    seed: int = 0,
) -> Victim:
    """Make anything that classifies attackable.

    Args:
        predictor: A trained network; a Bayesian network after `fit`; or a method of ``stfbnn.baselines`` that is an ordinary
            network, an ensemble, dropout or a posterior.
        space: Where inputs live; None for numbers in [0, 1] that the network takes as they are.
        temperature: τ; None for that of `fit`, and 1 for others.
        samples: Deployed draws of a Bayesian network; methods have their own number.
        seed: Which draws.

    Raises:
        InputError: It cannot be attacked in this way, or is no classifier.
        NotFittedError: A posterior has not been inferred.
    """
    where = InputSpace() if space is None else space
    tau = 1.0 if temperature is None else temperature
    if isinstance(predictor, BayesianNetwork):
        return PosteriorVictim(predictor, where, samples, seed, temperature)
    if isinstance(predictor, BayesianPredictor):
        return PosteriorVictim(predictor.bnn, where, predictor.samples, predictor.seed, temperature)
    if isinstance(predictor, PointNetwork):
        return NetworksVictim([predictor.model], _require_classes(predictor.likelihood), where, tau)
    if isinstance(predictor, DeepEnsemble):
        return NetworksVictim(predictor.models, _require_classes(predictor.likelihood), where, tau)
    if isinstance(predictor, MCDropout):
        return DropoutVictim(predictor, where, tau)
    if isinstance(predictor, nn.Module):
        return NetworksVictim([predictor], Categorical(), where, tau)
    raise InputError(
        f"a {type(predictor).__name__} cannot be attacked; give a torch.nn.Module, what stfbnn.bayesianize returned (after "
        f"fit), or a PointNetwork, DeepEnsemble, MCDropout or BayesianPredictor"
    )


def _run_network(network: nn.Module, inputs: Tensor) -> Tensor:
    with evaluating(network):
        return call_network(network, inputs)


def _require_classes(likelihood: Any) -> Categorical:
    if not isinstance(likelihood, Categorical):
        raise InputError(
            f"attacks and their accuracy are for classifiers, but the likelihood is {getattr(likelihood, 'name', likelihood)!r}"
        )
    return likelihood


def _in_double(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.device.type == "mps" else outputs.double()
