"""The natural-gradient engine against an independent implementation of the same equations, step by step, on the same noise.

    python -m venv reference && reference/bin/pip install --editable . ivon-opt
    reference/bin/python benchmarks/natural_gradient_reference.py        # some seconds

The other implementation is the package ivon-opt (Shen et al. 2024). It is under the GPL, which this project is not: keep it in
an environment of its own; nothing else of the project imports it.

Both optimise the same softmax regression from the same start, with the same minibatches and the same standard normal numbers;
the other one computes its losses in plain PyTorch. How the settings correspond:

    ours                                            the other's
    N / T                                           ess (λ)
    prior N(0, s²): δ = T / (N s²)                  weight_decay
    learning_rate, along half a cosine              lr, set before every step, with rescale_lr=False
    momentum β₁, g / (1 − β₁ᵗ)                      beta1, debias=True
    curvature_rate ρ, with curvature_trust → ∞      1 − beta2 (it has no 1/(t + t₀) phase)
    curvature h₀                                    the state "hess"; hess_init takes only one number
    SharedSample(draws)                             as many passes of sampled_params before a step
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import stfbnn
from common import RESULTS, environment
from stfbnn.files import write_json
from stfbnn.inference.engine import cosine_decay
from stfbnn.inference.estimators import SharedSample
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.inference.variational_newton import VariationalNewton

EXAMPLES, FEATURES, CLASSES, BATCH = 200, 7, 3, 40
PRIOR_STD, LEARNING_RATE, MOMENTUM, CURVATURE_RATE = 0.7, 0.1, 0.9, 0.02
TOLERANCE = 1e-5
CASES = ((1, 1.0), (2, 1.0), (2, 0.3))


def problem() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A softmax regression in double precision: the model, inputs, labels, and a curvature to start from."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    rule = torch.randn(FEATURES, CLASSES, generator=generator, dtype=torch.float64)
    y = (x @ rule + torch.randn(EXAMPLES, CLASSES, generator=generator, dtype=torch.float64)).argmax(1)
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES).double()
    size = sum(parameter.numel() for parameter in model.parameters())
    return model, x, y, 0.05 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)


def ours(steps: int, draws: int, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """The engine's mean and h after every step."""
    model, x, y, curvature = problem()
    bnn = stfbnn.bayesianize(model, x[:2], prior=PRIOR_STD)
    estimator = SharedSample(draws, antithetic=draws > 1)
    engine = VariationalNewton(
        bnn.posterior,
        bnn.prior,
        EXAMPLES,
        estimator,
        EXAMPLES // BATCH,
        curvature,
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        curvature_rate=CURVATURE_RATE,
        curvature_trust=1e15,
    )
    engine.begin(temperature, steps)
    generator = torch.Generator().manual_seed(1)
    effective = EXAMPLES / temperature
    trace = []
    for step in range(steps):
        rows = minibatch(step)
        engine.step(MinibatchLoss(bnn, stfbnn.Categorical(), x[rows], y[rows]), generator)
        precision = bnn.posterior.std_vector().detach() ** -2 / effective
        trace.append((bnn.posterior.mean_vector().detach().clone(), precision - 1 / (effective * PRIOR_STD**2)))
    return trace


def theirs(steps: int, draws: int, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """The other implementation's mean and h after every step."""
    from ivon import IVON  # noqa: PLC0415 - in an environment of its own

    model, x, y, curvature = problem()
    effective = EXAMPLES / temperature
    optimizer = IVON(
        model.parameters(),
        lr=LEARNING_RATE,
        ess=effective,
        weight_decay=1 / (effective * PRIOR_STD**2),
        beta1=MOMENTUM,
        beta2=1 - CURVATURE_RATE,
        debias=True,
        rescale_lr=False,
    )
    (group,) = optimizer.param_groups
    group["hess"] = curvature.clone()
    generator = torch.Generator().manual_seed(1)
    trace = []
    for step in range(steps):
        rows = minibatch(step)
        noise = torch.zeros_like(curvature)
        for index in range(draws):
            # What the engine draws: single-precision normals, each followed by its negative in a pair.
            noise = -noise if index % 2 else torch.randn(len(curvature), generator=generator).double()
            with patch("torch.randn", return_value=noise), optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        group["lr"] = LEARNING_RATE * cosine_decay(step, steps)
        optimizer.step()
        mean = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        trace.append((mean.clone(), group["hess"].clone()))
    return trace


def minibatch(step: int) -> Tensor:
    """Rows of a step's minibatch."""
    return torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(1000 + step))[:BATCH]


def compare(steps: int, draws: int, temperature: float) -> dict[str, Any]:
    """How far the two runs are apart, and how far each went."""
    mine, other = ours(steps, draws, temperature), theirs(steps, draws, temperature)
    apart = [
        ((m - n).abs().max().item(), (h - k).abs().max().item()) for (m, h), (n, k) in zip(mine, other, strict=True)
    ]
    return {
        "draws": draws,
        "temperature": temperature,
        "steps": steps,
        "largest_difference_of_mean": max(mean for mean, _ in apart),
        "largest_difference_of_h": max(h for _, h in apart),
        "at_the_last_step": {"mean": apart[-1][0], "h": apart[-1][1]},
        "moved": {
            "mean": (mine[-1][0] - mine[0][0]).abs().max().item(),
            "h": (mine[-1][1] - mine[0][1]).abs().max().item(),
        },
    }


def main() -> None:
    """Compare, write the results, and fail where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    try:
        import ivon  # noqa: F401, PLC0415 - in an environment of its own
    except ModuleNotFoundError:
        sys.exit("ivon-opt is not installed: make an environment of its own for it, as the head of this file says")
    torch.set_num_threads(1)
    runs = [compare(steps, draws, temperature) for draws, temperature in CASES]
    for run in runs:
        print(
            f"draws={run['draws']} T={run['temperature']:g}: over {steps} steps the means differ by at most "
            f"{run['largest_difference_of_mean']:.1e} (they moved by {run['moved']['mean']:.2f}), h by "
            f"{run['largest_difference_of_h']:.1e} (it moved by {run['moved']['h']:.2f})"
        )
    settings = {
        "examples": EXAMPLES,
        "features": FEATURES,
        "classes": CLASSES,
        "batch": BATCH,
        "prior_std": PRIOR_STD,
        "learning_rate": LEARNING_RATE,
        "momentum": MOMENTUM,
        "curvature_rate": CURVATURE_RATE,
        "tolerance": TOLERANCE,
        "dtype": "float64",
        "reference": f"ivon-opt {version('ivon-opt')}",
    }
    write_json(
        RESULTS / "natural_gradient_reference.json", {"environment": environment(), "settings": settings, "runs": runs}
    )
    worst = max(max(run["largest_difference_of_mean"], run["largest_difference_of_h"]) for run in runs)
    if not worst < TOLERANCE:
        sys.exit(f"the two implementations differ by {worst:.1e}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
