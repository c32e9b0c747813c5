"""An independent draw of weights for every example, so that one pass over n examples is n draws.

A weight vector for each example costs B·d numbers. Where the first layer does nothing but w ↦ Wx + b on one vector of an
example, its outputs can be drawn in their place, and an embedding's weights only in the rows that an example reads: both give
exactly the same law. A convolution's outputs cannot be drawn position by position, for its positions share their weights, so
there, and for every other layer, each example's weights are drawn whole.

Every way but the slowest is tried on a few examples beforehand, and taken only if it gives what the network gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from stfbnn.batches import Inputs, batch_size, concatenate, rows
from stfbnn.draws import chunk_rows
from stfbnn.errors import InputError
from stfbnn.inference.estimators import outputs_of_each
from stfbnn.inference.estimators.layer_outputs import plain_twin, require_stand_in
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanFieldPosterior, MixturePosterior, Posterior, components_of
from stfbnn.randomness import generator, seeded
from stfbnn.trunk.verification import difference

Way: TypeAlias = Literal["same", "pre-activations", "embedding rows", "layer", "network", "one by one"]
Parameters: TypeAlias = dict[str, Tensor]

# Weights of their own for each example take this much at once.
_WEIGHT_BYTES = 2**27
# On so many examples a way is compared with the network itself.
_TRIED = 3


class ExampleDraws:
    """Runs a network with weights w_n ~ q drawn independently for every example n.

    Args:
        bnn: The network, whose trunk is used.
        posterior: q; not always the network's own.
        example: A few rows of inputs, on the network's device.

    Attributes:
        way: How the draws are made: "same" (q has only one weight vector), "pre-activations", "embedding rows", "layer" (each
            example's weights through the first layer, then the trunk on all together), "network" (the whole network example by
            example, by ``torch.vmap``), or "one by one".
    """

    def __init__(self, bnn: BayesianNetwork, posterior: Posterior, example: Inputs) -> None:
        self._bnn, self._posterior = bnn, posterior
        self._layer = bnn.network.get_submodule(bnn.layer_name)
        self._plain = plain_twin(self._layer)
        self._components = components_of(posterior)
        weights = posterior.weights if isinstance(posterior, MixturePosterior) else torch.ones(1)
        self._shares = weights.detach().cpu().double()
        self._moments: list[tuple[Parameters, Parameters]] = []
        self.way: Way = self._choose(rows(example, 0, min(_TRIED, batch_size(example))))
        if self.way in ("pre-activations", "embedding rows"):
            self._moments = [self._moments_of(one) for one in self._components]

    def chunk_rows(self, inputs: Inputs) -> int:
        """How many examples to run at once; it follows from shapes and the device."""
        size = chunk_rows(inputs, self._bnn.device)
        if self.way not in ("layer", "network"):
            return size
        vector = self._posterior.mean_vector()
        each = vector.numel() * vector.element_size() * len(self._components)
        return max(2, min(size, _WEIGHT_BYTES // each))

    @torch.no_grad()
    def outputs(self, inputs: Inputs, random: torch.Generator) -> Tensor:
        """The outputs (B, …) for B examples on the network's device, with noise from a CPU generator."""
        if self.way == "same":
            return self._bnn.outputs(self._posterior.mean_vector().detach(), inputs)
        if self.way == "pre-activations":
            return self._through(self._pre_activations(batch_size(inputs), random), inputs)
        if self.way == "embedding rows":
            return self._through(self._embedding_rows(batch_size(inputs), random), inputs)
        return self._with_vectors(self.way, self._vectors(batch_size(inputs), random), inputs)

    def _choose(self, example: Inputs) -> Way:
        bnn = self._bnn
        if not self._posterior.noise_size:
            return "same"
        try:
            shapes = require_stand_in(bnn, example, "a stand-in")
        except InputError:
            # The layer's weights act elsewhere, too.
            return self._first_that_agrees(("network",), example)
        once = bnn.first_layer.calls == 1 and len(shapes) == 1
        if once and all(isinstance(one, MeanFieldPosterior) for one in self._components):
            if type(self._layer) is nn.Linear and len(shapes[0]) == 2:
                return "pre-activations"
            if type(self._layer) is nn.Embedding and self._layer.max_norm is None:
                return "embedding rows"
        return self._first_that_agrees(("layer", "network"), example)

    def _first_that_agrees(self, ways: tuple[Way, ...], example: Inputs) -> Way:
        """The first of some ways that gives what the network gives for each example by itself."""
        vectors = self._vectors(batch_size(example), generator(0, "agrees"))
        with torch.no_grad(), seeded(0, "agrees"):
            expected = self._with_vectors("one by one", vectors, example)
        for way in ways:
            try:
                with torch.no_grad(), seeded(0, "agrees"):
                    found = self._with_vectors(way, vectors, example)
            except (RuntimeError, ValueError):
                # Recurrent layers, and control flow that depends on data, cannot be run so.
                continue
            error, allowed = difference(expected, found)
            if error <= allowed:
                return way
        return "one by one"

    @torch.no_grad()
    def _vectors(self, size: int, random: torch.Generator) -> Tensor:
        """Independent weight vectors, (size, d)."""
        noise = torch.randn(size, self._posterior.noise_size, generator=random)
        return self._posterior.draw(noise.to(self._posterior.mean_vector()))

    def _with_vectors(self, way: Way, vectors: Tensor, inputs: Inputs) -> Tensor:
        if way == "layer":
            parameters = torch.vmap(self._parameters)(vectors)

            def one(own: Parameters, x: Tensor) -> Tensor:
                found: Tensor = functional_call(self._plain, own, (x.unsqueeze(0),), tie_weights=False)
                return found.squeeze(0)

            return self._through(lambda x: torch.vmap(one)(parameters, x), inputs)
        if way == "network":
            return outputs_of_each(self._bnn, vectors, inputs)
        each = [rows(inputs, index, index + 1) for index in range(len(vectors))]
        # Two rows, for many models squeeze the outputs for one.
        return torch.stack(
            [self._bnn.outputs(vector, concatenate([row, row]))[0] for vector, row in zip(vectors, each, strict=True)]
        )

    def _through(self, forward: Callable[[Tensor], Tensor], inputs: Inputs) -> Tensor:
        with self._bnn.layer_forward(forward):
            return self._bnn.run(self._bnn.network, inputs)

    def _parameters(self, vector: Tensor, deviation: bool = False) -> Parameters:
        prefix = f"{self._bnn.layer_name}." if self._bnn.layer_name else ""
        found = self._bnn.substitution(vector, deviation)
        return {name.removeprefix(prefix): value for name, value in found.items()}

    @torch.no_grad()
    def _moments_of(self, posterior: Posterior) -> tuple[Parameters, Parameters]:
        """Means and standard deviations of all the layer's parameters; 0 of what is not random."""
        fixed = {name: value.detach() for name, value in self._layer.named_parameters()}
        means = {**fixed, **self._parameters(posterior.mean_vector())}
        zeros = {name: torch.zeros_like(value) for name, value in means.items()}
        return means, {**zeros, **self._parameters(posterior.std_vector(), deviation=True)}

    def _components_for(self, size: int, random: torch.Generator) -> list[tuple[Tensor, Parameters, Parameters]]:
        """Which of the examples each component is drawn for, as row numbers, with its means and deviations."""
        device = self._bnn.device
        if len(self._moments) == 1:
            return [(torch.arange(size, device=device), *self._moments[0])]
        chosen = torch.multinomial(self._shares, size, replacement=True, generator=random)
        return [
            ((chosen == number).nonzero().squeeze(1).to(device), *moments)
            for number, moments in enumerate(self._moments)
        ]

    def _pre_activations(self, size: int, random: torch.Generator) -> Callable[[Tensor], Tensor]:
        """For independent Gaussian weights, Wx + b is Gaussian with independent components (Kingma et al. 2015)."""
        parts = self._components_for(size, random)
        units = parts[0][1]["weight"].shape[0]
        noise = torch.randn(size, units, generator=random).to(self._bnn.device)

        def forward(x: Tensor) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            result = torch.empty(size, units, dtype=x.dtype, device=x.device)
            for own, mean, std in parts:
                given = x[own]
                bias, width = mean.get("bias"), std.get("bias")
                centre = F.linear(given, mean["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))
                variance = F.linear(
                    given.to(wide).square(),
                    std["weight"].to(wide).square(),
                    None if width is None else width.to(wide).square(),
                )
                result[own] = centre + (variance.sqrt() * noise[own].to(wide)).to(x.dtype)
            return result

        return forward

    def _embedding_rows(self, size: int, random: torch.Generator) -> Callable[[Tensor], Tensor]:
        """The rows that an example reads, each drawn once for it, however often it is read."""
        parts = self._components_for(size, random)

        def forward(tokens: Tensor) -> Tensor:
            count, width = parts[0][1]["weight"].shape
            flat = tokens.reshape(size, -1).long()
            example = torch.arange(size, device=flat.device).unsqueeze(1)
            read, where = torch.unique(flat + example * count, return_inverse=True)
            like = parts[0][1]["weight"]
            noise = torch.randn(len(read), width, generator=random).to(like)
            drawn = torch.empty(*flat.shape, width, dtype=like.dtype, device=flat.device)
            for own, mean, std in parts:
                drawn[own] = mean["weight"][flat[own]] + std["weight"][flat[own]] * noise[where[own]]
            return drawn.reshape(*tokens.shape, width)

        return forward
