"""How both stages scale with processes, what a step sends, and what a slow network makes of it.

    python benchmarks/scaling.py

Every figure is of a run under torchrun on this machine, in a network namespace of its own where the machine allows one, so
that the bytes on the wire can be read off the loopback interface and its rate can be limited. In each run ordinary training and
stage two alternate, so that a change in the machine's speed meets both. Strong scaling keeps the batch of all ranks together,
weak scaling that of each. The images are noise: nothing here depends on what is on them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from common import RESULTS
from stfbnn.environment import environment
from stfbnn.files import write_json
from tasks import TASKS

EPOCHS = 3
RATES = (1000, 100)
"""Megabits a second of the slow networks."""


@dataclass(frozen=True)
class Load:
    """What is trained.

    Attributes:
        shape: Of an image.
        batch: Images a step, of all ranks (strong) or of each (weak).
        steps: An epoch.
    """

    shape: tuple[int, ...]
    batch: int
    steps: int


LOADS = {"fashion-mlp": Load((1, 28, 28), 128, 20), "cifar-resnet20": Load((3, 32, 32), 128, 4)}


@dataclass(frozen=True)
class Setting:
    """One run under torchrun."""

    network: str
    ranks: int
    weak: bool
    megabits: int | None = None


def settings() -> list[Setting]:
    """All that is run: scaling on the interface as it is, and two ranks on slower ones."""
    found = [Setting(name, ranks, weak) for name in LOADS for ranks in (1, 2, 4) for weak in (False, True)]
    return found + [Setting(name, 2, False, rate) for name in LOADS for rate in RATES]


def worker(setting: Setting, rounds: int) -> dict[str, Any]:
    """The figures of one rank: seconds of a step by round, bytes of a step on the wire of all ranks together."""
    torch.set_num_threads(1)
    load = LOADS[setting.network]
    torch.manual_seed(0)
    model = TASKS[setting.network].network()
    # Of all ranks together in strong scaling, of each in weak scaling.
    own = load.batch if setting.weak else load.batch // setting.ranks
    count = own * setting.ranks * load.steps
    images, labels = torch.randn(count, *load.shape), torch.randint(0, 10, (count,))
    if len(load.shape) == 3 and load.shape[0] == 3:
        images = images.contiguous(memory_format=torch.channels_last)
    bnn = stfbnn.bayesianize(copy.deepcopy(model).eval(), images[:2])
    sums = 0

    def ordinary(epochs: int) -> list[float]:
        run = stfbnn.train(copy.deepcopy(model), _loader(images, labels, own), epochs=epochs, optimizer="sgd", lr=1e-3)
        return [one.seconds for one in run.history]

    def stage_two(epochs: int) -> list[float]:
        nonlocal sums
        run = stfbnn.fit(bnn, _loader(images, labels, own), epochs=epochs, temperature=0.1, progress=False)
        sums = run.bytes_per_step
        return [one.seconds for one in run.history]

    seconds: dict[str, list[float]] = {"ordinary training": [], "stage two": []}
    for _ in range(rounds):
        for name, stage in (("ordinary training", ordinary), ("stage two", stage_two)):
            # The first epoch meets caches and buckets that are not there yet.
            seconds[name].append(statistics.median(stage(EPOCHS)[1:]) / load.steps)
    return {
        **asdict(setting),
        "images_per_step": own * setting.ranks,
        "seconds_per_step": seconds,
        "gradient_bytes": {
            "ordinary training": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
            "stage two": sums,
        },
        "wire_bytes": {"ordinary training": _wire(ordinary, load.steps), "stage two": _wire(stage_two, load.steps)},
    }


def _loader(images: torch.Tensor, labels: torch.Tensor, batch: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, labels), batch, shuffle=True)


def _wire(stage: Callable[[int], object], steps: int) -> float | None:
    """Bytes of a step on the interface: what two more epochs add, so that the start of a run does not count."""
    if os.environ.get("STFBNN_OWN_NETWORK") != "1":
        return None
    sent = []
    for epochs in (1, EPOCHS):
        before = _counter()
        stage(epochs)
        sent.append(_counter() - before)
    return (sent[1] - sent[0]) / ((EPOCHS - 1) * steps)


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _counter() -> int:
    _wait_for_all()
    # Unlike /sys, /proc shows the interfaces of the process's own namespace; the ninth number is bytes sent.
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def own_network() -> bool:
    """Whether this machine lets us have a network namespace with a limited interface."""
    if shutil.which("unshare") is None or shutil.which("tc") is None:
        return False
    trial = ["unshare", "-n", "bash", "-c", _prepared(10)]
    tried = subprocess.run(trial, capture_output=True, check=False)  # noqa: S603 - of fixed words
    return tried.returncode == 0


def _prepared(megabits: int | None) -> str:
    up = "ip link set lo up"
    # A loopback interface has packets of 64 KiB, more than a queue for a slow rate lets pass in one piece.
    slow = f" && ip link set lo mtu 1500 && tc qdisc add dev lo root tbf rate {megabits}mbit burst 64kb latency 400ms"
    return up if megabits is None else up + slow


def measure(setting: Setting, rounds: int, namespace: bool) -> dict[str, Any]:
    """Run one setting under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(setting.ranks)]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", "29517", str(Path(__file__).resolve())]
        command = [*launcher, "--worker", json.dumps(asdict(setting)), "--rounds", str(rounds), "--out", str(out)]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if namespace:
            command = ["unshare", "-n", "bash", "-c", _prepared(setting.megabits) + ' && exec "$@"', "bash", *command]
            variables["STFBNN_OWN_NETWORK"] = "1"
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return content


def main() -> None:
    """Measure all settings, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        found = worker(Setting(**json.loads(arguments.worker)), arguments.rounds)
        if os.environ["RANK"] == "0":
            write_json(arguments.out, found)
        _wait_for_all()
        # What a thread of the process group does as the interpreter goes down is of no interest here.
        os._exit(0)
    namespace, runs = own_network(), []
    for setting in settings():
        if setting.megabits is not None and not namespace:
            continue
        runs.append(measure(setting, arguments.rounds, namespace))
        one = runs[-1]["seconds_per_step"]
        print(setting, {name: f"{1000 * statistics.median(values):.1f} ms" for name, values in one.items()}, flush=True)
    write_json(
        RESULTS / "scaling.json",
        {"environment": environment(), "rounds": arguments.rounds, "loads": {n: asdict(v) for n, v in LOADS.items()}}
        | {"runs": runs},
    )


if __name__ == "__main__":
    main()
