"""What is released on top of one trained network: each method, fitted on a shadow model's members, as a predictor.

All releases of a shadow model start from the same stage one, which is trained once; the deep ensemble alone trains further
networks. A release of the user's own is any function ``(stage_one, data, seed) -> Predictor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stfbnn.baselines.deep_ensemble import DeepEnsemble
from stfbnn.baselines.mc_dropout import DROPOUT, MCDropout, with_dropout
from stfbnn.baselines.networks import PointNetwork
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import Predictor
from stfbnn.baselines.temperature_scaling import fit_temperature, scale
from stfbnn.baselines.whole_network import fit_whole_network
from stfbnn.conversion import bayesianize
from stfbnn.data.loader import Example, loader
from stfbnn.data.split import Split
from stfbnn.errors import InputError
from stfbnn.inference.fit import fit
from stfbnn.inference.options import TEMPERATURES
from stfbnn.likelihood import Categorical, Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import PosteriorFamily
from stfbnn.predictive import MemberOutputs
from stfbnn.prior import PriorLike
from stfbnn.training import train


@dataclass(frozen=True, eq=False)
class ReleaseData:
    """What a release may use.

    Attributes:
        inputs: The members of this shadow model, (n, …), float32, as the network takes them.
        labels: Theirs, (n,).
        held_inputs: Examples that no shadow model trains on, (h, …): for temperatures.
        held_labels: Theirs, (h,).
        batch_size: Of the loaders.
        another: ``another(k)`` is a further network, k ≥ 1, trained on the same members from another seed.
    """

    inputs: Tensor
    labels: Tensor
    held_inputs: Tensor
    held_labels: Tensor
    batch_size: int
    another: Callable[[int], nn.Module]

    @property
    def example(self) -> Tensor:
        """Two rows, as `stfbnn.bayesianize` asks for them."""
        return self.inputs[:2]

    def train_loader(self, seed: int) -> DataLoader[Example]:
        """The members, in a new order at each pass, which follows from ``seed`` alone."""
        return loader(Split(self.inputs, self.labels), self.batch_size, shuffle=True, seed=seed)

    def held_loader(self) -> DataLoader[Example]:
        """The held-out examples."""
        return loader(Split(self.held_inputs, self.held_labels), self.batch_size)


Release: TypeAlias = Callable[[nn.Module, ReleaseData, int], Predictor]
"""From stage one (which it must leave as it is), the data and a seed to what answers users."""


class Tempered:
    """A predictor whose members' logits are divided by a temperature, so that ``outputs(data).at()`` is what is released.

    Args:
        predictor: Any method whose outputs are logits of classes.
        temperature: τ.

    Raises:
        InputError: The outputs are no logits, or τ is not positive and finite.
    """

    def __init__(self, predictor: Predictor, temperature: float) -> None:
        likelihood = predictor.likelihood
        if not isinstance(likelihood, Categorical) or likelihood.outputs != "logits":
            raise InputError(f"a temperature divides logits of classes, but the likelihood is {likelihood!r}")
        scale(torch.zeros(1), temperature)
        self.predictor, self.temperature = predictor, temperature

    @property
    def likelihood(self) -> Likelihood:
        """That of the predictor."""
        return self.predictor.likelihood

    @property
    def trainable_parameters(self) -> int:
        """Those of the predictor, and τ."""
        return self.predictor.trainable_parameters + 1

    @property
    def artifact_bytes(self) -> int:
        """Those of the predictor, and τ."""
        return self.predictor.artifact_bytes + 4

    def outputs(self, data: Any) -> MemberOutputs:
        """The predictor's outputs over τ, (S, N, K).

        Raises:
            InputError: There are no data, or they are not finite or of a wrong form.
        """
        found = self.predictor.outputs(data)
        return MemberOutputs(scale(found.outputs, self.temperature), found.likelihood, found.shares, found.at_mean)


def released_network(predictor: Predictor) -> BayesianNetwork | None:
    """The Bayesian network whose posterior is a release's file; None for releases that have none."""
    plain = predictor.predictor if isinstance(predictor, Tempered) else predictor
    return plain.bnn if isinstance(plain, BayesianPredictor) else None


