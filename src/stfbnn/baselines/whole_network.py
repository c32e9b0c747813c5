"""The fully Bayesian network: a mean-field Gaussian over all weights, what "Bayesian neural network" means elsewhere.

It runs on the machinery of the library with the whole network in the first layer's place, so that the comparison is of methods
and not of two programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stfbnn.baselines.first_batch import first_batch
from stfbnn.baselines.predictor import PLAIN, Reading
from stfbnn.batches import OutputFunction, as_inputs, call_model, module_device, rows, split_batch, to_device
from stfbnn.errors import InputError, LayerError
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.inference.loaders import kept_generators
from stfbnn.layer_parameters import has_embeddings
from stfbnn.likelihood import LikelihoodLike
from stfbnn.locate import FirstLayer, is_passed_over, locate_first_layer
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanField, PosteriorFamily, resolve_family
from stfbnn.prior import Normal, PriorLike, resolve_prior
from stfbnn.randomness import seeded
from stfbnn.trunk import shared_copy
from stfbnn.wrappers import unwrap

Start = Literal["pretrained", "scratch"]

# What made both engines converge on small networks from both starts; see `engine_settings`.
_INITIAL_STD, _INITIAL_STD_WITH_NORMS, _WANDER = 0.01, 0.003, 10.0
_BACKPROP_RATE: dict[Start, float] = {"pretrained": 1e-3, "scratch": 3e-3}
_SCRATCH_PRIOR = 0.5


def fit_whole_network(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    val_loader: Iterable[Any] | None = None,
    start: Start = "pretrained",
    engine: str = "natural-gradient",
    engine_options: Mapping[str, Any] | None = None,
    initial_std: float | None = None,
    prior: PriorLike | None = None,
    epochs: int = 10,
    likelihood: LikelihoodLike = "auto",
    seed: int = 0,
    reading: Reading = PLAIN,
    **options: Any,
) -> tuple[BayesianNetwork, FitRun]:
    """Infer a mean-field posterior over all of a network's weights; the user's network is left as it is.

    Normalisations and learned activations keep their values, as they are nobody's first layer either: their few scales are not
    worth a posterior, and under a prior at zero they would switch channels off. From the pretrained network batch norm also
    keeps its statistics. From scratch there are none: they are measured once, in one pass at the random start, and kept. That
    is a normalised initialisation and less than training with batch norm, so figures of such a network from scratch are not the
    best that a fully Bayesian network could come to; without batch norm nothing is held back.

    Args:
        model: The network, trained; from scratch only its architecture counts.
        train_loader: As for ``stfbnn.fit``.
        val_loader: Likewise: chooses the temperature, for which each one that is tried is a whole run of its own.
        start: Where the posterior's mean starts: at the trained weights, or at a fresh random initialisation by each module's
            own ``reset_parameters``.
        engine: "natural-gradient" or "bayes-by-backprop".
        engine_options: The engine's settings, in place of those of `engine_settings`.
        initial_std: σ at the start: of all weights for Bayes by Backprop; for natural gradient the largest, which the curvature
            of the data may narrow. None takes 0.01, and 0.003 where there is batch norm.
        prior: As for ``stfbnn.bayesianize``. None takes N(0, 0.5²) from scratch; and from the trained weights their root mean
            square, parameter by parameter, or the trained weights themselves as the centre where there are embeddings.
        epochs: Passes over the data for each temperature.
        likelihood: As for ``stfbnn.fit``.
        seed: Of the initialisation and of inference.
        reading: How batches, and what the network returns, are read.
        **options: Further arguments of ``stfbnn.fit``, such as ``temperatures`` or ``predictive_temperature``.

    Returns:
        The network with its posterior, as any that ``stfbnn.predict`` takes, and the history. It cannot be saved as an
        artifact: that is for a layer.

    Raises:
        InputError: An argument or a batch is not usable, or a module does not say how it is initialised.
        LayerError: The network cannot be made Bayesian.
    """
    if start not in ("pretrained", "scratch"):
        raise InputError(f'start must be "pretrained" or "scratch", but it is {start!r}')
    plain = unwrap(model)
    if initial_std is None:
        initial_std = _INITIAL_STD_WITH_NORMS if _batch_norms(plain) else _INITIAL_STD
    settings = engine_settings(engine, start, initial_std, engine_options)
    first = first_batch(train_loader, seed, reading)
    example = to_device(rows(first.inputs, 0, 2), module_device(plain))
    whole = _whole(plain, example)
    if start == "scratch":
        plain = reinitialized_copy(plain, seed)
        _measure_batch_norm(plain, train_loader, seed, reading)
    recipe = resolve_prior(_default_prior(plain, whole, start) if prior is None else prior)
    # Natural gradient finds its own widths; what is given there would only be overwritten.
    family = MeanField(initial_std)
    bnn = BayesianNetwork(plain, whole, family, recipe, example, reading.output)
    if start == "scratch":
        # What the trained network saw, this one has not.
        bnn.provenance = None
    run = fit(
        bnn,
        train_loader,
        val_loader=val_loader,
        engine=engine,
        engine_options=settings,
        epochs=epochs,
        likelihood=likelihood,
        seed=seed,
        target_key=reading.target_key,
        weight_key=reading.weight_key,
        **options,
    )
    return bnn, run


def bayesianize_whole(
    model: nn.Module,
    example_inputs: Any,
    *,
    posterior: str | PosteriorFamily = "mean-field",
    prior: PriorLike = "pretrained",
    output: OutputFunction | None = None,
) -> BayesianNetwork:
    """Make all weights of a trained network Bayesian, without inferring anything yet; the model is left as it is.

    Which weights those are is said at `fit_whole_network`. With ``stfbnn.guarantees.fit_bound`` it is PAC-Bayes with backprop.

    Args:
        model: The trained network.
        example_inputs: A small batch as the model takes it.
        posterior: As for ``stfbnn.bayesianize``; a covariance over all weights is for tiny networks.
        prior: As for ``stfbnn.bayesianize``.
        output: As for ``stfbnn.bayesianize``.

    Raises:
        InputError: An argument is wrong, or the example inputs do not run.
        LayerError: The network cannot be made Bayesian.
    """
    plain, inputs = unwrap(model), as_inputs(example_inputs)
    family, recipe = resolve_family(posterior), resolve_prior(prior)
    return BayesianNetwork(plain, _whole(plain, inputs), family, recipe, inputs, output)


def engine_settings(
    engine: str, start: Start, initial_std: float, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The engine's settings for a whole network.

    Found on small networks, with and without batch norm. A whole network does not bear the widths that curvature and prior
    allow each weight for itself: together they drown the signal, and from scratch the mean then collapses to the prior's. So
    both engines start narrow. Natural gradient takes steps ten times as large as for a layer, since its curvature starts large;
    Bayes by Backprop the rates of Adam that are common for the mean.

    Args:
        engine: "natural-gradient" or "bayes-by-backprop".
        start: Where the mean starts.
        initial_std: The width at the start.
        given: Settings of the user's own; they win.

    Raises:
        InputError: The engine is another one.
    """
    if engine == "natural-gradient":
        own: dict[str, Any] = {"largest_std": initial_std, "wander": _WANDER}
    elif engine == "bayes-by-backprop":
        own = {"learning_rate": _BACKPROP_RATE[start]}
    else:
        raise InputError(f'engine must be "natural-gradient" or "bayes-by-backprop", but it is {engine!r}')
    return {**own, **(given or {})}


