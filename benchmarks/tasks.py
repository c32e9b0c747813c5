"""The tasks on which posteriors are compared, and their trained networks, kept in a cache between benchmarks.

    python benchmarks/tasks.py fashion-mlp cifar-resnet20       # train what is not in the cache yet

For every seed, data are held out BEFORE stage one, and four networks are trained on the rest: member 0 is the network that
becomes Bayesian, all four are the deep ensemble. The cache is the folder named by STFBNN_CACHE, by default
``~/.cache/stfbnn-benchmarks``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stfbnn
from common import data
from stfbnn.data import Split, hold_out, load, loader, normalise
from stfbnn.files import atomic_path
from stfbnn.models import resnet20

SEEDS, MEMBERS = (0, 1, 2), 4
OUTSIDE = 5000


def mlp() -> nn.Module:
    """784-256-256-10, as in the project's design notes."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


@dataclass(frozen=True)
class Task:
    """A data set, a network and how stage one trains it."""

    data: str
    network: Callable[[], nn.Module]
    train: int | None
    held_out: int
    epochs: int
    options: Mapping[str, object]
    outside: Mapping[str, str]


TASKS = {
    "fashion-mlp": Task(
        "fashion-mnist",
        mlp,
        None,
        10_000,
        25,
        {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
        {"kmnist": "kmnist-test"},
    ),
    "cifar-resnet20": Task(
        "cifar10-jpeg",
        # The layout that convolutions are fastest in here, for every method.
        lambda: resnet20((3, 32, 32), 10).to(memory_format=torch.channels_last),
        10_000,
        5_000,
        12,
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine", "precision": "bf16-mixed"},
        {},
    ),
}


@dataclass(frozen=True)
class Data:
    """One seed's data, normalised by the training images' statistics."""

    train: Split
    held: Split
    test: Split
    outside: Mapping[str, Tensor]
    mean: Tensor
    std: Tensor

    def loader(self, split: Split, batch: int = 128, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        """Minibatches of a split."""
        return loader(split, batch, shuffle=shuffle, mean=self.mean, std=self.std)

    def inputs(self, split: Split) -> Tensor:
        """All of a split's inputs."""
        return normalise(split.inputs, self.mean, self.std)


def task_data(name: str, seed: int) -> Data:
    """Load a task's data and hold a part out."""
    task = TASKS[name]
    source = load(data(task.data))
    assert source.test is not None
    rest, held = hold_out(source.train, task.held_out, seed=seed)
    train = rest if task.train is None else hold_out(rest, task.train, seed=seed)[1]
    mean, std = source.mean, source.std
    shape = source.test.inputs.shape[1:]
    outside = {
        kind: normalise(load(data(folder)).train.inputs[:OUTSIDE], mean, std) for kind, folder in task.outside.items()
    }
    noise = torch.rand(OUTSIDE, *shape, generator=torch.Generator().manual_seed(0))
    outside |= {
        "inverted": normalise(1 - source.test.inputs[:OUTSIDE], mean, std),
        "noise": normalise(noise, mean, std),
    }
    return Data(train, held, source.test, outside, mean, std)


def cache() -> Path:
    """Where what is slow to make is kept."""
    return Path(os.environ.get("STFBNN_CACHE", Path.home() / ".cache" / "stfbnn-benchmarks"))


def trained(name: str, seed: int, member: int = 0, known: Data | None = None) -> tuple[nn.Module, float]:
    """A trained network, from the cache where it is there, and the processor's seconds that stage one took."""
    folder = cache()
    path = folder / f"{name}-{seed}-{member}.pt"
    task = TASKS[name]
    torch.manual_seed(1000 * seed + member)
    model = task.network()
    if not path.exists():
        known = known or task_data(name, seed)
        batches = known.loader(known.train, shuffle=True)
        began = time.process_time()
        run = stfbnn.train(model, batches, epochs=task.epochs, seed=1000 * seed + member, **task.options)
        seconds = time.process_time() - began
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save({"state": run.model.state_dict(), "seconds": seconds}, temporary)
        print(f"{path.name}: loss {run.history[-1].loss:.3f}, {seconds:.0f} s", flush=True)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["state"])
    return model.eval(), float(saved["seconds"])


def main() -> None:
    """Fill the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--members", type=int, nargs="+", default=list(range(MEMBERS)))
    arguments = parser.parse_args()
    for name in arguments.tasks:
        for seed in SEEDS:
            for member in arguments.members:
                trained(name, seed, member)


if __name__ == "__main__":
    main()
