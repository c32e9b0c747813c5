"""The Bayesian network: a posterior over the first layer, in front of the user's trained and frozen trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stfbnn.batches import Inputs, OutputFunction, call_model, module_device, output_tensor
from stfbnn.description import ModelDescription, describe_inputs
from stfbnn.errors import InputError, LayerError, NotFittedError
from stfbnn.layer_parameters import differentiate_densely, padding_rows, twins
from stfbnn.likelihood import Likelihood
from stfbnn.locate import FirstLayer
from stfbnn.mixed_precision import Precision, autocast_dtype, cast_to, full_precision
from stfbnn.posterior import ParameterLayout, Posterior, PosteriorFamily
from stfbnn.prior import GaussianPrior, Normal
from stfbnn.provenance import Provenance, StagesSeen, attached
from stfbnn.randomness import generator
from stfbnn.trunk import (
    ChangeGuard,
    FoldingReport,
    apply_first_layer_affine,
    fingerprint,
    fold,
    inputs_left_alone,
    shared_copy,
)
from stfbnn.trunk.offloading import offloaded_trunk

Weights = Literal["sample", "mean"]


class BayesianNetwork(nn.Module):
    """A network whose first layer's parameters are random, w ~ q(w), and whose trunk is frozen.

    Made by `bayesianize`. Called like the model it came from, it returns the model's raw output for one posterior draw;
    with ``weights="mean"`` it is deterministic, with the posterior mean in place. Gradients reach the inputs and the
    posterior's parameters, never the trunk. The trunk shares the model's tensors and stays in evaluation mode whatever
    ``.train()`` says.

    Attributes:
        layer_name: The first layer's dotted name in the model; "" if the model is that layer.
        posterior: q(w).
        prior: p(w).
        trained: The layer's trained parameters, by their own names.
        likelihood: p(y | output), set by `fit`.
        temperature: The temperature T of the posterior, set by `fit`.
        predictive_temperature: τ, which divides every draw's logits; 1 unless `fit` was asked to choose it.
        num_examples: N, the number of training examples, where it is known.
        provenance: The examples that stage one saw; None where nobody has said.
        seen: The examples that shaped the prior, the posterior and τ.
        folding: What was simplified in the trunk, and what was left.
        first_layer: The layer's names and what was found out about it.
        model_description: What identifies the model, beside its weights.
        input_description: Form, shapes, dtypes and ranges of the example inputs; None where they have no such description.
    """

    _scale: Tensor | None
    _shift: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        first_layer: FirstLayer,
        family: PosteriorFamily,
        prior: Normal,
        example_inputs: Inputs | None,
        output: OutputFunction | None = None,
        fold_batch_norm: bool = True,
        beside: BayesianNetwork | None = None,
    ) -> None:
        super().__init__()
        self.layer_name = first_layer.name
        self.first_layer = first_layer
        self.family = family
        self.prior_recipe = prior
        self.output = output
        self._prefix = f"{first_layer.name}." if first_layer.name else ""
        self.input_description = None if example_inputs is None else describe_inputs(example_inputs)
        self.provenance: Provenance | None = attached(model)
        choice = prior.choice
        self.seen = (
            StagesSeen() if choice is None else StagesSeen(prior=choice.seen, prior_candidates=choice.candidates)
        )
        if beside is None:
            self._take_trunk(model, example_inputs, fold_batch_norm)
        else:
            self.share_trunk(beside)
        layer = self.network.get_submodule(self.layer_name)
        self.layout = ParameterLayout.of(self.trained, layer)
        # Of what is inferred: where only some of a layer's parameters are, the others keep their tensors.
        self._twins = {twin: name for twin, name in twins(layer).items() if name in self.trained}
        self._padding = padding_rows(layer)
        weights = self.trained_vector()
        if not bool(torch.isfinite(weights).all()):
            raise LayerError(
                f"the layer {first_layer.name!r} holds NaN or infinite weights; train or load the model again"
            )
        self.prior: GaussianPrior = prior.build(weights, self.layout)
        self.posterior: Posterior = family.build(self.layout, weights, self.prior)
        affine = self.folding.first_layer_affine
        # As buffers, so that they move along; not persistent, for they follow from the trunk.
        self.register_buffer("_scale", None if affine is None else affine.scale, persistent=False)
        self.register_buffer("_shift", None if affine is None else affine.shift, persistent=False)

        self.likelihood: Likelihood | None = None
        self.temperature: float | None = None
        self.predictive_temperature = 1.0
        self.num_examples: int | None = None
        self._forward_dtype: torch.dtype | None = None
        self.seed(0)

    def _take_trunk(self, model: nn.Module, example_inputs: Inputs | None, fold_batch_norm: bool) -> None:
        """Set all that follows from the model and the layer alone, which is what `share_trunk` takes over."""
        self._guard = ChangeGuard(model)
        own = {self._prefix + name for name in self.first_layer.parameters}
        self.trunk_fingerprint = fingerprint(model, exclude=own)
        self.model_fingerprint = fingerprint(model)
        self.model_description = ModelDescription.of(model)
        self.network = shared_copy(model)
        self._trunk_is_shared = False
        layer = self.network.get_submodule(self.layer_name)
        differentiate_densely(layer)
        parameters = dict(layer.named_parameters())
        # The trained values are copied: they stay as the prior's centre whatever becomes of the model.
        self.trained = {name: parameters[name].detach().clone() for name in self.first_layer.parameters}
        self.folding = FoldingReport()
        # Nothing can be folded without inputs on which to check that folding changed nothing.
        if example_inputs is not None:
            self.folding = fold(self.network, self.layer_name, example_inputs, enabled=fold_batch_norm)

    def has_trunk(self, model_fingerprint: str, layer_name: str, folding: dict[str, Any] | None) -> bool:
        """Whether the trunk is that of a model and a layer, folded as a `FoldingReport.record` says."""
        return (self.model_fingerprint, self.layer_name) == (model_fingerprint, layer_name) and (
            self.folding.record() == folding
        )

    def share_trunk(self, other: BayesianNetwork) -> None:
        """Compute with the trunk of another network in place of one's own, so that both take its memory once.

        It computes the same, so ``other`` has to be on the same layer of the same model, on the same device and folded alike;
        that is not checked here. A network that is moved takes a trunk of its own along. Two that share one must not be called
        from two threads at once.
        """
        self._guard = other._guard
        self.trunk_fingerprint, self.model_fingerprint = other.trunk_fingerprint, other.model_fingerprint
        self.model_description = other.model_description
        self.network, self.trained, self.folding = other.network, other.trained, other.folding
        self._trunk_is_shared = other._trunk_is_shared = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BayesianNetwork:
        if self._trunk_is_shared:
            # What moves or converts this network must not do so to the trunk of another.
            self.network, self._trunk_is_shared = shared_copy(self.network), False
        offloaded = offloaded_trunk(self.network)
        if offloaded is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        with offloaded.left_behind(fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        offloaded.compute_on(self.device)
        return self

    @property
    def model(self) -> nn.Module | None:
        """The user's model; None where it was deleted, or stayed behind when this network was pickled."""
        return self._guard.model

    def seed(self, seed: int) -> None:
        """Restart the generator from which calls draw their weights."""
        self._generator = generator(seed, "call")

    @property
    def fitted(self) -> bool:
        """Whether the posterior has been inferred."""
        return self.likelihood is not None

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return module_device(self.posterior)

    def train(self, mode: bool = True) -> BayesianNetwork:
        """Set the flag of this module alone: the trunk's batch-norm statistics and dropout stay frozen."""
        if not isinstance(mode, bool):
            raise InputError(f"training mode is expected to be a boolean, but it is {mode!r}")
        self.training = mode
        return self

    def trained_vector(self) -> Tensor:
        """The layer's trained weights as one vector (d,), in at least float32."""
        return self.layout.flatten({name: _at_least_float32(value) for name, value in self.trained.items()})

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal noise for one draw of weights, from a CPU generator, on this network's device."""
        noise = torch.randn(self.posterior.noise_size, generator=generator)
        return noise.to(device=self.device, dtype=self.posterior.mean_vector().dtype)

    def forward(self, *args: Any, weights: Weights = "sample", **kwargs: Any) -> Any:
        """Run the model with one draw of weights, or at the posterior mean.

        Args:
            *args: The model's own arguments.
            weights: "sample" for a fresh draw q(w) from this network's own generator; "mean" for E_q[w].
            **kwargs: The model's own keyword arguments.

        Returns:
            What the model returns.

        Raises:
            InputError: ``weights`` is neither.
            ModelChangedError: The user's model was changed since `bayesianize`.
        """
        if weights == "sample":
            with full_precision(self.device):
                vector = self.posterior.draw(self.draw_noise(self._generator))
        elif weights == "mean":
            vector = self.posterior.mean_vector()
        else:
            raise InputError(f'weights must be "sample" or "mean", but it is {weights!r}')
        self.check_unchanged()
        return functional_call(self.network, self.substitution(vector), args, kwargs, tie_weights=False)

    def check_unchanged(self) -> None:
        """Refuse to go on with a model that was changed since `bayesianize`.

        Raises:
            ModelChangedError: A parameter or buffer of the user's model was written or replaced, or the file of an offloaded
                trunk was.
        """
        self._guard.check()
        if (offloaded := offloaded_trunk(self.network)) is not None:
            offloaded.file.check()

    def substitution(self, vector: Tensor, deviation: bool = False) -> dict[str, Tensor]:
        """The network's parameters that a weight vector (d,) stands for, by their full names, ready for a call.

        With ``deviation``, those that a difference of two weight vectors stands for: a folded batch norm's shift drops out.
        """
        layer, parameters = self.network.get_submodule(self.layer_name), self.layer_parameters(vector, deviation)
        scale, shift = self._scale, self._shift
        if scale is not None and shift is not None:
            parameters = apply_first_layer_affine(
                layer, parameters, scale, torch.zeros_like(shift) if deviation else shift
            )
        parameters.update({twin: parameters[name] for twin, name in self._twins.items()})
        return {self._prefix + name: value for name, value in parameters.items()}

    def layer_parameters(self, vector: Tensor, deviation: bool = False) -> dict[str, Tensor]:
        """The layer's own parameters that a weight vector (d,) stands for, by their own names and in their own dtypes.

        With ``deviation``, those that a difference of two stands for: what is the same in all draws drops out.
        """
        layer = self.network.get_submodule(self.layer_name)
        parameters = {
            name: value.to(layer.get_parameter(name).dtype) for name, value in self.layout.unflatten(vector).items()
        }
        for name, index in self._padding.items():
            # Their gradients are cut off by definition, so they could not be inferred: they keep their trained values.
            rows = torch.tensor(index, device=vector.device)
            kept = layer.get_parameter(name).detach()[rows]
            parameters[name] = parameters[name].index_copy(0, rows, torch.zeros_like(kept) if deviation else kept)
        return parameters

    def outputs(self, vector: Tensor, inputs: Inputs) -> Tensor:
        """The tensor of outputs for one weight vector (d,); the way in which inference and prediction call the network."""
        substitution = self.substitution(vector)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.network, substitution, args, kwargs, tie_weights=False)

        return self.run(call, inputs)

    def run(self, call: Callable[..., Any], inputs: Inputs) -> Tensor:
        """The tensor of outputs of ``call``, which is the network or stands for it, in the precision that is asked for."""
        with cast_to(self._forward_dtype, self.device), inputs_left_alone(inputs):
            return output_tensor(call_model(call, inputs), self.output)

    @contextmanager
    def computing_in(self, precision: Precision | None) -> Iterator[None]:
        """Within a block, let `outputs` compute in ``precision``, and everything else in full precision.

        Args:
            precision: "32-true", "bf16-mixed", or None for that of a ``torch.autocast`` around the block.

        Raises:
            InputError: The precision is unknown, or the surrounding autocast is to float16.
        """
        before = self._forward_dtype
        self._forward_dtype = (
            before if precision is None and before is not None else autocast_dtype(precision, self.device)
        )
        try:
            with full_precision(self.device):
                yield
        finally:
            self._forward_dtype = before

    @contextmanager
    def layer_forward(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let ``forward`` stand in for the first layer's own forward within a block."""
        layer: Any = self.network.get_submodule(self.layer_name)
        own = layer.__dict__.get("forward")

        # The name that dense layers and convolutions give their argument, by which it may be passed.
        def stand_in(input: Tensor) -> Tensor:  # noqa: A002
            return forward(input)

        layer.forward = stand_in
        # PyTorch's fused transformer layer reads the weights of its parts without calling them, but not where one is hooked.
        watched = layer.register_forward_pre_hook(lambda *_: None)
        try:
            yield
        finally:
            watched.remove()
            del layer.forward
            if own is not None:
                layer.forward = own

    def require_fitted(self) -> Likelihood:
        """The likelihood that `fit` set.

        Raises:
            NotFittedError: `fit` has not run.
        """
        if self.likelihood is None:
            raise NotFittedError("this posterior has not been inferred yet: call stfbnn.fit(bnn, train_loader) first")
        return self.likelihood

    def posterior_state(self) -> dict[str, Any]:
        """Copies of what inference changes: the posterior's parameters and buffers, and the prior's scale."""
        state = {name: value.detach().clone() for name, value in self.posterior.state_dict().items()}
        return {"posterior": state, "prior_std": self.prior.std.clone()}

    @torch.no_grad()
    def load_posterior_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `posterior_state` gave."""
        for name, value in self.posterior.state_dict().items():
            value.copy_(state["posterior"][name])
        self.prior.std.copy_(state["prior_std"])

    def reset_posterior(self) -> None:
        """Put the posterior and the prior back to where `bayesianize` left them."""
        weights = self.trained_vector()
        prior = self.prior_recipe.build(weights, self.layout)
        fresh = self.family.build(self.layout, weights, prior)
        if fresh.state_dict().keys() != self.posterior.state_dict().keys():
            # A mixture that has dropped components gets them back.
            self.posterior = copy.deepcopy(fresh).to(self.posterior.mean_vector())
        self.load_posterior_state({"posterior": fresh.state_dict(), "prior_std": prior.std})

    def extra_repr(self) -> str:
        """The layer, the sizes and the state, for ``print``."""
        total = sum(parameter.numel() for parameter in self.network.parameters())
        state = f"fitted at T={self.temperature:g}" if self.temperature is not None else "not fitted"
        return (
            f"layer={self.layer_name!r}, posterior={self.posterior.family!r}, "
            f"random weights={self.layout.size} of {total}, {state}"
        )


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
