"""The first batch of a loader: what a baseline learns about the inputs before it reads them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stfbnn.baselines.predictor import Reading
from stfbnn.batches import Batch
from stfbnn.errors import InputError
from stfbnn.inference.loaders import kept_generators, require_rereadable
from stfbnn.inference.survey import checked_batch
from stfbnn.randomness import seeded


def first_batch(loader: Iterable[Any], seed: int, reading: Reading) -> Batch:
    """Read one batch, and leave the loader's generators and the global ones as they were.

    Args:
        loader: Batches with targets, to be read anew afterwards.
        seed: Of what the loader draws meanwhile.
        reading: How batches are read.

    Raises:
        InputError: The loader can be read only once or is empty, or the batch is not usable.
    """
    require_rereadable(loader)
    with seeded(seed, "first-batch"), kept_generators(loader):
        batch = next(iter(loader), None)
    if batch is None:
        raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
    return checked_batch(batch, reading.target_key, reading.weight_key)
