"""The demonstration: an overconfident network, made Bayesian in its first layer, beside temperature scaling.

All of it runs on what scikit-learn has on board. The network reads handwritten digits through a noisy sensor and is
trained until it is sure of everything. Strange examples are patches of two photographs, seen through the same sensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stfbnn import models
from stfbnn.conversion import bayesianize, parameter_counts
from stfbnn.data import DataSet, Split, hold_out, load, loader
from stfbnn.errors import InputError
from stfbnn.evaluation.evaluate import BAYESIAN, Contender, SideBySide, contenders, side_by_side
from stfbnn.inference.fit import fit
from stfbnn.inference.held_out import HeldOut
from stfbnn.inference.history import FitRun
from stfbnn.inference.options import TEMPERATURES
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import predict
from stfbnn.randomness import derive_seed, generator, seeded
from stfbnn.threads import threads
from stfbnn.training import train

OUTSIDE = "photo patches"
RESCALED = f"{BAYESIAN} + τ"
_NOISE = 0.25
_SIDE = 8
_SMALLER = 4


@dataclass(frozen=True)
class DemoSettings:
    """How much work the demonstration does.

    Attributes:
        seed: Everything random follows from it.
        hidden: Units of the network's two hidden layers.
        train_epochs: Passes of stage one.
        fit_epochs: Passes of stage two, for each temperature.
        temperatures: What stage two tries.
        samples: Posterior draws of a prediction.
        held_out: Share of the training digits that stage one does not see.
        patches: Strange examples.
    """

    seed: int = 0
    hidden: int = 256
    train_epochs: int = 100
    fit_epochs: int = 20
    temperatures: tuple[float, ...] = TEMPERATURES
    samples: int = 64
    held_out: float = 0.25
    patches: int = 360


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        side: The figures of the methods.
        parameters: For each method what had to be learned for it.
        seconds: Wall time of each step.
        fit_run: Stage two's course.
        counts: Numbers of examples, by part.
        layer: The layer that was made Bayesian.
    """

    side: SideBySide
    parameters: dict[str, int]
    seconds: dict[str, float]
    fit_run: FitRun
    counts: dict[str, int]
    layer: str


def run_demo(
    settings: DemoSettings | None = None, tell: Callable[[str], None] = lambda _: None, progress: bool | None = None
) -> DemoResult:
    """Train, convert, infer, compare.

    Nothing is chosen by the test digits: the network's size, its training and the noise are fixed, and the temperatures
    are found on held-out training digits.

    Args:
        settings: How much work; None for the usual, about 15 seconds.
        tell: Called with a line before each step.
        progress: As for ``stfbnn.fit``.
    """
    chosen = settings or DemoSettings()
    clock = _Clock()
    # On operations as small as these, more threads cost more than they give.
    with threads(1):
        with clock("data"):
            tell("Digits of scikit-learn (8x8 pixels), seen through a noisy sensor …")
            data = load("digits")
            rest, held = hold_out(data.train, chosen.held_out, chosen.seed)
            assert data.test is not None  # noqa: S101 - the digits have one
            parts = {"train": rest, "held-out": held, "test": data.test}
            parts = {name: _through_sensor(part, chosen.seed, name) for name, part in parts.items()}
            strange = _through_sensor(Split(photo_patches(chosen.patches, chosen.seed)), chosen.seed, OUTSIDE)
        mean, std = _statistics(parts["train"])

        def batches(part: Split, shuffle: bool = False) -> Any:
            return loader(part, 64, shuffle, mean, std)

        with clock("stage one"):
            tell(f"Stage one: train a network on {len(rest)} digits; {len(held)} are held out and it never sees them …")
            with seeded(chosen.seed, "model"):
                model = models.mlp(data.input_shape, _class_count(data), hidden=chosen.hidden)
            train(
                model,
                batches(parts["train"], shuffle=True),
                epochs=chosen.train_epochs,
                schedule="constant",
                accelerator="cpu",
                seed=chosen.seed,
                progress=progress,
            )
        with clock("stage two"):
            tell("Stage two: make its first layer Bayesian; T is chosen on the held-out digits …")
            example = next(iter(batches(parts["train"])))[0][:8]
            bnn = bayesianize(model, example)
            run = fit(
                bnn,
                batches(parts["train"], shuffle=True),
                epochs=chosen.fit_epochs,
                val_loader=batches(parts["held-out"]),
                temperatures=chosen.temperatures,
                seed=chosen.seed,
                progress=progress,
            )
        with clock("comparison"):
            tell(f"Compare on {len(data.test)} test digits and {chosen.patches} patches of photographs …")
            side = side_by_side(
                _methods(model, bnn, batches(parts["held-out"]), chosen),
                batches(parts["test"]),
                {OUTSIDE: batches(strange)},
            )
    counts = parameter_counts(bnn)
    learned = dict.fromkeys(side.predictions, counts["total"])
    # A posterior has a mean and a standard deviation for each weight of its layer; scaling adds one number.
    extra = {"temperature-scaled": 1, BAYESIAN: 2 * counts["random"], RESCALED: 2 * counts["random"] + 1}
    return DemoResult(
        side=side,
        parameters={name: extra.get(name, total) for name, total in learned.items()},
        seconds=clock.seconds,
        fit_run=run,
        counts={**{name: len(part) for name, part in parts.items()}, OUTSIDE: len(strange)},
        layer=bnn.layer_name,
    )


