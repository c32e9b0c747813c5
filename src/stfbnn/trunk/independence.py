"""What running several draws of weights on one batch, chunk by chunk, rests on.

A network must leave its inputs as they are, or the second draw would not see what the first one saw; and it must treat every
example by itself, or an answer would depend on which examples happen to share a chunk with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, concatenate, rows, tensors_of
from stfbnn.errors import InputError
from stfbnn.randomness import seeded
from stfbnn.trunk.verification import difference


@contextmanager
def inputs_left_alone(inputs: Inputs) -> Iterator[None]:
    """Refuse a network that writes into its inputs within the block.

    Raises:
        InputError: After the block, if a tensor of ``inputs`` was written in place.
    """
    before = _versions(inputs)
    yield
    if _versions(inputs) != before:
        raise InputError(
            "the model changes its inputs in place, so that another draw of weights would not see the same inputs; let it "
            "work on a copy (x = x - mean instead of x -= mean, a first activation with inplace=False)"
        )


def _versions(inputs: Inputs) -> list[int]:
    # Inference tensors count no writes.
    return [tensor._version for tensor in tensors_of(inputs) if not tensor.is_inference()]


@torch.no_grad()
def require_apart(run: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """Refuse a network whose output for an example depends on the other examples of the batch.

    Two examples are run by themselves, and in a batch of four: the other two are copies of one of them. A network that draws
    random numbers in evaluation mode, or that does not run on other batches than its own, cannot be examined in this way, and
    passes; so does a batch of one.

    Args:
        run: From inputs to outputs (B, …), at fixed weights.
        inputs: B examples.

    Raises:
        InputError: The outputs differ by more than rounding.
    """
    size = batch_size(inputs)
    if size == 1:
        return
    one, other = rows(inputs, 0, 1), rows(inputs, size - 1, size)
    found = []
    for seed, batch in enumerate(([one, other], [one, other], [other, other, one, other])):
        try:
            with seeded(seed, "apart"):
                found.append(run(concatenate(batch)))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return
    alone, again, together = found
    if not torch.equal(torch.nan_to_num(alone), torch.nan_to_num(again)):
        return
    error, allowed = difference(alone, together[2:])
    if not error <= allowed:
        raise InputError(
            f"the model's output for an example depends on the other examples of its batch (it moves by {error:.1e} as they "
            f"change, where rounding explains {allowed:.1e}), so predictions would depend on the batching. Usual reasons: "
            f"batch norm without running statistics, or a layer that takes the batch for the sequence (batch_first=False)"
        )
