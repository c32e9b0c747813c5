"""Save and load: a fitted posterior as a small folder, which upgrades the one model that it was inferred for.

The folder holds nothing of the trunk: ``config.json``, ``posterior.safetensors`` (8 bytes for each first-layer parameter
in float32, for a mean-field posterior) and a model card. The format is specified in docs/artifact-format.md. Loading
executes no code from the folder.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.artifact_files import Config, check_target, check_values, read_folder, tensor_specs, write_folder
from stfbnn.batches import Inputs, OutputFunction, as_inputs, module_device
from stfbnn.description import ModelDescription, stand_in
from stfbnn.errors import ArtifactError, InputError, StfbnnError
from stfbnn.likelihood import Likelihood, build_likelihood
from stfbnn.locate import FirstLayer
from stfbnn.model_card import check_metrics, model_card
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import PointMassPosterior, Posterior, PosteriorFamily, build_family, components_of
from stfbnn.prior import GaussianPrior, Normal
from stfbnn.trunk import fingerprint
from stfbnn.wrappers import unwrap


def save(
    bnn: BayesianNetwork,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save a fitted posterior; the folder appears whole or not at all.

    The model itself is not saved: keep it, for `load` needs it. Which examples stage one saw (``bnn.provenance``) is not
    saved either: 8 bytes an example would soon outweigh the posterior, and anyone who holds an example could test by its
    hash whether it was a training example.

    Args:
        bnn: The network, after `fit`.
        directory: The folder to make; its parents are created.
        overwrite: Replace an artifact that is there. It is kept until the new one is whole.
        metrics: Figures for the model card, by name, such as ``{"test NLL": 0.28}``.

    Returns:
        The folder's absolute path.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: The folder is there already, an argument is wrong, the posterior is not finite, or the posterior
            family, the prior or the likelihood is of the user's own making and could not be built again by its name.
    """
    if not isinstance(bnn, BayesianNetwork):
        raise InputError(f"save takes what stfbnn.bayesianize returned, but it was given a {type(bnn).__name__}")
    likelihood = bnn.require_fitted()
    target = check_target(directory, overwrite)
    figures = check_metrics(metrics or {})
    bnn.check_unchanged()
    tensors = bnn.posterior.tensors()
    try:
        check_values(tensors)
        _check_std(bnn.posterior)
    except ArtifactError as error:
        raise InputError(f"{error}: inference diverged; call fit again with a lower learning rate") from error
    entries = _entries(bnn, likelihood)
    try:
        as_read = json.loads(json.dumps(entries, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the configuration of the posterior or the likelihood is not JSON ({error})") from error
    _require_rebuildable(bnn, likelihood, Config(as_read))
    write_folder(target, entries, tensors, model_card(bnn, target.name, figures), overwrite)
    return target


def load(
    directory: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    map_location: str | torch.device | None = None,
    output: OutputFunction | None = None,
) -> BayesianNetwork:
    """Load a saved posterior onto the model that it was inferred for.

    On the CPU and with the same versions, predictions of the same seed equal those before saving bit by bit. `fit` can go
    on from here. ``provenance`` is what is attached to ``model``, and None where nothing is.

    Args:
        directory: What `save` wrote.
        model: The trained network, with the very weights and buffers that it had; wrappers are looked through. It is left
            as it was.
        example_inputs: A small batch as the model takes it; only needed where a warning asks for it.
        map_location: The device of the result; None for the model's. The model is not moved.
        output: How to take the predictions out of what the model returns, as for `bayesianize`: a function cannot be saved.

    Returns:
        The fitted network.

    Raises:
        ArtifactError: A file is missing or damaged, the format is unknown, or the model is another one; says which.
        InputError: An argument is wrong.
    """
    device = _device(map_location)
    bnn = load_beside((), directory, model, example_inputs, output)
    return bnn if device is None else bnn.to(device)


def load_beside(
    others: Iterable[BayesianNetwork],
    directory: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any = None,
    output: OutputFunction | None = None,
) -> BayesianNetwork:
    """`load`, with the trunk of one of ``others`` in place of a new one, where one of them has the same.

    Args:
        others: Networks on this very model, on its device.
        directory: As of `load`; so are the other arguments and the exceptions.
        model: The trained network.
        example_inputs: A small batch.
        output: The output function.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    inputs = None if example_inputs is None else as_inputs(example_inputs)
    config, tensors = read_folder(directory)
    if config.get("output_function", bool) and output is None:
        raise InputError(
            "this posterior was inferred with an output function, which cannot be saved; pass the same one as output="
        )
    plain = unwrap(model)
    first_layer = _first_layer(config)
    _require_same_model(plain, config)
    family, prior, likelihood = _family(config), _prior(config), _likelihood(config)
    bnn = _restore_network(plain, first_layer, family, prior, config, inputs, output, others)
    with torch.no_grad():
        bnn.posterior.load_tensors(tensors)
        _check_std(bnn.posterior)
        bnn.prior.set_scales(torch.tensor(_prior_scales(config, bnn), dtype=torch.float64))
    bnn.temperature = config.positive("temperature")
    bnn.predictive_temperature = config.positive("predictive_temperature")
    bnn.num_examples = config.get("num_examples", int, type(None))
    bnn.likelihood = likelihood.to(bnn.device)
    return bnn


def _entries(bnn: BayesianNetwork, likelihood: Likelihood) -> dict[str, Any]:
    """All of ``config.json`` but what describes the files."""
    layer, scales = bnn.first_layer, bnn.prior.scales.tolist()
    return {
        "library_version": _library_version(),
        "layer": {
            "name": layer.name,
            "parameters": list(layer.parameters),
            "tensors": tensor_specs(bnn.trained),
            "calls": layer.calls,
            "tied": list(layer.tied),
            "skipped": list(layer.skipped),
        },
        "model": {
            **asdict(bnn.model_description),
            "fingerprint": bnn.model_fingerprint,
            "trunk_fingerprint": bnn.trunk_fingerprint,
        },
        "posterior": {"family": bnn.posterior.family, "config": bnn.posterior.config()},
        "prior": {"recipe": bnn.prior_recipe.config(), "std": scales if bnn.prior_recipe.per_parameter else scales[0]},
        "likelihood": {"name": likelihood.name, "config": likelihood.config()},
        "temperature": bnn.temperature,
        "predictive_temperature": bnn.predictive_temperature,
        "num_examples": bnn.num_examples,
        "example_inputs": bnn.input_description,
        "folding": bnn.folding.record(),
        "output_function": bnn.output is not None,
    }


def _require_rebuildable(bnn: BayesianNetwork, likelihood: Likelihood, config: Config) -> None:
    """Refuse what `load` could not build again: it would be noticed too late."""
    advice = "objects of the user's own making cannot be saved; keep their state yourself"
    parts: list[tuple[str, object, Any]] = [
        ("posterior family", bnn.family, _family),
        ("prior", bnn.prior_recipe, _prior),
        ("likelihood", likelihood, _likelihood),
    ]
    for what, own, build in parts:
        try:
            rebuilt = build(config)
        except ArtifactError as error:
            raise InputError(f"the {what} {type(own).__name__} cannot be built again by its name: {advice}") from error
        if type(rebuilt) is not type(own):
            raise InputError(
                f"the {what} is a {type(own).__name__}, which would be loaded as a {type(rebuilt).__name__}: {advice}"
            )
    weights = bnn.layout.flatten(bnn.trained).to(bnn.prior.mean)
    mean = weights if bnn.prior_recipe.center == "pretrained" else torch.zeros_like(weights)
    if type(bnn.prior) is not GaussianPrior or not torch.equal(mean, bnn.prior.mean):
        raise InputError(f"the prior is not the one that its recipe {bnn.prior_recipe} builds: {advice}")
    twin = _family(config).build(bnn.layout, bnn.posterior.mean_vector().detach(), bnn.prior)
    if type(twin) is not type(bnn.posterior) or tensor_specs(twin.tensors()) != tensor_specs(bnn.posterior.tensors()):
        raise InputError(
            f"the posterior is a {type(bnn.posterior).__name__}, which would be loaded as a {type(twin).__name__} with "
            f"other tensors: {advice}"
        )


def _family(config: Config) -> PosteriorFamily:
    name = config.text("posterior.family")
    try:
        return build_family(name, config.mapping("posterior.config"))
    except (StfbnnError, TypeError) as error:
        raise ArtifactError(f"config.json: the posterior {name!r} cannot be built ({error})") from error


def _prior(config: Config) -> Normal:
    try:
        prior = Normal(**config.mapping("prior.recipe"))
    except (StfbnnError, TypeError) as error:
        raise ArtifactError(f"config.json: the prior cannot be built ({error})") from error
    named = list(config.texts("layer.parameters"))
    if isinstance(prior.std, Mapping) and sorted(prior.std) != sorted(named):
        raise ArtifactError(
            f"config.json: the prior has scales for {list(prior.std)}, but the layer's parameters are {named}"
        )
    return prior


def _prior_scales(config: Config, bnn: BayesianNetwork) -> list[float]:
    if not bnn.prior_recipe.per_parameter:
        return [config.positive("prior.std")]
    scales = config.positives("prior.std")
    if len(scales) != len(bnn.layout.names):
        raise ArtifactError(
            f"config.json: 'prior.std' has {len(scales)} numbers, but the layer has {len(bnn.layout.names)} parameters"
        )
    return scales


def _likelihood(config: Config) -> Likelihood:
    name = config.text("likelihood.name")
    try:
        return build_likelihood(name, config.mapping("likelihood.config"))
    except (StfbnnError, TypeError, ValueError) as error:
        raise ArtifactError(f"config.json: the likelihood {name!r} cannot be built ({error})") from error


def _first_layer(config: Config) -> FirstLayer:
    return FirstLayer(
        name=config.text("layer.name"),
        parameters=config.texts("layer.parameters"),
        calls=config.get("layer.calls", int),
        tied=config.texts("layer.tied"),
        skipped=config.texts("layer.skipped"),
    )


def _require_same_model(model: nn.Module, config: Config) -> None:
    """Refuse any model but the one that the posterior was inferred for, and say in what it differs."""
    name = config.text("layer.name")
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(
            f"the model ({type(model).__name__}) has no layer {name!r}, for which this posterior was inferred (in a "
            f"{config.text('model.class_name')}): another architecture"
        ) from error
    found, said = tensor_specs(dict(layer.named_parameters())), config.mapping("layer.tensors")
    if list(found) != list(config.texts("layer.parameters")) or found != said:
        raise ArtifactError(
            f"the layer {name!r} has the parameters {found}, but this posterior was inferred for {said}: another "
            f"architecture"
        )
    here = ModelDescription.of(model)
    both = (
        f"the posterior was inferred for a {config.text('model.class_name')} of "
        f"{config.get('model.parameters', int)} parameters, and this is a {here.class_name} of {here.parameters}"
    )
    if here.structure != config.text("model.structure"):
        raise ArtifactError(
            f"the model has another architecture: names, shapes or dtypes of its parameters or buffers differ ({both})"
        )
    if here.modules != config.text("model.modules"):
        raise ArtifactError(
            f"the model has another architecture: its tensors are alike, but the names or classes of its modules differ, "
            f"as with another activation function ({both})"
        )
    if fingerprint(model) == config.text("model.fingerprint"):
        return
    prefix = f"{name}." if name else ""
    remedy = "load the weights that the model had when its posterior was inferred"
    if fingerprint(model, exclude={prefix + own for own in found}) == config.text("model.trunk_fingerprint"):
        raise ArtifactError(
            f"the trained weights of the layer {name!r} are not those that this posterior started from (the rest of the "
            f"model is the same): {remedy}"
        )
    if here.buffers != config.text("model.buffers"):
        raise ArtifactError(
            f"the model has the same architecture but other buffers (such as batch norm's running statistics), and "
            f"perhaps other weights: {remedy}; if it ran in training mode, its statistics moved"
        )
    raise ArtifactError(f"the model has the same architecture but other trunk weights: {remedy}")


def _restore_network(
    model: nn.Module,
    first_layer: FirstLayer,
    family: PosteriorFamily,
    prior: Normal,
    config: Config,
    inputs: Inputs | None,
    output: OutputFunction | None,
    others: Iterable[BayesianNetwork],
) -> BayesianNetwork:
    """Build the network anew, with batch norms folded as they were."""
    folding = config.get("folding", dict, type(None))
    wanted = (config.text("model.fingerprint"), first_layer.name, folding)
    beside = next((other for other in others if other.has_trunk(*wanted)), None)

    def build(with_inputs: Inputs | None) -> BayesianNetwork:
        return BayesianNetwork(model, first_layer, family, prior, with_inputs, output, beside=beside)

    if folding is None or beside is not None:
        bnn = build(None)
    elif inputs is not None:
        return build(inputs)
    else:
        try:
            bnn = build(_stand_in(config, module_device(model)))
            same = bnn.folding.record() == folding
        except InputError:
            same = False
        if not same:
            warnings.warn(
                "batch norms are left unfolded, which is as exact but slower and takes more memory, because the saved "
                "description of the example inputs does not lead to the folding that was saved; pass example_inputs= to load",
                stacklevel=3,
            )
            bnn = build(None)
    bnn.input_description = config.get("example_inputs", dict, type(None))
    return bnn


def _stand_in(config: Config, device: torch.device) -> Inputs:
    description = config.get("example_inputs", dict, type(None))
    if description is None:
        raise InputError("the example inputs have no description")
    try:
        return stand_in(description, device)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"the description of the example inputs is unusable: {error}") from error


def _check_std(posterior: Posterior) -> None:
    for part in components_of(posterior):
        std: Tensor = part.std_vector().detach()
        positive = torch.isfinite(std) & ((std > 0) | isinstance(part, PointMassPosterior))
        bad = int((~positive).sum())
        if bad:
            raise ArtifactError(f"the posterior has {bad} standard deviations that are not positive and finite")


def _device(map_location: str | torch.device | None) -> torch.device | None:
    if map_location is None:
        return None
    try:
        return torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"map_location={map_location!r} is not a device; give one such as 'cpu' or 'cuda:0'"
        ) from error


def _library_version() -> str:
    try:
        return version("stfbnn")
    except PackageNotFoundError:
        # Run from a source tree that was never installed.
        return "unknown"
