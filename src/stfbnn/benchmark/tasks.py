"""The tasks: what is learned, by which network, on how many examples, and what it is tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn import models
from stfbnn.benchmark.parts import Part, TaskData, TensorPart
from stfbnn.data import DataSet, Split, data_root, hold_out, load
from stfbnn.demo import photo_patches
from stfbnn.errors import DataError, InputError
from stfbnn.evaluation.shift import TABLE_CORRUPTIONS, corrupt, corrupt_table
from stfbnn.factories import build
from stfbnn.randomness import derive_seed, generator

BUNDLED = ("digits", "diabetes")
"""Data that come with scikit-learn; all others lie under the folder that STFBNN_DATA names."""

# Of the examples, for testing, where the data have no test part of their own.
_TEST_SHARE = 0.2

SHIFTS = ("gaussian noise", "gaussian blur", "contrast", "rotation")
"""The corruptions of images that are measured: one of each sort."""


@dataclass(frozen=True)
class Task:
    """What is learned, and how stage one learns it.

    Attributes:
        name: Of the task.
        source: "digits", "diabetes", "sst2", a folder under the data root, or a path.
        network: "mlp", "lenet", "resnet20", "table-mlp" (one hidden layer of 50 units), "minilm", or "package.module:factory".
        seeds: One division of the data, and one of everything, each; for tables with fixed splits their numbers.
        epochs: Of stage one.
        options: Of ``stfbnn.train``.
        fit_epochs: Of stage two, for each temperature.
        held_out: How much of the training part is held out, a share or a count.
        batch: Rows of a minibatch.
        train: How many of the rest are trained on; None for all.
        choose: How many of the held-out ones are used; None for all.
        test: How many test examples are used; None for all.
        outside: Foreign sets: names of data, "inverted", "noise" or "photo patches".
        shifted: How many test examples are corrupted; 0 for none.
        samples: Posterior draws of a prediction.
        precision: Of every forward pass, one of Fabric's names.
        arguments: Of the network's factory.
        budget: How many settings are tried, if fewer than the suite says.
        left_out: Methods that are not run on it because they would take too long.
        courses: Whether runs of other lengths are measured too.
    """

    name: str
    source: str
    network: str
    seeds: tuple[int, ...]
    epochs: int
    options: Mapping[str, Any]
    fit_epochs: int
    held_out: float | int = 0.2
    batch: int = 128
    train: int | None = None
    choose: int | None = None
    test: int | None = None
    outside: tuple[str, ...] = ()
    shifted: int = 500
    samples: int = 32
    precision: str = "32-true"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    left_out: tuple[str, ...] = ()
    courses: bool = True

    def data(self, seed: int) -> TaskData:
        """Load and divide the data.

        Raises:
            DataError: They are not there.
            InputError: The network does not suit them.
        """
        if self.source == "sst2":
            from stfbnn.benchmark.texts import sst2_data  # noqa: PLC0415 - needs transformers

            return sst2_data(self, seed)
        return _tensor_data(self, seed)

    def missing(self) -> str | None:
        """Why the data cannot be had here; None where they can."""
        if self.source in BUNDLED or Path(self.source).exists():
            return None
        root = data_root()
        if root is None:
            return "STFBNN_DATA is not set: it names the folder of real data sets"
        folder = root / ("text/sst2" if self.source == "sst2" else self.source)
        return None if folder.exists() else f"there is no {folder}"


def _tensor_data(task: Task, seed: int) -> TaskData:
    source = _source(task, seed)
    whole, test_split = source.train, source.test
    if test_split is None:
        whole, test_split = hold_out(whole, _TEST_SHARE, seed=derive_seed(seed, "test"))
    rest, held = hold_out(whole, task.held_out, seed=seed)
    train = rest if task.train is None else hold_out(rest, task.train, seed=derive_seed(seed, "train"))[1]
    images = len(source.input_shape) == 3
    mean, std = (source.mean, source.std) if images else _columns(train)

    def part(split: Split) -> TensorPart:
        return TensorPart(split, mean, std)

    test = part(test_split).first(task.test)
    shifted = test.first(task.shifted) if task.shifted else None
    return TaskData(
        kind="classification" if source.classes is not None else "regression",
        network=_factory(task, source, train),
        train=part(train),
        held=part(held).first(task.choose),
        test=test,
        outside={name: part(_foreign(name, test)) for name in task.outside},
        corrupted=None if shifted is None else _corruption(shifted, images, mean, std, seed),
        shifted=shifted,
        corruptions=(SHIFTS if images else TABLE_CORRUPTIONS) if shifted is not None else (),
    )


def _source(task: Task, seed: int) -> DataSet:
    if task.source == "diabetes":
        return _diabetes(seed)
    if task.source.startswith("uci-gal-splits/"):
        return load(_path(task.source), split=seed)
    return load(task.source if task.source in BUNDLED else _path(task.source))


def _path(name: str) -> str:
    if Path(name).exists():
        return name
    root = data_root()
    if root is None:
        raise DataError(f"{name} lies under the folder that STFBNN_DATA names, which is not set")
    return str(root / name)


def _diabetes(seed: int) -> DataSet:
    """Scikit-learn's diabetes table: 442 rows of 10 columns, a tenth of them for testing."""
    from sklearn.datasets import load_diabetes  # noqa: PLC0415 - slow to import, needed here alone

    rows, targets = load_diabetes(return_X_y=True, scaled=False)
    whole = Split(torch.from_numpy(rows).float(), torch.from_numpy(targets).float())
    train, test = hold_out(whole, 0.1, seed=derive_seed(seed, "test"))
    mean, std = _columns(train)
    return DataSet("bundled", train, test, "regression", None, mean, std)


