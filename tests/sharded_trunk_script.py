"""A trunk shared out among ranks, started by the tests under torchrun.

Usage: sharded_trunk_script.py FOLDER, which leaves its results in FOLDER/result.RANK.pt.
"""

import gc
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from large_trunk_script import used
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.inference.fit import fit
from stfbnn.posterior import Mixture
from stfbnn.prediction import predict
from stfbnn.trunk.mapped_weights import map_weights
from stfbnn.trunk.offloading import offload
from stfbnn.trunk.sharding import shard
from stfbnn.weights_file import save_weights
from two_ranks import leave_results, refusal

WIDTH, DEPTH = 896, 6


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 32)
        self.start = nn.Parameter(torch.randn(32))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        tokens = self.first(x.unsqueeze(1).expand(-1, 3, -1)) + self.start
        return self.head(self.encoder(tokens).mean(1))


def encoder():
    torch.manual_seed(3)
    return Encoder()


def dense():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3))


def wide():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, WIDTH), *[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)], nn.Linear(WIDTH, 3))


def rows(count=14, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def results(bnn, **options):
    """What inference and predictions of all ranks together give."""
    held_out = rows(seed=2)
    run = fit(
        bnn,
        DataLoader(rows(), 4, shuffle=True),
        epochs=1,
        val_loader=[held_out.tensors],
        temperatures=(1.0, 0.3),
        early_stop="nll",
        predictive_temperature="held-out",
        val_samples=4,
        progress=False,
        **options,
    )
    return {
        "mean": bnn.posterior.mean_vector().detach().clone(),
        "std": bnn.posterior.std_vector().detach().clone(),
        "probs": predict(bnn, held_out.tensors[0], samples=4).probs,
        "history": [(one.temperature, one.nll, one.kl, one.held_out_nll) for one in run.history],
        "chosen": [run.temperature, run.predictive_temperature, run.held_out_nll],
        "bytes_per_step": run.bytes_per_step,
    }


def made(build, posterior="mean-field"):
    return bayesianize(build(), rows().tensors[0][:2], posterior=posterior)


def sharded(build, posterior="mean-field", **options):
    bnn = made(build, posterior)
    shard(bnn, **options)
    return bnn


def mixture(bnn):
    """What a mixture learns and how its components are weighed."""
    fit(
        bnn,
        DataLoader(rows(), 4),
        epochs=1,
        val_loader=[rows(seed=2).tensors],
        val_samples=2,
        progress=False,
        temperature=1.0,
    )
    return {"mean": bnn.posterior.mean_vector().detach().clone(), "weights": bnn.posterior.weights.clone()}


def from_file(folder, build):
    """Never whole in the memory of any rank."""
    file = folder / f"model.{os.environ['RANK']}.safetensors"
    save_weights(build(), file)
    with torch.device("meta"):
        model = build()
    bnn = bayesianize(map_weights(model, file), rows().tensors[0][:2])
    shard(bnn)
    return results(bnn)


def from_offloaded(folder, build):
    bnn = made(build)
    offload(bnn, folder / os.environ["RANK"])
    shard(bnn)
    return results(bnn)


def saved(folder):
    """Saved by one rank and loaded onto the model of any."""
    bnn = sharded(dense)
    found = results(bnn)
    path = folder / f"posterior.{os.environ['RANK']}"
    save(bnn, path)
    return {"here": found["probs"], "there": predict(load(path, dense()), rows(seed=2).tensors[0], samples=4).probs}


def memory():
    """MiB that the trunk takes on this rank: whole, shared out, and at most while it computes."""
    gc.collect()
    before = used()
    bnn = made(wide)
    whole = used() - before
    shard(bnn)
    # The model has gone, but the guard of its tensors is yet to notice.
    bnn.check_unchanged()
    gc.collect()
    parts = used() - before
    results(bnn)
    gc.collect()
    local = sum(value.to_local().nbytes for value in bnn.network.parameters() if hasattr(value, "to_local"))
    return {"whole": whole, "parts": parts, "after": used() - before, "local": local / 2**20}


class Uneven(DistributedSampler):
    """One row less for the first rank."""

    def __iter__(self):
        return iter(range(8 - (self.rank == 0)))

    def __len__(self):
        return 8 - (self.rank == 0)


def uneven(batch_size):
    loader = DataLoader(rows(), batch_size, sampler=Uneven(rows()))
    fit(sharded(dense), loader, epochs=1, temperature=1.0, progress=False)


def twice():
    shard(sharded(dense))


def all_ranks(folder):
    return {
        "whole": {build.__name__: results(made(build)) for build in (dense, encoder)},
        "sharded": {build.__name__: results(sharded(build)) for build in (dense, encoder)},
        "named": results(sharded(dense, blocks=["2"])),
        "per example": results(made(dense), estimator="per-example"),
        "per example, sharded": results(sharded(dense), estimator="per-example"),
        "mixture": mixture(made(dense, Mixture(2))),
        "mixture, sharded": mixture(sharded(dense, Mixture(2))),
        "from file": from_file(folder, dense),
        "from offloaded": from_offloaded(folder, dense),
        "saved": saved(folder),
        "memory": memory(),
        "uneven rows": refusal(lambda: uneven(8)),
        "uneven batches": refusal(lambda: uneven(1)),
        "twice": refusal(twice),
    }


if __name__ == "__main__":
    leave_results(all_ranks)
