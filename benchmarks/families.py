"""Every posterior family beside the network, temperature scaling and a deep ensemble, on two networks.

    python benchmarks/tasks.py fashion-mlp cifar-resnet20       # stage one: 12 networks each
    python benchmarks/families.py fashion-mlp
    python benchmarks/families.py cifar-resnet20

T, τ and the mixture's weights are chosen on images that were held out before stage one, the baselines' temperatures on the
same ones; the test images are used for the figures alone. Seconds are the
processor's, on one thread, of everything after the (first) network's training: for the deep ensemble the training of its
three further networks. Results are written after every seed, and seeds that are there
are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import stfbnn
from common import RESULTS, environment, figures_of, ood_figures, table
from stfbnn.data import Split
from stfbnn.evaluation.evaluate import network_outputs
from stfbnn.files import write_json, write_text
from stfbnn.inference.components.weights import stack
from stfbnn.posterior import MixturePosterior
from stfbnn.prediction import member_outputs
from stfbnn.predictive import MemberOutputs
from tasks import MEMBERS, SEEDS, TASKS, cache, task_data, trained

SAMPLES = 32
COUNTS = (2, 4, 8)

# The library's own records are to be in the processor's seconds too: what else the machine does then hardly matters.
time.perf_counter = time.process_time


@dataclass(frozen=True)
class Plan:
    """How a task's posteriors are inferred.

    Attributes:
        epochs: At every temperature.
        further_epochs: Of inference, for the components of a mixture after the first one.
        temperatures: Tried in this order.
        engine_options: Of natural gradient.
        skipped: Families that are left out, and why.
        held: Held-out images for every choice; None for all.
        val_samples: Draws for a held-out score.
        test: Test images; None for all.
        outside: Images of every foreign set.
        bfloat16: Whether everything runs under autocast to bfloat16, as stage one did.
    """

    epochs: int
    further_epochs: int
    temperatures: tuple[float, ...]
    engine_options: Mapping[str, float]
    skipped: Mapping[str, str]
    held: int | None = None
    val_samples: int = 32
    test: int | None = None
    outside: int = 5000
    bfloat16: bool = False


PLANS = {
    "fashion-mlp": Plan(
        8,
        2,
        (1.0, 0.3, 0.1, 0.03),
        {"wander": 2.0},
        {
            "filterwise": "256 blocks of 785 weights: 0.9 s for one draw, 20 minutes for an epoch",
            "full": "one block of 200,960 weights: refused, it would need 1.6 TB",
        },
    ),
    "cifar-resnet20": Plan(
        2,
        1,
        (1.0, 0.3, 0.1, 0.03),
        {"wander": 5.0},
        {"mean-field, Bayes by Backprop": "left out for time: natural gradient has the family"},
        held=2500,
        val_samples=16,
        test=3000,
        outside=500,
        bfloat16=True,
    ),
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


Run = Callable[[Tensor], MemberOutputs]


def networks_outputs(networks: Sequence[nn.Module], x: Tensor) -> MemberOutputs:
    """One member a network."""
    members = torch.stack([network_outputs(model, list(x.split(128))) for model in networks])
    return MemberOutputs(members, stfbnn.Categorical(), at_mean=len(networks) == 1)


class Seed:
    """All methods on one seed's networks.

    Args:
        name: The task.
        seed: Of the split, the networks and the inference.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.plan = name, seed, PLANS[name]
        known = task_data(name, seed)
        self.known = known
        self.networks = [trained(name, seed, member, known) for member in range(MEMBERS)]
        self.model = self.networks[0][0]
        assert known.test.targets is not None
        assert known.held.targets is not None
        self.test = known.inputs(known.test)[: self.plan.test], known.test.targets[: self.plan.test]
        held = Split(known.held.inputs[: self.plan.held], known.held.targets[: self.plan.held])
        self.held = known.inputs(held), known.held.targets[: self.plan.held]
        self.held_loader = known.loader(held, 1000)
        self.methods: dict[str, dict[str, float]] = {}
        self.notes: dict[str, Any] = {"stage_one_seconds": [seconds for _, seconds in self.networks]}
        # What a run that was stopped had done.
        self.partial = cache() / f"families-{name}-{seed}.json"
        if self.partial.exists():
            saved = json.loads(self.partial.read_text())
            self.methods, self.notes = saved["methods"], saved["notes"]

    def run(self) -> dict[str, Any]:
        """Run those that are missing."""
        parts: list[tuple[str, Callable[[], None]]] = [("baselines", self._baselines)]
        for method, posterior, engine in FAMILIES:
            if method not in self.plan.skipped:
                parts.append((method, partial(self._family, method, posterior, engine)))
        for family, counts in (("mean-field", COUNTS), ("point", COUNTS[:2])):
            parts.append((f"mixture of {family}", partial(self._mixtures, family, counts)))
        for name, part in parts:
            if name not in self.notes:
                part()
                self.notes.setdefault(name, None)
                write_json(self.partial, json.loads(json.dumps(self._record(), default=float)))
        return self._record()

    def _record(self) -> dict[str, Any]:
        return {"seed": self.seed, "methods": self.methods, "notes": self.notes}

    def _family(self, method: str, posterior: str, engine: str) -> None:
        bnn, run, seconds = self._fitted(posterior, engine)
        self.notes[method] = run.as_dict()
        self._add(method, lambda x: member_outputs(bnn, x, samples=SAMPLES), seconds, run.predictive_temperature)

    def _add(self, method: str, run: Run, seconds: float, tau: float) -> None:
        inside = run(self.test[0])
        outside = {kind: run(x[: self.plan.outside]) for kind, x in self.known.outside.items()}
        for label, temperature in ((method, 1.0), (f"{method} + τ", tau)):
            pred = inside.at(temperature)
            found = figures_of(pred, self.test[1])
            for kind, outputs in outside.items():
                found |= ood_figures(kind, pred, outputs.at(temperature))
            self.methods[label] = found | {"seconds": seconds}
            picked = {key: round(self.methods[label][key], 4) for key in ("accuracy", "nll", "ece", "seconds")}
            print(f"{self.name} {self.seed}: {label}: {picked}", flush=True)

    def _baselines(self) -> None:
        models = [model for model, _ in self.networks]
        others = sum(seconds for _, seconds in self.networks[1:])
        for method, members, seconds in (("network", models[:1], 0.0), ("deep ensemble of 4", models, others)):
            tau = networks_outputs(members, self.held[0]).best_temperature(self.held[1])
            self.notes[f"{method}: τ"] = tau
            self._add(method, lambda x, members=members: networks_outputs(members, x), seconds, tau)

    def _fitted(self, posterior: Any, engine: str) -> tuple[stfbnn.BayesianNetwork, stfbnn.FitRun, float]:
        plan, start = self.plan, time.process_time()
        bnn = stfbnn.bayesianize(self.model, self.held[0][:2], posterior=posterior)
        run = stfbnn.fit(
            bnn,
            self.known.loader(self.known.train, shuffle=True),
            epochs=plan.epochs,
            engine=engine,
            engine_options=plan.engine_options if engine == "natural-gradient" else {},
            val_loader=self.held_loader,
            val_samples=plan.val_samples,
            temperatures=plan.temperatures,
            predictive_temperature="held-out",
            seed=self.seed,
            progress=False,
        )
        return bnn, run, time.process_time() - start

    def _mixtures(self, family: str, counts: Sequence[int]) -> None:
        """One fit of all components, scored with the first 2, 4 … of them."""
        recipe = stfbnn.Mixture(
            components=max(counts),
            family=family,
            inference_epochs=self.plan.further_epochs,
            # All are kept here, and weighed below as by default.
            weighting="equal",
            max_excess=1e6,
        )
        bnn, run, seconds = self._fitted(recipe, "natural-gradient" if family == "mean-field" else "auto")
        self.notes[f"mixture of {family}"] = run.as_dict()
        whole = bnn.posterior
        assert isinstance(whole, MixturePosterior)
        densities = []
        for component in whole.components:
            bnn.posterior = component
            densities.append(member_outputs(bnn, self.held[0], samples=SAMPLES).at().log_density(self.held[1]))
        for count in counts:
            weights = stack(torch.stack(densities[:count])).weights
            kept = [index for index in range(count) if weights[index] > 1e-3]
            bnn.posterior = MixturePosterior(
                bnn.layout, [whole.components[index] for index in kept], weights[kept] / weights[kept].sum()
            )
            tau = member_outputs(bnn, self.held[0], samples=SAMPLES, seed=1).best_temperature(self.held[1])
            # Component 0 with its choice of T, and what each further one took.
            spent = seconds - sum(one.retraining_seconds + one.inference_seconds for one in run.components[count:])
            label = f"mixture of {count}" if family == "mean-field" else f"ensemble of {count} first layers"
            self.notes[label] = {"weights": weights.tolist(), "tau": tau}
            self._add(label, lambda x: member_outputs(bnn, x, samples=SAMPLES), spent, tau)


def main() -> None:
    """Run the seeds that are missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    plan = PLANS[arguments.task]
    path = RESULTS / f"families_{arguments.task}.json"

    def done() -> list[dict[str, Any]]:
        # Read every time: seeds may run in several processes.
        return json.loads(path.read_text())["runs"] if path.exists() else []

    for seed in arguments.seeds:
        if any(run["seed"] == seed for run in done()):
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            found = Seed(arguments.task, seed).run()
        runs = sorted([*done(), found], key=lambda run: run["seed"])
        settings = {**asdict(plan), "samples": SAMPLES}
        content = {"environment": environment(), "settings": settings, "runs": runs}
        write_json(path, json.loads(json.dumps(content, default=float)))
        write_text(path.with_suffix(".md"), table(runs))
    print(table(done()))


if __name__ == "__main__":
    main()
