"""A trunk under hard memory limits, started by the tests as a process of its own.

Usage: large_trunk_script.py FOLDER, which prints what worked under which limit as JSON.

The limit is on the process's own writable memory (RLIMIT_DATA), so many MiB above what the interpreter and the libraries take
when they have all been used once. Beyond it the next allocation fails.
"""

import gc
import json
import resource
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from stfbnn.trunk.mapped_weights import map_weights
from stfbnn.trunk.offloading import offload
from stfbnn.weights_file import save_weights

WIDTH, DEPTH, CLASSES, ROWS = 768, 8, 3, 32
TRUNK_MIB = 4 * (WIDTH + 1) * WIDTH * DEPTH / 2**20


def network(depth=DEPTH):
    return nn.Sequential(
        nn.Linear(8, WIDTH),
        nn.GELU(),
        *[nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)) for _ in range(depth)],
        nn.GELU(),
        nn.Linear(WIDTH, CLASSES),
    )


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), ROWS // 2)


def used():
    """MiB of writable memory of its own that this process has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) / 1024


@contextmanager
def limited(mib):
    """A limit within a block, in MiB above what the process has."""
    gc.collect()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int((used() + mib) * 2**20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def train(depth=DEPTH):
    """Ordinary training: all parameters, their gradients, and Adam's two moments."""
    stfbnn.train(network(depth), loader(), epochs=1, optimizer="adam", progress=False)


def infer(bnn):
    """Stage two and a prediction, as one list of numbers."""
    stfbnn.fit(bnn, loader(), epochs=1, temperature=1.0, progress=False)
    probs = stfbnn.predict(bnn, loader().dataset.tensors[0], samples=4).probs
    return [*bnn.posterior.mean_vector().tolist(), *bnn.posterior.std_vector().tolist(), *probs.flatten().tolist()]


def bayesian(model):
    return stfbnn.bayesianize(model, loader().dataset.tensors[0][:2])


def stage_two(path, depth=DEPTH):
    """With the trunk in memory."""
    model = network(depth)
    model.load_state_dict(torch.load(path, weights_only=True))
    return infer(bayesian(model))


def stage_two_mapped(path):
    """With a trunk that was never in memory: built without values, which stay in their file."""
    with torch.device("meta"):
        model = network()
    return infer(bayesian(map_weights(model, path)))


def outcome(limit, action, *arguments):
    """What an action gives under a limit: its numbers, or what it failed with."""
    with limited(limit):
        try:
            return {"numbers": action(*arguments)}
        except (RuntimeError, MemoryError) as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def offloaded_under_limit(models, folder, limit):
    """The trunk of the only model leaves the memory, and stage two goes on under a limit on what it takes."""
    bnn = bayesian(models[0])
    offload(bnn, folder)
    held = used()
    models.clear()
    # The guard of the model's tensors lets them go when it finds that the model has gone.
    bnn.check_unchanged()
    freed = held - used()
    return {"freed": freed} | outcome(limit, infer, bnn)


def main(folder):
    torch.manual_seed(0)
    model = network()
    torch.save(model.state_dict(), folder / "model.pt")
    save_weights(model, folder / "model.safetensors")
    models = [model]
    del model
    # Libraries that are loaded at first use are no part of what is compared.
    train(1)
    infer(bayesian(network(1)))
    enough = 2.2 * TRUNK_MIB
    scarce = 0.6 * TRUNK_MIB
    found = {
        "training, enough for stage two": outcome(enough, train),
        "stage two, enough": outcome(enough, stage_two, folder / "model.pt"),
        "stage two, no limit": outcome(8 * 1024, stage_two, folder / "model.pt"),
        "stage two, scarce": outcome(scarce, stage_two, folder / "model.pt"),
        "stage two mapped, scarce": outcome(scarce, stage_two_mapped, folder / "model.safetensors"),
        "stage two offloaded, scarce": offloaded_under_limit(models, folder, scarce),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
