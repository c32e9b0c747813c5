"""The way back: a plain network with the posterior's mean in its first layer."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn

from stfbnn.errors import InputError, LayerError
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import components_of
from stfbnn.trunk import fingerprint
from stfbnn.wrappers import unwrap


def merge(bnn: BayesianNetwork, model: nn.Module | None = None) -> nn.Module:
    """Make a plain network of the user's own class, whose first layer holds the mean of the posterior.

    In evaluation mode it computes ``bnn(x, weights="mean")``: exactly where nothing was folded, else up to the rounding of
    folding. It costs no more than the trained network, needs no stfbnn and knows nothing of its uncertainty. A predictive
    temperature τ is not a part of it: where one was chosen, divide the logits by ``bnn.predictive_temperature``.

    Args:
        bnn: The network, after `fit`.
        model: The trained network, where it was deleted or ``bnn`` was pickled; else None, for ``bnn`` knows it.

    Returns:
        A copy of the trained network that shares no tensor with it: batch norms, modes, hooks and ``requires_grad`` are the
        model's, on the model's device. A first layer whose parameters were tied to other places is no longer tied to them, as
        in the Bayesian network; then a warning says so.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: An argument is wrong, or the model is not known or another one.
        LayerError: The model cannot be copied.
    """
    if not isinstance(bnn, BayesianNetwork):
        raise InputError(f"merge takes what stfbnn.bayesianize returned, but it was given a {type(bnn).__name__}")
    bnn.require_fitted()
    bnn.check_unchanged()
    source = _source(bnn, model)
    if len(components_of(bnn.posterior)) > 1:
        warnings.warn(
            "the mean of a mixture lies between disparate optima, where the network may be poor; predict with draws instead",
            stacklevel=2,
        )
    try:
        merged = copy.deepcopy(source)
    except Exception as error:
        raise LayerError(f"the model cannot be copied by copy.deepcopy: {error}") from error
    layer = merged.get_submodule(bnn.layer_name)
    for name, value in bnn.layer_parameters(bnn.posterior.mean_vector()).items():
        _replace(layer, name, value)
    places, own = dict(merged.named_parameters(remove_duplicate=False)), set(layer.parameters())
    untied = [place for place in bnn.first_layer.tied if places[place] not in own]
    if untied:
        warnings.warn(
            f"the layer {bnn.layer_name!r} of the merged network is no longer tied to {', '.join(untied)}, which keep the "
            f"trained values; ties that are made again (as transformers does when it loads a model) undo the merge",
            stacklevel=2,
        )
    return merged


def _source(bnn: BayesianNetwork, model: nn.Module | None) -> nn.Module:
    if model is None:
        known = bnn.model
        if known is None:
            raise InputError(
                "the model is not known: it was deleted, or this network was pickled; pass it, as in merge(bnn, model)"
            )
        return known
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    plain = unwrap(model)
    if fingerprint(plain) != bnn.model_fingerprint:
        raise InputError(
            f"this {type(plain).__name__} is not the model that the posterior was inferred for, with the weights that it had "
            f"then; pass that one"
        )
    return plain


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of one, under all names that it has in the layer.

    It is not written into, for places outside of the layer may hold it too, and keep it.
    """
    before = layer.get_parameter(name)
    # A copy always: a value that has the right dtype already would stay the posterior's own memory.
    after = nn.Parameter(value.detach().to(before, copy=True), requires_grad=before.requires_grad)
    for part in layer.modules():
        for key in [key for key, parameter in part._parameters.items() if parameter is before]:
            setattr(part, key, after)
