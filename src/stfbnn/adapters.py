"""Several posteriors for one model, switched at run time: the model's memory is taken once.

adapters = stfbnn.Adapters(model)
adapters.add("site-a", "posteriors/site-a")
adapters.add("site-b", "posteriors/site-b")
adapters.activate("site-b")
output = adapters(x)
prediction = stfbnn.predict(adapters["site-a"], x)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.artifact import load_beside
from stfbnn.batches import OutputFunction
from stfbnn.errors import InputError
from stfbnn.network import BayesianNetwork, Weights
from stfbnn.wrappers import unwrap


class Adapters:
    """Posteriors by name, all for one model, of which one is active.

    Each is a `BayesianNetwork`, with everything that belongs to one: they may be of different families, on different layers,
    with different priors, likelihoods and temperatures. The model's tensors are shared by all of them and with the model. What
    is folded out of batch norm (new weights for the convolutions before them) is shared by those on the same layer. So a
    further posterior on a layer takes the memory of its own tensors and of its prior's centre: for "mean-field" 12 bytes for
    each number in the layer.

    Switching changes a name and nothing else: no file is read and no tensor moved. A posterior that is fetched by its name
    stays what it is whatever is active. Those on one layer run the same modules, with other weights put into them for the
    time of a call, so they must not be called from two threads at once; make one `Adapters` for each thread.

    All compute on the device on which the model was when they were added; move the model there first.

    Args:
        model: The trained network; wrappers are looked through. It is left as it was, and must not be changed: the call after
            a change raises `ModelChangedError`.

    Raises:
        InputError: ``model`` is not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._networks: dict[str, BayesianNetwork] = {}
        self._active: str | None = None

    @property
    def model(self) -> nn.Module:
        """The model, without any posterior."""
        return self._model

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were added."""
        return tuple(self._networks)

    @property
    def active(self) -> str | None:
        """The name of the active posterior; None where there is none."""
        return self._active

    @property
    def current(self) -> BayesianNetwork:
        """The active posterior.

        Raises:
            InputError: None is active.
        """
        if self._active is None:
            raise InputError(f"no adapter is active; call add or activate first ({self._known()})")
        return self._networks[self._active]

    def add(
        self,
        name: str,
        posterior: BayesianNetwork | str | os.PathLike[str],
        *,
        example_inputs: Any = None,
        output: OutputFunction | None = None,
    ) -> BayesianNetwork:
        """Add a posterior; the first one becomes active.

        Args:
            name: By which it is to be known.
            posterior: A folder that `stfbnn.save` wrote; or a network made from this very model, which is not copied: it gives
                up its own trunk for the shared one, which computes the same.
            example_inputs: As for `stfbnn.load`: only needed where a warning asks for it.
            output: As for `stfbnn.load`.

        Returns:
            The network, which is also ``adapters[name]``.

        Raises:
            InputError: The name is taken or is none, or the network was made from another model.
            ArtifactError: The folder holds no whole posterior, or one that was inferred for another model; says which.
            ModelChangedError: The model was changed since an earlier one was added.
        """
        if not isinstance(name, str) or not name:
            raise InputError(f"the name of an adapter must be a text that is not empty, but it is {name!r}")
        if name in self._networks:
            raise InputError(f"there is an adapter {name!r} already; remove it first, or choose another name")
        for network in self._networks.values():
            # All watch the same model, so none of them would work from here on.
            network.check_unchanged()
        if isinstance(posterior, BayesianNetwork):
            if example_inputs is not None or output is not None:
                raise InputError("example_inputs and output are for folders; a network has its own")
            added = self._adopt(name, posterior)
        else:
            added = load_beside(self._placed_like(self._model), posterior, self._model, example_inputs, output)
        self._networks[name] = added
        if self._active is None:
            self._active = name
        return added

    def activate(self, name: str) -> None:
        """Let calls go to another posterior.

        Raises:
            InputError: There is none of that name.
        """
        self._active = self._require(name)

    @contextmanager
    def using(self, name: str) -> Iterator[BayesianNetwork]:
        """Make another posterior active within a block, and give it.

        Raises:
            InputError: There is none of that name.
        """
        before, self._active = self._active, self._require(name)
        try:
            yield self._networks[name]
        finally:
            # Within the block it may have been removed.
            self._active = before if before in self._networks else None

    def remove(self, name: str) -> None:
        """Forget a posterior; where it was the active one, none is active then.

        Raises:
            InputError: There is none of that name.
        """
        del self._networks[self._require(name)]
        if self._active == name:
            self._active = None

    def __call__(self, *args: Any, weights: Weights = "sample", **kwargs: Any) -> Any:
        """Call the active posterior's network with one draw of weights, or at the mean; see `BayesianNetwork.forward`."""
        return self.current(*args, weights=weights, **kwargs)

    def __getitem__(self, name: str) -> BayesianNetwork:
        """The posterior of a name, active or not.

        Raises:
            InputError: There is none of that name.
        """
        return self._networks[self._require(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._networks

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._networks)

    def __repr__(self) -> str:
        lines = [f"Adapters for a {type(self._model).__name__}"]
        lines += [
            f"  {name!r}{' (active)' if name == self._active else ''}: {network.extra_repr()}"
            for name, network in self._networks.items()
        ]
        return "\n".join(lines)

    def _adopt(self, name: str, network: BayesianNetwork) -> BayesianNetwork:
        network.check_unchanged()
        if network.model is not self._model:
            raise InputError(
                f"the network for {name!r} was not made from this very model, so it would bring along a copy of its own; call "
                f"bayesianize or load with this model, or save the posterior and add the folder"
            )
        trunk = (network.model_fingerprint, network.layer_name, network.folding.record())
        for other in self._placed_like(network.network):
            if other.has_trunk(*trunk):
                network.share_trunk(other)
                break
        return network

    def _placed_like(self, module: nn.Module) -> list[BayesianNetwork]:
        """Those whose trunks are in the same place and precision as the module, and were never elsewhere."""
        place = _place(module.parameters())
        return [
            network
            for network in self._networks.values()
            if _place((*network.network.parameters(), *network.trained.values())) == place
        ]

    def _require(self, name: str) -> str:
        if name not in self._networks:
            raise InputError(f"there is no adapter {name!r}; {self._known()}")
        return name

    def _known(self) -> str:
        return f"there are {', '.join(map(repr, self._networks))}" if self._networks else "none was added"


def _place(tensors: Iterable[Tensor]) -> set[tuple[torch.device, torch.dtype]]:
    return {(tensor.device, tensor.dtype) for tensor in tensors}
