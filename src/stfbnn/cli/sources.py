"""From the data that a user names to the parts that a command needs, the same ones in every command of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stfbnn.cli.record import DataChoice, HoldOut, ModelChoice, Record
from stfbnn.data import DataSet, Split, data_root, hold_out, load, loader, recognise
from stfbnn.data.csv_table import read_header, read_table
from stfbnn.data.source import choose_target, find_parts
from stfbnn.errors import DataError, InputError

_CSV = (".csv", ".tsv")

# A mean and a standard deviation of inputs; None for the training part's own.
Numbers: TypeAlias = tuple[Sequence[float] | None, Sequence[float] | None]


@dataclass(frozen=True)
class Sources:
    """The parts of a run's data.

    Attributes:
        data: The data set as it was read.
        train: What both stages train on.
        held_out: What neither has seen, or None.
        test: What the figures are computed on, or None.
    """

    data: DataSet
    train: Split
    held_out: Split | None
    test: Split | None

    def summary(self) -> str:
        """One line for a person."""
        held = 0 if self.held_out is None else len(self.held_out)
        return f"{self.data.summary()}; {len(self.train):,} to train on, {held:,} held out"


def read(choice: DataChoice) -> DataSet:
    """Read a data set.

    Raises:
        DataError: It is missing, damaged or of no known kind.
        InputError: An option is out of range, or the kind does not know it.
    """
    task: Any = choice.task  # any text, for load checks it
    return load(
        choice.source,
        choice.kind,
        split=choice.split,
        task=task,
        target=choice.target,
        image_size=choice.image_size,
        limit=choice.limit,
    )


def divide(data: DataSet, share: HoldOut | None) -> Sources:
    """Hold out what a run holds out.

    Raises:
        InputError: There is nothing to train on, or nothing left after holding out.
    """
    if data.task == "unlabelled":
        raise InputError("the data have no targets, so nothing can be learned from them")
    if share is None:
        return Sources(data, data.train, None, data.test)
    if share.part == "train":
        rest, held = hold_out(data.train, share.share, share.seed)
        return Sources(data, rest, held, data.test)
    if data.test is None:
        raise InputError(
            "the data have no test part to hold examples out of; give --val-data, or another --hold-out-of"
        )
    rest, held = hold_out(data.test, share.share, share.seed)
    return Sources(data, data.train, held, rest)


def digest(split: Split) -> str:
    """16 hexadecimal digits that identify examples, their order and their targets."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in (split.stored, split.targets):
        if tensor is not None:
            state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(tensor.contiguous().numpy().data)
    return state.hexdigest()


def offered(parts: Sources) -> dict[str, Any]:
    """What a model's factory is given if it names these parameters; ``num_classes`` is the number of outputs."""
    data, targets = parts.data, parts.train.targets
    if data.classes is not None:
        return {"input_shape": list(data.input_shape), "num_classes": len(data.classes)}
    assert targets is not None  # noqa: S101 - divide refuses unlabelled data
    columns = targets.reshape(len(targets), -1).double()
    spread = columns.std(dim=0, correction=0)
    return {
        "input_shape": list(data.input_shape),
        "num_classes": columns.shape[1],
        "target_mean": columns.mean(dim=0).tolist(),
        "target_std": spread.masked_fill(spread == 0, 1.0).tolist(),
    }


def record_of(
    choice: DataChoice,
    held: HoldOut | None,
    parts: Sources,
    numbers: Numbers,
    model: ModelChoice,
) -> Record:
    """The record of a run on these parts.

    Args:
        choice: The training data.
        held: What was held out of them.
        parts: The data, read and divided.
        numbers: The user's mean and standard deviation for the normalisation, or None for the data's own.
        model: The network.
    """
    table = _csv_columns(choice)
    mean, std = _statistics(parts.data, *numbers)
    return Record(
        data=choice if table is None else replace(choice, target=table[0]),
        hold_out=held,
        val_data=None,
        task=parts.data.task,
        input_shape=parts.data.input_shape,
        mean=mean,
        std=std,
        classes=parts.data.classes,
        columns=None if table is None else table[1],
        train_digest=digest(parts.train),
        held_out_digest=None if parts.held_out is None else digest(parts.held_out),
        model=model,
    )


def batches(split: Split, record: Record, batch_size: int, shuffle: bool = False) -> Any:
    """A loader of a split, normalised as the run is."""
    return loader(split, batch_size, shuffle, record.mean, record.std)


def test_part(record: Record) -> Split:
    """The test part of a run's own data, without what was held out of it.

    Raises:
        InputError: There is none, or the data are no longer what they were.
    """
    sources = divide(read(record.data), record.hold_out)
    require_same(sources, record)
    if sources.test is None:
        raise InputError(f"{record.data.source} has no test part; give labelled examples with --data")
    return sources.test


