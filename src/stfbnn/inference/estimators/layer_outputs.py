"""Estimators that work at the first layer's output, for layers that are linear in their weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stfbnn.batches import Inputs, concatenate, rows
from stfbnn.errors import InputError
from stfbnn.inference.estimators.base import Average, Estimate, Estimator, Minibatch, Sampler
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanFieldPosterior
from stfbnn.randomness import generator, seeded
from stfbnn.trunk.dataflow import HOOKS
from stfbnn.trunk.verification import difference

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Below it the standard deviation of a pre-activation is no longer divided by: all inputs of a row may be zero.
_SMALLEST_VARIANCE = 1e-30

Forward = Callable[[Tensor, dict[str, Tensor]], Tensor]


class LocalReparameterization(Estimator):
    """Draws the pre-activations of a dense layer instead of its weights (Kingma, Salimans & Welling 2015).

    For x → Wx + b with independent Gaussian weights, the pre-activations of one example are independent Gaussians with the
    means Mx + μ_b and the variances Σ x_i² σ_ji² + σ_b². That equals in law an independent weight draw for every example.
    It is exact only where the layer is applied once to an example: across the positions of a convolution, or over tokens,
    it would break the dependence that the shared weights make.

    Args:
        draws: Draws for each example and estimate.
        antithetic: Draw in pairs ±ε.
    """

    name: ClassVar[str] = "local-reparameterization"

    def check(self, bnn: BayesianNetwork, example: Inputs) -> None:
        """Only for a mean-field posterior over a Linear layer that is called once, on one vector an example."""
        _require_mean_field(bnn, self.name)
        layer = bnn.network.get_submodule(bnn.layer_name)
        if type(layer) is not nn.Linear:
            raise InputError(
                f"local reparameterisation is exact only for a Linear first layer, but {bnn.layer_name!r} is a "
                f'{type(layer).__name__}; use estimator="antithetic"'
            )
        shapes = require_stand_in(bnn, example, self.name)
        if bnn.first_layer.calls != 1 or len(shapes) != 1:
            raise InputError(
                f"local reparameterisation needs a layer that is called once, but {bnn.layer_name!r} is called "
                f'{max(bnn.first_layer.calls, len(shapes))} times; use estimator="antithetic"'
            )
        if len(shapes[0]) != 2:
            raise InputError(
                f"local reparameterisation needs a layer that is applied once to an example, but the input of "
                f'{bnn.layer_name!r} has the shape {shapes[0]}; use estimator="antithetic"'
            )

    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        """The mean over the draws of the loss with drawn pre-activations."""
        view = _LinearInWeights(minibatch.network, sampler)
        units = view.means["weight"].shape[0]
        average = Average(self.draws)
        for noise in self.noises(lambda: torch.randn(minibatch.size, units, generator=generator).to(view.like)):

            def forward(start: int, stop: int, noise: Tensor = noise) -> Callable[[Tensor], Tensor]:
                def run(x: Tensor) -> Tensor:
                    mean = view.call(x, view.means)
                    # Squares leave the range of half precision.
                    wide = torch.promote_types(x.dtype, torch.float32)
                    squares = {name: value.to(wide).square() for name, value in view.stds.items()}
                    variance = view.call(x.to(wide).square(), squares).clamp_min(_SMALLEST_VARIANCE)
                    return mean + (variance.sqrt() * noise[start:stop]).to(mean.dtype)

                return run

            average.add(*view.chained(*minibatch.through_layer(forward, view.leaves)))
        return average.result()


class Flipout(Estimator):
    """One weight draw whose deviation from the mean is flipped in sign for every example (Wen et al. 2018).

    With random signs r_n (one for each output channel) and s_n (input channel), example n sees the weights
    M + (σε) ∘ r_n s_nᵀ: marginally a draw from q for every example, and uncorrelated between examples.

    Args:
        draws: Draws of ε for one estimate, each with signs of its own; an antithetic pair shares them.
        antithetic: Draw in pairs ±ε.
    """

    name: ClassVar[str] = "flipout"

    def check(self, bnn: BayesianNetwork, example: Inputs) -> None:
        """Only for a mean-field posterior over a Linear or convolutional layer that has the batch first."""
        _require_mean_field(bnn, self.name)
        layer = bnn.network.get_submodule(bnn.layer_name)
        if type(layer) is not nn.Linear and type(layer) not in _CONVOLUTIONS:
            raise InputError(
                f"flipout is for Linear and convolutional first layers, but {bnn.layer_name!r} is a "
                f'{type(layer).__name__}; use estimator="antithetic"'
            )
        require_stand_in(bnn, example, self.name)

    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        """The mean over the draws of the loss with flipped deviations."""
        view = _LinearInWeights(minibatch.network, sampler)
        # Channels are dimension 1 for a convolution and the last one for a dense layer.
        weight = view.means["weight"]
        layer = view.layer
        in_channels = layer.in_channels if isinstance(layer, _CONVOLUTIONS) else weight.shape[1]
        average = Average(self.draws)
        signs_in = signs_out = torch.empty(0)
        for index, noise in enumerate(self.noises(lambda: sampler.noise(generator))):
            if not (self.antithetic and index % 2):
                signs_in = _signs(minibatch.size, in_channels, generator, view.like)
                signs_out = _signs(minibatch.size, weight.shape[0], generator, view.like)
            parts = view.split(noise)

            def forward(
                start: int,
                stop: int,
                parts: dict[str, Tensor] = parts,
                signs_in: Tensor = signs_in,
                signs_out: Tensor = signs_out,
            ) -> Callable[[Tensor], Tensor]:
                def run(x: Tensor) -> Tensor:
                    before, after = signs_in[start:stop], signs_out[start:stop]
                    deviation = {name: view.stds[name] * part.to(x.dtype) for name, part in parts.items()}
                    flipped = view.call(x * view.along_channels(before, x), deviation)
                    return view.call(x, view.means) + flipped * view.along_channels(after, flipped)

                return run

            average.add(*view.chained(*minibatch.through_layer(forward, view.leaves)))
        return average.result()


class _LinearInWeights:
    """The first layer's means and standard deviations as it takes them, and its own forward as a linear map of weights.

    A batch norm that was folded into the layer scales both and shifts only the mean.
    """

    def __init__(self, bnn: BayesianNetwork, sampler: Sampler) -> None:
        self._bnn, self._sampler = bnn, sampler
        self.layer = bnn.network.get_submodule(bnn.layer_name)
        self._plain = plain_twin(self.layer)
        with torch.enable_grad():
            mean, std = sampler.moments()
            self.like = mean
            self._mean_parts = self._parameters(mean, deviation=False)
            self._std_parts = self._parameters(std, deviation=True)
        # Cut off here, so that every chunk's graph ends at the layer; `chained` goes on from here to the sampler's leaves.
        self.means = {name: part.detach().requires_grad_() for name, part in self._mean_parts.items()}
        self.stds = {name: part.detach().requires_grad_() for name, part in self._std_parts.items()}
        self.leaves = (*self.means.values(), *self.stds.values())

    def chained(self, nll: float, gradients: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """The gradients by the sampler's leaves, from those by this layer's means and standard deviations."""
        parts = zip((*self._mean_parts.values(), *self._std_parts.values()), gradients, strict=True)
        # A bias that a folded batch norm added has no deviation.
        known, ahead = zip(*((part, gradient) for part, gradient in parts if part.requires_grad), strict=True)
        return nll, torch.autograd.grad(known, self._sampler.leaves, ahead, retain_graph=True)

    def call(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The layer's forward with other parameters."""
        result: Tensor = functional_call(self._plain, parameters, (x,))
        return result

    def split(self, noise: Tensor) -> dict[str, Tensor]:
        """Noise (d,) under the layer's parameter names; zero for a bias that a folded batch norm added."""
        parts = self._bnn.layout.unflatten(noise)
        return {name: parts.get(name, torch.zeros_like(value)) for name, value in self.means.items()}

    def along_channels(self, signs: Tensor, x: Tensor) -> Tensor:
        """Signs (B, C) in a shape that multiplies ``x`` along its channels."""
        ones = [1] * (x.ndim - 2)
        dense = isinstance(self.layer, nn.Linear)
        shape = (len(signs), *ones, signs.shape[1]) if dense else (*signs.shape, *ones)
        return signs.reshape(shape).to(x.dtype)

    def _parameters(self, vector: Tensor, deviation: bool) -> dict[str, Tensor]:
        prefix = f"{self._bnn.layer_name}." if self._bnn.layer_name else ""
        found = self._bnn.substitution(vector, deviation)
        return {name.removeprefix(prefix): value for name, value in found.items()}


