"""Risk certificates of a Bayesian first layer and of a fully Bayesian network, and the confidence far from the data.

    python benchmarks/guarantees.py --tasks mnist-lenet fashion-mlp fashion-lenet cifar-resnet20

The training examples are cut in two: stage one and the prior's centre come from A, the bound is on S, on which the posterior is
fitted with the bound as its objective. The prior's scale is one of four, for which every bound pays ln 4; which one is shown is
chosen by the bound itself. Each task and seed is a file of its own in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import stfbnn
from by_seed import run_by_seed
from stfbnn.baselines import bayesianize_whole
from stfbnn.benchmark.parts import TensorPart, targets_of_part
from stfbnn.benchmark.suites import built_in_tasks
from stfbnn.benchmark.tasks import Task
from stfbnn.data import Split, hold_out, loader
from stfbnn.files import plain
from stfbnn.guarantees.far_field import confidence_along, far_field
from stfbnn.guarantees.fit_bound import fit_bound
from stfbnn.guarantees.risk_certificate import risk_certificate
from stfbnn.network import BayesianNetwork
from stfbnn.randomness import derive_seed, seeded

DISTANCES = (10.0, 30.0, 100.0, 1e3, 1e4, 1e5)
"""An image has a length of about 28 in the space of the networks."""

SCALES = (0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Budget:
    """How much work a task bears.

    Attributes:
        examples: Half for A and half for S; None for all.
        epochs: Of stage one.
        bound_epochs: Of each fit with the bound as its objective.
        directions: From test images, and as many random ones.
        draws: For the limits.
    """

    examples: int | None
    epochs: int
    bound_epochs: int
    directions: int = 50
    draws: int = 500


BUDGETS = {
    "digits-mlp": Budget(None, 20, 5),
    "mnist-lenet": Budget(None, 8, 4),
    "fashion-mlp": Budget(None, 8, 4),
    "fashion-lenet": Budget(None, 8, 4),
    "cifar-resnet20": Budget(10_000, 12, 2, 20, 100),
}


def study(name: str, seed: int) -> dict[str, Any]:
    """One task and seed."""
    task, budget, began = built_in_tasks()[name], BUDGETS[name], time.process_time()
    data = task.data(seed)
    part = data.train
    assert isinstance(part, TensorPart)
    whole = part.split
    if budget.examples is not None:
        whole = hold_out(whole, budget.examples, seed=derive_seed(seed, "guarantees"))[1]
    first, second = hold_out(whole, 0.5, seed=derive_seed(seed, "A and S"))
    model = _stage_one(task, budget, data.network, first, part, seed)
    stage_one = time.process_time() - began
    example = next(iter(loader(first, 2, mean=part.mean, std=part.std)))[0]
    # Q is fitted on S alone; each number below is about S.
    certified = list(loader(second, 250, mean=part.mean, std=part.std))

    def batches() -> Any:
        return loader(second, task.batch, shuffle=True, mean=part.mean, std=part.std)

    found: dict[str, Any] = {}
    adam = {"engine": "bayes-by-backprop", "engine_options": {"learning_rate": 0.02}}
    # Draws of a whole network for every example take minutes a pass: it has one, and ours one and ten.
    for method, make, engine, passes in (
        ("STF-BNN", _first_layer, {}, 1),
        ("STF-BNN, ten draws an example", _first_layer, {}, 10),
        ("Bayesian network", _all_layers, adam, 1),
    ):
        made = partial(make, model, example)
        found[method] = _certificates(made, batches, certified, data, budget, engine, passes, seed)
    return {
        "seed": seed,
        "n": len(second),
        "stage_one_seconds": stage_one,
        "methods": found,
        "far_field": _far(task, model, example, data, budget, seed),
        "seconds": time.process_time() - began,
    }


def _stage_one(task: Task, budget: Budget, make: Any, split: Split, part: TensorPart, seed: int) -> nn.Module:
    with seeded(seed, "guarantees network"):
        model: nn.Module = make()
    batches = loader(split, task.batch, shuffle=True, mean=part.mean, std=part.std)
    stfbnn.train(
        model, batches, epochs=budget.epochs, seed=seed, precision=task.precision, progress=False, **task.options
    )
    return model


def _first_layer(model: nn.Module, example: Tensor, scale: float) -> BayesianNetwork:
    return stfbnn.bayesianize(model, example, prior=stfbnn.Normal(std=scale, center="pretrained"))


def _all_layers(model: nn.Module, example: Tensor, scale: float) -> BayesianNetwork:
    return bayesianize_whole(model, example, prior=stfbnn.Normal(std=scale, center="pretrained"))


def _certificates(
    make: Callable[[float], BayesianNetwork],
    batches: Callable[[], Any],
    certified: Any,
    data: Any,
    budget: Budget,
    engine: dict[str, Any],
    passes: int,
    seed: int,
) -> dict[str, Any]:
    """The certificate at every scale of the prior, each paying for the choice among them."""
    found = []
    for scale in SCALES:
        began = time.process_time()
        bnn = make(scale)
        run = fit_bound(
            bnn, batches(), epochs=budget.bound_epochs, priors=len(SCALES), seed=seed, progress=False, **engine
        )
        fitted = time.process_time() - began
        certificate = risk_certificate(
            bnn,
            certified,
            passes=passes,
            priors_considered=len(SCALES),
            max_seen_share=0.01,
            seed=seed,
            progress=False,
        )
        tested = stfbnn.predict(bnn, data.test.batches(250), samples=16, seed=seed)
        assert isinstance(tested, stfbnn.CategoricalPrediction)
        found.append(
            {
                "scale": scale,
                "fit_seconds": fitted,
                "seconds": time.process_time() - began,
                "run": plain(run.as_dict()),
                "certificate": plain(certificate.as_dict()),
                "test_error_averaged": float((tested.labels != targets_of_part(data.test)).double().mean()),
            }
        )
    return {"by_scale": found}


def _far(task: Task, model: nn.Module, example: Tensor, data: Any, budget: Budget, seed: int) -> dict[str, Any]:
    """Limits of the confidence of a posterior by the default call, and the confidence on the way to them."""
    bnn = stfbnn.bayesianize(model, example)
    held = data.held.batches(500)
    # The parts are disjoint rows; that some are equal is how the data are.
    options: dict[str, Any] = {"val_loader": held, "max_seen_share": 1.0, "seed": seed, "progress": False}
    train = data.train.first(5000).batches(task.batch, shuffle=True)
    stfbnn.fit(bnn, train, epochs=task.fit_epochs, **options)
    directions = next(iter(data.test.batches(budget.directions)))[0]
    found = far_field(
        bnn, directions, draws=budget.draws, random_directions=budget.directions, seed=seed, progress=False
    )
    along = confidence_along(bnn, directions, DISTANCES, samples=min(200, budget.draws), seed=seed)
    return {"limits": plain(found.as_dict()), "along": plain(along.as_dict())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_by_seed(
        __doc__, "guarantees", BUDGETS, study, lambda one: f"{one['seconds']:.0f} s", list(BUDGETS)[1:], scales=SCALES
    )
