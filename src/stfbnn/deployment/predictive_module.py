"""The averaged predictive as an ordinary module: S fixed draws baked in, tensors in, tensors out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stfbnn.batches import Inputs, as_inputs, batch_size, call_model, map_tensors, require_finite
from stfbnn.deployment.averaging import Averaging
from stfbnn.deployment.errors import ExportError
from stfbnn.deployment.layouts import (
    BatchAxes,
    CannotStackError,
    LayoutName,
    LoopedNetwork,
    StackedNetwork,
    WeightSets,
    row_count,
)
from stfbnn.draws import Draws
from stfbnn.errors import InputError
from stfbnn.likelihood import Likelihood
from stfbnn.mixed_precision import full_precision
from stfbnn.network import BayesianNetwork
from stfbnn.predictive import sums_for
from stfbnn.trunk import shared_copy
from stfbnn.wrappers import unwrap

Layout = Literal["auto", "stacked", "loop"]

# Numbers of rows on which the two layouts are compared, and how far they may differ.
_ROWS = (2, 3)
_TOLERANCE = 1e-4


class PredictiveModule(nn.Module):
    """What `predict` computes, as a module without randomness: it can be traced, compiled, written to a file.

    Called like the model, it returns a dict of tensors, (B, …) each, named in ``outputs``. For classes and labels: "probs",
    and in nats "entropy" = "aleatoric" + "epistemic"; for numbers and counts: "mean", "std", and the variances "aleatoric" and
    "epistemic". All are in the network's dtype, at least float32. Inputs are not checked, and gradients reach them.

    Made by `predictive_module`.

    Attributes:
        samples: S, the number of draws baked in.
        outputs: The names of the tensors that it returns, in order.
    """

    shares: Tensor | None

    def __init__(
        self,
        network: LoopedNetwork | StackedNetwork,
        samples: int,
        shares: Tensor | None,
        likelihood: Likelihood,
        temperature: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.likelihood = likelihood
        self.samples = samples
        self.register_buffer("shares", shares)
        self._averaging = Averaging(likelihood, temperature)
        self.outputs = self._averaging.names
        # Not eval(), which the user's modules may override to do more than that.
        for part in self.modules():
            part.training = False

    @property
    def layout(self) -> LayoutName:
        """How the draws are run: "stacked" is the trunk once, on S·B rows, "loop" once for every draw, on B rows."""
        return self.network.layout

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Predict for B examples.

        Args:
            *args: The model's own arguments; the first dimension of every tensor is the batch.
            **kwargs: The model's own keyword arguments.

        Returns:
            The tensors by their names.
        """
        return self._averaging(self.network(*args, **kwargs), self.samples, row_count(args, kwargs), self.shares)

    def train(self, mode: bool = True) -> PredictiveModule:
        """Set the flag of this module alone: the network's batch-norm statistics and dropout stay frozen."""
        self.training = mode
        return self

    def with_network(self, network: StackedNetwork) -> PredictiveModule:
        """The same average over another layout of the same network."""
        return PredictiveModule(network, self.samples, self.shares, self.likelihood, self._averaging.temperature)


def predictive_module(
    bnn: BayesianNetwork, example_inputs: Any, *, samples: int = 32, seed: int = 0, layout: Layout = "auto"
) -> PredictiveModule:
    """Make an ordinary module of the averaged predictive, with the draws of `predict` for the same ``samples`` and ``seed``.

    It holds copies of all it needs, so that nothing that happens to the model later changes it: the trunk once, the first layer
    S times. ``torch.compile`` takes it.

    Args:
        bnn: The network, after `fit`.
        example_inputs: One or more examples as the model takes them.
        samples: S, posterior draws. A mixture's are dealt out to its components, at least one to each.
        seed: Which draws.
        layout: "stacked" runs the trunk once on S·B rows: a small graph, and fast on accelerators and for few examples. "loop"
            runs it draw by draw on B rows: S times as many operations, less memory, and in PyTorch on a CPU faster for many.
            "auto" takes the first where it is seen to agree with the second, as it does for every network that treats its
            examples apart and keeps them in order.

    Returns:
        The module, in evaluation mode, on the network's device.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: An argument is wrong, or the likelihood is of the user's own making.
        ExportError: ``layout="stacked"`` was asked for, and the network does not treat its examples apart.
    """
    module, _ = build(bnn, example_inputs, samples, seed, layout)
    return copy.deepcopy(module).to(bnn.device)


