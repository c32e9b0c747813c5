"""A network trained by someone else: a convolutional network for MNIST, given as a state dict.

    python benchmarks/pretrained_cnn.py         # 3 divisions, about 20 minutes on one core

Its author trained it on the MNIST training images, so nothing of those is held out: T and the temperatures τ are chosen on
one half of the TEST images, and all figures are of the other half; the seeds divide the test images differently.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

import stfbnn
from common import contest, data, write
from stfbnn.baselines import fit_temperature
from stfbnn.data import hold_out, load, loader, normalise
from stfbnn.evaluation.evaluate import network_outputs

BATCH, EPOCHS, MEAN, STD = 256, 2, 0.1307, 0.3081
TEMPERATURES = (1.0, 0.3, 0.1)
OUTSIDE = 2000
# 320 random weights bear larger steps than a wide layer does, and so converge in two passes over the data.
ENGINE = {"wander": 5.0}


class HandwritingNetwork(nn.Module):
    """Three convolutions and two dense layers, rebuilt from the names and shapes of the state dict."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

        self.conv_layers = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 128))
        self.fc_layers = nn.Sequential(nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28)."""
        return self.fc_layers(self.conv_layers(x).flatten(1))


def trained_network() -> nn.Module:
    """The network with its author's weights."""
    model = HandwritingNetwork()
    model.load_state_dict(torch.load(data("pretrained") / "handwriting_model.pth", weights_only=True))
    return model.eval()


def one_seed(seed: int, epochs: int) -> dict[str, Any]:
    """Stage two and all figures on one division of the test images."""
    source = load(data("mnist"))
    assert source.test is not None
    test, held = hold_out(source.test, 0.5, seed=seed)
    mean, std = torch.tensor([MEAN]), torch.tensor([STD])
    train_loader = loader(source.train, BATCH, shuffle=True, mean=mean, std=std)
    held_loader = loader(held, 1000, mean=mean, std=std)
    held_x, test_x = normalise(held.inputs, mean, std), normalise(test.inputs, mean, std)
    held_y, test_y = held.targets, test.targets
    assert held_y is not None
    assert test_y is not None
    fashion = load(data("fashion-mnist"))
    assert fashion.test is not None
    outside = {
        "kmnist": normalise(load(data("kmnist-test")).train.inputs[:OUTSIDE], mean, std),
        "fashion": normalise(fashion.test.inputs[:OUTSIDE], mean, std),
    }
    model = trained_network()
    tau = fit_temperature(network_outputs(model, list(held_x.split(128))), held_y)

    start = time.perf_counter()
    bnn = stfbnn.bayesianize(model, test_x[:2])
    run = stfbnn.fit(
        bnn,
        train_loader,
        epochs=epochs,
        engine_options=ENGINE,
        val_loader=held_loader,
        temperatures=TEMPERATURES,
        predictive_temperature="held-out",
        seed=seed,
    )
    seconds = time.perf_counter() - start

    methods = contest(model, bnn, tau, (test_x, test_y), outside)
    print(f"seed {seed}: network's τ {tau:.2f}, T {run.temperature}, {seconds:.0f} s", flush=True)
    return {
        "seed": seed,
        "methods": methods,
        "network_tau": tau,
        "stage_two": {"seconds": seconds, **run.as_dict()},
    }


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of stage two for each temperature")
    arguments = parser.parse_args()
    settings = {
        "batch": BATCH,
        "stage_two_epochs_per_temperature": arguments.epochs,
        "temperatures": TEMPERATURES,
        "engine_options": ENGINE,
        "samples": 32,
    }
    runs = []
    for seed in arguments.seeds:
        runs.append(one_seed(seed, arguments.epochs))
        write("pretrained_cnn", runs, settings)


if __name__ == "__main__":
    main()
