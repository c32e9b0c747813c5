"""What ``stfbnn landscape`` studies: the network and the data of a run, of files of the user's own, or of a built-in task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from stfbnn.benchmark.runner import Unit, trained_context
from stfbnn.benchmark.suites import built_in_tasks
from stfbnn.cli import sources, stage_two
from stfbnn.cli.record import DataChoice
from stfbnn.errors import InputError


@dataclass(frozen=True)
class Studied:
    """A network with its data, in batches.

    Attributes:
        network: Trained.
        train: What it was trained on.
        held_out: What nothing has seen.
        test: For figures; None where there is none.
        outside: Foreign sets, by name.
        about: One line for a person.
    """

    network: nn.Module
    train: Any
    held_out: Any
    test: Any
    about: str
    outside: Mapping[str, Any] = field(default_factory=dict)


def of_task(name: str, seed: int, folder: Path, threads: int) -> Studied:
    """A built-in task, whose network is trained once and then kept in ``folder``.

    Raises:
        InputError: The data are not there.
    """
    task = built_in_tasks()[name]
    reason = task.missing()
    if reason:
        raise InputError(f"the task {name} cannot be had: {reason}")
    context = trained_context(Unit(task, seed, 1, (), folder, threads))
    data = context.data
    return Studied(
        context.model,
        context.train_loader,
        context.held_loader,
        data.test.batches(task.batch),
        f"task {name}: {len(data.train):,} examples to train on, {len(data.held):,} held out",
        {name: part.batches(task.batch) for name, part in data.outside.items()},
    )


def of_run(ready: stage_two.Ready, ood: Sequence[str], batch_size: int) -> Studied:
    """A network that ``stfbnn train`` or the user trained.

    Raises:
        InputError: Nothing is held out.
        DataError: Foreign data do not fit the network.
    """
    if ready.held_out is None:
        raise InputError(
            "every retraining stops by held-out examples, and there are none: give `train` or this command --hold-out, or "
            "--val-data"
        )
    record = ready.record
    whole = sources.divide(sources.read(record.data), record.hold_out)
    named = {
        Path(name).name: sources.read_like(record, DataChoice(name, limit=record.data.limit), classes=False)
        for name in ood
    }
    if len(named) < len(ood):
        raise InputError("two --ood have the same last name; rename one of the folders")
    return Studied(
        ready.network,
        sources.batches(ready.train, record, batch_size, shuffle=True),
        sources.batches(ready.held_out, record, batch_size),
        None if whole.test is None else sources.batches(whole.test, record, batch_size),
        ready.summary(),
        {name: sources.batches(replace(part, targets=None), record, batch_size) for name, part in named.items()},
    )
