"""How the ranks that torchrun starts find each other, also when it starts them again.

Ranks leave their addresses for each other in a store that torchrun keeps, and keeps when it starts them again. There a rank may
find where another one was before, and waits for a process that has gone. So each start here has a part of the store for itself:
rank 0 opens it, and another rank enters only what a living rank 0 has let it into. The number of restarts that torchrun tells
would not do, for each machine counts its own.
"""

from __future__ import annotations

import atexit
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from lightning_fabric.strategies.ddp import DDPStrategy

from stfbnn.errors import LostRankError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_NEXT_LOOK = 0.02
# Where a strategy says nothing.
_PATIENCE = timedelta(minutes=30)


def has_kept_store() -> bool:
    """Whether torchrun started this process, and keeps a store for its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def kept_store(timeout: timedelta) -> Store:
    """The store that torchrun keeps for its ranks, over all its starts of them.

    Args:
        timeout: How long to wait for it, and for what is asked of it.

    Raises:
        RuntimeError: It has gone.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # noqa: PLC0415 - not in every build

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def connect(strategy: DDPStrategy) -> None:
    """Make the process group of this start, as Fabric would; nothing where there is one already.

    Args:
        strategy: Says the device, the backend, and how long a rank waits for the others, now and later.

    Raises:
        LostRankError: Not all ranks have come in time.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined] # noqa: PLC0415 - not in every build

    if torch.distributed.is_initialized():
        return
    device, timeout = strategy.root_device, strategy._timeout or _PATIENCE
    backend = strategy.process_group_backend or ("nccl" if device.type == "cuda" else "gloo")
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kept = kept_store(timeout)
    start = meet(PrefixStore("stfbnn", kept), rank, count, timeout)
    bound: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    torch.distributed.init_process_group(
        backend, store=PrefixStore(f"stfbnn/{start}", kept), rank=rank, world_size=count, timeout=timeout, **bound
    )
    if backend == "nccl":
        atexit.register(_disconnect)


def meet(store: Store, rank: int, count: int, timeout: timedelta) -> int:
    """The number of this start, from 1, the same on all its ranks and greater than those before.

    A rank greets the newest start with a word that is new, until rank 0 has repeated it, which one that has gone cannot do.

    Args:
        store: Where notes are left; what earlier starts have left there does no harm.
        rank: This process.
        count: How many there are.
        timeout: How long to wait for the others.

    Raises:
        LostRankError: Not all of them have come in time.
    """
    try:
        return _open(store, count, timeout) if rank == 0 else _enter(store, rank, timeout)
    except RuntimeError as error:
        # A store's own errors: a wait without end, or the machine that keeps it.
        found = str(error).splitlines()[0]
        raise LostRankError(
            f"rank {rank} of {count} has not met all others within {timeout.total_seconds():g} s ({found}); "
            f"see what they say, and whether their machines reach {os.environ.get('MASTER_ADDR', 'each other')}"
        ) from error


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _open(store: Store, count: int, timeout: timedelta) -> int:
    start = int(store.add("start", 1))
    for rank in range(1, count):
        store.wait([f"{start}/greeting/{rank}"], timeout)
        store.set(f"{start}/answer/{rank}", store.get(f"{start}/greeting/{rank}").decode())
    return start


def _enter(store: Store, rank: int, timeout: timedelta) -> int:
    word, greeted = uuid4().hex, 0
    until = time.monotonic() + timeout.total_seconds()
    store.wait(["start"], timeout)
    while time.monotonic() < until:
        # Adding nothing reads the number.
        start = int(store.add("start", 0))
        if start != greeted:
            store.set(f"{start}/greeting/{rank}", word)
            greeted = start
        answer = f"{start}/answer/{rank}"
        if store.check([answer]) and store.get(answer) == word.encode():
            return start
        time.sleep(_NEXT_LOOK)
    raise RuntimeError("rank 0 has not answered")
