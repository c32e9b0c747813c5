"""The Bayesian network: a posterior over the first layer, in front of the user's trained and frozen trunk."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stfbnn.batches import Inputs, OutputFunction, as_inputs, call_model, module_device, output_tensor
from stfbnn.description import ModelDescription, describe_inputs
from stfbnn.errors import InputError, LayerError, NotFittedError
from stfbnn.likelihood import Likelihood
from stfbnn.locate import FirstLayer, locate_first_layer
from stfbnn.mixed_precision import Precision, autocast_dtype, cast_to, full_precision
from stfbnn.posterior import ParameterLayout, Posterior, PosteriorFamily, resolve_family
from stfbnn.prior import GaussianPrior, Normal, PriorLike, resolve_prior
from stfbnn.provenance import Provenance, attached
from stfbnn.randomness import generator
from stfbnn.trunk import ChangeGuard, FoldingReport, apply_first_layer_affine, fingerprint, fold, shared_copy
from stfbnn.wrappers import unwrap

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
    ) -> None:
        super().__init__()
        self.layer_name = first_layer.name
        self.first_layer = first_layer
        self.family = family
        self.prior_recipe = prior
        self.output = output
        self._guard = ChangeGuard(model)
        self._prefix = f"{first_layer.name}." if first_layer.name else ""
        own = {self._prefix + name for name in first_layer.parameters}
        self.trunk_fingerprint = fingerprint(model, exclude=own)
        self.model_fingerprint = fingerprint(model)
        self.model_description = ModelDescription.of(model)
        self.input_description = None if example_inputs is None else describe_inputs(example_inputs)
        self.provenance: Provenance | None = attached(model)

        self.network = shared_copy(model)
        # The trained values are copied: they stay as the prior's centre whatever becomes of the model.
        layer = self.network.get_submodule(first_layer.name)
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            # Sparse gradients do not flow into a vector of weights, and rescaled ones are not gradients of the loss.
            layer.sparse = layer.scale_grad_by_freq = False
        self.trained = {name: dict(layer.named_parameters())[name].detach().clone() for name in first_layer.parameters}
        self.layout = ParameterLayout.of(self.trained)
        weights = self.trained_vector()
        if not bool(torch.isfinite(weights).all()):
            raise LayerError(
                f"the layer {first_layer.name!r} holds NaN or infinite weights; train or load the model again"
            )
        self.prior: GaussianPrior = prior.build(weights, self.layout)
        self.posterior: Posterior = family.build(self.layout, weights, self.prior)
        self.folding = FoldingReport()
        # Nothing can be folded without inputs on which to check that folding changed nothing.
        if example_inputs is not None:
            self.folding = fold(self.network, first_layer.name, example_inputs, enabled=fold_batch_norm)
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
            ModelChangedError: A parameter or buffer of the user's model was written or replaced.
        """
        self._guard.check()

    def substitution(self, vector: Tensor, deviation: bool = False) -> dict[str, Tensor]:
        """The network's parameters that a weight vector (d,) stands for, by their full names, ready for a call.

        With ``deviation``, those that a difference of two weight vectors stands for: a folded batch norm's shift drops out.
        """
        layer = self.network.get_submodule(self.layer_name)
        parameters = {
            name: value.to(layer.get_parameter(name).dtype) for name, value in self.layout.unflatten(vector).items()
        }
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            # Its gradient is cut off by definition, so it could not be inferred: it keeps its trained value.
            row = torch.tensor([layer.padding_idx], device=vector.device)
            parameters["weight"] = parameters["weight"].index_copy(0, row, layer.weight.detach()[row])
        scale, shift = self._scale, self._shift
        if scale is not None and shift is not None:
            parameters = apply_first_layer_affine(
                layer, parameters, scale, torch.zeros_like(shift) if deviation else shift
            )
        return {self._prefix + name: value for name, value in parameters.items()}

    def outputs(self, vector: Tensor, inputs: Inputs) -> Tensor:
        """The tensor of outputs for one weight vector (d,); the way in which inference and prediction call the network."""
        substitution = self.substitution(vector)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.network, substitution, args, kwargs, tie_weights=False)

        return self.run(call, inputs)

    def run(self, call: Callable[..., Any], inputs: Inputs) -> Tensor:
        """The tensor of outputs of ``call``, which is the network or stands for it, in the precision that is asked for."""
        with cast_to(self._forward_dtype, self.device):
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
        layer.forward = forward
        try:
            yield
        finally:
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


def bayesianize(
    model: nn.Module,
    example_inputs: Any,
    layer: str | None = None,
    posterior: str | PosteriorFamily = "mean-field",
    prior: PriorLike | None = None,
    output: OutputFunction | None = None,
    fold_batch_norm: bool = True,
) -> BayesianNetwork:
    """Make the first layer of a trained network Bayesian; the model itself is left as it was.

    Args:
        model: The trained network; wrappers such as DataParallel or a compiled module are looked through.
        example_inputs: A small batch as the model takes it: a tensor for ``model(x)``, a tuple for ``model(*x)``, a
            mapping for ``model(**x)``. The first layer is found by running it once.
        layer: The layer's name where the first one is not wanted.
        posterior: The family of q(w): "mean-field", or a recipe such as ``stfbnn.MeanField(initial_std=0.01)``.
        prior: p(w): a standard deviation s for N(0, s²), or a mapping with one for each of the layer's parameters; "rms" (s
            from the trained weights), "rms-per-parameter"; "empirical-bayes" (s learned); "pretrained" (centred on the trained
            weights); or ``stfbnn.Normal(…)``. None takes "rms", and "pretrained" for embedding layers, whose rows for tokens
            that never occur would otherwise be pulled to zero.
        output: How to take the tensor of predictions out of what the model returns, where that is neither a tensor nor has
            ``logits``.
        fold_batch_norm: Fold frozen batch normalisation into the layers before it where that is exact.

    Returns:
        The Bayesian network, to be given to `fit`. Its initial posterior mean is the trained layer.

    Raises:
        LayerError: The model has no usable first layer, or the named one is not usable.
        InputError: An argument is wrong, or the example inputs do not run.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    inputs = as_inputs(example_inputs)
    family = resolve_family(posterior)
    plain = unwrap(model)
    first_layer = locate_first_layer(plain, inputs, layer)
    if prior is None:
        is_embedding = isinstance(plain.get_submodule(first_layer.name), nn.Embedding | nn.EmbeddingBag)
        prior = "pretrained" if is_embedding else "rms"
    recipe = resolve_prior(prior)
    if first_layer.tied:
        warnings.warn(
            f"the layer {first_layer.name!r} shares parameters with {', '.join(first_layer.tied)}; there they stay at "
            f"their trained values, for only the first layer becomes random",
            stacklevel=2,
        )
    return BayesianNetwork(plain, first_layer, family, recipe, inputs, output, fold_batch_norm)


def parameter_counts(bnn: BayesianNetwork) -> Mapping[str, int]:
    """Scalars in the random layer and in the whole network."""
    total = sum(parameter.numel() for parameter in bnn.network.parameters())
    return {"random": bnn.layout.size, "total": total}


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