def held_out_part(record: Record) -> Split | None:
    """What a run held out, or None.

    Raises:
        InputError: The data are no longer what they were.
    """
    if record.val_data is not None:
        held = read_like(record, record.val_data)
        if digest(held) != record.held_out_digest:
            raise InputError(f"the held-out data {record.val_data.source} are no longer those that T was chosen on")
        return held
    if record.hold_out is None:
        return None
    sources = divide(read(record.data), record.hold_out)
    require_same(sources, record)
    return sources.held_out


def require_same(sources: Sources, record: Record) -> None:
    """Refuse data that are not those of the record.

    Raises:
        InputError: They differ.
    """
    same = digest(sources.train) == record.train_digest
    if record.val_data is None and record.held_out_digest is not None and sources.held_out is not None:
        same = same and digest(sources.held_out) == record.held_out_digest
    if not same:
        raise InputError(
            f"the data are not those of the earlier stage (of {record.data.source}); with others the held-out part would "
            f"not be held out: give the same --data, or train anew"
        )


def read_like(record: Record, choice: DataChoice, classes: bool = True) -> Split:
    """Read other data for a run's network: the test part where there is one, else the only part.

    Args:
        record: The run.
        choice: The data; targets may be absent.
        classes: Match classes by their names; False leaves targets away, for data with classes of their own.

    Raises:
        DataError: The examples have another shape, other columns, or a class that the run does not know.
    """
    table = _unlabelled_table(record, choice)
    if table is not None:
        return table
    choice = _as_recorded(record, choice)
    data = read(choice)
    if classes and data.task not in (record.task, "unlabelled"):
        # A few rows of classes look like numbers, and the reverse.
        data = read(replace(choice, task=record.task))
    split = data.train if data.test is None else data.test
    if tuple(split.stored.shape[1:]) != record.input_shape:
        raise DataError(
            f"the examples of {choice.source} have the shape {tuple(split.stored.shape[1:])}, but the network was made "
            f"for {record.input_shape}; for images of another size give --image-size"
        )
    if not classes:
        return replace(split, targets=None)
    if data.classes is None or record.classes is None or split.targets is None:
        return split
    return replace(split, targets=_matched(split.targets, data.classes, record.classes, choice.source))


def _as_recorded(record: Record, choice: DataChoice) -> DataChoice:
    """Fill in what the run's own data were read with, where the kind is the same and the user said nothing."""
    kind = "digits" if choice.source == "digits" else choice.kind or recognise(choice.source)
    if kind in ("parquet", "image-folder") and choice.image_size is None and len(record.input_shape) == 3:
        choice = replace(choice, image_size=(record.input_shape[1], record.input_shape[2]))
    if kind != "csv" or record.columns is None:
        return choice
    choice = replace(choice, target=choice.target or record.data.target)
    found = _csv_columns(choice)
    if found is not None and found[1] != record.columns:
        raise DataError(
            f"{choice.source} has the input columns {list(found[1])}, but the network was made for {list(record.columns)}, "
            f"in that order"
        )
    return choice


def _unlabelled_table(record: Record, choice: DataChoice) -> Split | None:
    """A csv file without the target's column, or None where the source is something else."""
    if record.columns is None or Path(choice.source).suffix.lower() not in _CSV:
        return None
    path = _locate(choice.source)
    target = choice.target or record.data.target
    if not path.is_file() or target in read_header(path):
        return None
    table = read_table(path, None)
    if tuple(table.columns) != record.columns:
        raise DataError(
            f"{path} has the columns {table.columns}, but the network was made for {list(record.columns)} (the target "
            f"{target!r} aside), in that order"
        )
    if not len(table.values):
        raise DataError(f"{path} is empty; at least one example is needed")
    values = torch.from_numpy(table.values).float()
    return Split(values if choice.limit is None else values[: choice.limit])


def _matched(targets: Tensor, names: Sequence[str], known: Sequence[str], where: str) -> Tensor:
    """Class indices by ``names`` as class indices by ``known``."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"{where} has the classes {unknown[:6]}, which the network does not know; it knows {list(known)}"
        )
    return torch.tensor([known.index(name) for name in names])[targets]


def _locate(source: str) -> Path:
    path, root = Path(source), data_root()
    return path if path.exists() or root is None else root / path


def _csv_columns(choice: DataChoice) -> tuple[str, tuple[str, ...]] | None:
    """The target's column and the inputs' columns of a csv source; None for another kind."""
    if choice.source == "digits" or (choice.kind or recognise(choice.source)) != "csv":
        return None
    path = _locate(choice.source)
    file = next(iter(find_parts(path, _CSV)[0])) if path.is_dir() else path
    header = read_header(file)
    target = choose_target(header, choice.target, str(file))
    assert target is not None  # noqa: S101 - the last column where no name says it
    return target, tuple(name for name in header if name != target)


def _statistics(
    data: DataSet, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for the normalisation: the user's, or the training part's own.

    Raises:
        InputError: Only one of the two is given.
    """
    if (mean is None) != (std is None):
        raise InputError("give both --mean and --std, or neither")
    if mean is None or std is None:
        return tuple(data.mean.tolist()), tuple(data.std.tolist())
    return tuple(mean), tuple(std)
