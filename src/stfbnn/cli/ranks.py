"""A command on several ranks: ``torchrun`` starts the same command line in every process, and one run comes of it.

Rank 0 writes the files and speaks; the others take part in silence. An error is told once, by whichever rank comes with it
first, and ends all. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from stfbnn.cli import options as opt
from stfbnn.errors import InputError, StfbnnError

if TYPE_CHECKING:
    import torch

    from stfbnn.processes import Processes

T = TypeVar("T")

# Commands that several processes can take part in.
SHARED = ("train", "fit", "predict-shards")

_CLAIMED, _TOLD = "claimed", "told"
# Seconds to wait for torchrun's store, and for another rank to write a line.
_PATIENCE = 20


def started() -> tuple[int, int]:
    """This process's rank and the number of ranks, as a launcher says in the environment; 0 of 1 without one."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1


def require_shared(command: str | None) -> None:
    """Refuse a command that writes what it writes once, where several processes were started to run it.

    Raises:
        InputError: It is one of these.
    """
    count = started()[1]
    if command is not None and count > 1 and command not in SHARED:
        raise InputError(
            f"`stfbnn {command}` is run by one process, but {count} were started; run it without torchrun (for predictions by "
            f"many processes there is `stfbnn predict-shards`)"
        )


@dataclass(frozen=True)
class Ranks:
    """The ranks of one command, as one of them sees them.

    Attributes:
        processes: What they share.
        device: Where this rank puts the network; among several the library moves it to the rank's own device.
        settings: ``accelerator``, ``devices`` and ``strategy`` for the library.
        launched: Whether a launcher started this process, alone or not.
    """

    processes: Processes
    device: torch.device
    settings: dict[str, Any]
    launched: bool

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.processes.rank == 0

    @property
    def count(self) -> int:
        """How many there are."""
        return self.processes.count

    def by_first(self, action: Callable[[], T]) -> T:
        """What ``action`` gives on rank 0, on every rank; no rank goes on before it is done, and an error ends all."""
        return self._together(lambda: self.processes.from_first(action))

    def by_each(self, action: Callable[[], T]) -> T:
        """Let every rank do what may fail on one alone, such as reading a file: all go on, or none does.

        Raises:
            StfbnnError: Of the first rank on which it failed, on every rank; likewise an OSError.
        """
        if not self.processes.several:
            return action()
        found: T | None = None
        failure: Exception | None = None
        try:
            found = action()
        except (StfbnnError, OSError) as error:
            failure = error
        failures = [one for one in self._together(lambda: self.processes.gather(failure)) if one is not None]
        if failures:
            raise failures[0]
        return found  # type: ignore[return-value]

    def require_same(self, what: str, value: Any) -> None:
        """Refuse ranks that have found different things.

        Raises:
            InputError: They have; ``what`` says of what.
        """
        found = self._together(lambda: self.processes.gather(value))
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise InputError(f"the ranks have different {what}: {found[0]} on rank 0, {found[other]} on rank {other}")

    def _together(self, exchange: Callable[[], T]) -> T:
        """What the ranks tell each other, or an error that says that one of them was lost meanwhile."""
        from stfbnn.processes import naming_lost_ranks  # noqa: PLC0415 - slow

        with naming_lost_ranks(self.processes):
            return exchange()

    def leave(self) -> None:
        """End the talk between the ranks, once all have come here; a process that ends in the midst of it may abort."""
        if self.processes.several:
            import torch  # noqa: PLC0415 - slow

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def join(device: str, devices: str, num_nodes: int, strategy: str, precision: str | None = None) -> Ranks:
    """Take part in a command as the rank that a launcher made of this process, or alone.

    Args:
        device: As for ``--device``; among several ranks it names the kind alone.
        devices: As for ``--devices``.
        num_nodes: Machines.
        strategy: As for `stfbnn.train`.
        precision: Likewise; None for the default.

    Raises:
        InputError: They cannot be used here, contradict what was started, or ask for processes that nothing has started.
    """
    from stfbnn.launching import is_started_as_rank, launched_fabric  # noqa: PLC0415 - slow
    from stfbnn.processes import Processes  # noqa: PLC0415

    chosen, wanted = opt.pick_device(device), opt.parse_devices(devices)
    if num_nodes < 1:
        raise InputError(f"--num-nodes must be at least 1, but it is {num_nodes}")
    rank, count = started()
    launched = is_started_as_rank()
    if count == 1:
        if num_nodes > 1 or (wanted or 1) > 1:
            raise InputError(
                f"several processes are started by torchrun: torchrun --nnodes {num_nodes} --nproc-per-node {wanted or 1} "
                f"--no-python stfbnn …, which also makes --devices and --num-nodes unnecessary"
            )
        settings = {"accelerator": chosen.type, "devices": 1 if chosen.index is None else [chosen.index]}
        return Ranks(Processes(), chosen, settings | {"strategy": strategy}, launched)
    if not launched:
        raise InputError(
            f"the environment's RANK and WORLD_SIZE say that this is one of {count} processes, but not that torchrun started "
            f"them; start them by torchrun --nproc-per-node {count} --no-python stfbnn …, or unset both for a run of one"
        )
    if chosen.index is not None:
        raise InputError(
            f"--device {device} is one device for {count} processes; say --device {chosen.type}, and name devices by "
            f"CUDA_VISIBLE_DEVICES"
        )
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    for name, value, default, found in (
        ("--devices", wanted, None, here),
        ("--num-nodes", num_nodes, 1, count // here),
    ):
        if value not in (default, found):
            raise InputError(f"{name} is {value}, but torchrun started {found}; leave it away, or start as many")
    if rank:
        # What they warn of is what rank 0 warns of.
        warnings.simplefilter("ignore")
    fabric = launched_fabric(chosen.type, "auto", strategy, 1, "32-true" if precision is None else precision)
    processes = Processes(fabric)
    processes.from_first(_forget_told)
    import torch  # noqa: PLC0415

    settings = {"accelerator": chosen.type, "devices": "auto", "strategy": strategy}
    return Ranks(processes, torch.device("cpu"), settings, launched)


def tell_once(tell: Callable[[], None]) -> None:
    """Tell of what ends this process, unless another rank has come with it first; then wait until that one has told.

    torchrun ends all ranks as soon as one of them has ended, so a rank that ended before another has spoken would silence it.
    """
    store = _store()
    if store is None:
        tell()
        return
    try:
        if store.add(_CLAIMED, 1) > 1:
            store.wait([_TOLD])
            return
    except RuntimeError:
        # The store has gone, or the other rank before it could speak: better twice than never.
        store = None
    tell()
    if store is not None:
        with suppress(RuntimeError):
            store.set(_TOLD, "")


def told() -> bool:
    """Whether a rank has told of what ends all of them; what another one meets then, such as a lost connection, follows."""
    store = _store()
    try:
        return store is not None and bool(store.check([_TOLD]))
    except RuntimeError:
        return False


def _forget_told() -> None:
    """Let this start tell of what ends it; machines that count their restarts apart may have told of an earlier one."""
    store = _store()
    if store is not None:
        store.delete_key(_CLAIMED)
        store.delete_key(_TOLD)


def _store() -> Any:
    """Where torchrun lets its ranks leave notes for each other, before they are connected and after; None without it."""
    if started()[1] == 1:
        return None
    from stfbnn.rendezvous import has_kept_store, kept_store  # noqa: PLC0415 - slow

    if not has_kept_store():
        return None
    from torch.distributed import PrefixStore  # type: ignore[attr-defined] # noqa: PLC0415 - slow

    try:
        store = kept_store(timedelta(seconds=_PATIENCE))
    except RuntimeError:
        return None
    # Ranks that are started again begin with a clean sheet.
    return PrefixStore(f"stfbnn/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