def log_density_gain(side: SideBySide, method: str, other: str) -> tuple[float, float]:
    """How much higher a method's mean log density of the test targets is than another's, and that mean's standard error.

    The difference is taken example by example, for both methods saw the same ones.
    """
    gains = (
        side.predictions[method].log_density(side.targets) - side.predictions[other].log_density(side.targets)
    ).double()
    return float(gains.mean()), float(gains.std() / len(gains) ** 0.5)


def photo_patches(count: int, seed: int) -> Tensor:
    """Grey patches of the two photographs that come with scikit-learn.

    The photographs are made smaller by averaging, so that a patch of 8x8 pixels shows more than a plain surface.

    Args:
        count: How many.
        seed: Says which.

    Returns:
        (count, 1, 8, 8), in [0, 1].

    Raises:
        InputError: ``count`` is not positive.
    """
    from sklearn.datasets import load_sample_images  # noqa: PLC0415 - slow to import, needed here alone

    if count < 1:
        raise InputError(f"the number of patches must be positive, but it is {count}")
    random = generator(seed, OUTSIDE)
    images = [_small_grey(np.asarray(image)) for image in load_sample_images().images]
    patches = []
    for index in range(count):
        image = images[index % len(images)]
        top, left = (int(torch.randint(side - _SIDE + 1, (), generator=random)) for side in image.shape)
        patches.append(image[top : top + _SIDE, left : left + _SIDE])
    return torch.stack(patches).unsqueeze(1)


def _small_grey(image: Any) -> Tensor:
    grey = torch.from_numpy(image.astype(np.float32)).mean(dim=2).div(255)
    return torch.nn.functional.avg_pool2d(grey[None], _SMALLER)[0]


def _methods(model: Any, bnn: BayesianNetwork, held_out: Any, settings: DemoSettings) -> Iterator[Contender]:
    yield from contenders(model, bnn, held_out, settings.samples, settings.seed, progress=False)
    scores = HeldOut(
        bnn, held_out, bnn.require_fitted(), "labels", settings.samples, derive_seed(settings.seed, "held-out")
    )
    tau = scores.best_predictive_temperature()

    def rescaled(data: Any) -> Any:
        return predict(
            bnn, data, samples=settings.samples, seed=settings.seed, predictive_temperature=tau, progress=False
        )

    yield Contender(RESCALED, rescaled, f"τ = {tau:.3f} from held-out data")


def _through_sensor(part: Split, seed: int, name: str) -> Split:
    """Add the sensor's noise, of its own for each part."""
    noise = torch.randn(part.stored.shape, generator=generator(seed, "sensor", name))
    return replace(part, stored=part.inputs + _NOISE * noise)


def _statistics(part: Split) -> tuple[float, float]:
    return float(part.inputs.mean()), float(part.inputs.std())


def _class_count(data: DataSet) -> int:
    assert data.classes is not None  # noqa: S101 - digits are classes
    return len(data.classes)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
