"""What every trainer's callback does once its training has ended: make the network Bayesian and infer its first layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stfbnn.batches import rows, split_batch, to_device
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_options
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.network import BayesianNetwork

# From whatever a loader gives to what `fit` takes: a pair (inputs, target), or a mapping.
ToBatch = Callable[[Any], Any]
_EXAMPLES = 2


class Rebatched:
    """A loader whose batches are brought into the form that `fit` takes.

    Args:
        loader: The trainer's.
        to_batch: Applied to every batch.
    """

    def __init__(self, loader: Iterable[Any], to_batch: ToBatch) -> None:
        self._loader, self._to_batch = loader, to_batch

    def __iter__(self) -> Iterator[Any]:
        return (self._to_batch(batch) for batch in self._loader)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    @property
    def dataset(self) -> Any:
        """The loader's data set, by whose size N is counted."""
        return getattr(self._loader, "dataset", None)


@dataclass(frozen=True)
class StageTwoOptions:
    """What a callback was asked for.

    Attributes:
        network: Dotted name of the network within the trained module; "" for the module itself.
        to_batch: Brings the trainer's batches into the form that `fit` takes; None where they have it.
        bayesianize: Keyword arguments of `bayesianize`.
        fit: Keyword arguments of `fit`.
        val_loader: What is held out; None takes the trainer's own.

    Raises:
        InputError: An argument is unknown, or is the callback's own to give.
    """

    network: str = ""
    to_batch: ToBatch | None = None
    bayesianize: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    val_loader: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        require_options("bayesianize", bayesianize, self.bayesianize, own=("model", "example_inputs"))
        require_options("fit", fit, self.fit, own=("bnn", "train_loader"))

    def network_of(self, module: nn.Module) -> nn.Module:
        """The network within the trained module; also asked for before training, which can take long.

        Raises:
            InputError: There is none of that name.
        """
        try:
            return module.get_submodule(self.network)
        except AttributeError as error:
            children = [name for name, _ in module.named_children()]
            raise InputError(f"{type(module).__name__} has no module {self.network!r}; it has {children}") from error

    def run(
        self, module: nn.Module, train_loader: Iterable[Any] | None, val_loader: Iterable[Any] | None
    ) -> tuple[BayesianNetwork, FitRun]:
        """Convert and fit.

        Raises:
            InputError: There is no training data, the named network is not there, or an argument is wrong.
        """
        if train_loader is None:
            raise InputError("the trainer has no training data to infer the posterior from; pass them to its fit")
        network = self.network_of(module)
        train = self._rebatched(train_loader)
        options = dict(self.fit)
        held_out = val_loader if self.val_loader is None else self.val_loader
        if held_out is not None:
            options.setdefault("val_loader", self._rebatched(held_out))
        keys = {key: options[key] for key in ("target_key", "weight_key") if key in options}
        inputs = split_batch(next(iter(train)), **keys)[0]
        device = next((parameter.device for parameter in network.parameters()), None)
        example = rows(inputs if device is None else to_device(inputs, device), 0, _EXAMPLES)
        training = network.training
        # By the network's own method: some do more than set a flag.
        network.eval()
        try:
            bnn = bayesianize(network, example, **self.bayesianize)
            return bnn, fit(bnn, train, **options)
        finally:
            network.train(training)

    def _rebatched(self, loader: Iterable[Any]) -> Iterable[Any]:
        return loader if self.to_batch is None else Rebatched(loader, self.to_batch)


def in_one_process(world_size: int) -> bool:
    """Whether training ran in one process; warns where it did not, for every process would infer from its own shard."""
    if world_size > 1:
        warnings.warn(
            f"training ran in {world_size} processes, each of which saw a shard of the data, so no posterior is inferred at "
            f"its end: save the network, and call stfbnn.fit in one process",
            stacklevel=3,
        )
    return world_size == 1