def _columns(train: Split) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column; 1 where it is constant."""
    inputs = train.inputs.double()
    std = inputs.std(dim=0, correction=0)
    return inputs.mean(dim=0).float(), std.masked_fill(std == 0, 1.0).float()


def _factory(task: Task, source: DataSet, train: Split) -> Callable[[], nn.Module]:
    """What makes an untrained network that suits the data."""
    shape = source.input_shape
    if source.classes is None:
        assert train.targets is not None  # noqa: S101 - a regression has targets
        targets = train.targets.reshape(len(train), -1).double()
        spread = targets.std(dim=0, correction=0)
        offered = {
            "num_classes": targets.shape[1],
            "target_mean": targets.mean(dim=0).tolist(),
            "target_std": spread.masked_fill(spread == 0, 1.0).tolist(),
        }
    else:
        offered = {"num_classes": len(source.classes)}
    if ":" in task.network:
        return lambda: build(task.network, task.arguments, {"input_shape": list(shape), **offered})[0]
    if task.network not in _NETWORKS:
        raise InputError(
            f"task {task.name} names the network {task.network!r}; there are {', '.join(_NETWORKS)}, or package.module:factory"
        )
    return lambda: _NETWORKS[task.network](shape, **offered, **task.arguments)


def _resnet20(*sizes: Any, **named: Any) -> nn.Module:
    # The layout in which convolutions are fastest on a processor, for every method.
    network: nn.Module = models.resnet20(*sizes, **named).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _table_mlp(shape: tuple[int, ...], **named: Any) -> nn.Module:
    return models.mlp(shape, **{"hidden": 50, "depth": 1, **named})


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": models.mlp,
    "lenet": models.lenet,
    "resnet20": _resnet20,
    "table-mlp": _table_mlp,
}


def _foreign(name: str, test: TensorPart) -> Split:
    """Examples unlike the training data, as many as there are test examples or fewer."""
    count, shape = len(test), test.split.stored.shape[1:]
    if name == "inverted":
        return Split(1 - test.split.inputs)
    if name == "noise":
        return Split(torch.rand(count, *shape, generator=generator(0, "noise")))
    if name == "photo patches":
        return Split(photo_patches(min(count, 360), 0))
    data = load(_path(name))
    split = data.train if data.test is None else data.test
    return Split(split.stored[:count])


def _corruption(shifted: TensorPart, images: bool, mean: Tensor, std: Tensor, seed: int) -> Callable[[str, int], Part]:
    def corrupted(name: str, severity: int) -> Part:
        if images:
            return shifted.changed(lambda inputs: corrupt(inputs, name, severity, seed=seed))
        return shifted.changed(lambda rows: corrupt_table(rows, name, severity, mean, std, seed))

    return corrupted
