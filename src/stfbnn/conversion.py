"""From a trained network to a Bayesian one: the first of the calls that a user makes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from stfbnn.batches import OutputFunction, as_inputs
from stfbnn.errors import InputError
from stfbnn.layer_listing import advice_on_size
from stfbnn.layer_parameters import has_embeddings
from stfbnn.locate import locate_first_layer
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import PosteriorFamily, resolve_family
from stfbnn.prior import PriorLike, resolve_prior
from stfbnn.wrappers import unwrap


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
        prior = "pretrained" if has_embeddings(plain.get_submodule(first_layer.name)) else "rms"
    recipe = resolve_prior(prior)
    # A module that is registered in two places is drawn in both.
    inside = set(plain.get_submodule(first_layer.name).modules())
    elsewhere = [name for name in first_layer.tied if plain.get_submodule(name.rpartition(".")[0]) not in inside]
    if elsewhere:
        warnings.warn(
            f"the layer {first_layer.name!r} shares parameters with {', '.join(elsewhere)}; there they stay at "
            f"their trained values, for only the first layer becomes random",
            stacklevel=2,
        )
    if layer is None and (advice := advice_on_size(plain, inputs, first_layer.name)) is not None:
        warnings.warn(advice, stacklevel=2)
    return BayesianNetwork(plain, first_layer, family, recipe, inputs, output, fold_batch_norm)


def parameter_counts(bnn: BayesianNetwork) -> Mapping[str, int]:
    """Scalars in the random layer and in the whole network."""
    total = sum(parameter.numel() for parameter in bnn.network.parameters())
    return {"random": bnn.layout.size, "total": total}
