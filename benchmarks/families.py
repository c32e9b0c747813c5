"""Every posterior family beside the network, temperature scaling and a deep ensemble, on two networks.

    python benchmarks/tasks.py fashion-mlp cifar-resnet20       # stage one: 12 networks each
    python benchmarks/families.py fashion-mlp
    python benchmarks/families.py cifar-resnet20

T, τ and the mixture's weights are chosen on images that were held out before stage one, the baselines' temperatures on the
same ones; the test images are used for the figures alone. Seconds are of everything after the (first) network's training: for
the deep ensemble the training of its three further networks. Results are written after every seed, and seeds that are there
are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

import stfbnn
from common import RESULTS, environment, figures_of, network_predictions, ood_figures, table
from stfbnn.baselines import fit_temperature
from stfbnn.files import write_json, write_text
from stfbnn.inference.components.weights import stack
from stfbnn.inference.held_out import HeldOut
from stfbnn.posterior import MixturePosterior
from stfbnn.predictive import CategoricalPrediction
from tasks import MEMBERS, SEEDS, TASKS, Data, task_data, trained

SAMPLES, COMPONENTS = 32, 8


@dataclass(frozen=True)
class Plan:
    """How a task's posteriors are inferred."""

    epochs: int
    temperatures: tuple[float, ...]
    engine_options: Mapping[str, float]
    skipped: Mapping[str, str]


PLANS = {
    "fashion-mlp": Plan(
        8,
        (1.0, 0.3, 0.1, 0.03),
        {"wander": 2.0},
        {
            "filterwise": "256 blocks of 785 weights: 0.9 s for one draw, 20 minutes for an epoch",
            "full": "one block of 200,960 weights: refused, it would need 1.6 TB",
        },
    ),
    "cifar-resnet20": Plan(3, (1.0, 0.3, 0.1, 0.03), {"wander": 5.0}, {}),
}

# Method, posterior, engine.
FAMILIES = [
    ("mean-field", "mean-field", "natural-gradient"),
    ("mean-field, Bayes by Backprop", "mean-field", "bayes-by-backprop"),
    ("mean-field, Laplace", "mean-field", "laplace"),
    ("low-rank, Bayes by Backprop", "low-rank", "bayes-by-backprop"),
    ("filterwise", "filterwise", "natural-gradient"),
    ("full", "full", "natural-gradient"),
]

Predict = Callable[[Tensor], CategoricalPrediction]


def figures(predict: Predict, known: Data) -> dict[str, float]:
    """All figures of one method."""
    inside = predict(known.inputs(known.test))
    assert known.test.targets is not None
    found = figures_of(inside, known.test.targets)
    for kind, x in known.outside.items():
        found |= ood_figures(kind, inside, predict(x))
    return found


def ensemble_prediction(logits: list[Tensor], temperature: float) -> CategoricalPrediction:
    """The mean of several networks' probabilities, their logits over one temperature."""
    each = torch.stack([(one.double() / temperature).log_softmax(1) for one in logits])
    log_probs = each.logsumexp(0) - math.log(len(logits))
    return CategoricalPrediction(len(logits), False, log_probs, torch.special.entr(each.exp()).sum(2).mean(0))


