"""Which of several processes this is."""

from __future__ import annotations

import os

from stfbnn.errors import InputError


def which_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's number and how many there are, as given, or as torchrun's environment says, or 0 of 1.

    No process group is needed: processes that write into different files have nothing to say to each other.

    Args:
        rank: The number, from 0; None reads ``RANK``.
        world_size: How many; None reads ``WORLD_SIZE``.

    Raises:
        InputError: Only one of the two is given, or they are out of range.
    """
    if (rank is None) != (world_size is None):
        raise InputError("give both rank and world_size, or neither (then torchrun's environment says)")
    if rank is None or world_size is None:
        texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if texts[0] is None or texts[1] is None:
            return 0, 1
        try:
            rank, world_size = int(texts[0]), int(texts[1])
        except ValueError as error:
            raise InputError(f"the environment's RANK and WORLD_SIZE are {texts}, which are no numbers") from error
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be at least 0 and less than world_size, but they are {rank} and {world_size}")
    return rank, world_size
