"""Monte Carlo dropout: the average over dropout masks at prediction, too (Gal and Ghahramani, 2016)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.baselines.predictor import (
    PLAIN,
    Reading,
    call_network,
    collect_outputs,
    evaluating,
    input_chunks,
    parameter_count,
    require_count,
    require_likelihood,
    require_network,
    state_bytes,
)
from stfbnn.batches import Inputs, module_device
from stfbnn.errors import InputError
from stfbnn.likelihood import Likelihood
from stfbnn.predictive import MemberOutputs
from stfbnn.randomness import derive_seed, seeded

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""What stays random at prediction."""

_LINEAR_OR_CONV = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ADDED = "input_dropout"


class MCDropout:
    """A network whose dropout modules go on dropping at prediction, while all else (batch norm) is in evaluation mode.

    Every example has masks of its own in every member, as in the source. They follow from the seed, the member's number and
    the example's place in the data: the same data in the same order give the same outputs however they are batched, but an
    example that is predicted alone has other masks than the same example within a data set.

    Dropout that is no module is not seen: ``F.dropout``, and the ``dropout=`` of recurrent layers and of attention weights.

    Args:
        model: A network that was trained with dropout (see `with_dropout`). It is not changed: its modes are put back after
            every call.
        likelihood: What its outputs mean; for a regression with the noise set.
        samples: Masks to average.
        seed: Which masks; mask s is the same whatever ``samples`` is.
        users_network: Whether it is the network that the user has anyway, so that nothing has to be kept beyond it.
        reading: How batches and what the network returns are read.

    Raises:
        InputError: An argument is wrong, or the network has no dropout module with a rate above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        samples: int = 32,
        seed: int = 0,
        *,
        users_network: bool = True,
        reading: Reading = PLAIN,
    ) -> None:
        self.model = require_network(model)
        self.likelihood = require_likelihood(likelihood)
        self.samples = require_count(samples, "samples")
        derive_seed(seed)
        self.seed = seed
        if not _active_dropout(model):
            raise InputError(
                "the model has no dropout module with p > 0 (F.dropout, and dropout inside recurrent layers and attention "
                "weights, cannot be seen from outside); train one with dropout, such as with_dropout(model, p=0.1)"
            )
        self.trainable_parameters = parameter_count(model)
        self.artifact_bytes = 0 if users_network else state_bytes(model)
        self._reading = reading

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs under every mask, (samples, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            InputError: There are no data, or they are not finite or of a wrong form.
        """
        chunks = input_chunks(data, module_device(self.model), self._reading)
        with evaluating(self.model), dropping(self.model):
            outputs = collect_outputs(self._members, chunks)
        return MemberOutputs(outputs, self.likelihood)

    def _members(self, index: int, chunk: Inputs) -> Iterator[Tensor]:
        # One stream of random numbers a chunk, which the members use in turn: a seed for each would take longer to set than a
        # small network to run.
        with seeded(self.seed, "mc dropout", index):
            for _ in range(self.samples):
                yield call_network(self.model, chunk, self._reading)


def with_dropout(model: nn.Module, p: float, first: str | None = None) -> nn.Module:
    """A copy of a network with dropout at the input of every linear and convolutional layer except the first.

    It is the usual recipe for a network that has none, and to be trained (further) before `MCDropout` makes sense of it. The
    dropout modules become children ``input_dropout`` of the layers, called by a forward pre-hook: names and shapes in the
    state dict stay those of ``model``, whose weights can be loaded into the copy and the reverse. Elements are dropped one by
    one, in feature maps, too. A layer that the network uses several times drops every time. The output projection of
    ``nn.MultiheadAttention`` is never called as a module and stays as it is.

    Args:
        model: The network; it is not changed.
        p: The rate, in [0, 1).
        first: Name of the first layer, whose input is left whole; None takes the first in the order in which the modules were
            registered.

    Returns:
        The copy, on the same device, with modes and ``requires_grad`` as in ``model``.

    Raises:
        InputError: ``p`` is out of range, ``first`` names no linear or convolutional layer, there is no other layer, dropout
            was added before, or the model cannot be copied.
    """
    require_network(model)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise InputError(f"p must be a dropout rate in [0, 1), but it is {p!r}")
    try:
        result = copy.deepcopy(model)
    except Exception as error:
        raise InputError(f"the model cannot be copied: {error}") from error
    projections = {module.out_proj for module in result.modules() if isinstance(module, nn.MultiheadAttention)}
    layers = {
        name: module
        for name, module in result.named_modules()
        if isinstance(module, _LINEAR_OR_CONV) and module not in projections
    }
    left_whole = next(iter(layers), None) if first is None else first
    if len(layers) < 2 or left_whole not in layers:
        raise InputError(
            f"dropout goes before every linear and convolutional layer but the first, "
            f"{'which first= names' if first is not None else 'so there must be at least two'}; first={first!r}, and the "
            f"layers are {list(layers)}"
        )
    for name, layer in layers.items():
        if hasattr(layer, _ADDED):
            raise InputError(f"layer {name!r} has {_ADDED!r} already; give the network as it was before with_dropout")
        if name != left_whole:
            layer.add_module(_ADDED, nn.Dropout(p).train(layer.training))
            layer.register_forward_pre_hook(_drop_input, with_kwargs=True)
    return result


def _drop_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A function of the module, not a closure, so that the network can be copied and pickled."""
    dropout = layer.get_submodule(_ADDED)
    if args:
        return (dropout(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": dropout(kwargs["input"])}


def _active_dropout(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, DROPOUT) and module.p > 0]


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Put a network's dropout into training mode; whoever calls it puts the modes back."""
    for module in _active_dropout(model):
        module.training = True
    # In evaluation mode PyTorch's transformer layers take a fused path that leaves their own dropout modules out.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