def _signs(rows: int, channels: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randint(0, 2, (rows, channels), generator=generator) * 2 - 1).to(like)


def plain_twin(layer: nn.Module) -> nn.Module:
    """A layer whose forward is its own while another stands in for the layer's, and without hooks, which run around that."""
    twin = copy.copy(layer)
    vars(twin).update({name: OrderedDict() for name in HOOKS if vars(twin).get(name)})
    return twin


def require_stand_in(bnn: BayesianNetwork, example: Inputs, name: str) -> list[tuple[int, ...]]:
    """Refuse a network in which a stand-in for the layer's forward, example by example, is not equal to other weights.

    Returns:
        The shapes of what the layer is given, one for each call.

    Raises:
        InputError: The layer's forward was replaced, the examples are not the first dimension of its inputs, or its
            parameters are also read by others.
    """
    layer, instead = bnn.network.get_submodule(bnn.layer_name), '; use estimator="antithetic"'
    if "forward" in vars(layer):
        raise InputError(
            f"the forward method of {bnn.layer_name!r} was replaced, which {name!r} cannot see through{instead}"
        )
    weights = bnn.trained_vector().to(bnn.posterior.mean_vector())
    noise = torch.randn(weights.shape, generator=generator(0, "stand-in")).to(weights)
    # Of the weights' own size, so that what they change cannot be taken for rounding.
    weights = weights + (weights.square().mean().sqrt() + 0.01) * noise
    prefix = f"{bnn.layer_name}." if bnn.layer_name else ""
    parameters = {key.removeprefix(prefix): value for key, value in bnn.substitution(weights).items()}
    plain = plain_twin(layer)
    shapes: list[tuple[int, ...]] = []

    def forward(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        result: Tensor = functional_call(plain, parameters, (x,))
        return result

    # Twice, for a dimension that is not that of the examples may be of one size with it.
    for count in (2, 3):
        inputs = concatenate([rows(example, 0, 1)] * count)
        shapes.clear()
        with torch.no_grad(), seeded(0, "stand-in"):
            expected = bnn.outputs(weights, inputs)
        with torch.no_grad(), seeded(0, "stand-in"), bnn.layer_forward(forward):
            found = bnn.run(bnn.network, inputs)
        if any(shape[0] != count for shape in shapes):
            raise InputError(
                f"{name!r} needs the examples to be the first dimension of what {bnn.layer_name!r} is given, but for {count} "
                f"examples its input has the shape {shapes[0]}{instead}"
            )
        error, allowed = difference(expected, found)
        if not shapes or not error <= allowed:
            raise InputError(
                f"the parameters of {bnn.layer_name!r} act on the output in another way than by a call of the layer (they are "
                f"read elsewhere), which {name!r} cannot see{instead}"
            )
    return shapes


def _require_mean_field(bnn: BayesianNetwork, name: str) -> None:
    posteriors = getattr(bnn.posterior, "components", None) or [bnn.posterior]
    for posterior in posteriors:
        if not isinstance(posterior, MeanFieldPosterior):
            raise InputError(
                f"the estimator {name!r} is for independent weights (a mean-field posterior), but the posterior is "
                f'{posterior.family!r}; use estimator="antithetic" or "per-example"'
            )
