"""What a run was made of, as a JSON file in its folder: the data, what was held out of them, and the network.

Stage two picks it up from stage one, and evaluation and prediction from stage two, so that nothing has to be said twice
and nothing can be said differently: the same held-out part, the same normalisation, the same order of the classes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stfbnn.errors import ArtifactError, CheckpointError
from stfbnn.files import write_json

TRAIN_RECORD, FIT_RECORD = "run.json", "fit.json"
WEIGHTS, SEEN, TRAIN_CHECKPOINT, HISTORY = "model.safetensors", "seen.safetensors", "train.checkpoint", "history.json"
POSTERIOR, FIT_CHECKPOINT, FIT_HISTORY = "posterior", "fit.checkpoint", "fit_history.json"

_FORMAT, _VERSION = "stfbnn-run", 1


@dataclass(frozen=True)
class DataChoice:
    """Which data, and how to read them; see ``stfbnn.data.load``."""

    source: str
    kind: str | None = None
    target: str | None = None
    task: str | None = None
    image_size: tuple[int, int] | None = None
    split: int = 0
    limit: int | None = None

    def absolute(self) -> DataChoice:
        """The same, readable from any folder. What is relative to $STFBNN_DATA, or no path at all, stays as it is."""
        path = Path(self.source)
        return replace(self, source=str(path.resolve())) if path.exists() and self.source != "digits" else self


@dataclass(frozen=True)
class HoldOut:
    """What was held out.

    Attributes:
        share: A fraction or a number of examples, of ``part``.
        seed: Of the division.
        part: "train", or "test" for a network whose training saw all of the training part.
    """

    share: float | int
    seed: int
    part: str = "train"


@dataclass(frozen=True)
class ModelChoice:
    """Which network: its factory, with all arguments that it was given, and the file with its weights."""

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = WEIGHTS


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        data: The training data.
        hold_out: What was held out of them; None for nothing.
        val_data: Held-out data from elsewhere.
        task: "classification" or "regression".
        input_shape: Shape of one example.
        mean: What was subtracted from the inputs, per channel or column.
        std: What they were divided by.
        classes: Names of the classes, in the order of the outputs.
        columns: Names of a csv file's inputs, in order.
        train_digest: Hash of the examples trained on and their targets.
        held_out_digest: Likewise of those held out.
        model: The network.
        training: The options of ``stfbnn train`` by which it was trained, and can be trained again on other examples; None for
            a network from elsewhere.
    """

    data: DataChoice
    hold_out: HoldOut | None
    val_data: DataChoice | None
    task: str
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    columns: tuple[str, ...] | None
    train_digest: str
    held_out_digest: str | None
    model: ModelChoice
    training: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON; the weights' path becomes relative to the file's folder where it can."""
        weights = _relative(self.model.weights, path.parent)
        entries = asdict(replace(self, data=self.data.absolute(), model=replace(self.model, weights=weights)))
        if self.val_data is not None:
            entries["val_data"] = asdict(self.val_data.absolute())
        write_json(path, {"format": _FORMAT, "version": _VERSION, **entries})

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what `write` wrote; unknown entries are ignored, the weights' path becomes absolute.

        Raises:
            ArtifactError: There is no such file, or it is none of these.
        """
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtifactError(f"there is no {path.name} in {path.parent}: {_WHERE[path.name]}") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); restore it, or run the command again") from error
        if not isinstance(entries, dict) or entries.get("format") != _FORMAT or entries.get("version") != _VERSION:
            raise ArtifactError(f"{path} is no record of a run, or one of a newer version of stfbnn")
        try:
            model = ModelChoice(**_known(ModelChoice, entries["model"]))
            return cls(
                data=_choice(entries["data"]),
                hold_out=None if entries["hold_out"] is None else HoldOut(**_known(HoldOut, entries["hold_out"])),
                val_data=None if entries["val_data"] is None else _choice(entries["val_data"]),
                task=entries["task"],
                input_shape=tuple(entries["input_shape"]),
                mean=tuple(entries["mean"]),
                std=tuple(entries["std"]),
                classes=None if entries["classes"] is None else tuple(entries["classes"]),
                columns=None if entries["columns"] is None else tuple(entries["columns"]),
                train_digest=entries["train_digest"],
                held_out_digest=entries["held_out_digest"],
                model=replace(model, weights=str((path.parent / model.weights).resolve())),
                training=entries.get("training"),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; restore it, or run the command again") from error

    def refuse_other(self, path: Path) -> None:
        """Refuse to go on in a folder whose run had other data or another network.

        Raises:
            CheckpointError: Says what differs.
        """
        if not path.exists():
            return
        before = Record.read(path)
        different = [
            f"  {what}: {then} there, {now} now"
            for what, then, now in (
                ("training examples", before.train_digest, self.train_digest),
                ("held-out examples", before.held_out_digest, self.held_out_digest),
                ("mean", before.mean, self.mean),
                ("std", before.std, self.std),
                ("model", before.model.factory, self.model.factory),
                ("model arguments", before.model.arguments, self.model.arguments),
            )
            if then != now
        ]
        if different:
            raise CheckpointError(
                f"{path} records another run:\n"
                + "\n".join(different)
                + "\nchoose another --output, or start anew with --no-resume"
            )


_WHERE = {
    TRAIN_RECORD: "give the folder that `stfbnn train --output` wrote",
    FIT_RECORD: "give the folder that `stfbnn fit` wrote (run it first)",
}


def _choice(entries: Any) -> DataChoice:
    known = _known(DataChoice, entries)
    size = known.get("image_size")
    return DataChoice(**{**known, "image_size": None if size is None else tuple(size)})


def _known(kind: Any, entries: Any) -> dict[str, Any]:
    return {name: entries[name] for name in kind.__dataclass_fields__ if name in entries}


def _relative(path: str, folder: Path) -> str:
    try:
        return Path(os.path.relpath(Path(path).resolve(), folder.resolve())).as_posix()
    except ValueError:
        # Another drive.
        return path