def one_seed(name: str, seed: int) -> dict[str, Any]:
    """All methods on one seed's networks."""
    plan, known = PLANS[name], task_data(name, seed)
    networks = [trained(name, seed, member, known) for member in range(MEMBERS)]
    model, first_seconds = networks[0]
    held_x, held_y = known.inputs(known.held), known.held.targets
    assert held_y is not None
    methods: dict[str, dict[str, float]] = {}
    notes: dict[str, Any] = {"stage_one_seconds": first_seconds}

    def show(method: str) -> None:
        picked = {key: round(methods[method][key], 4) for key in ("accuracy", "nll", "ece", "seconds")}
        print(f"{name} {seed}: {method}: {picked}", flush=True)

    def add(method: str, predict: Predict, seconds: float) -> None:
        methods[method] = figures(predict, known) | {"seconds": seconds}
        show(method)

    add("network", lambda x: network_predictions(model, x, 1.0), 0.0)
    tau = fit_temperature(network_predictions(model, held_x, 1.0).log_probs, held_y)
    add("temperature scaling", lambda x: network_predictions(model, x, tau), 0.0)

    def logits(x: Tensor) -> list[Tensor]:
        return [network_predictions(member, x, 1.0).log_probs for member, _ in networks]

    held_logits = logits(held_x)
    found = minimize_scalar(
        lambda log_tau: -float(ensemble_prediction(held_logits, math.exp(log_tau)).log_density(held_y).mean()),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    others = sum(seconds for _, seconds in networks[1:])
    add("deep ensemble of 4", lambda x: ensemble_prediction(logits(x), 1.0), others)
    add("deep ensemble of 4 + τ", lambda x: ensemble_prediction(logits(x), math.exp(found.x)), others)
    notes["taus"] = {"network": tau, "deep ensemble": math.exp(found.x)}

    def bayesian(bnn: stfbnn.BayesianNetwork, tau: float) -> Predict:
        def predict(x: Tensor) -> CategoricalPrediction:
            pred = stfbnn.predict(bnn, x, samples=SAMPLES, predictive_temperature=tau)
            assert isinstance(pred, CategoricalPrediction)
            return pred

        return predict

    def fitted(posterior: Any, engine: str) -> tuple[stfbnn.BayesianNetwork, stfbnn.FitRun, float]:
        start = time.perf_counter()
        bnn = stfbnn.bayesianize(model, held_x[:2], posterior=posterior)
        run = stfbnn.fit(
            bnn,
            known.loader(known.train, shuffle=True),
            epochs=plan.epochs,
            engine=engine,
            engine_options=plan.engine_options if engine in ("auto", "natural-gradient") else {},
            val_loader=known.loader(known.held, 1000),
            temperatures=plan.temperatures,
            predictive_temperature="held-out",
            seed=seed,
            progress=False,
        )
        return bnn, run, time.perf_counter() - start

    for method, posterior, engine in FAMILIES:
        if posterior in plan.skipped:
            continue
        bnn, run, seconds = fitted(posterior, engine)
        notes[method] = run.as_dict()
        add(method, bayesian(bnn, 1.0), seconds)
        add(f"{method} + τ", bayesian(bnn, run.predictive_temperature), seconds)

    for family in ("mean-field", "point"):
        recipe = stfbnn.Mixture(components=COMPONENTS, family=family, max_excess=1e6, min_weight=0.0)
        bnn, run, seconds = fitted(recipe, "auto")
        notes[f"mixture of {family}"] = run.as_dict()
        whole = bnn.posterior
        assert isinstance(whole, MixturePosterior)
        for count in (2, 4, COMPONENTS):
            weights, tau = keep_first(bnn, whole, count, known, seed)
            # Component 0 with its choice of T, and what each further one took.
            spent = seconds - sum(one.retraining_seconds + one.inference_seconds for one in run.components[count:])
            label = f"mixture of {count}" if family == "mean-field" else f"ensemble of {count} first layers"
            notes[label] = {"weights": weights, "tau": tau}
            add(label, bayesian(bnn, 1.0), spent)
            add(f"{label} + τ", bayesian(bnn, tau), spent)
    return {"seed": seed, "methods": methods, "notes": notes}


def keep_first(
    bnn: stfbnn.BayesianNetwork, whole: MixturePosterior, count: int, known: Data, seed: int
) -> tuple[list[float], float]:
    """Make the mixture of the first ``count`` components the posterior, weights stacked anew; the weights, and τ."""
    targets = known.held.targets
    assert targets is not None
    inputs, densities = known.inputs(known.held), []
    for component in whole.components[:count]:
        bnn.posterior = component
        densities.append(stfbnn.predict(bnn, inputs, samples=SAMPLES).log_density(targets))
    weights = stack(torch.stack(densities)).weights
    kept = [index for index in range(count) if weights[index] > 1e-3]
    bnn.posterior = MixturePosterior(
        bnn.layout, [whole.components[index] for index in kept], weights[kept] / weights[kept].sum()
    )
    held = HeldOut(bnn, known.loader(known.held, 1000), bnn.require_fitted(), "labels", SAMPLES, seed)
    return weights.tolist(), held.best_predictive_temperature()


def main() -> None:
    """Run the seeds that are missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    plan = PLANS[arguments.task]
    path = RESULTS / f"families_{arguments.task}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in arguments.seeds:
        if any(run["seed"] == seed for run in runs):
            continue
        runs.append(one_seed(arguments.task, seed))
        settings = {
            "epochs_per_temperature": plan.epochs,
            "temperatures": plan.temperatures,
            "engine_options": dict(plan.engine_options),
            "skipped": dict(plan.skipped),
            "samples": SAMPLES,
        }
        content = {"environment": environment(), "settings": settings, "runs": runs}
        write_json(path, json.loads(json.dumps(content, default=float)))
        write_text(path.with_suffix(".md"), table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
