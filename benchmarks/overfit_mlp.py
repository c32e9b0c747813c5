"""An overfit MLP on whole Fashion-MNIST: the network, temperature scaling, and STF-BNN.

    python benchmarks/overfit_mlp.py            # 3 seeds, about 12 minutes on one core

For every seed 10,000 training images are held out BEFORE stage one; T and the temperatures τ are chosen on them, and the
test images are used for the figures alone. ``--quick`` does what a hurried user would: T = 0.1 and four epochs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

import stfbnn
from common import contest, data, network_predictions, write
from stfbnn.baselines import fit_temperature
from stfbnn.data import hold_out, load, loader, normalise

HELD_OUT, BATCH, STAGE_ONE_EPOCHS, STAGE_TWO_EPOCHS = 10_000, 128, 25, 8
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)


def mlp() -> nn.Module:
    """784-256-256-10, as in the project's design notes."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def one_seed(seed: int, epochs: int, temperatures: tuple[float, ...]) -> dict[str, Any]:
    """Both stages and all figures."""
    source = load(data("fashion-mnist"))
    assert source.test is not None
    train_split, held_split = hold_out(source.train, HELD_OUT, seed=seed)
    mean, std = source.mean, source.std
    train_loader = loader(train_split, BATCH, shuffle=True, mean=mean, std=std)
    held_loader = loader(held_split, 1000, mean=mean, std=std)
    test_x, test_y = normalise(source.test.inputs, mean, std), source.test.targets
    held_x, held_y = normalise(held_split.inputs, mean, std), held_split.targets
    assert test_y is not None
    assert held_y is not None
    outside = {
        "kmnist": normalise(load(data("kmnist-test")).train.inputs, mean, std),
        "inverted": normalise(1 - source.test.inputs, mean, std),
        "noise": normalise(torch.rand(5000, 1, 28, 28, generator=torch.Generator().manual_seed(0)), mean, std),
    }

    torch.manual_seed(seed)
    model = mlp()
    options = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"}
    stage_one = stfbnn.train(model, train_loader, epochs=STAGE_ONE_EPOCHS, seed=seed, **options)
    tau = fit_temperature(network_predictions(model, held_x, 1.0).log_probs, held_y)

    start = time.perf_counter()
    bnn = stfbnn.bayesianize(model, test_x[:2])
    run = stfbnn.fit(
        bnn,
        train_loader,
        epochs=epochs,
        val_loader=held_loader,
        temperatures=temperatures,
        predictive_temperature="held-out",
        seed=seed,
    )
    seconds = time.perf_counter() - start

    methods = contest(model, bnn, tau, (test_x, test_y), outside)
    train_nll = stage_one.history[-1].loss
    print(f"seed {seed}: train loss {train_nll:.3f}, network's τ {tau:.2f}", flush=True)
    return {
        "seed": seed,
        "methods": methods,
        "network_tau": tau,
        "stage_one": {"seconds": stage_one.seconds, "loss": train_nll},
        "stage_two": {"seconds": seconds, **run.as_dict()},
    }


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one temperature and few epochs of stage two")
    arguments = parser.parse_args()
    epochs, temperatures = (4, (0.1,)) if arguments.quick else (STAGE_TWO_EPOCHS, TEMPERATURES)
    settings = {
        "held_out": HELD_OUT,
        "batch": BATCH,
        "stage_one_epochs": STAGE_ONE_EPOCHS,
        "stage_two_epochs_per_temperature": epochs,
        "temperatures": temperatures,
        "samples": 32,
    }
    runs = []
    for seed in arguments.seeds:
        runs.append(one_seed(seed, epochs, temperatures))
        write("overfit_mlp_quick" if arguments.quick else "overfit_mlp", runs, settings)


if __name__ == "__main__":
    main()
