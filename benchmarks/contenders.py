"""The methods that are attacked and asked for their members, each fitted as the benchmark's suites fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from stfbnn.baselines.networks import PointNetwork
from stfbnn.baselines.predictor import Predictor
from stfbnn.benchmark.methods import METHODS, Context, Trained
from stfbnn.benchmark.methods.networks import likelihood_of
from stfbnn.benchmark.parts import TensorPart, targets_of_part
from stfbnn.benchmark.runner import Unit, trained_context
from stfbnn.benchmark.suites import built_in_tasks
from stfbnn.threat import InputSpace
from tasks import cache

NETWORK, SCALED = "network", "temperature scaling"
NAMED = {
    "MC dropout": "mc-dropout",
    "deep ensemble of 4": "deep-ensemble",
    "Bayesian network (from the trained one)": "bnn-pretrained",
    "STF-BNN": "stf-bnn",
    "STF-BNN, mixture of 4": "stf-bnn-mixture",
}
"""What a table calls the suite's methods."""

Contender = tuple[Predictor, float]
"""A predictor and its τ."""


def context_of(task_name: str, seed: int) -> Context:
    """A task's data and its network, which the studies of landscapes share."""
    unit = Unit(built_in_tasks()[task_name], seed, 1, (), cache() / "landscape", torch.get_num_threads())
    return trained_context(unit)


def input_space(context: Context) -> InputSpace:
    """Images in [0, 1], normalised as the task does."""
    part = context.data.test
    assert isinstance(part, TensorPart)
    mean, std = (tuple(float(one) for one in torch.as_tensor(values).reshape(-1)) for values in (part.mean, part.std))
    return InputSpace(mean=mean, std=std)


def fitted(context: Context, folder: Path) -> dict[str, Callable[[], Contender]]:
    """All methods by name, each fitted when it is called."""
    context = replace(context, folder=folder, budget=1)

    def network() -> Contender:
        return PointNetwork(context.model, likelihood_of(context)), 1.0

    def scaled() -> Contender:
        predictor, _ = network()
        return predictor, predictor.outputs(context.held_loader).best_temperature(targets_of_part(context.data.held))

    def of_suite(name: str) -> Callable[[], Contender]:
        def fit() -> Contender:
            found = METHODS[name].fit(context)
            return found.predictor(found.raw), 1.0

        return fit

    return {NETWORK: network, SCALED: scaled, **{title: of_suite(name) for title, name in NAMED.items()}}


def with_network(context: Context, trained: Trained) -> Context:
    """The same task with another network."""
    return replace(context, base=trained)
