"""What stage two costs on the architectures that people have, against ordinary training.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py                # transformers' classes and the project's own
    OMP_NUM_THREADS=1 python benchmarks/architectures.py --elsewhere    # torchvision's and timm's, where they are installed

Networks have random weights, for time and memory do not depend on them. A step of ordinary training (forward, backward, Adam)
and of stage two (natural gradient, with one draw of weights and with the default's pair) alternate in one process; each
round gives one ratio, and the median is quoted. Memory is counted, not sampled: weights, gradients, the optimiser's or the
posterior's state, and the distinct storages that autograd keeps for the backward pass. Rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stfbnn
from common import RESULTS, environment
from stfbnn.batches import call_model, output_tensor, rows
from stfbnn.draws import chunk_rows
from stfbnn.evaluation.cost import bytes_of, saved_bytes
from stfbnn.files import write_json, write_text
from stfbnn.inference.engines import build_engine
from stfbnn.inference.minibatch import MinibatchLoss
from zoo import ROWS, Row, elsewhere

EXAMPLES = 50_000


def timed(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, make = row.build(False)
    inputs, labels = make(row.batch), torch.randint(0, 10, (row.batch,))
    example = rows(inputs, 0, 2)
    model.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        bnn = stfbnn.bayesianize(model, example, layer=row.layer)
        conversion = time.perf_counter() - start
    first = stfbnn.locate_first_layer(model, example).name
    total = sum(parameter.numel() for parameter in model.parameters())

    trained, _ = row.build(False)
    trained.load_state_dict(model.state_dict())
    trained.train()
    adam = torch.optim.Adam(trained.parameters(), lr=1e-5)

    def loss_of_training() -> Tensor:
        return nn.functional.cross_entropy(output_tensor(call_model(trained, inputs)), labels)

    def training_step() -> None:
        adam.zero_grad(set_to_none=True)
        loss_of_training().backward()
        adam.step()

    loss = MinibatchLoss(bnn, stfbnn.Categorical(), inputs, labels)
    generator = torch.Generator().manual_seed(0)

    def stage_two(draws: int) -> Callable[[], object]:
        curvature = torch.full((bnn.layout.size,), 1e-2)
        estimator = stfbnn.SharedSample(draws, antithetic=draws > 1)
        engine = build_engine(
            "natural-gradient", bnn.posterior, bnn.prior, EXAMPLES, EXAMPLES // row.batch, curvature, estimator, {}
        )
        engine.begin(1.0, 10_000)
        return lambda: engine.step(loss, generator)

    steps = {"training": training_step, "one draw": stage_two(1), "pair": stage_two(2)}
    for step in steps.values():
        step()
    seconds = [{name: timed(step) for name, step in steps.items()} for _ in range(rounds)]

    weights = bnn.posterior.mean_vector().detach().clone().requires_grad_()
    chunk = min(row.batch, chunk_rows(inputs, bnn.device))

    def one_pass() -> Tensor:
        return nn.functional.cross_entropy(bnn.outputs(weights, rows(inputs, 0, chunk)), labels[:chunk])

    owned = [*trained.parameters(), *trained.buffers()]
    frozen = [weights, *model.parameters(), *model.buffers(), *bnn.network.parameters(), *bnn.network.buffers()]
    kept = {"training": saved_bytes(loss_of_training, owned), "stage two": saved_bytes(one_pass, frozen)}
    parameters = bytes_of(trained.parameters())
    memory = {
        # Weights and buffers, gradients, Adam's two moments.
        "training": bytes_of(owned) + 3 * parameters + kept["training"],
        # The shared trunk with its folded copies; the posterior, its precision, momentum and gradients, nine vectors in all.
        "stage two": bytes_of(frozen) + 9 * weights.nbytes + kept["stage two"],
    }
    bnn.likelihood, bnn.temperature, bnn.num_examples = stfbnn.Categorical(), 1.0, EXAMPLES
    with tempfile.TemporaryDirectory() as folder:
        saved = stfbnn.save(bnn, Path(folder) / "posterior")
        artifact = sum(file.stat().st_size for file in saved.iterdir())
    found = {
        "name": row.name,
        "source": row.source,
        "first_layer": first,
        "layer": bnn.layer_name,
        "parameters": bnn.layout.size,
        "network_parameters": total,
        "conversion_seconds": conversion,
        "artifact_bytes": artifact,
        "batch": row.batch,
        "seconds": seconds,
        "saved_bytes": kept,
        "memory_bytes": memory,
        "found_as_expected": first == row.first,
        "warned": [str(one.message) for one in caught],
    }
    print(as_row(found), flush=True)
    return found


def as_row(found: dict[str, Any]) -> str:
    """A row of the markdown table."""
    ratios = {
        kind: statistics.median(one[kind] / one["training"] for one in found["seconds"])
        for kind in ("one draw", "pair")
    }
    memory = found["memory_bytes"]["stage two"] / found["memory_bytes"]["training"]
    kept = found["saved_bytes"]["stage two"] / found["saved_bytes"]["training"]
    size = found["artifact_bytes"]
    return (
        f"| {found['name']} ({found['source']}) | `{found['layer']}` | {found['parameters']:,} | "
        f"{100 * found['parameters'] / found['network_parameters']:.3f} % | "
        f"{f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.0f} KB'} | {found['conversion_seconds']:.1f} s | "
        f"{ratios['one draw']:.2f} | {ratios['pair']:.2f} | {memory:.2f} | {kept:.2f} |"
    )


COLUMNS = (
    "model",
    "Bayesian layer",
    "its parameters",
    "share",
    "posterior on disk",
    "conversion",
    "step, one draw",
    "step, pair",
    "memory",
    "activations kept",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def main() -> None:
    """Measure the rows that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--elsewhere", action="store_true")
    parser.add_argument("--only", help="rows whose name begins so")
    arguments = parser.parse_args()
    path = RESULTS / "architectures.json"
    content = json.loads(path.read_text()) if path.exists() else {"environment": environment(), "rows": []}
    done = content["rows"]
    for row in elsewhere() if arguments.elsewhere else ROWS:
        if arguments.only and not row.name.startswith(arguments.only):
            continue
        if not any((one["name"], one["source"]) == (row.name, row.source) for one in done):
            done.append(measure(row, arguments.rounds))
            write_json(path, content)
            write_text(path.with_suffix(".md"), HEADER + "\n".join(as_row(one) for one in done) + "\n")


if __name__ == "__main__":
    main()
