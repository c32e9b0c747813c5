"""How fast eight runs of one layer's retraining share two cores: one after another, stacked, or on a thread each.

python benchmarks/retraining_speed.py --threads 2

Steps of all runs on one minibatch of 128 examples, the ways alternating in one process on an idle machine; "one after another"
is timed with all threads and with one. Medians of the rounds, relative to the faster of these two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from common import RESULTS, environment
from stfbnn import models
from stfbnn.batches import Batch
from stfbnn.files import write_json, write_text
from stfbnn.optima.courses import Course
from stfbnn.optima.layer_function import LayerFunction
from stfbnn.optima.study import choose_layers
from stfbnn.optima.workers import EXECUTIONS, workers
from stfbnn.threads import threads

RUNS, BATCH = 8, 128
NETWORKS = {
    "MLP": (models.mlp, (1, 28, 28)),
    "LeNet": (models.lenet, (1, 28, 28)),
    "ResNet-20": (models.resnet20, (3, 32, 32)),
}


def seconds_of(function: LayerFunction, batch: Any, execution: Any, count: int) -> float:
    """One step of all runs."""
    courses = [Course(function.trained.clone(), 1e-4, 0.0, 3) for _ in range(RUNS)]
    with threads(count), workers(function, execution) as work:
        work.step(courses, batch)
        began = time.perf_counter()
        work.step(courses, batch)
        return time.perf_counter() - began


def main() -> None:
    """Time all networks and layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ways = [("loop, one thread", "loop", 1), *((name, name, given.threads) for name in EXECUTIONS)]
    rows = []
    for name, (factory, shape) in NETWORKS.items():
        torch.manual_seed(0)
        model = factory(shape, num_classes=10).eval()
        batch = (torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,)))
        for place, choice in choose_layers(model, [batch], "auto", 0, "labels"):
            function = LayerFunction(model, [batch], choice.name)
            checked = Batch(*batch)
            taken: dict[str, list[float]] = {label: [] for label, *_ in ways}
            for _ in range(given.rounds):
                for label, execution, count in ways:
                    taken[label].append(seconds_of(function, checked, execution, count))
            medians = {label: statistics.median(times) for label, times in taken.items()}
            rows.append(
                {"network": name, "place": place, "weights": function.size, "seconds": medians, "rounds": taken}
            )
            print(rows[-1]["network"], place, {label: round(value, 4) for label, value in medians.items()}, flush=True)
    write_json(RESULTS / "retraining_speed.json", json.loads(json.dumps({"environment": environment(), "rows": rows})))
    lines = ["| network | layer | one after another | stacked | threads |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = row["seconds"]
        base = min(seconds["loop"], seconds["loop, one thread"])
        gains = " | ".join(f"{base / seconds[way]:.2f} times as fast" for way in ("stacked", "threads"))
        lines.append(f"| {row['network']} | {row['place']} | {1000 * base:.0f} ms | {gains} |")
    write_text(RESULTS / "retraining_speed.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
