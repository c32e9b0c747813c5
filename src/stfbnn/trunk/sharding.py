"""A trunk that is shared out among the ranks of a run: each keeps its part, and has a whole block only while it needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, training_batch
from stfbnn.errors import InputError
from stfbnn.inference.loaders import length
from stfbnn.inference.ranks import require_same_network
from stfbnn.launching import joined_fabric
from stfbnn.processes import Processes
from stfbnn.trunk.blocks import trunk_blocks
from stfbnn.trunk.offloading import stop_offloading

if TYPE_CHECKING:
    from stfbnn.network import BayesianNetwork

T = TypeVar("T")
_ATTRIBUTE = "_sharded_trunk"


def shard(
    bnn: BayesianNetwork,
    *,
    blocks: Sequence[str] | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
) -> None:
    """Share the frozen trunk's parameters out among the ranks that ``torchrun`` or ``fabric run`` started.

    Of R ranks each keeps 1/R of every block. A block is gathered for its own forward pass and again for its backward pass, and
    freed after each (PyTorch's ``fully_shard``); nothing is summed for it, since its parameters are frozen. The first layer,
    its posterior, the buffers, and parameters that are in no block are whole on every rank.

    From here on the ranks compute only together: all of them call `fit`, as without sharding and with the same result; and all
    call `predict` on the same data, or on as many rows. `save` needs one of them. The memory becomes free only when nothing
    else holds the parameters: delete the model that was given to `bayesianize`. One that does not fit even once is built
    without values and given them by `map_weights`, so that every rank reads its own part alone.

    In a single process nothing is changed.

    Args:
        bnn: The network, fitted or not, the same on every rank; it is changed in place and moved to the rank's device. An
            offloaded trunk is shared out from its file, and needs it no longer.
        blocks: The modules that are gathered as a whole, by name; None takes the entries of the network's lists of modules,
            and otherwise the parts that it calls.
        accelerator: As for `fit`.
        devices: As for `fit`.
        num_nodes: As for `fit`.

    Raises:
        InputError: There is no trunk, a block cannot be one, the trunk is shared with another network or sharded already, or
            the ranks have different models.
        ModelChangedError: The user's model was changed since `bayesianize`.
    """
    bnn.check_unchanged()
    if is_sharded(bnn.network):
        raise InputError("this network's trunk is sharded already; call shard once")
    if bnn._trunk_is_shared:
        raise InputError("this network computes with the trunk of another one; shard a network with a trunk of its own")
    chosen = trunk_blocks(bnn.network, bnn.layer_name, blocks)
    fabric = joined_fabric(accelerator, devices, "auto", num_nodes)
    if fabric is None or fabric.world_size == 1:
        return
    # Slow to import, and not a part of every build of PyTorch.
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    require_same_network(bnn, Processes(fabric))
    stop_offloading(bnn.network)
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    for block in chosen.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    setattr(bnn.network, _ATTRIBUTE, True)
    bnn.to(fabric.device)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was called on a network."""
    return _ATTRIBUTE in vars(network)


def found_by_first(network: nn.Module, processes: Processes, compute: Callable[[], T]) -> T:
    """What ``compute`` gives on the first rank, on every rank: on machines of different kinds its last digits may differ.

    The others compute too where the network is sharded, for the first cannot alone.
    """
    if not is_sharded(network):
        return processes.from_first(compute)
    found = compute()
    return processes.from_first(lambda: found)


class EvenBatches:
    """A rank's part of a loader, of which all take as many batches of as many rows: they compute only together.

    Args:
        loader: The part; what it tells of itself, such as its sampler and its length, is told here too.
        processes: The ranks.
        target_key: The target's entry in mappings.
        weight_key: The weights' entry in mappings.
    """

    def __init__(
        self, loader: Iterable[Any], processes: Processes, target_key: str = TARGET_KEY, weight_key: str = WEIGHT_KEY
    ) -> None:
        self._loader, self._processes = loader, processes
        self._keys = target_key, weight_key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            InputError: The ranks have different numbers of batches, or of rows in one.
        """
        self._require_even(length(self._loader), "numbers of batches")
        end = object()
        batches = iter(self._loader)
        while True:
            batch = next(batches, end)
            self._require_even(0 if batch is end else len(training_batch(batch, *self._keys).target), "numbers of rows")
            if batch is end:
                return
            yield batch

    def _require_even(self, own: int | None, what: str) -> None:
        found = self._processes.gather(own)
        if len(set(found)) > 1:
            raise InputError(
                f"the ranks have different {what}, {found}, but with a sharded trunk all compute together: let the sampler "
                f"give every rank as many, as torch's DistributedSampler does"
            )
