"""The digits of scikit-learn: 1,797 grey images of 8x8 pixels that need no download."""

from __future__ import annotations

import torch

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.source import Options, Part
from stfbnn.data.split import Split, hold_out

_TEST_SHARE = 0.2
_SEED = 0
_LARGEST_VALUE = 16


def read(options: Options) -> DataSet:
    """Give the digits, scaled to [0, 1], with a fixed stratified fifth of them as the test part.

    ``stfbnn.data.hold_out`` with seed 0 makes the parts, so they are the same everywhere.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import, needed here alone

    found = load_digits()
    images = torch.from_numpy(found.images).float().div(_LARGEST_VALUE).unsqueeze(1)
    rest, held = hold_out(Split(images, torch.from_numpy(found.target).long()), _TEST_SHARE, _SEED)
    train, test = (
        Part(part.stored.numpy(), None if part.targets is None else part.targets.numpy(), f"digits ({name})")
        for part, name in ((rest, "train"), (held, "test"))
    )
    return assemble("digits", train, test, options, names=[str(name) for name in found.target_names])
