"""What stage two needs before it can start: the trained network, its data, and examples that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stfbnn import factories
from stfbnn.cli import networks, sources
from stfbnn.cli import record as rec
from stfbnn.data import Split
from stfbnn.errors import InputError


@dataclass(frozen=True)
class Request:
    """What the user said.

    Attributes:
        run: Folder of ``stfbnn train``, or None for a network of the user's own.
        checkpoint: File with the weights; a record beside it counts as ``run`` does.
        factory: Makes the network; None takes the record's.
        arguments: Of the factory.
        data: The training data; None takes the record's.
        val_data: Held-out data from elsewhere.
        share: What to hold out, 0 for nothing; None where nothing was said.
        share_of: "train" or "test".
        mean: For the normalisation; None for the record's, or the data's own.
        std: Likewise.
        seed: Of the division, where there is no record.
    """

    run: Path | None
    checkpoint: Path | None
    factory: str | None
    arguments: dict[str, Any]
    data: rec.DataChoice | None
    val_data: str | None
    share: float | int | None
    share_of: str
    mean: list[float] | None
    std: list[float] | None
    seed: int


@dataclass(frozen=True)
class Ready:
    """What stage two starts from.

    Attributes:
        network: The trained network.
        train: Examples to infer on.
        held_out: Examples that nothing has seen, or None.
        record: All of it, for the folder.
    """

    network: nn.Module
    train: Split
    held_out: Split | None
    record: rec.Record

    @property
    def example(self) -> Split:
        """A few examples, to find the first layer with."""
        return self.train.take(torch.arange(min(8, len(self.train))))

    def summary(self) -> str:
        """One line for a person."""
        held = 0 if self.held_out is None else len(self.held_out)
        return f"{self.record.data.source}: {len(self.train):,} examples to infer on, {held:,} held out"


def prepare(request: Request, tell: Callable[[str], None]) -> Ready:
    """Put network and data together.

    Args:
        request: What the user said.
        tell: Takes a line of warning.

    Raises:
        InputError: Something is missing, or contradicts stage one.
        DataError: The data are missing or damaged.
    """
    if request.share_of not in ("train", "test"):
        raise InputError(f"--hold-out-of must be train or test, but it is {request.share_of!r}")
    before = _stage_one(request)
    return _foreign(request, tell) if before is None else _continued(request, before)


def _continued(request: Request, before: rec.Record) -> Ready:
    """From a network that ``stfbnn train`` trained."""
    if request.mean is not None or request.std is not None:
        raise InputError(
            f"stage one normalised the inputs by mean {list(before.mean)} and std {list(before.std)}, and the network "
            f"needs the same; leave --mean and --std away"
        )
    choice = request.data or before.data
    held = _held_out_before(request, before.hold_out)
    parts = sources.divide(sources.read(choice), held)
    sources.require_same(parts, before)
    factory = request.factory or before.model.factory
    network, given = factories.build(factory, request.arguments or before.model.arguments, {})
    weights = Path(before.model.weights) if request.checkpoint is None else request.checkpoint
    networks.load_weights(network, weights)
    folder = Path(before.model.weights).parent if request.run is None else request.run
    networks.attach_seen(network, folder / rec.SEEN)
    model = rec.ModelChoice(factory, given, str(weights))
    ready = _ready(request, network, choice, held, parts, (before.mean, before.std), model)
    return replace(ready, record=replace(ready.record, training=before.training))


def _foreign(request: Request, tell: Callable[[str], None]) -> Ready:
    """From a network that was trained elsewhere."""
    if request.factory is None or request.checkpoint is None or request.data is None:
        raise InputError(
            "give RUN, the folder of `stfbnn train`; or, for a network of your own, --model, --checkpoint and --data"
        )
    if request.val_data is not None and request.share:
        raise InputError("give --val-data or --hold-out, not both")
    held = rec.HoldOut(request.share, request.seed, request.share_of) if request.share else None
    parts = sources.divide(sources.read(request.data), held)
    network, given = factories.build(request.factory, request.arguments, sources.offered(parts))
    networks.load_weights(network, request.checkpoint)
    if held is not None and held.part == "train":
        tell(
            "warning: nothing says what this network was trained on. If it saw all of the training part, the examples "
            "held out of it are not unseen, and T and τ come out too low; then use --hold-out-of test or --val-data"
        )
    if request.mean is None and request.std is None:
        tell(
            "note: inputs are normalised by the training part's own mean and standard deviation; if the network was "
            "trained otherwise, give --mean and --std"
        )
    model = rec.ModelChoice(request.factory, given, str(request.checkpoint))
    return _ready(request, network, request.data, held, parts, (request.mean, request.std), model)


def _ready(
    request: Request,
    network: nn.Module,
    choice: rec.DataChoice,
    held: rec.HoldOut | None,
    parts: sources.Sources,
    numbers: sources.Numbers,
    model: rec.ModelChoice,
) -> Ready:
    record = sources.record_of(choice, held, parts, numbers, model)
    unseen = parts.held_out
    if request.val_data is not None:
        elsewhere = replace(choice, source=request.val_data)
        unseen = sources.read_like(record, elsewhere)
        record = replace(record, val_data=elsewhere, held_out_digest=sources.digest(unseen))
    return Ready(network, parts.train, unseen, record)


def _stage_one(request: Request) -> rec.Record | None:
    """The record of stage one: of the folder that was named, or beside the weights."""
    if request.run is not None:
        return rec.Record.read(request.run / rec.TRAIN_RECORD)
    if request.checkpoint is None:
        return None
    folder = request.checkpoint if request.checkpoint.is_dir() else request.checkpoint.parent
    beside = folder / rec.TRAIN_RECORD
    return rec.Record.read(beside) if beside.is_file() else None


def _held_out_before(request: Request, done: rec.HoldOut | None) -> rec.HoldOut | None:
    """What stage one held out; only that, or a share of the test part, is unseen."""
    if request.share is None or (done is not None and (request.share, request.share_of) == (done.share, done.part)):
        return done
    if done is None and request.share == 0:
        return None
    if done is None and request.share_of == "test":
        return rec.HoldOut(request.share, request.seed, "test")
    told = "nothing" if done is None else f"{done.share} with seed {done.seed}"
    raise InputError(
        f"stage one held out {told}, and only that is unseen; leave --hold-out away, or give other unseen data with "
        f"--val-data"
    )
