"""Which optima the first layer has, beside a middle and the last one, and how wide each layer's posterior is.

    python benchmarks/landscape.py --tasks fashion-mlp fashion-lenet cifar-resnet20 sst2-minilm

The MLPs and LeNet are those of the benchmark's suite ``full``, the ResNet-20 and the sentence encoder those of docs/results.md
(tasks.py and minilm_sst2.py); they are trained once and kept in the cache. Each task and seed is a JSON file of its own, so
that a run that was stopped goes on. Larger networks are retrained on part of their training examples, and the results say how
many.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minilm_sst2
import tasks
from by_seed import run_by_seed
from stfbnn.benchmark.methods.base import EVALUATION_BATCH
from stfbnn.benchmark.runner import Unit, trained_context
from stfbnn.benchmark.suites import built_in_tasks
from stfbnn.optima.paths import BEND_STEPS
from stfbnn.optima.retraining import RetrainingOptions
from stfbnn.optima.study import landscape
from stfbnn.optima.widths import compare_layers
from stfbnn.report import save_figure
from stfbnn.report.landscape_plots import landscape_figure
from tasks import cache

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@dataclass(frozen=True)
class Budget:
    """How much of a study a task bears.

    Attributes:
        runs: Retrainings of each layer.
        epochs: Of each, at most.
        train: Training examples, or None for all.
        examples: On which paths are computed.
        points: Along each path, and along each side of the plane.
        curve_steps: Minibatches that each curve is fitted on.
        layers: Layers whose posterior widths are compared, at most.
        width_epochs: Of each layer's inference.
        named: The layers to study, where "auto" is not meant.
    """

    runs: int = 6
    epochs: int = 40
    train: int | None = None
    examples: int = 2000
    points: int = 21
    curve_steps: int = BEND_STEPS
    layers: int = 8
    width_epochs: int = 5
    named: tuple[str, ...] = ()


BUDGETS = {
    "digits-mlp": Budget(epochs=100),
    "fashion-mlp": Budget(),
    "fashion-lenet": Budget(runs=5, epochs=20, train=10_000, width_epochs=3),
    "cifar-resnet20": Budget(3, 6, examples=500, points=11, curve_steps=60, layers=3, width_epochs=2),
    "sst2-minilm": Budget(3, 3, 1_000, examples=100, points=7, curve_steps=20, layers=3, width_epochs=1),
}


@dataclass(frozen=True)
class Studied:
    """A trained network and its data, in batches.

    Attributes:
        model: The network.
        train: What it was trained on, or part of that.
        count: How many these are.
        held: What nothing has seen.
        test: For figures.
        outside: Foreign examples.
    """

    model: nn.Module
    train: Any
    count: int
    held: Any
    test: Any
    outside: dict[str, Any]


def studied(task_name: str, seed: int) -> Studied:
    """The network of a task and seed, trained now if it is not in the cache."""
    task, budget = built_in_tasks()[task_name], BUDGETS[task_name]
    if task_name == "cifar-resnet20":
        known = tasks.task_data(task_name, seed)
        return Studied(
            tasks.trained(task_name, seed, 0, known)[0],
            known.loader(known.train, shuffle=True),
            len(known.train),
            known.loader(known.held.take(torch.arange(2000))),
            known.loader(known.test),
            dict(known.outside),
        )
    if task_name == "sst2-minilm":
        data = task.data(seed)
        model = minilm_sst2.fine_tuned(seed, data)[0]
    else:
        context = trained_context(Unit(task, seed, 1, (), cache() / "landscape", torch.get_num_threads()))
        data, model = context.data, context.model
    part = data.train.first(budget.train)
    return Studied(
        model,
        part.batches(task.batch, shuffle=True),
        len(part),
        data.held.batches(EVALUATION_BATCH if task.network != "minilm" else 64),
        data.test.batches(task.batch),
        {name: other.batches(task.batch) for name, other in data.outside.items()},
    )


def study(task_name: str, seed: int) -> dict[str, Any]:
    """Everything about one network; its figure is drawn for the first seed."""
    task, budget, began = built_in_tasks()[task_name], BUDGETS[task_name], time.process_time()
    one = studied(task_name, seed)
    found = landscape(
        one.model,
        one.train,
        one.held,
        layers=budget.named or "auto",
        options=RetrainingOptions(runs=budget.runs, epochs=budget.epochs),
        examples=budget.examples,
        points=budget.points,
        plane=budget.points,
        curve_steps=budget.curve_steps,
        seed=seed,
        checkpoint=cache() / "landscape" / task_name / str(seed),
    )
    spent = time.process_time() - began
    if seed == 0:
        save_figure(landscape_figure(found, task_name), FIGURES / f"landscape_{task_name}.png", dpi=80)
    widths = compare_layers(
        one.model,
        one.train,
        one.held,
        most=budget.layers,
        test_loader=one.test,
        outside=one.outside,
        epochs=budget.width_epochs,
        # Each layer's own default: of embeddings the trained weights, which tokens that never occur keep.
        prior=None if task.network == "minilm" else "rms",
        samples=task.samples,
        # The parts are disjoint rows; that some are equal is how the data are.
        max_seen_share=1.0,
        seed=seed,
        precision="bf16-mixed" if task.precision == "bf16-mixed" else None,
        checkpoint=cache() / "landscape" / task_name / f"{seed}-widths",
    )
    return {
        "seed": seed,
        "train": one.count,
        "landscape_seconds": spent,
        "landscape": found.as_dict(),
        "widths": widths.as_dict(),
    }


if __name__ == "__main__":
    run_by_seed(__doc__, "landscape", BUDGETS, study, lambda one: one["landscape"]["verdict"], list(BUDGETS))
