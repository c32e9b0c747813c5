"""From the arrays of a reader to a data set: checked, labelled, with the statistics of its training part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stfbnn.data.labels import decide_task, index_labels, regression_values
from stfbnn.data.source import Array, Options, Part, Task, check_finite
from stfbnn.data.split import Split, to_float
from stfbnn.errors import DataError

CHANNEL_COUNTS = (1, 3, 4)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in memory.

    Attributes:
        kind: How it was stored: "idx", "npz", "parquet", "csv", "image-folder", "uci" or "digits".
        train: The training part; the only part where the source has one.
        test: The test part, or None.
        task: "classification", "regression", or "unlabelled" where the training part has no targets.
        classes: The names of the classes 0 … K-1; None unless the task is classification.
        mean: Mean of the training inputs (after the scaling of images to [0, 1]), float32, one per channel or column.
        std: Their standard deviation (divisor N), likewise; 1 where the inputs are constant.
    """

    kind: str
    train: Split
    test: Split | None
    task: Task
    classes: tuple[str, ...] | None
    mean: Tensor
    std: Tensor

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (C, H, W) or (F,)."""
        return tuple(self.train.stored.shape[1:])

    def summary(self) -> str:
        """One line for a person: kind, shape, classes and sizes."""
        shape = "x".join(map(str, self.input_shape))
        what = self.task if self.classes is None else f"{len(self.classes)} classes"
        sizes = f"{len(self.train):,} train" + (f", {len(self.test):,} test" if self.test is not None else "")
        return f"{self.kind}: inputs {shape}, {what}, {sizes}"


def assemble(
    kind: str,
    train: Part,
    test: Part | None,
    options: Options,
    *,
    columns: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> DataSet:
    """Check what a reader found and make it a data set.

    Args:
        kind: The kind of source.
        train: The training part.
        test: The test part, or None.
        options: The user's options; ``task`` and ``limit`` are used here.
        columns: Names of a table's columns, for messages.
        names: Names of the classes 0 … K-1 where the source lists them.

    Raises:
        DataError: A part is empty or its counts disagree, the inputs have an unusable shape, type or value, the
            targets do not fit the task, or the test part does not fit the training part.
    """
    train = _checked(train)
    test = None if test is None else _checked(test)
    task = decide_task(train, options.task)
    stored = _stored(train, columns)
    held = None if test is None else _stored(test, columns)
    if held is not None and test is not None and held.shape[1:] != stored.shape[1:]:
        raise DataError(
            f"an example has the shape {tuple(stored.shape[1:])} in {train.where} and {tuple(held.shape[1:])} in "
            f"{test.where}; both parts must have the same"
        )
    classes: tuple[str, ...] | None = None
    targets: Array | None = None
    tested: Array | None = None
    if task == "classification":
        targets, tested, classes = index_labels(train, test, names)
    elif task == "regression":
        targets = regression_values(train)
        tested = None if test is None else regression_values(test)
        if targets is not None and tested is not None and targets.shape[1:] != tested.shape[1:]:
            raise DataError(f"targets have the shape {targets.shape} in training and {tested.shape} in testing")
    elif test is not None and test.targets is not None:
        raise DataError(f"{test.where} has targets, but {train.where} has none")
    first = _split(stored, targets, options.limit)
    mean, std = statistics(first.stored)
    return DataSet(
        kind=kind,
        train=first,
        test=None if held is None else _split(held, tested, options.limit),
        task=task,
        classes=classes,
        mean=mean,
        std=std,
    )


def statistics(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel (N x C x …) or column (N x F), float32.

    Two passes in float64 over blocks, so that neither large offsets nor large sets lose digits or need memory.
    """
    dimensions = [0, *range(2, stored.ndim)]
    shape = (1, -1, *[1] * (stored.ndim - 2))
    count = stored.numel() // stored.shape[1]
    blocks = [stored[start : start + 2048] for start in range(0, len(stored), 2048)]
    mean = torch.stack([to_float(block).double().sum(dimensions) for block in blocks]).sum(0) / count
    squares = [(to_float(block).double() - mean.reshape(shape)).square().sum(dimensions) for block in blocks]
    std = (torch.stack(squares).sum(0) / count).sqrt()
    # A column may be constant but for the last bit of a float32: a rounding error of whoever computed it, which
    # must not be scaled up to a signal.
    constant = std <= torch.finfo(torch.float32).eps * mean.abs()
    return mean.float(), std.masked_fill(constant, 1.0).float()


def _split(stored: Tensor, targets: Array | None, limit: int | None) -> Split:
    # Cut only now: the classes were found in the complete labels. Cloned, so that the rest is not kept alive.
    cut = stored if limit is None or limit >= len(stored) else stored[:limit].clone()
    return Split(cut, None if targets is None else torch.from_numpy(targets[: len(cut)].copy()))


def _checked(part: Part) -> Part:
    if not len(part.inputs):
        raise DataError(f"{part.where} is empty; at least one example is needed")
    targets = part.targets
    if targets is None:
        return part
    if len(targets) != len(part.inputs) and not (part.cut and len(targets) > len(part.inputs)):
        raise DataError(
            f"{part.where} has {len(part.inputs)} examples and {len(targets)} targets; there must be as many"
        )
    if targets.dtype.kind not in "fbiuUS":
        raise DataError(f"{part.where} has targets of the type {targets.dtype}; numbers or texts are expected")
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim not in (1, 2):
        raise DataError(f"{part.where} has targets of shape {targets.shape}; N or N x D is expected")
    check_finite(targets, f"the target of {part.where}")
    return replace(part, targets=targets)


def _stored(part: Part, columns: Sequence[str] | None) -> Tensor:
    if part.inputs.dtype.kind not in "fbiu":
        raise DataError(f"{part.where} has inputs of the type {part.inputs.dtype}; numbers are expected")
    if part.inputs.ndim == 2:
        with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite and is named as such
            values = np.ascontiguousarray(part.inputs, dtype=np.float32)
        if not values.shape[1]:
            raise DataError(f"{part.where} has no column beside the target")
        check_finite(values, part.where, columns)
        return torch.from_numpy(values)
    return torch.from_numpy(np.ascontiguousarray(_pixels(_channels_first(part), part.where)))


def _channels_first(part: Part) -> Array:
    inputs = part.inputs
    if inputs.ndim == 3:
        return inputs[:, None]
    if inputs.ndim != 4:
        raise DataError(
            f"{part.where} has inputs of shape {inputs.shape}; tables are N x F, images N x H x W, N x C x H x W or "
            f"N x H x W x C"
        )
    # N x C x H x W is torch's own order; the other is believed only where it alone makes sense.
    last = inputs.shape[3] in CHANNEL_COUNTS and inputs.shape[1] not in CHANNEL_COUNTS
    return inputs.transpose(0, 3, 1, 2) if last else inputs


def _pixels(images: Array, where: str) -> Array:
    if not images[0].size:
        raise DataError(f"{where} has images of shape {images.shape[1:]}, which have no pixels")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind == "b":
        return images.astype(np.uint8) * np.uint8(255)
    check_finite(images, where)
    low, high = float(images.min()), float(images.max())
    top = 1 if images.dtype.kind == "f" else 255
    if low < 0 or high > top:
        raise DataError(
            f"{where} has pixels of the type {images.dtype} from {low:g} to {high:g}; expected are integers from 0 to "
            f"255 or floats from 0 to 1, not yet normalised (normalisation is done when batches are made)"
        )
    return images.astype(np.float32 if images.dtype.kind == "f" else np.uint8)
