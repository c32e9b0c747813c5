"""Accuracy under attack of every method that one could pick, and of a network that was trained to stand attacks.

    python benchmarks/robustness.py --tasks fashion-mlp fashion-lenet cifar-resnet20

Each task, seed and method is a file of its own in the cache, and within a method each attack, so that a run that was stopped
goes on. Attacks are those of ``stfbnn.robustness.default_attacks`` with the budgets below; nothing about a method is chosen by
how it stands them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from common import RESULTS, environment
from contenders import NETWORK, Contender, context_of, fitted, input_space, with_network
from stfbnn.adversarial_training import AdversarialTraining
from stfbnn.baselines.networks import PointNetwork
from stfbnn.benchmark.methods import METHODS, Context, Trained
from stfbnn.benchmark.methods.networks import likelihood_of, stage_one
from stfbnn.benchmark.parts import TensorPart
from stfbnn.errors import InputError
from stfbnn.files import write_json, write_text
from stfbnn.posterior import MeanFieldPosterior
from stfbnn.robustness.attack import Attack
from stfbnn.robustness.detection import detection
from stfbnn.robustness.gradient import fgsm, pgd
from stfbnn.robustness.library import APGD, Square, Transfer
from stfbnn.robustness.smoothing import certified_radius
from stfbnn.robustness.study import evaluate_robustness
from stfbnn.robustness.victim import Victim, victim
from stfbnn.threat import Threat
from tasks import cache

EPSILONS = (2 / 255, 4 / 255, 8 / 255)
HARDENED = ("adversarially trained", "adversarially trained, STF-BNN")


@dataclass(frozen=True)
class Budget:
    """How much work a task bears.

    Attributes:
        examples: Test images, the first ones.
        apgd: Steps of APGD.
        queries: Of Square.
        hardening: Epochs of adversarial training; 0 for none.
        counts: Draws of the curve.
    """

    examples: int
    apgd: int
    queries: int
    hardening: int
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


BUDGETS = {
    "digits-mlp": Budget(200, 50, 300, 25),
    "fashion-mlp": Budget(200, 30, 100, 10),
    "fashion-lenet": Budget(100, 20, 100, 4),
    "cifar-resnet20": Budget(50, 10, 50, 0, (1, 4, 16)),
}


def attacks(budget: Budget, one: Victim, source: Victim) -> dict[str, Attack]:
    """The attacks on one victim."""
    found: dict[str, Attack] = {"FGSM": fgsm(), "PGD-20": pgd(20)}
    seen: dict[str, Any] = {"knowledge": "deployed"}
    if one.random:
        seen = {"knowledge": "fresh", "draws": 8}
        found["PGD-20, fresh draws"] = pgd(20, **seen)
        found["PGD-20, fresh draws, averaged probability"] = pgd(20, average="probability", **seen)
    found["APGD-CE"] = APGD(loss="ce", steps=budget.apgd, **seen)
    found["APGD-DLR"] = APGD(loss="dlr", steps=budget.apgd, **seen)
    found["Square"] = Square(queries=budget.queries)
    if one is not source:
        found["transfer from the network"] = Transfer(source, pgd(20))
    return found


def hardened(context: Context, budget: Budget) -> Context:
    """The context with a network that was trained on attacked images, at the middle ε."""
    began = time.process_time()
    adversarial = AdversarialTraining(Threat(EPSILONS[1]), steps=5, step_size=0.3, space=input_space(context))
    task = replace(context.task, epochs=budget.hardening, options={**context.task.options, "adversarial": adversarial})
    folder = cache() / "robustness" / task.name / f"{context.seed}-hardened"
    model = stage_one(
        replace(context, task=task, folder=folder), context.fresh("member", 0), "hardened", {"weight_decay": 0.0}
    )
    return with_network(context, Trained(model, {"weight_decay": 0.0}, time.process_time() - began))


def contenders(context: Context, budget: Budget) -> dict[str, Any]:
    """All that is attacked, by name."""
    folder = cache() / "robustness" / context.task.name / f"{context.seed}-fits"
    found: dict[str, Any] = dict(fitted(context, folder))
    if budget.hardening:
        found[HARDENED[0]] = partial(_of_network, context, budget)
        found[HARDENED[1]] = partial(_on_hardened, context, budget)
    return found


def _of_network(context: Context, budget: Budget) -> Contender:
    return PointNetwork(hardened(context, budget).model, likelihood_of(context)), 1.0


def _on_hardened(context: Context, budget: Budget) -> Contender:
    found = METHODS["stf-bnn"].fit(replace(hardened(context, budget), budget=1))
    return found.predictor(found.raw), 1.0


def attacked(context: Context, budget: Budget) -> tuple[Tensor, Tensor]:
    """Test images in [0, 1] and their labels."""
    part = context.data.test
    assert isinstance(part, TensorPart)
    inputs, targets = part.split.inputs[: budget.examples], part.split.targets
    assert targets is not None
    return inputs, targets[: budget.examples]


def study(context: Context, name: str, make: Any, budget: Budget) -> dict[str, Any]:
    """One method under attack."""
    began = time.process_time()
    space = input_space(context)
    predictor, tau = make()
    fit_seconds = time.process_time() - began
    one = victim(predictor, space=space, temperature=tau)
    source = victim(PointNetwork(context.model, likelihood_of(context)), space=space)
    if name == NETWORK:
        source = one
    inputs, targets = attacked(context, budget)
    kept = cache() / "robustness" / context.task.name / f"{context.seed}-attacks" / name
    found = evaluate_robustness(
        one,
        inputs,
        targets,
        EPSILONS,
        attacks=attacks(budget, one, source),
        draw_counts=budget.counts,
        seed=context.seed,
        checkpoint=kept,
    )
    seen = detection(one, inputs, targets, Threat(EPSILONS[-1]), attack=pgd(20), seed=context.seed)
    return {
        "fit_seconds": fit_seconds,
        "seconds": time.process_time() - began,
        "robustness": found.as_dict(),
        "detection": seen.as_dict(),
        "certified": _certified(predictor, space, inputs, targets, context.seed),
    }


def _certified(predictor: Any, space: Any, inputs: Tensor, targets: Tensor, seed: int) -> Any:
    """Certified radii where the theorem covers the posterior; else why not."""
    bnn = getattr(predictor, "bnn", None)
    if bnn is None or not isinstance(bnn.posterior, MeanFieldPosterior):
        return None
    try:
        return certified_radius(bnn, inputs, targets, space=space, seed=seed).as_dict()
    except InputError as error:
        return {"refused": str(error)}


def main() -> None:
    """Run what is missing, and write one file of results a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(BUDGETS)[1:], choices=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = parser.parse_args()
    folder = cache() / "robustness"
    for task in chosen.tasks:
        for seed in chosen.seeds:
            context, budget = context_of(task, seed), BUDGETS[task]
            for name, make in contenders(context, budget).items():
                kept = folder / f"{task}-{seed}" / f"{name}.json"
                if not kept.exists():
                    write_json(kept, json.loads(json.dumps(study(context, name, make, budget))))
                print(task, seed, name, json.loads(kept.read_text())["seconds"], flush=True)
        write_results(task)


def write_results(task: str) -> None:
    """Put together what is there of a task."""
    runs = []
    for one in sorted((cache() / "robustness").glob(f"{task}-[0-9]*")):
        methods = {path.stem: json.loads(path.read_text()) for path in sorted(one.glob("*.json"))}
        runs.append({"seed": int(one.name.rsplit("-", 1)[1]), "methods": methods})
    content = json.dumps(
        {"environment": environment(), "epsilons": EPSILONS, "budget": vars(BUDGETS[task]), "runs": runs},
        separators=(",", ":"),
    )
    write_text(RESULTS / f"robustness_{task}.json", content + "\n")


if __name__ == "__main__":
    main()