def build(
    bnn: BayesianNetwork, example_inputs: Any, samples: int, seed: int, layout: Layout
) -> tuple[PredictiveModule, PredictiveModule]:
    """The module of `predictive_module`, and the same in "loop" layout, both on the CPU.

    They share their tensors with each other, and the trunk's with the user's model where that is on the CPU too.

    Raises:
        As `predictive_module`.
    """
    bnn = plain_network(bnn)
    if layout not in ("auto", "stacked", "loop"):
        raise InputError(f'layout must be "auto", "stacked" or "loop", but it is {layout!r}')
    likelihood, temperature = bnn.require_fitted(), bnn.predictive_temperature
    # Both called here for what they refuse.
    Averaging(likelihood, temperature)
    sums_for(likelihood, temperature)
    inputs = example_rows(example_inputs, batch_size(as_inputs(example_inputs)))
    bnn.check_unchanged()
    # A surrounding autocast would round what is drawn, for good.
    with torch.no_grad(), full_precision(bnn.device), full_precision(torch.device("cpu")):
        loop = _loop(bnn, likelihood, Draws(bnn, samples, seed))
        _require_outputs(loop, inputs)
        if layout == "loop":
            return loop, loop
        try:
            return _stacked(bnn, loop, inputs), loop
        except CannotStackError as error:
            if layout == "stacked":
                raise ExportError(
                    f'draws cannot stand side by side in one batch: {error}; pass layout="loop"'
                ) from error
            return loop, loop


def plain_network(bnn: Any) -> BayesianNetwork:
    """The Bayesian network, taken out of what ``torch.compile`` and the like have put around it.

    Raises:
        InputError: It is none.
    """
    plain = unwrap(bnn) if isinstance(bnn, nn.Module) else bnn
    if not isinstance(plain, BayesianNetwork):
        raise InputError(f"what stfbnn.bayesianize or stfbnn.load returned is needed, not a {type(plain).__name__}")
    return plain


def example_rows(example_inputs: Any, count: int) -> Inputs:
    """``count`` rows of the example on the CPU, from the first again where it has fewer.

    Raises:
        InputError: It is no batch, or not finite.
    """
    inputs = as_inputs(example_inputs)
    size = batch_size(inputs)
    require_finite(inputs, "example_inputs")
    return map_tensors(inputs, lambda tensor: tensor.detach().cpu()[torch.arange(count) % size])


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of two predictions; of numbers, relative to the largest mean or standard deviation there is.

    Infinite where shapes differ or a difference is not finite.
    """
    units = dict.fromkeys(expected, 1.0)
    if "mean" in expected:
        size = max(float(expected["mean"].abs().amax()), float(expected["std"].amax()))
        units = {"mean": size, "std": size, "aleatoric": size**2, "epistemic": size**2}
    worst = 0.0
    for name, one in expected.items():
        other = found[name]
        if other.shape != one.shape:
            return math.inf
        difference = float((other.double() - one.double()).abs().amax())
        if difference == 0:
            continue
        relative = difference / units[name] if units[name] > 0 else math.inf
        worst = max(worst, relative) if math.isfinite(relative) else math.inf
    return worst


def _loop(bnn: BayesianNetwork, likelihood: Likelihood, draws: Draws) -> PredictiveModule:
    prefix = f"{bnn.layer_name}." if bnn.layer_name else ""
    sets = []
    for index in range(draws.count):
        weights = bnn.substitution(draws.vector(index))
        # Of their own storage, and not views of the vector, which files would hold whole for each.
        sets.append({name.removeprefix(prefix): value.detach().cpu().clone() for name, value in weights.items()})
    network = LoopedNetwork(shared_copy(bnn.network).to("cpu"), bnn.layer_name, WeightSets(sets), bnn.output)
    shares = None if draws.shares is None else draws.shares.float()
    kept = copy.deepcopy(likelihood).cpu().requires_grad_(False)
    return PredictiveModule(network, draws.count, shares, kept, bnn.predictive_temperature)


def _require_outputs(loop: PredictiveModule, inputs: Inputs) -> None:
    """Refuse what `predict` would refuse, on the example."""
    network = loop.network

    def one(*args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(network, LoopedNetwork)  # noqa: S101 - said for the type checker
        return network.one(0, *args, **kwargs)

    try:
        outputs: Tensor = call_model(one, inputs)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the network does not run on example_inputs on the CPU: {error}") from error
    loop.likelihood.check_outputs(outputs)
    if outputs.shape[0] != batch_size(inputs):
        raise InputError(
            f"for {batch_size(inputs)} examples the network gives outputs {tuple(outputs.shape)}, whose first dimension is not "
            f"the batch; give more than one example, should it leave that dimension out for one"
        )


def _stacked(bnn: BayesianNetwork, loop: PredictiveModule, inputs: Inputs) -> PredictiveModule:
    """The stacked layout, after it was seen to agree with the loop at two sizes of batch."""
    looped = loop.network
    assert isinstance(looped, LoopedNetwork)  # noqa: S101 - said for the type checker
    layer = looped.network.get_submodule(bnn.layer_name)
    try:
        axes = BatchAxes.found(layer, lambda rows: call_model(looped.network, example_rows(inputs, rows)), _ROWS[0])
        module = loop.with_network(StackedNetwork(looped, axes, bnn.first_layer.calls == 1))
        for rows in _ROWS:
            probe = example_rows(inputs, rows)
            error = largest_difference(call_model(module, probe), call_model(loop, probe))
            if not error <= _TOLERANCE:
                raise CannotStackError(f"draws or examples change each other's outputs there, by {error:.1e}")
    except CannotStackError:
        raise
    except Exception as error:
        # Whatever the user's modules raise on a batch that is not the one they were given.
        reason = (str(error).splitlines() or [""])[0]
        raise CannotStackError(f"{type(error).__name__}: {reason}") from error
    return module
