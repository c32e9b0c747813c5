"""A network that ends its process in the chosen way, and what the Python calls make of it; for `test_cli_ranks`.

Usage: rank_networks.py FOLDER, as a rank under torchrun: stage one and stage two of the run that the tests make by commands.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from stfbnn import bayesianize, fit, train
from stfbnn.data import hold_out, load, loader
from stfbnn.errors import InputError
from stfbnn.randomness import seeded

LIMIT, BATCH, EPOCHS, SEED = 300, 32, 3, 5


class Fragile(nn.Module):
    """Changes nothing, but on rank 1: there KILLED_AFTER names a file, and NAN_AFTER a number of training batches."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def forward(self, x):
        if os.environ.get("RANK") != "1":
            return x
        file = os.environ.get("KILLED_AFTER")
        if file and Path(file).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches += self.training
        return x * (float("nan") if self.batches > int(os.environ.get("NAN_AFTER", "1000000")) else 1.0)


def network():
    if os.environ.get("REFUSED_ON") == os.environ.get("RANK", ""):
        raise InputError("this rank has no network")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10), Fragile())


def both_stages(folder):
    data = load("digits", limit=LIMIT)
    rest, held = hold_out(data.train, 0.1, SEED)
    statistics = data.mean, data.std
    with seeded(SEED, "model"):
        model = network()
    one = train(
        model,
        loader(rest, BATCH, True, *statistics),
        epochs=EPOCHS,
        val_loader=loader(held, BATCH, False, *statistics),
        seed=SEED,
        accelerator="cpu",
    )
    example = next(iter(loader(rest.take(torch.arange(8)), 8, False, *statistics)))[0]
    bnn = bayesianize(model, example)
    two = fit(
        bnn,
        loader(rest, BATCH, True, *statistics),
        epochs=EPOCHS,
        temperature=0.3,
        val_loader=loader(held, BATCH, False, *statistics),
        val_samples=4,
        seed=SEED,
        accelerator="cpu",
    )
    figures = {
        "model": model.state_dict(),
        "seen": one.provenance.to_tensor(),
        "losses": [record.loss for record in one.history],
        "mean": bnn.posterior.mean_vector().detach(),
        "std": bnn.posterior.std_vector().detach(),
        "held-out NLL": two.held_out_nll,
        "bytes per step": two.bytes_per_step,
    }
    if os.environ["RANK"] == "0":
        torch.save(figures, folder / "reference.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    both_stages(Path(sys.argv[1]))
    torch.distributed.barrier()
