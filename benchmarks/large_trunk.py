"""What a large network takes in memory and in time: ordinary training, stage two, and stage two with its trunk in a file.

    OMP_NUM_THREADS=1 python benchmarks/large_trunk.py
    OMP_NUM_THREADS=1 python benchmarks/large_trunk.py --only-group

A vision transformer of 76 million parameters on 16x16 images. Every cell of the table of limits is a process of its own
under a hard limit on its writable memory (RLIMIT_DATA), so many MiB above what it takes when the libraries are loaded: it
works or it fails with the allocator's error. Peaks are of the same memory, sampled every two milliseconds. A last run has a
limit on all pages, those of files included (a memory control group), where the machine allows to make one. Steps of the three
kinds alternate in one process, and medians of the ratios are quoted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from common import RESULTS, environment
from stfbnn.files import write_json
from stfbnn.inference.engines import build_engine
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.trunk.mapped_weights import map_weights
from stfbnn.weights_file import save_weights

WIDTH, DEPTH, CLASSES, BATCH, STEPS = 1024, 6, 10, 8, 1
KINDS = ("ordinary training", "stage two", "stage two, offloaded")
LIMITS = (1300, 600, 150)
GROUPS = Path("/sys/fs/cgroup/memory")


class Transformer(nn.Module):
    """Patches of 4x4 pixels, an encoder, and the mean of its outputs."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, 16, 16)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        found: Tensor = self.head(self.encoder(tokens).mean(1))
        return found


def made(depth: int = DEPTH) -> Transformer:
    """The network with the weights of seed 0."""
    torch.manual_seed(0)
    return Transformer(depth).eval()


def data() -> tuple[Tensor, Tensor]:
    """Images and labels of ``STEPS`` batches."""
    generator = torch.Generator().manual_seed(1)
    count = BATCH * STEPS
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def mapped(weights: Path) -> Transformer:
    """The network, whose values never were in memory."""
    with torch.device("meta"):
        network = Transformer()
    return map_weights(network, weights)


def train(network: nn.Module) -> str:
    """Ordinary training with Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    for images, labels in zip(*(part.split(BATCH) for part in data()), strict=True):
        training_step(network, optimizer, images, labels)
    return ""


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step."""
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()


def infer(network: nn.Module) -> str:
    """Stage two of one epoch and a prediction; a digest of every number that they gave."""
    loader = DataLoader(TensorDataset(*data()), BATCH)
    bnn = stfbnn.bayesianize(network, data()[0][:2])
    stfbnn.fit(bnn, loader, epochs=1, temperature=1.0, progress=False)
    probs = stfbnn.predict(bnn, data()[0][:BATCH], samples=2).probs
    numbers = [*bnn.posterior.mean_vector().tolist(), *bnn.posterior.std_vector().tolist(), *probs.flatten().tolist()]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def status(key: str) -> float:
    """A figure of this process in MiB, by the system's name for it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


@contextmanager
def watched(peak: list[float]) -> Iterator[None]:
    """Sample the writable memory within a block, and leave its peak in a list."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], status("VmData"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def worker(kind: str, limit: int, weights: Path, group: Path | None = None) -> dict[str, Any]:
    """One cell: what a kind of run does under a limit in MiB, 0 for none, and in a memory control group."""
    # What libraries load at first use is no part of the comparison.
    train(made(1))
    infer(made(1))
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    before = status("VmData")
    peak = [before]
    with watched(peak):
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (int((before + limit) * 2**20),) * 2)
        try:
            digest = train(made()) if kind == KINDS[0] else infer(made() if kind == KINDS[1] else mapped(weights))
        except (RuntimeError, MemoryError) as error:
            return {"works": False, "error": str(error).splitlines()[0]}
    return {"works": True, "digest": digest, "peak_mib": peak[0] - before, "resident_mib": status("VmHWM")}


