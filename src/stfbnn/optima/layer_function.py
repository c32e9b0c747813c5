"""The network as a function of one layer's weights, and examples in memory on which it is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.batches import (
    TARGET_KEY,
    WEIGHT_KEY,
    Batch,
    Inputs,
    OutputFunction,
    tensors_of,
)
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.first_look import first_batch, first_look, two_rows
from stfbnn.inference.survey import checked_batch, counted_labels
from stfbnn.likelihood import LikelihoodLike
from stfbnn.network import BayesianNetwork

# Input numbers that a stack of networks times a chunk of examples may hold: what is kept for a backward pass grows with it.
_STACK_NUMBERS = 2**22


class LayerFunction:
    """Outputs and losses of one network under many weights of one of its layers, the others being frozen.

    Args:
        model: The trained network; it is left as it was.
        loader: Batches with targets, by the first of which the layer is found and the likelihood chosen and checked.
        layer: The layer's dotted name; None for the first.
        likelihood: As for `fit`; a noise that is to be learned is that of the trained network's residuals on that batch.
        seed: Of what the loader draws.
        target_key: The target's entry in mappings.
        output: How to take the tensor of predictions out of what the model returns.

    Attributes:
        bnn: The network, the layer's posterior being a point mass.
        layer: The layer's name.
        size: d, how many weights the layer has.
        likelihood: p(y | output).
        trained: The layer's trained weights (d,).

    Raises:
        InputError: The loader is empty, or its first batch does not fit the network or the likelihood.
        LayerError: There is no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        layer: str | None = None,
        likelihood: LikelihoodLike = "auto",
        seed: int = 0,
        target_key: str = TARGET_KEY,
        output: OutputFunction | None = None,
    ) -> None:
        batch = first_batch(loader, seed, target_key, WEIGHT_KEY)
        example = two_rows(batch, model)
        self.bnn: BayesianNetwork = bayesianize(model, example, layer=layer, posterior="point", output=output)
        self.layer, self.size = self.bnn.layer_name, self.bnn.layout.size
        self.trained = self.bnn.trained_vector().detach()
        self.likelihood, _ = first_look(self.bnn, loader, likelihood, seed, target_key, WEIGHT_KEY)
        with torch.no_grad():
            here = batch.to(self.bnn.device)
            estimate = self.likelihood.estimate(self.bnn.outputs(self.trained, here.inputs), here.target)
            self.likelihood.move(estimate, 1.0)
        self._stacks = True

    def outputs(self, vectors: Tensor, inputs: Inputs, stacked: bool = True) -> Tensor:
        """Outputs (K, B, …) under every weight vector, differentiable in ``vectors``.

        What comes before the layer is computed once for all K where they are stacked.

        Args:
            vectors: (K, d).
            inputs: Of B examples, on the network's device.
            stacked: Run all K at once where the network allows that; else one after another.
        """
        if stacked and self._stacks:
            try:
                found: Tensor = torch.vmap(lambda vector: self.bnn.outputs(vector, inputs))(vectors)
                return found
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # Recurrent layers, and control flow that depends on data, have no rule for several weights at once.
                self._stacks = False
        return torch.stack([self.bnn.outputs(vector, inputs) for vector in vectors])

    def losses(self, vectors: Tensor, batch: Batch, stacked: bool = True) -> Tensor:
        """Mean −log p(y | x, w) of a batch in nats per example, (K,), differentiable in ``vectors``."""
        return self.losses_of(self.outputs(vectors, batch.inputs, stacked), batch.target)

    def losses_of(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean −log p(y | output) of outputs (K, B, …), (K,)."""
        return torch.stack([-self.likelihood.log_prob(one, target).mean() for one in outputs])

    def group(self, inputs: Inputs) -> int:
        """How many networks are stacked over one minibatch, so that memory stays bounded."""
        numbers = sum(tensor.numel() for tensor in tensors_of(inputs))
        return max(1, _STACK_NUMBERS // max(1, numbers))


@dataclass(frozen=True)
class Scores:
    """How each of K weight vectors does on some examples.

    Attributes:
        loss: Mean −log p(y | x, w), nats per example, (K,), in float64.
        accuracy: Share of right labels, (K,), in float64; None where the targets are no labels.
    """

    loss: Tensor
    accuracy: Tensor | None


class Examples:
    """Some of a loader's examples, in memory, in chunks.

    Args:
        loader: Batches with targets.
        target_key: The target's entry in mappings.
        most: How many of the first examples are kept; None for all.

    Raises:
        InputError: There is no batch, or one cannot be used.
    """

    def __init__(self, loader: Iterable[Any], target_key: str = TARGET_KEY, most: int | None = None) -> None:
        self.batches: list[Batch] = []
        self.count = 0
        for given in loader:
            batch = checked_batch(given, target_key)
            if most is not None and self.count + len(batch) > most:
                batch = batch.rows(0, most - self.count)
            self.batches.append(batch)
            self.count += len(batch)
            if self.count == most:
                break
        if not self.batches:
            raise InputError("the loader gave no batch: it is empty")
        self.targets = torch.cat([batch.target.cpu() for batch in self.batches])

    @torch.no_grad()
    def outputs(self, function: LayerFunction, vectors: Tensor) -> Tensor:
        """Outputs (K, N, …) of all examples under every weight vector, on the CPU."""
        return torch.cat([outputs for outputs, _ in self._run(function, vectors)], dim=1)

    @torch.no_grad()
    def scores(self, function: LayerFunction, vectors: Tensor) -> Scores:
        """Loss and accuracy of every weight vector (K, d)."""
        loss, right = torch.zeros(len(vectors), dtype=torch.float64), torch.zeros(len(vectors), dtype=torch.float64)
        # Where some labels are left out, a share of right ones would count them as wrong.
        labelled = (
            function.likelihood.name == "categorical"
            and self.targets.dim() == 1
            and counted_labels(function.likelihood, self.targets) is None
        )
        for outputs, target in self._run(function, vectors):
            loss += function.losses_of(outputs, target).double() * len(target)
            if labelled:
                right += (outputs.argmax(dim=2) == target).double().sum(dim=1)
        return Scores(loss / self.count, right / self.count if labelled else None)

    def _run(self, function: LayerFunction, vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            here = batch.to(function.bnn.device)
            size = function.group(here.inputs)
            parts = [function.outputs(part, here.inputs).cpu() for part in torch.split(vectors, size)]
            yield torch.cat(parts), batch.target.cpu()
