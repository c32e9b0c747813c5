"""The estimators of the gradient: noise and time of one estimate, on a dense and on a convolutional first layer.

    python benchmarks/estimators.py             # about 5 minutes on one core, after benchmarks/tasks.py

q is a fitted mean-field posterior. Every estimator makes 32 estimates, each on a fresh minibatch of 128 (``over data``), and
32 on one and the same (``given data``). Noise of the mean's gradient: the variance of ĝ in units of q, averaged over the
weights, Σ λσ² Var ĝ / d, λ = N/T: how many posterior variances one Newton step of length 1 would be off. Noise of the
curvature: Var ĥ / (h+δ)², averaged. Time: median of alternated runs in one process, as a ratio to one shared draw. "Cost" is
the noise over data times the time, relative to one shared draw: what reaching a given accuracy costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import stfbnn
from common import RESULTS, environment
from stfbnn.errors import InputError
from stfbnn.files import write_json, write_text
from stfbnn.inference.estimators import Estimate, Estimator, Sampler, resolve_estimator
from stfbnn.inference.minibatch import MinibatchLoss
from tasks import SEEDS, TASKS, task_data, trained

BATCH, TEMPERATURE = 128, 0.1
CHOICES = [
    ("shared", 1),
    ("shared", 2),
    ("antithetic", 2),
    ("antithetic", 4),
    ("per-example", 1),
    ("per-example", 2),
    ("flipout", 1),
    ("flipout", 2),
    ("local-reparameterization", 1),
    ("local-reparameterization", 2),
]


def noise(estimates: list[Estimate], std: Tensor, effective: float) -> tuple[float, float]:
    """Of the mean's gradient and of the curvature, as the module says."""
    loc, scale = (torch.stack([one.gradients[part] for one in estimates]).double() for part in (0, 1))
    std = std.double()
    gradient = (effective * std.square() * loc.var(0)).mean()
    # 1/(h+δ) is λσ².
    curvature = ((scale / std).var(0) * (effective * std.square()).square()).mean()
    return float(gradient), float(curvature)


def one_seed(name: str, seed: int, repeats: int, timings: int) -> dict[str, dict[str, float]]:
    """All estimators on one network."""
    known = task_data(name, seed)
    model, _ = trained(name, seed)
    bnn = stfbnn.bayesianize(model, known.inputs(known.test)[:2])
    batches = known.loader(known.train, BATCH, shuffle=True)
    stfbnn.fit(bnn, batches, epochs=1, temperature=TEMPERATURE, estimator="antithetic", seed=seed)
    effective = len(known.train) / TEMPERATURE
    loc, std = (
        value.detach().clone().requires_grad_() for value in (bnn.posterior.mean_vector(), bnn.posterior.std_vector())
    )
    sampler = Sampler((loc, std), lambda noise: loc + std * noise, lambda: (loc, std), len(loc))
    torch.manual_seed(seed)
    minibatches = [MinibatchLoss(bnn, stfbnn.Categorical(), x, y) for x, y in batches][: max(repeats, 1)]

    estimators: dict[str, Estimator] = {}
    for kind, draws in CHOICES:
        try:
            estimators[f"{kind}, {draws}"] = resolve_estimator(kind, draws, bnn, known.inputs(known.test)[:2])
        except InputError as error:
            print(f"{name}: {error}")

    def run(estimator: Estimator, index: int, repeat: int) -> Estimate:
        generator = torch.Generator().manual_seed(1000 * index + repeat)
        return estimator.estimate(minibatches[index % len(minibatches)], sampler, generator)

    found: dict[str, dict[str, float]] = {}
    for label, estimator in estimators.items():
        over = noise([run(estimator, index, 0) for index in range(repeats)], std.detach(), effective)
        given = noise([run(estimator, 0, index) for index in range(repeats)], std.detach(), effective)
        found[label] = {
            "gradient_over_data": over[0],
            "gradient_given_data": given[0],
            "curvature_over_data": over[1],
            "curvature_given_data": given[1],
        }

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    rounds = [
        {label: timed(lambda e=estimator, r=r: run(e, r, 1)) for label, estimator in estimators.items()}  # type: ignore[misc]
        for r in range(timings)
    ]
    base = "shared, 1"
    for label, figures in found.items():
        figures["time"] = statistics.median(one[label] / one[base] for one in rounds)
    for figures in found.values():
        for kind in ("gradient", "curvature"):
            key = f"{kind}_over_data"
            figures[f"{kind}_cost"] = figures["time"] * figures[key] / found[base][key]
    return found


def main() -> None:
    """Run the tasks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS, reverse=True))
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--timings", type=int, default=9)
    arguments = parser.parse_args()
    path = RESULTS / "estimators.json"
    # What another call found for other tasks stays.
    results = json.loads(path.read_text())["tasks"] if path.exists() else {}
    for name in arguments.tasks:
        results[name] = [one_seed(name, seed, arguments.repeats, arguments.timings) for seed in SEEDS]
        settings = {"batch": BATCH, "temperature": TEMPERATURE, "repeats": arguments.repeats, "seeds": SEEDS}
        content = {"environment": environment(), "settings": settings, "tasks": results}
        write_json(path, json.loads(json.dumps(content)))
        write_text(path.with_suffix(".md"), table(results))
    print(table(results))


def table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Medians over the seeds, with the range."""
    lines = []
    for name, runs in results.items():
        keys = list(next(iter(runs[0].values())))
        lines += [f"{name}:", "", "| estimator, draws | " + " | ".join(key.replace("_", " ") for key in keys) + " |"]
        lines.append("|---" * (len(keys) + 1) + "|")
        for label in runs[0]:
            cells = []
            for key in keys:
                values = sorted(run[label][key] for run in runs)
                cells.append(f"{statistics.median(values):.3g} ({values[0]:.3g}–{values[-1]:.3g})")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