def started(kind: str, limit: int, weights: Path, group: Path | None = None) -> dict[str, Any]:
    """`worker` in a process of its own."""
    # Freed memory goes back to the system at once, so that what is used is what is counted.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", kind, "--limit", str(limit), "--weights", str(weights)]
    if group is not None:
        command += ["--group", str(group)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        return {"works": False, "error": f"ended by signal {-done.returncode}: {done.stderr[-300:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def under_group(weights: Path, mib: int = 200) -> dict[str, Any] | str:
    """Both kinds of stage two where all pages are limited that a process takes beyond the libraries, those of files too."""
    group = GROUPS / f"stfbnn-large-trunk-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(mib * 2**20))
    except OSError as error:
        return f"no memory control group can be made here: {error}"
    # Pages that are in memory already are charged to whoever brought them there.
    with weights.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return {"limit_mib": mib, **{kind: started(kind, 0, weights, group) for kind in KINDS[1:]}}
    finally:
        group.rmdir()


def ratios(weights: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a step of each kind, alternated, and the ratios to ordinary training."""
    images, labels = (part[:BATCH] for part in data())
    network = made()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)

    def stage_two(model: nn.Module) -> Callable[[], None]:
        bnn = stfbnn.bayesianize(model, images[:2])
        curvature = torch.full((bnn.layout.size,), 1e-2)
        estimator = stfbnn.SharedSample(1, antithetic=False)
        engine = build_engine("natural-gradient", bnn.posterior, bnn.prior, 10_000, 1_000, curvature, estimator, {})
        engine.begin(1.0, 10_000)
        loss = MinibatchLoss(bnn, stfbnn.Categorical(), images, labels)
        noise = torch.Generator().manual_seed(0)

        def step() -> None:
            engine.step(loss, noise)

        return step

    def training() -> None:
        training_step(network, optimizer, images, labels)

    steps = dict(zip(KINDS, (training, stage_two(made()), stage_two(mapped(weights))), strict=True))

    def timed(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for step in steps.values():
        step()
    seconds = [{kind: timed(step) for kind, step in steps.items()} for _ in range(rounds)]
    found = {kind: sorted(one[kind] / one[KINDS[0]] for one in seconds) for kind in KINDS[1:]}
    found["offloaded / in memory"] = sorted(one[KINDS[2]] / one[KINDS[1]] for one in seconds)
    summary = {
        kind: {"median": statistics.median(each), "min": each[0], "max": each[-1]} for kind, each in found.items()
    }
    return {"seconds": seconds, "ratios": summary}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only-group", action="store_true", help="measure the control group alone again")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.limit, arguments.weights, arguments.group)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        network = made()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        random = sum(parameter.numel() for parameter in network.patches.parameters())
        save_weights(network, weights)
        del network
        if arguments.only_group:
            content = json.loads((RESULTS / "large_trunk.json").read_text())
            content["control_group"] = under_group(weights)
            write_json(RESULTS / "large_trunk.json", content)
            print(json.dumps(content["control_group"], indent=2))
            return
        free = {kind: started(kind, 0, weights) for kind in KINDS}
        print(json.dumps(free, indent=2))
        table = [{"limit_mib": limit, **{kind: started(kind, limit, weights) for kind in KINDS}} for limit in LIMITS]
        trunk = 4 * parameters / 2**20
        grouped = under_group(weights)
        content = {
            "environment": environment(),
            "parameters": parameters,
            "random_parameters": random,
            "weights_mib": trunk,
            "without_limit": free,
            "limits": table,
            "control_group": grouped,
            "steps": ratios(weights, arguments.rounds),
        }
    digests = {
        cell["digest"]
        for row in [free, *table]
        for cell in row.values()
        if isinstance(cell, dict) and cell.get("digest")
    }
    assert len(digests) == 1, "stage two gave different numbers"
    write_json(RESULTS / "large_trunk.json", content)
    print("| limit, MiB | " + " | ".join(KINDS) + " |\n|---|---|---|---|")
    for row in table:
        print(
            f"| {row['limit_mib']} | " + " | ".join("works" if row[kind]["works"] else "fails" for kind in KINDS) + " |"
        )
    for kind, each in content["steps"]["ratios"].items():
        print(f"{kind}: {each['median']:.3f} ({each['min']:.3f} to {each['max']:.3f})")
    print(grouped)


if __name__ == "__main__":
    main()
