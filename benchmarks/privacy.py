"""How well an attacker tells who was in the training data, of every method that one could release.

    python benchmarks/privacy.py --tasks fashion-mlp fashion-lenet cifar-resnet20

Shadow models are trained on halves of a pool of the task's training examples by the task's own recipe, with the epochs below.
Networks and predictions are kept in the cache, so that a run that was stopped goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from by_seed import run_by_seed
from stfbnn.benchmark.parts import TensorPart
from stfbnn.benchmark.suites import built_in_tasks
from stfbnn.benchmark.tasks import Task
from stfbnn.data import Split, hold_out, loader
from stfbnn.data.loader import normalise
from stfbnn.files import plain
from stfbnn.privacy.releases import Dropout, Ensemble, FirstLayer, Network, Release, TemperatureScaling, WholeNetwork
from stfbnn.privacy.study import privacy_study
from stfbnn.randomness import derive_seed, seeded
from stfbnn.training import train
from tasks import cache


@dataclass(frozen=True)
class Budget:
    """How much work a task bears.

    Attributes:
        pool: Examples, half of which each model is trained on.
        held_out: Examples for temperatures.
        models: Shadow models.
        epochs: Of stage one.
        fit_epochs: Of every fit on top of it, for each temperature.
        draws: That the attacker on the file looks at.
    """

    pool: int
    held_out: int
    models: int
    epochs: int
    fit_epochs: int
    draws: int = 16


BUDGETS = {
    "digits-mlp": Budget(1000, 200, 16, 25, 8),
    "fashion-mlp": Budget(4000, 1000, 16, 25, 8),
    "fashion-lenet": Budget(4000, 1000, 16, 20, 6),
    "cifar-resnet20": Budget(2000, 500, 6, 20, 3, 8),
}


def releases(budget: Budget) -> dict[str, Release]:
    """What is released; all Bayesian ones choose T from the same three on held-out examples."""
    common: dict[str, Any] = {"epochs": budget.fit_epochs, "temperatures": (0.3, 0.1, 0.03)}
    return {
        "network": Network(),
        "temperature scaling": TemperatureScaling(),
        "MC dropout": Dropout(epochs=budget.fit_epochs),
        "deep ensemble of 4": Ensemble(4),
        "Bayesian network (from the trained one)": WholeNetwork(**common),
        "STF-BNN": FirstLayer(**common),
        "STF-BNN, mixture of 4": FirstLayer(posterior="mixture", **common),
    }


def study(name: str, seed: int) -> dict[str, Any]:
    """One task and seed."""
    task, budget, began = built_in_tasks()[name], BUDGETS[name], time.process_time()
    data = task.data(seed)
    part = data.train
    assert isinstance(part, TensorPart)
    pool = hold_out(part.split, budget.pool, seed=derive_seed(seed, "privacy pool"))[1]
    held = data.held
    assert isinstance(held, TensorPart)
    inputs, labels = _tensors(pool, part)
    held_inputs, held_labels = _tensors(held.first(budget.held_out).split, held)
    found = privacy_study(
        inputs,
        labels,
        partial(_train, task, budget, data.network, inputs, labels),
        releases(budget),
        make_model=data.network,
        held_out=(held_inputs, held_labels),
        models=budget.models,
        artifact_draws=budget.draws,
        seed=seed,
        folder=cache() / "privacy" / f"{name}-{seed}",
        settings={"task": name, "epochs": budget.epochs, "options": dict(task.options)},
        batch_size=min(task.batch, 64),
    )
    return {"seed": seed, "seconds": time.process_time() - began, "study": plain(found.as_dict())}


def _tensors(split: Split, part: TensorPart) -> tuple[Tensor, Tensor]:
    assert split.targets is not None
    return normalise(split.inputs, part.mean, part.std), split.targets


def _train(
    task: Task, budget: Budget, make: Any, inputs: Tensor, labels: Tensor, members: Tensor, seed: int
) -> nn.Module:
    """Stage one on some examples of the pool, by the task's recipe."""
    with seeded(seed, "network"):
        model: nn.Module = make()
    batches = loader(Split(inputs[members], labels[members]), min(task.batch, 64), shuffle=True)
    train(model, batches, epochs=budget.epochs, seed=seed, precision=task.precision, progress=False, **task.options)
    return model


if __name__ == "__main__":
    run_by_seed(__doc__, "privacy", BUDGETS, study, lambda one: one["study"]["verdict"], list(BUDGETS)[1:])
