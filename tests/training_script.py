"""A small run with everything random in it, started by the tests as a process of its own: to be killed, or as a rank.

Usage: training_script.py killed FOLDER DRAW, or ranks FOLDER, which leaves its results in FOLDER/result.RANK.pt.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from stfbnn.training import train

EXAMPLES = 48


def data():
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(EXAMPLES, 6, generator=generator)
    return inputs, (inputs[:, :3].sum(1) > 0).long() + (inputs[:, 3] > 1).long()


class Noisy(Dataset):
    """Draws from all three global generators for every example; stops in the chosen way at the chosen draw."""

    def __init__(self, stop_at=None, stop=None, noise=0.1):
        self.inputs, self.targets = data()
        self.stop_at, self.stop, self.noise, self.drawn = stop_at, stop, noise, 0

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        self.drawn += 1
        if self.drawn == self.stop_at:
            self.stop()
        noise = random.random() + np.random.random() + torch.rand(())
        return self.inputs[index] + self.noise * noise, self.targets[index]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def network(dropout=0.2, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(8, 3))


def resumable(folder, dataset):
    """Five epochs of 6 batches of 8, accumulated by 4, so that the last step of an epoch is a short one."""
    inputs, targets = data()
    return train(
        network(),
        DataLoader(dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(9)),
        epochs=5,
        lr=0.02,
        accumulate=4,
        clip_norm=1.0,
        val_loader=[(inputs[:20], targets[:20])],
        keep_best=True,
        seed=3,
        accelerator="cpu",
        checkpoint=None if folder is None else folder / "run.ckpt",
    )


def full_batch(ranks):
    """Every step sees the whole data set, so that the number of ranks does not matter."""
    loader = DataLoader(Noisy(noise=0.0), EXAMPLES // 2 // ranks, shuffle=True)
    return train(
        network(dropout=0.0, norm=False), loader, epochs=6, optimizer="sgd", lr=0.1, accumulate=2, accelerator="cpu"
    )


def small_batches(folder, dataset):
    """Three epochs of small batches in a random order, with running statistics that differ from rank to rank."""
    loader = DataLoader(dataset, 4, shuffle=True)
    checkpoint = None if folder is None else folder / "ranks.ckpt"
    return train(network(), loader, epochs=3, lr=0.02, accelerator="cpu", checkpoint=checkpoint)


def interrupted_and_resumed(folder):
    try:
        small_batches(folder, Noisy(4 + 24 + 10, interrupt))
    except KeyboardInterrupt:
        return small_batches(folder, Noisy())
    raise AssertionError("the run was not interrupted")


def result(run):
    rows = [
        (record.epoch, record.loss, record.accuracy, record.val_loss, record.val_accuracy, record.learning_rate)
        for record in run.history
    ]
    return {
        "model": run.model.state_dict(),
        "history": rows,
        "seen": run.provenance.to_tensor(),
        "chosen": run.chosen_epoch,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, where = sys.argv[1], Path(sys.argv[2])
    if mode == "killed":
        resumable(where, Noisy(int(sys.argv[3]), kill))
    else:
        found = {
            "full batch": result(full_batch(2)),
            "straight": result(small_batches(None, Noisy())),
            "resumed": result(interrupted_and_resumed(where)),
            "finished": result(small_batches(where, Noisy())),
        }
        torch.save(found, where / f"result.{os.environ['RANK']}.pt")
        # All is done and written. As the interpreter goes down, a thread of the process group sometimes aborts it (about
        # one run in 150 on a loaded machine), which says nothing of what is tested: end without that.
        torch.distributed.barrier()
        os._exit(0)
