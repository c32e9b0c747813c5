"""A run that both stages have been through, loaded: its record, its network and the Bayesian network on top."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stfbnn import factories
from stfbnn.artifact import load
from stfbnn.cli import networks
from stfbnn.cli import options as opt
from stfbnn.cli import record as rec
from stfbnn.network import BayesianNetwork


@dataclass(frozen=True)
class FittedRun:
    """What ``evaluate`` and ``predict`` start from.

    Attributes:
        record: The data and the network of stage two.
        model: The trained network.
        bnn: The Bayesian network made of it.
    """

    record: rec.Record
    model: nn.Module
    bnn: BayesianNetwork


def load_run(folder: Path, factory: str | None, arguments: str, checkpoint: Path | None, device: str) -> FittedRun:
    """Load the folder that ``stfbnn fit`` wrote.

    Args:
        folder: The folder.
        factory: Overrides the recorded one.
        arguments: JSON; where not empty, overrides the recorded ones.
        checkpoint: The weights, where they have moved.
        device: As for ``--device``.

    Raises:
        ArtifactError: The folder is not one of these, is damaged, or belongs to another network.
        InputError: The network cannot be built, or an argument is wrong.
    """
    chosen = opt.pick_device(device)
    given: dict[str, Any] = opt.parse_object("--model-args", arguments)
    record = rec.Record.read(folder / rec.FIT_RECORD)
    model, _ = factories.build(factory or record.model.factory, given or record.model.arguments, {})
    weights = Path(record.model.weights) if checkpoint is None else checkpoint
    networks.load_weights(model, weights)
    networks.attach_seen(model, weights.parent / rec.SEEN)
    model.to(chosen).eval()
    return FittedRun(record, model, load(folder / rec.POSTERIOR, model))
