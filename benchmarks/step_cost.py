"""What a step of stage two costs, in time and in memory for the backward pass, against a step of ordinary training.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --batch 128
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --batch 512 --rounds 15 --name step_cost_512
    OMP_NUM_THREADS=2 python benchmarks/step_cost.py --batch 128 --name step_cost_two_threads

A ResNet-20 on 32x32 images, both in channels_last. The two kinds of step alternate in one process, so that a
change in the machine's speed meets both; each round gives one ratio, and the median over the rounds is quoted. The bytes
kept for the backward pass are the distinct storages that autograd saves in the forward pass, beside parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import stfbnn
from common import RESULTS, environment
from stfbnn.draws import chunk_rows
from stfbnn.evaluation.cost import saved_bytes
from stfbnn.files import write_json
from stfbnn.inference.engines import build_engine
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.models import resnet20

CLASSES, EXAMPLES = 10, 50_000


def convolution_seconds(step: Callable[[], None], repeats: int = 5) -> tuple[float, float]:
    """Seconds that a step spends in convolutions, forward and backward, and seconds in all (profiled, one after another)."""
    with torch.profiler.profile() as profile:
        for _ in range(repeats):
            step()
    events = profile.key_averages()
    inside = sum(event.self_cpu_time_total for event in events if "convolution" in event.key)
    total = sum(event.self_cpu_time_total for event in events)
    return inside / repeats / 1e6, total / repeats / 1e6


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="step_cost", help="name of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (arguments.batch,), device=device)

    network = resnet20(input_shape=(3, 32, 32), num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    for _ in range(3):
        network(images)  # running statistics that are not the identity
    trained = resnet20(input_shape=(3, 32, 32), num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    trained.load_state_dict(network.state_dict())
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def training_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    bnn = stfbnn.bayesianize(trained.eval(), images[:2])
    bnn.to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)

    loss = MinibatchLoss(bnn, stfbnn.Categorical(), images, labels)

    def stage_two(name: str, draws: int) -> Callable[[], None]:
        curvature = torch.full((bnn.layout.size,), 1e-2, device=device)
        batches = EXAMPLES // arguments.batch
        estimator = stfbnn.SharedSample(draws, antithetic=draws > 1)
        engine = build_engine(name, bnn.posterior, bnn.prior, EXAMPLES, batches, curvature, estimator, {})
        engine.begin(1.0, 10_000)

        def step() -> None:
            engine.step(loss, generator)

        return step

    steps = {
        "training": training_step,
        "natural gradient, 1 draw": stage_two("natural-gradient", 1),
        "natural gradient, antithetic pair (default)": stage_two("natural-gradient", 2),
        "Bayes by Backprop, 1 draw": stage_two("bayes-by-backprop", 1),
    }

    def timed(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for step in steps.values():
        for _ in range(3):
            step()
    rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(arguments.rounds)]
    ratios = {name: sorted(one[name] / one["training"] for one in rounds) for name in steps if name != "training"}
    floor = None
    if device.type == "cpu":
        _, all_of_training = convolution_seconds(training_step)
        in_convolutions, _ = convolution_seconds(steps["natural gradient, 1 draw"])
        floor = in_convolutions / all_of_training
        print(f"one draw's convolutions alone are {floor:.3f} of a training step")
    weights = bnn.posterior.mean_vector().detach().clone().requires_grad_()
    chunk = chunk_rows(images, device)

    def one_pass(rows: int) -> Tensor:
        return nn.functional.cross_entropy(bnn.outputs(weights, images[:rows]), labels[:rows])

    frozen = [weights, *bnn.network.parameters(), *bnn.network.buffers()]
    kept = {
        "training": saved_bytes(
            lambda: nn.functional.cross_entropy(network(images), labels), [*network.parameters(), *network.buffers()]
        ),
        "stage two, whole batch at once": saved_bytes(lambda: one_pass(arguments.batch), frozen),
        "stage two": saved_bytes(lambda: one_pass(chunk), frozen),
    }
    summary = {
        name: {"median": statistics.median(values), "min": values[0], "max": values[-1]}
        for name, values in ratios.items()
    }
    for name, values in summary.items():
        print(f"{name}: {values['median']:.3f} of a training step ({values['min']:.3f} to {values['max']:.3f})")
    shares = {name: value / kept["training"] for name, value in kept.items()}
    print(f"bytes kept for the backward pass, as a share of training's: {shares}")
    print(bnn.folding.summary())
    content = {
        "environment": environment(),
        "seconds": rounds,
        "step_ratios": summary,
        "convolutions_alone": floor,
        "saved_bytes": kept,
        "saved_shares": shares,
        "batch": arguments.batch,
        "chunk": chunk,
    }
    write_json(RESULTS / f"{arguments.name}.json", content)


if __name__ == "__main__":
    main()
