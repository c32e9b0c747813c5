"""What the ranks of a run of stage two agree on beside the gradients of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.network import BayesianNetwork
from stfbnn.processes import Processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def rank_path(processes: Processes) -> tuple[int | str, ...]:
    """What sets a rank's own random numbers apart (`stfbnn.randomness`); those of rank 0 are those of a single process."""
    return ("rank", processes.rank) if processes.rank else ()


def require_same_network(bnn: BayesianNetwork, processes: Processes) -> None:
    """Refuse ranks that were given different networks.

    Raises:
        InputError: The trained models differ.
    """
    if len(set(processes.gather(bnn.model_fingerprint))) > 1:
        raise InputError(
            "the ranks have different models: give every rank the same trained parameters, by `stfbnn.train`, from one file, "
            "or from one seed"
        )


@contextmanager
def computing_on(bnn: BayesianNetwork, fabric: Fabric | None) -> Iterator[None]:
    """The network on the rank's device within a block, and back where it was after it."""
    home = bnn.device
    away = fabric is not None and fabric.device != home
    if away and fabric is not None:
        bnn.to(fabric.device)
    try:
        yield
    finally:
        if away:
            bnn.to(home)
            if bnn.likelihood is not None:
                bnn.likelihood = bnn.likelihood.to(home)


def mean_learned(own: Tensor | None, weight: float, processes: Processes) -> tuple[Tensor | None, float]:
    """What the likelihood learns from all ranks: the mean of what it would learn from each, by what their examples count.

    Args:
        own: Of this rank; None where nothing is learned, or nothing of its examples counts.
        weight: The sum of its examples' weights.
        processes: The ranks.

    Returns:
        The mean, and the sum of all ranks' weights.
    """
    if not processes.several:
        return own, weight
    parts = processes.gather((weight, None if own is None else own.cpu()))
    total = sum(share for share, _ in parts)
    known = [(share, value) for share, value in parts if value is not None]
    if not known:
        return None, total
    counted = sum(share for share, _ in known)
    mean = torch.stack([value * (share / counted) for share, value in known]).sum(dim=0)
    return mean if own is None else mean.to(own.device), total


def require_batches(found: int, expected: int, processes: Processes) -> None:
    """Refuse a pass in which a rank has taken another number of steps than before, since all take every step together.

    Raises:
        InputError: It has.
    """
    if processes.several and found != expected:
        raise InputError(
            f"train_loader gave rank {processes.rank} {found} batches in this epoch, but {expected} before; with several "
            f"processes it must give the same number at each pass"
        )
