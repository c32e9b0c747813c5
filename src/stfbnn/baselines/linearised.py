"""A network linearised in some of its weights, and its training data, in the forms that laplace-torch reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from stfbnn.baselines.last_layer import head_features, last_layer_name
from stfbnn.baselines.predictor import PLAIN, Reading, call_network
from stfbnn.batches import Batch, Inputs, module_device
from stfbnn.draws import chunk_rows
from stfbnn.errors import InputError, LayerError
from stfbnn.inference.survey import checked_batch
from stfbnn.likelihood import Gaussian, Likelihood
from stfbnn.locate import parametric_leaves
from stfbnn.trunk import shared_copy

Subset = Literal["last-layer", "all"]
Structure = Literal["kron", "diag", "full"]

_FACTORED = (nn.Linear, nn.Conv2d)
# Under which a mapping for laplace-torch holds the inputs themselves.
_INPUTS = "stfbnn_inputs"
# Derivatives of every output for every example are taken in pieces of this many rows: of features, and of whole networks.
_ROWS_OF_FEATURES, _ROWS_OF_INPUTS = 64, 8
# A full matrix takes P² numbers, and its determinants P³ steps.
_LARGEST_FULL = 8192


class Linearised(nn.Module):
    """The network as laplace-torch takes it: one argument, outputs (B, K), gradients for the weights that are random.

    It shares the user's tensors and nothing else. For a last layer whose output is the network's, it is that layer, and its
    argument the features.
    """

    def __init__(
        self, model: nn.Module, example: Inputs, subset: Subset, structure: Structure, reading: Reading
    ) -> None:
        super().__init__()
        network = shared_copy(model)
        self._reading, self._layer = reading, ""
        self._source: list[nn.Module] = []
        if subset == "last-layer":
            name = last_layer_name(model, example)
            layers = [name]
            if head_features(network, name, example, reading) is not None:
                # In a list, so that its parameters are not this module's.
                self._source, self._layer = [network], name
                network, layers = network.get_submodule(name), [""]
        elif structure == "kron":
            # Of the kinds with Kronecker factors, those that are called: attention reads the weights of one without calling it.
            leaves = parametric_leaves(model, example)
            layers = [name for name in leaves if type(model.get_submodule(name)) in _FACTORED]
        else:
            layers = [""]
        found = [network.get_submodule(name) for name in layers]
        if structure == "kron" and (not found or any(type(layer) not in _FACTORED for layer in found)):
            kind = type(found[0]).__name__ if found else "none such"
            raise LayerError(
                f"Kronecker factors are for dense and two-dimensional convolutional layers, but here is {kind}; take "
                f'structure="diag"'
            )
        for layer in found:
            layer.requires_grad_(True)
        self.network = network
        size = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
        if structure == "full" and size > _LARGEST_FULL:
            raise InputError(
                f'a full matrix over {size} weights is too large (up to {_LARGEST_FULL}); take structure="kron" or "diag"'
            )
        with torch.no_grad():
            self.squeezed = self._run(self.prepared(example)).ndim == 1

    @property
    def on_features(self) -> bool:
        """Whether the argument is the features."""
        return bool(self._source)

    def prepared(self, inputs: Inputs) -> Inputs:
        """The argument for a chunk of inputs.

        Raises:
            InputError: The network ends in its last layer on some inputs and not on these.
        """
        if not self._source:
            return inputs
        features = head_features(self._source[0], self._layer, inputs, self._reading)
        if features is None:
            raise InputError("the network ends in its last layer on the first examples but not on all")
        return features

    def forward(self, inputs: Any) -> Tensor:
        """(B, K), of what `prepared` gave, or of a mapping that holds it (see `TrainingData`)."""
        outputs = self._run(inputs[_INPUTS] if isinstance(inputs, dict) and _INPUTS in inputs else inputs)
        return outputs.unsqueeze(-1) if self.squeezed else outputs

    def _run(self, inputs: Inputs) -> Tensor:
        # The layer returns its tensor as it is; only a network may wrap it.
        return call_network(self.network, inputs, PLAIN if self._source else self._reading)

    def at(self, deviation: Tensor, inputs: Inputs) -> Tensor:
        """f(x; θ*) + J(x) (θ − θ*), in the shape of the network's own outputs.

        Args:
            deviation: θ − θ*, all parameters that require gradients one after another.
            inputs: What `prepared` gave.

        Raises:
            InputError: An operation has no forward-mode derivative.
        """
        trained = {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}
        parts = torch.split(deviation, [value.numel() for value in trained.values()])
        tangents = {name: part.reshape(value.shape) for part, (name, value) in zip(parts, trained.items(), strict=True)}

        def function(parameters: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(self, parameters, (inputs,))
            return found

        if type(self.network) in _FACTORED:
            # Linear in its weights as it is.
            linear: Tensor = function({name: value + tangents[name] for name, value in trained.items()})
            return linear.squeeze(-1) if self.squeezed else linear
        try:
            # Fused attention has no forward-mode derivative.
            with sdpa_kernel(SDPBackend.MATH):
                pair: Any = jvp(function, (trained,), (tangents,))
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(f"the network cannot be linearised in these weights: {error}") from error
        linear = pair[0] + pair[1]
        return linear.squeeze(-1) if self.squeezed else linear


class TrainingData:
    """The training data as laplace-torch reads them: checked, on the network's device, in pieces that suit the structure.

    Inputs that are a tensor are given as (inputs, target); others in a mapping, which is all else that it knows, with the
    target twice: under its own key and under the one by which it counts rows.

    Args:
        network: What they are for.
        loader: The user's batches.
        likelihood: By which targets are checked.
        outputs: A few rows of the network's outputs, (B, K), for the same.
        structure: Of the curvature.
        reading: How batches are read.

    Attributes:
        dataset: Of the length that is the number of examples.
        numbers: Single targets of the last pass.

    Raises:
        InputError: A batch is not usable, or there is none.
    """

    def __init__(
        self,
        network: Linearised,
        loader: Iterable[Any],
        likelihood: Likelihood,
        outputs: Tensor,
        structure: Structure,
        reading: Reading,
    ) -> None:
        self._network, self._loader, self._likelihood, self._reading = network, loader, likelihood, reading
        self._outputs = outputs
        few = _ROWS_OF_FEATURES if network.on_features else _ROWS_OF_INPUTS
        self._rows = None if structure == "kron" else few
        self.numbers = 0
        self.dataset = range(sum(len(batch) for batch in self._batches()))

    def __iter__(self) -> Iterator[Any]:
        device = module_device(self._network)
        self.numbers = 0
        for batch in self._batches():
            target = batch.target.long()
            if isinstance(self._likelihood, Gaussian):
                target = batch.target.to(self._outputs.dtype).reshape(len(batch), -1)
            self.numbers += target.numel()
            size = self._rows or chunk_rows(batch.inputs, device)
            for start in range(0, len(batch), size):
                part = Batch(batch.inputs, target).rows(start, start + size).to(device)
                inputs = self._network.prepared(part.inputs)
                if isinstance(inputs, Tensor):
                    yield inputs, part.target
                else:
                    yield {_INPUTS: inputs, "input_ids": part.target, "labels": part.target}

    def _batches(self) -> Iterator[Batch]:
        found = False
        for given in self._loader:
            batch, found = checked_batch(given, self._reading.target_key, self._reading.weight_key), True
            if batch.weight is not None:
                raise InputError("laplace-torch knows no weights of examples; give batches (inputs, target)")
            self._likelihood.check_targets(self._outputs, batch.target)
            yield batch
        if not found:
            raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
