"""What the ranks of one run share: sums, objects, and the word of rank 0.

A rank is one of several processes that take part in a run, started by ``torchrun`` or by Lightning Fabric, through which all
of them talk to each other. One process is a run of one rank, for which nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from stfbnn.errors import LostRankError, StfbnnError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")

# Environment: seconds that a rank waits for the others before it gives up; Fabric's own default is half an hour.
TIMEOUT = "STFBNN_RANK_TIMEOUT"


class Processes:
    """The ranks of a run, as one of them sees them; every method but `from_first` alone is called by all of them.

    Args:
        fabric: Launched; None where this process is the only one.

    Attributes:
        rank: This process, from 0.
        count: How many there are.
        sent: Bytes that this rank has put into sums so far.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.count = 1 if fabric is None else fabric.world_size
        self.sent = 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape, the same bits on every rank."""
        if not self.several:
            return value
        assert self._fabric is not None  # noqa: S101 - there are several ranks only with it
        self.sent += value.numel() * value.element_size()
        reduced = self._fabric.all_reduce(value.to(self._fabric.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)  # noqa: S101 - a tensor in, a tensor out; said for the type checker
        return reduced.to(value.device)

    def gather(self, value: T) -> list[T]:
        """What each rank gave, by rank; plain values and CPU tensors."""
        if not self.several:
            return [value]
        found: list[T | None] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What ``compute`` gives on rank 0, on every rank; an error of it is raised on all, so that none waits in vain."""
        if not self.several:
            return compute()
        assert self._fabric is not None  # noqa: S101 - there are several ranks only with it
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = compute(), None
            except (StfbnnError, OSError) as error:
                outcome = None, error
        value, failure = self._fabric.broadcast(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]


@contextmanager
def naming_lost_ranks(processes: Processes) -> Iterator[None]:
    """Say that it is another rank which fails, where a sum or a message fails because it has gone or cannot be reached.

    Raises:
        LostRankError: In place of what the means of communication raise.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own, but name their place in its code.
        if not processes.several or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise LostRankError(
            f"rank {processes.rank} of {processes.count} lost another rank, which has ended or whose machine cannot be reached "
            f"({str(error).splitlines()[0]}); what ended it is in that rank's output. Start the run again with as many ranks, "
            f"and it goes on from its checkpoint; {TIMEOUT} sets for how many seconds a rank waits for the others"
        ) from error
