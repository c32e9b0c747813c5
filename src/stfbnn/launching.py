"""How a run of either stage comes by its ranks, and each rank by its part of the data: through Lightning Fabric."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.launchers import _MultiProcessingLauncher
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from lightning_fabric.strategies.strategy import Strategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.distributed import is_available, is_torchelastic_launched
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from stfbnn.errors import InputError
from stfbnn.processes import TIMEOUT
from stfbnn.randomness import derive_seed
from stfbnn.rendezvous import connect, has_kept_store


def is_started_as_rank() -> bool:
    """Whether ``torchrun`` or ``fabric run`` started this process."""
    return (is_available() and is_torchelastic_launched()) or os.environ.get("LT_CLI_USED", "0") != "0"


def launched_fabric(
    accelerator: str,
    devices: int | str | list[int],
    strategy: str | Strategy,
    num_nodes: int,
    precision: Any = "32-true",
) -> Fabric:
    """Fabric, launched: in a process that a launcher started it joins the other ranks.

    Args:
        accelerator: Fabric's name; "auto" takes a GPU where there is one.
        devices: "auto" is 1, or what the launcher says.
        strategy: "auto", "ddp", "ddp_find_unused_parameters_true" or one of Fabric's objects for these.
        num_nodes: Machines; taken from the launcher where that is ``torchrun``.
        precision: One of Fabric's names.

    A rank waits half an hour for the others, or as many seconds as ``STFBNN_RANK_TIMEOUT`` says in the environment, or what a
    strategy says that is an object.

    Raises:
        InputError: They cannot be used here, or the strategy does not keep the whole model on every rank.
    """
    if is_available() and is_torchelastic_launched():
        # `fabric run` names the devices itself, in variables that Fabric reads and that must not be contradicted.
        if devices == "auto" and "LT_DEVICES" not in os.environ:
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
        if num_nodes == 1 and "LT_NUM_NODES" not in os.environ:
            num_nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    elif devices == "auto":
        devices = 1
    patient = _patient(strategy, num_nodes > 1 or devices not in (1, "1"))
    try:
        fabric = Fabric(
            accelerator=accelerator, devices=devices, strategy=patient, num_nodes=num_nodes, precision=precision
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise InputError(
            f"accelerator={accelerator!r}, devices={devices!r}, strategy={strategy!r}, num_nodes={num_nodes}, "
            f"precision={precision!r} cannot be used here: {error}"
        ) from error
    if isinstance(fabric.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "this strategy forks or spawns a function, in which a copy of the model would be trained and lost; run the "
            "script by `torchrun --nproc-per-node N script.py` (from a notebook, train on one device)"
        )
    if not isinstance(fabric.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"strategy {type(fabric.strategy).__name__} is not supported, for the whole model must be on every rank; "
            f'use "auto", "ddp" or "ddp_find_unused_parameters_true", and stfbnn.shard to share out the trunk of stage two'
        )
    if os.environ.get("LT_CLI_USED", "0") == "0":
        if has_kept_store() and isinstance(fabric.strategy, DDPStrategy):
            # Fabric then finds them connected.
            connect(fabric.strategy)
        # Under `fabric run` Fabric has launched itself already, and refuses a second time.
        fabric.launch()
    return fabric


def _patient(strategy: str | Strategy, several: bool) -> str | Strategy:
    """A strategy by name as the object whose ranks wait for each other as long as the environment says, if it does.

    Raises:
        InputError: It says no number of seconds.
    """
    said = os.environ.get(TIMEOUT)
    if said is None or not several or strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        return strategy
    try:
        timeout = timedelta(seconds=float(said))
    except (ValueError, OverflowError) as error:
        raise InputError(f"the environment's {TIMEOUT} must be a number of seconds, but it is {said!r}") from error
    if timeout <= timedelta(0):
        raise InputError(f"the environment's {TIMEOUT} must be positive, but it is {said!r}")
    return DDPStrategy(timeout=timeout, find_unused_parameters=strategy == "ddp_find_unused_parameters_true")


def joined_fabric(
    accelerator: str, devices: int | str | list[int], strategy: str | Strategy, num_nodes: int
) -> Fabric | None:
    """`launched_fabric`; None where nothing is asked for and no launcher started this process, which is then alone."""
    if not is_started_as_rank() and (accelerator, devices, strategy, num_nodes) == ("auto", "auto", "auto", 1):
        return None
    return launched_fabric(accelerator, devices, strategy, num_nodes)


def sharded(fabric: Fabric, loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """The part of a loader that this rank trains on, filled up by repeated examples to the length of the others'.

    Raises:
        InputError: There are several ranks, and the loader is no DataLoader over a data set with a length.
    """
    if fabric.world_size == 1:
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise InputError(
            "with several processes the loader must be a torch DataLoader over a data set with a length, so that each "
            f"rank can be given its own part; it is a {type(loader).__name__}"
        )
    # Fabric's wrapper is taken off again: it counts epochs by its own passes, which a resumed run has made fewer of.
    try:
        wrapped: Any = fabric.setup_dataloaders(loader, move_to_device=False)
    except (TypeError, MisconfigurationException) as error:
        raise InputError(f"the loader cannot be shared out among several processes: {error}") from error
    part: DataLoader[Any] = wrapped._dataloader
    if isinstance(part.sampler, DistributedSampler) and part.sampler is not loader.sampler:
        part.sampler.seed = derive_seed(seed, "shuffle") % 2**31
    return part


def samplers(loader: Any) -> list[Any]:
    """The sampler, the batch sampler and the sampler in it, as far as a loader has them."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [sampler for sampler in found if sampler is not None]


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell the samplers that have a ``set_epoch`` which epoch it is."""
    for sampler in {id(sampler): sampler for sampler in samplers(loader)}.values():
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)
