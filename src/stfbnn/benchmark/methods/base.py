"""What a method is to the benchmark, and the one way in which every method's hyper-parameters are chosen.

Each method has a list of settings, the most usual first, of which a suite tries the same number for all. All are scored on the
held-out examples: the raw row shows the setting with the lowest negative log density, the scaled row that with the lowest one
at its own best predictive temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from stfbnn.baselines.predictor import Predictor
from stfbnn.batches import Inputs, split_batch
from stfbnn.benchmark.clock import clock
from stfbnn.benchmark.parts import TaskData, targets_of_part
from stfbnn.benchmark.records import Candidate
from stfbnn.benchmark.tasks import Task
from stfbnn.likelihood import Gaussian
from stfbnn.predictive import MemberOutputs
from stfbnn.predictive.weighting import average
from stfbnn.randomness import seeded

EVALUATION_BATCH = 1000
NOISE = "noise_std"
"""Under which a regression's noise stands in a candidate's setting."""
CLASSES, BOTH = frozenset({"classification"}), frozenset({"classification", "regression"})


@dataclass(frozen=True)
class Trained:
    """The one network that everything starts from.

    Attributes:
        model: In evaluation mode.
        setting: By which it was trained.
        seconds: That its training took.
    """

    model: nn.Module
    setting: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Context:
    """What a method is given.

    Attributes:
        task: What is learned.
        data: Its data for this seed.
        seed: Everything random follows from it.
        budget: How many settings are tried.
        base: The trained network; only the method that trains it has none.
        folder: Where a method may keep checkpoints; None for nowhere.
    """

    task: Task
    data: TaskData
    seed: int
    budget: int
    base: Trained | None = None
    folder: Path | None = None

    @property
    def model(self) -> nn.Module:
        """The trained network."""
        assert self.base is not None  # noqa: S101 - the runner trains it first
        return self.base.model

    @property
    def train_loader(self) -> Any:
        """Minibatches of the training examples, in a new order at each pass."""
        return self.data.train.batches(self.task.batch, shuffle=True)

    @property
    def held_loader(self) -> Any:
        """The held-out examples."""
        return self.data.held.batches(EVALUATION_BATCH)

    @property
    def example(self) -> Inputs:
        """Two inputs."""
        return split_batch(next(iter(self.data.train.batches(2))))[0]

    def fresh(self, *path: int | str) -> nn.Module:
        """An untrained network; another one for every path."""
        with seeded(self.seed, "network", *path):
            return self.data.network()

    def one_batch(self) -> Context:
        """The same with one minibatch and one epoch, by which the memory of a step is measured."""
        count = min(self.task.batch, len(self.data.train), len(self.data.held))
        return replace(
            self, task=replace(self.task, epochs=1, fit_epochs=1), data=self.data.only(count), budget=1, folder=None
        )


@dataclass(frozen=True)
class Fitted:
    """A method after its choice of a setting.

    Attributes:
        candidates: What was tried.
        raw: The number of the candidate that the raw row shows.
        scaled: That of the scaled row; None for a regression.
        predictors: The candidates, ready to predict; None for those that neither row shows.
        seconds: Of the chosen setting (the raw row's), beyond having the base network.
        search_seconds: Of all settings.
        notes: What else the method says of itself.
    """

    candidates: tuple[Candidate, ...]
    raw: int
    scaled: int | None
    predictors: tuple[Predictor | None, ...]
    seconds: float
    search_seconds: float
    notes: Mapping[str, Any] = field(default_factory=dict)

    def predictor(self, index: int) -> Predictor:
        """One of those that are shown."""
        found = self.predictors[index]
        assert found is not None  # noqa: S101 - those that are shown are kept
        return found


FitOne = Callable[[Context, Mapping[str, Any]], Predictor]


@dataclass(frozen=True)
class Method:
    """A method that a user could pick.

    Attributes:
        name: In files and on the command line.
        title: What a table calls it.
        kinds: What it can predict.
        fit: Everything after the base network.
        step: One fit on a single minibatch, by which memory is measured; None where it has no steps of its own.
        missing: Why it cannot be had here, such as a package that is not installed; None where it can.
        course: Runs of other lengths at a setting that was chosen; None where none are measured.
        trains_base: Whether it is the one that trains the base network.
        holds_base: Whether it needs the base network in memory.
    """

    name: str
    title: str
    kinds: frozenset[str]
    fit: Callable[[Context], Fitted]
    step: Callable[[Context], Any] | None = None
    missing: Callable[[Context], str | None] = lambda _: None
    course: Callable[[Context, Candidate], list[Candidate]] | None = None
    trains_base: bool = False
    holds_base: bool = True


def by_grid(fit_one: FitOne, settings: Sequence[Mapping[str, Any]]) -> Callable[[Context], Fitted]:
    """Try settings one after another.

    Args:
        fit_one: From a context and a setting to a predictor.
        settings: Of the hyper-parameters, the most usual first.
    """

    def fit(context: Context) -> Fitted:
        candidates, predictors = [], []
        for setting in settings[: context.budget]:
            began = clock()
            predictor = fit_one(context, setting)
            seconds = clock() - began
            candidates.append(score(context, predictor, setting, seconds))
            predictors.append(predictor)
        return choose(candidates, predictors)

    return fit


def score(context: Context, predictor: Predictor, setting: Mapping[str, Any], seconds: float) -> Candidate:
    """How a setting does on the held-out examples."""
    targets = targets_of_part(context.data.held)
    members = predictor.outputs(context.held_loader)
    if context.data.kind == "regression":
        noise = best_noise(members, targets)
        members = with_noise(members, noise)
        return Candidate({**setting, NOISE: noise}, _nll(members, 1.0, targets), None, None, seconds)
    tau = members.best_temperature(targets)
    return Candidate(dict(setting), _nll(members, 1.0, targets), _nll(members, tau, targets), tau, seconds)


def adjusted(members: MemberOutputs, candidate: Candidate) -> MemberOutputs:
    """The members with what was chosen for them on the held-out examples, but for the predictive temperature."""
    noise = candidate.setting.get(NOISE)
    return members if noise is None else with_noise(members, noise)


def with_noise(members: MemberOutputs, noise: float) -> MemberOutputs:
    """The members of a regression with another noise."""
    return replace(members, likelihood=Gaussian(noise_std=noise))


def best_noise(members: MemberOutputs, targets: Tensor) -> float:
    """The observation noise at which the average of the members gives held-out targets the highest density.

    Every method of a regression gets its noise so: it is to them what the predictive temperature is to classes. It cannot pass
    the root mean square of the mean's residuals, for the members' own spread adds to it.
    """
    residuals = targets.double() - Gaussian.match(mean_output(members), targets)
    highest = 0.5 * math.log(float(residuals.square().mean().clamp_min(1e-24)))
    found = minimize_scalar(
        lambda log_noise: _nll(with_noise(members, math.exp(log_noise)), 1.0, targets),
        bounds=(highest - 5.0, highest + 0.1),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return math.exp(found.x)


def mean_output(members: MemberOutputs) -> Tensor:
    """The members' mean output, (N, …), in float64."""
    return average(members.outputs, members.shares)


def _nll(members: MemberOutputs, tau: float, targets: Tensor) -> float:
    return -float(members.at(tau).log_density(targets).double().mean())


def choose(
    candidates: Sequence[Candidate], predictors: Sequence[Predictor], notes: Mapping[str, Any] | None = None
) -> Fitted:
    """Choose by the held-out scores, once as they are and once with a predictive temperature."""
    raw = _lowest([one.held_out_nll for one in candidates])
    scores = [one.held_out_nll_scaled for one in candidates]
    scaled = None if None in scores else _lowest(scores)
    kept = {raw, scaled}
    return Fitted(
        candidates=tuple(candidates),
        raw=raw,
        scaled=scaled,
        predictors=tuple(one if index in kept else None for index, one in enumerate(predictors)),
        seconds=candidates[raw].seconds,
        search_seconds=sum(one.seconds for one in candidates),
        notes=notes or {},
    )


def _lowest(scores: Sequence[float | None]) -> int:
    """The first of the lowest; what is no number is never the lowest."""
    numbers = [math.inf if score is None or math.isnan(score) else score for score in scores]
    return numbers.index(min(numbers))
