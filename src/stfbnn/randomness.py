"""Seeds: every random number of a run follows from one seed and from where in the run it is drawn.

No state of a generator has to be saved for an exact resume: epoch 7 of stage two draws the same numbers
whether the run got there at once or was killed and resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from stfbnn.errors import InputError


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive an independent 63-bit seed for one place in a run.

    Args:
        seed: The run's seed, a non-negative integer.
        path: What the numbers are for, such as ``("epoch", 7)``.

    Returns:
        An integer in [0, 2^63), by numpy's ``SeedSequence`` (hashed, so neighbouring seeds are unrelated).

    Raises:
        InputError: The seed is not a non-negative integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a non-negative integer, but it is {seed!r}")
    key: list[int] = []
    for part in path:
        encoded = part.encode() if isinstance(part, str) else part.to_bytes(8, "little")
        # Length first, so that ("ab", "c") and ("a", "bc") differ.
        key += [len(encoded), *encoded]
    state = np.random.SeedSequence(entropy=seed, spawn_key=tuple(key)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one place in a run; CPU, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


@contextmanager
def seeded(seed: int, *path: int | str) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators for a block, and restore them after it.

    Data loaders, augmentations and dropout draw from the global generators; within the block what they draw
    follows from ``seed`` and ``path`` alone, and outside it the user's own state is as it was.
    """
    derived = derive_seed(seed, *path)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(derived)
        np.random.seed(derived % 2**32)  # noqa: NPY002
        torch.manual_seed(derived)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