def reinitialized_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy in evaluation mode whose every module has drawn its parameters anew, by its own ``reset_parameters``.

    Args:
        model: The network, which is not changed.
        seed: Of the draws; the global generators are left as they were.

    Raises:
        InputError: A module holds parameters and has no such method.
        LayerError: The network cannot be copied.
    """
    fresh = shared_copy(model)
    with torch.no_grad(), seeded(seed, "scratch"):
        # The copy shares its memory with the model up to here; tied parameters are one object and stay tied.
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.data = tensor.data.clone()
        for name, module in fresh.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise InputError(
                    f"the module {name!r} ({type(module).__name__}) has parameters of its own and no reset_parameters(), so it "
                    f'does not say how it is initialised; give it that method, or take start="pretrained"'
                )
    return fresh


def _whole(model: nn.Module, example: Any) -> FirstLayer:
    """The network as its own first layer, without the parameters of what is passed over."""
    located = locate_first_layer(model, example, "")
    kept = {
        id(parameter)
        for module in model.modules()
        if is_passed_over(module)
        for parameter in module.parameters(recurse=False)
    }
    names = tuple(name for name, parameter in model.named_parameters() if id(parameter) not in kept)
    if not names:
        raise LayerError(
            "the network's only parameters are those of normalisations and activations, which are passed over"
        )
    return FirstLayer("", names, located.calls, (), ())


def _default_prior(model: nn.Module, whole: FirstLayer, start: Start) -> PriorLike:
    if start == "scratch":
        return _SCRATCH_PRIOR
    if has_embeddings(model):
        return "pretrained"
    values = {name: model.get_parameter(name).detach().double() for name in whole.parameters}
    sizes = {name: float(value.square().mean().sqrt()) for name, value in values.items()}
    if not any(sizes.values()):
        raise InputError("all weights of the network are zero, so that they give the prior no scale; pass prior=")
    # Biases that training left at zero say nothing of their scale: they take that of all weights together.
    total = sum(float(value.square().sum()) for value in values.values()) / sum(
        value.numel() for value in values.values()
    )
    return Normal(std={name: size or total**0.5 for name, size in sizes.items()})


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Those with statistics of their own."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def _measure_batch_norm(network: nn.Module, loader: Iterable[Any], seed: int, reading: Reading) -> None:
    """Set the running statistics to the average over one pass; nothing else is in training mode meanwhile."""
    norms = _batch_norms(network)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    device = module_device(network)
    for norm in norms:
        norm.reset_running_stats()
        # The plain average over batches.
        norm.momentum, norm.training = None, True
    try:
        with seeded(seed, "batch-norm"), kept_generators(loader):
            for batch in loader:
                inputs, _ = split_batch(batch, reading.target_key, True, reading.weight_key)
                call_model(network, to_device(inputs, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False