@dataclass(frozen=True)
class Network:
    """The trained network as it is."""

    def __call__(self, stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        """Nothing is fitted."""
        del data, seed
        return PointNetwork(stage_one, Categorical())


@dataclass(frozen=True)
class TemperatureScaling:
    """The network with τ fitted on held-out examples: labels stay, but every confidence that an attacker compares changes."""

    def __call__(self, stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        """One pass over the held-out examples."""
        del seed
        network = PointNetwork(stage_one, Categorical())
        logits = network.outputs(data.held_inputs).outputs[0]
        return Tempered(network, fit_temperature(logits, data.held_labels))


@dataclass(frozen=True)
class FirstLayer:
    """This library's method: the first layer Bayesian, all others as stage one left them.

    Attributes:
        posterior: The family, as for `stfbnn.bayesianize`.
        prior: The prior, likewise.
        layer: Another layer than the first.
        epochs: As for `stfbnn.fit`, for each temperature.
        temperatures: T; of several, the one of the lowest held-out NLL is kept.
        predictive_temperature: τ; "held-out" fits it.
        samples: Posterior draws that answer users.
    """

    posterior: str | PosteriorFamily = "mean-field"
    prior: PriorLike | None = None
    layer: str | None = None
    epochs: int = 10
    temperatures: tuple[float, ...] = TEMPERATURES
    predictive_temperature: float | Literal["held-out"] = 1.0
    samples: int = 32

    def __call__(self, stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        """Infer the posterior on the members."""
        bnn = bayesianize(stage_one, data.example, layer=self.layer, posterior=self.posterior, prior=self.prior)
        fit(
            bnn,
            data.train_loader(seed),
            val_loader=data.held_loader(),
            epochs=self.epochs,
            likelihood="categorical",
            predictive_temperature=self.predictive_temperature,
            **_on_held_out(self.temperatures),
            seed=seed,
        )
        return at_own_temperature(bnn, self.samples, seed)


@dataclass(frozen=True)
class Dropout:
    """Monte Carlo dropout.

    Stage one is shared by all releases. Where it has active dropout modules it is used as it is; otherwise dropout is added
    before every layer but the first (`stfbnn.baselines.with_dropout`) and stage one's weights are trained further with it on
    the members. That is cheaper than training from scratch, and the members are then seen for a few epochs more.

    Attributes:
        rate: p, where dropout is added.
        epochs: Of the further training.
        lr: Of AdamW at its start; it falls along a cosine.
        samples: Masks that answer users.
    """

    rate: float = 0.1
    epochs: int = 5
    lr: float = 1e-3
    samples: int = 32

    def __call__(self, stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        """Train further where dropout has to be added."""
        if any(isinstance(module, DROPOUT) and module.p > 0 for module in stage_one.modules()):
            return MCDropout(stage_one, Categorical(), samples=self.samples, seed=seed)
        model = with_dropout(stage_one, self.rate).requires_grad_()
        train(model, data.train_loader(seed), epochs=self.epochs, lr=self.lr, seed=seed, progress=False)
        return MCDropout(model, Categorical(), samples=self.samples, seed=seed, users_network=False)


@dataclass(frozen=True)
class Ensemble:
    """Stage one and further networks, trained on the same members from other seeds.

    Attributes:
        members: Networks in all.
    """

    members: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.members, bool) or not isinstance(self.members, int) or self.members < 2:
            raise InputError(f"an ensemble needs members, an integer of at least 2, but it is {self.members!r}")

    def __call__(self, stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        """Train the others."""
        del seed
        others = [data.another(number) for number in range(1, self.members)]
        return DeepEnsemble([stage_one, *others], Categorical())


@dataclass(frozen=True)
class WholeNetwork:
    """The fully Bayesian network, a mean-field Gaussian over all weights that starts from stage one.

    Attributes:
        epochs: As for `stfbnn.fit`, for each temperature.
        temperatures: T, as of `FirstLayer`.
        predictive_temperature: τ; "held-out" fits it.
        samples: Posterior draws that answer users.
        engine: As of `stfbnn.baselines.fit_whole_network`.
    """

    epochs: int = 10
    temperatures: tuple[float, ...] = TEMPERATURES
    predictive_temperature: float | Literal["held-out"] = 1.0
    samples: int = 32
    engine: str = "natural-gradient"

    def __call__(self, stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        """Infer the posterior on the members."""
        bnn, _ = fit_whole_network(
            stage_one,
            data.train_loader(seed),
            val_loader=data.held_loader(),
            start="pretrained",
            engine=self.engine,
            epochs=self.epochs,
            likelihood="categorical",
            predictive_temperature=self.predictive_temperature,
            **_on_held_out(self.temperatures),
            seed=seed,
        )
        return at_own_temperature(bnn, self.samples, seed)


RELEASES: dict[str, Release] = {
    "network": Network(),
    "temperature scaling": TemperatureScaling(),
    "stf-bnn": FirstLayer(),
    "stf-bnn mixture": FirstLayer(posterior="mixture"),
    "mc dropout": Dropout(),
    "deep ensemble": Ensemble(),
    "bayesian network": WholeNetwork(),
}
"""Those that can be named, with their default settings."""


def resolve_releases(releases: Iterable[str] | Mapping[str, str | Release]) -> dict[str, Release]:
    """Turn what a study was given into releases by name.

    Args:
        releases: Names of built-in ones; or a mapping from names of the user's choice to built-in names or functions.

    Raises:
        InputError: There is none, a name is not known or stands there twice, or an entry is no function.
    """
    if isinstance(releases, str) or not isinstance(releases, Iterable):
        raise InputError(f"releases must be a list of names or a mapping from names to functions, not {releases!r}")
    given: list[tuple[str, Any]] = (
        list(releases.items()) if isinstance(releases, Mapping) else [(name, name) for name in releases]
    )
    names = [name for name, _ in given]
    if not names or len(set(names)) < len(names):
        raise InputError(f"releases must be at least one, each of a name of its own, but they are {names}")
    found: dict[str, Release] = {}
    for name, release in given:
        if not isinstance(name, str) or not name or (isinstance(release, str) and release not in RELEASES):
            raise InputError(f"the release {release!r} is not known; choose of {sorted(RELEASES)}, or give a function")
        chosen = RELEASES[release] if isinstance(release, str) else release
        if not callable(chosen):
            raise InputError(f"the release {name!r} must be a function (stage_one, data, seed), but it is {chosen!r}")
        found[name] = chosen
    return found


def describe(release: Release) -> str:
    """What identifies a release where a killed study goes on: of a dataclass its settings, else only which function it is."""
    given: Any = release
    if is_dataclass(given):
        return f"{type(given).__module__}.{given!r}"
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}.{named.__qualname__}"


def _on_held_out(temperatures: tuple[float, ...]) -> dict[str, Any]:
    # The parts are other rows; that some of them are equal, as in most real data, is how the data are.
    chosen: dict[str, Any] = {"max_seen_share": 1.0, "progress": False}
    if len(temperatures) == 1:
        return {**chosen, "temperature": temperatures[0]}
    return {**chosen, "temperature": "held-out", "temperatures": temperatures}


def at_own_temperature(bnn: BayesianNetwork, samples: int, seed: int) -> Predictor:
    """The posterior's draws as `stfbnn.predict` averages them, at the τ that `fit` stored."""
    predictor = BayesianPredictor(bnn, samples=samples, seed=seed)
    return predictor if bnn.predictive_temperature == 1 else Tempered(predictor, bnn.predictive_temperature)
