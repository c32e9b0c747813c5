"""Stage one as a record keeps it: by what options a network was trained, and how to train one by them again."""

from __future__ import annotations

from typing import Any

from stfbnn.adversarial_training import AdversarialTraining
from stfbnn.cli.record import Record
from stfbnn.errors import InputError
from stfbnn.threat import InputSpace, Threat

_SAME = (
    "epochs",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "warmup",
    "label_smoothing",
    "accumulate",
    "clip_norm",
    "precision",
)


def training_options(record: Record) -> dict[str, Any]:
    """The keyword arguments of ``stfbnn.train`` for a run's options.

    Raises:
        InputError: The network was trained elsewhere, so that nothing says how.
    """
    training = _training(record)
    options = {name: training[name] for name in _SAME}
    if training["adversarial"] is not None:
        options["adversarial"] = AdversarialTraining(
            Threat(training["adversarial"]), training["adversarial_steps"], space=input_space(record)
        )
    return options


def batch_size(record: Record) -> int:
    """Examples of one batch: of all ranks that took part, for another training is by one process.

    Raises:
        InputError: As for `training_options`.
    """
    training = _training(record)
    return int(training["batch_size"]) * int(training.get("ranks", 1))


def input_space(record: Record, lower: float = 0.0, upper: float = 1.0) -> InputSpace:
    """Where a run's inputs live: images in [0, 1], and how they are normalised."""
    return InputSpace(lower, upper, record.mean, record.std)


def _training(record: Record) -> dict[str, Any]:
    if record.training is None:
        raise InputError(
            "nothing says how this network was trained, so that it cannot be trained again on other examples; train it with "
            "`stfbnn train`"
        )
    return record.training
