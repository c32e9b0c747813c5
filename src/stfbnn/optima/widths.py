"""Each layer alone made Bayesian, with one prior and one budget: is the first layer the right one for this network?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, OutputFunction
from stfbnn.checkpoint import prepare_checkpoint, previous_path
from stfbnn.conversion import bayesianize
from stfbnn.errors import CheckpointError, InputError, LayerError
from stfbnn.files import write_text
from stfbnn.inference.checks import require_count
from stfbnn.inference.engines import ENGINES
from stfbnn.inference.first_look import first_batch, two_rows
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.inference.loaders import count_examples, kept_generators, length, require_rereadable
from stfbnn.inference.options import TEMPERATURES, temperature_schedule
from stfbnn.inference.quiet import told_once
from stfbnn.layer_listing import LayerChoice, layer_choices
from stfbnn.likelihood import LikelihoodLike
from stfbnn.likelihood.names import resolve_likelihood
from stfbnn.mixed_precision import Precision
from stfbnn.network import BayesianNetwork
from stfbnn.optima.width_figures import HELD_OUT, TEST, Judge, JudgedData, LabelledSet, Measured, read_foreign
from stfbnn.optima.width_table import Difference, LayerComparison, LayerWidth
from stfbnn.prior import PriorLike, resolve_prior
from stfbnn.progress import progress_bar
from stfbnn.randomness import derive_seed
from stfbnn.trunk import fingerprint
from stfbnn.wrappers import unwrap


def compare_layers(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    layers: Sequence[str] | Literal["all"] | None = None,
    most: int = 8,
    test_loader: Iterable[Any] | None = None,
    outside: Mapping[str, Any] | None = None,
    epochs: int = 5,
    temperature: float | Literal["held-out"] = 0.1,
    prior: PriorLike | None = "rms",
    likelihood: LikelihoodLike = "auto",
    engine: str = "auto",
    samples: int = 32,
    max_seen_share: float = 0.02,
    seed: int = 0,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    precision: Precision | None = None,
    output: OutputFunction | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> LayerComparison:
    """Make each layer alone Bayesian and compare what comes of it, on held-out data that no stage has seen.

    Every layer gets a mean-field posterior, the same recipe of a prior, the same fit and the same draws. The model, the
    loaders' generators and the global generators are left as they were. All data but the training data are kept in memory.

    Args:
        model: The trained network; wrappers are looked through.
        train_loader: As for `fit`.
        val_loader: Held-out data, as for `fit`, by which layers are ranked; at least two examples.
        layers: Names of layers, normalisations too; "all" for all but normalisations and learned activations, however many;
            None for at most ``most`` of those, evenly spread, with the first and the last.
        most: See ``layers``.
        test_loader: Labelled examples for the figures; without them the figures are of the held-out examples.
        outside: Foreign examples by name: inputs as `predict` takes them, or loaders, whose targets are ignored (a batch that
            is a tuple is a pair of inputs and target).
        epochs: Of each fit, for each T.
        temperature: T, or "held-out" to let each fit choose.
        prior: As for `bayesianize`, for every layer; None lets each have its default, which differs for embeddings.
        likelihood: As for `fit`.
        engine: As for `fit`.
        samples: Draws for every score and prediction.
        max_seen_share: As for `fit`: how many of the held-out examples may equal ones that training saw.
        seed: Of everything random.
        target_key: The target's entry in mappings.
        weight_key: The examples' weights' entry in mappings; held-out NLLs are weighted means, other figures are not.
        precision: Of the network's passes, as for `fit`.
        output: How to take the tensor of predictions out of what the model returns.
        checkpoint: A folder in which each layer's figures are kept when it is done, and the state of its fit until then.
        resume: Go on from what is in the folder; further layers may be asked of it.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        Every layer's figures, their ranking and a verdict; ``bayesianize(layer=….recommended)`` takes the answer.

    Raises:
        InputError: An argument or the data are not usable, or the held-out data were seen in training.
        LayerError: A layer is not known, or none can be made Bayesian.
        CheckpointError: The folder cannot be written, or holds layers of other settings.
    """
    require_count(most=most)
    _check_settings(epochs, samples, seed, temperature, engine)
    _check_loaders(train_loader, val_loader)
    recipe = None if prior is None else resolve_prior(prior)
    plain = unwrap(model)
    example = two_rows(first_batch(train_loader, seed, target_key, weight_key), plain)
    choices = layer_choices(plain, example)
    chosen, skipped = _choose(choices, layers, most)
    held_out = LabelledSet.read("val_loader", val_loader, seed, target_key, weight_key)
    if len(held_out.targets) < 2:
        raise InputError("val_loader holds one example, by which no difference can be judged; hold more out")
    test = None if test_loader is None else LabelledSet.read("test_loader", test_loader, seed, target_key, weight_key)
    data = JudgedData(held_out, test, read_foreign(outside or {}, seed, target_key, weight_key))
    given = resolve_likelihood(likelihood, held_out.targets).cpu()
    settings = {
        "model": fingerprint(plain),
        "epochs": epochs,
        "temperature": temperature,
        "prior": None if recipe is None else recipe.config(),
        "likelihood": [type(given).__name__, given.config()],
        "engine": engine,
        "samples": samples,
        "seed": seed,
        "precision": precision,
        "training data": [length(train_loader), count_examples(train_loader, 0)],
        **data.digests(),
    }
    kept = None if checkpoint is None else _Folder(Path(checkpoint), settings, [choice.name for choice in choices])
    done = {} if kept is None or not resume else kept.load([choice.name for choice in chosen])
    judge = Judge(plain, data, given, samples, seed, precision, output)

    def inferred(bnn: BayesianNetwork) -> FitRun:
        # Every layer sees the same batches in the same order.
        with kept_generators(train_loader), kept_generators(val_loader), told_once(first=not done):
            return fit(
                bnn,
                train_loader,
                epochs=epochs,
                engine=engine,
                likelihood=likelihood,
                seed=seed,
                val_loader=val_loader,
                val_samples=samples,
                max_seen_share=max_seen_share,
                temperature=temperature,
                target_key=target_key,
                weight_key=weight_key,
                checkpoint=None if kept is None else kept.fit_path(bnn.layer_name),
                resume=resume,
                precision=precision,
                progress=False,
            )

    def settled(choice: LayerChoice) -> Measured | str:
        """The layer's figures, or why it has none."""
        try:
            bnn = bayesianize(plain, example, layer=choice.name, prior=recipe, output=output)
        except (LayerError, InputError) as error:
            # It is about this layer, for the model, the inputs and the recipe have been found usable.
            return str(error)
        try:
            return judge.measure(bnn, choice, inferred(bnn))
        except InputError as error:
            # Data and settings with which another layer was fitted are right: it is this layer, whose fit diverged.
            if not done:
                raise
            return str(error)

    failed: dict[str, str] = {}
    with progress_bar("compare layers", len(chosen), progress) as bar:
        for choice in chosen:
            bar.describe(f"layer {choice.name}")
            if choice.name not in done:
                found = settled(choice)
                if isinstance(found, str):
                    failed[choice.name] = found
                    bar.advance()
                    continue
                done[choice.name] = found
                if kept is not None:
                    kept.save(found)
            bar.advance(1, held_out_nll=done[choice.name].width.held_out_nll)
    if not done:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in failed.items())
        raise LayerError(f"none of the layers can be made Bayesian: {reasons}")
    first = _first(choices)
    return LayerComparison(
        network=judge.network,
        layers=tuple(done[one.name].beside(done.get(first), held_out.weights) for one in chosen if one.name in done),
        first=first,
        failed=failed,
        skipped=skipped,
        tested_on=HELD_OUT if test is None else TEST,
        num_held_out=len(held_out.targets),
    )


class _Folder:
    """Where layers are kept: a file for each that is done, and the checkpoint of the fit that is under way.

    Args:
        folder: Is created.
        settings: What is the same for all layers; a file with others is refused.
        names: All layers of the network; files are named by their places, for names may hold anything.

    Raises:
        CheckpointError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], names: Sequence[str]) -> None:
        self._folder, self._settings, self._names = folder, json.loads(json.dumps(settings)), list(names)
        prepare_checkpoint(folder / "layer", {})

    def fit_path(self, layer: str) -> Path:
        """The checkpoint of a layer's fit."""
        return self._path(layer, "fit")

    def load(self, layers: Sequence[str]) -> dict[str, Measured]:
        """The layers that are done; a file that is damaged is as good as none.

        Raises:
            CheckpointError: A file is of other settings.
        """
        found = {}
        for layer in layers:
            path = self._path(layer, "json")
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                settings, width = content["settings"], content["width"]
                over = Difference(**width.pop("over_network"))
                measured = Measured(
                    LayerWidth(**width, over_network=over), torch.tensor(content["density"], dtype=torch.float64)
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            differ = [key for key in {**settings, **self._settings} if settings.get(key) != self._settings.get(key)]
            if differ:
                told = "; ".join(f"{key}: {settings.get(key)} there, {self._settings.get(key)} now" for key in differ)
                raise CheckpointError(
                    f"{path} is of a comparison with other settings ({told}); give those, or another folder, or delete it"
                )
            found[layer] = measured
        return found

    def save(self, measured: Measured) -> None:
        """Keep a layer that is done, and drop the checkpoint of its fit."""
        layer = measured.width.layer
        content = {"settings": self._settings, "width": asdict(measured.width), "density": measured.density.tolist()}
        # Not write_json, which refuses the infinity that a density of 0 has.
        write_text(self._path(layer, "json"), json.dumps(content) + "\n")
        for path in (self.fit_path(layer), previous_path(self.fit_path(layer))):
            path.unlink(missing_ok=True)

    def _path(self, layer: str, ending: str) -> Path:
        return self._folder / f"layer-{self._names.index(layer):03d}.{ending}"


def _check_settings(epochs: int, samples: int, seed: int, temperature: float | str, engine: str) -> None:
    require_count(epochs=epochs, samples=samples)
    derive_seed(seed)
    if isinstance(temperature, str) and temperature != "held-out":
        raise InputError(f'temperature must be a number or "held-out", but it is {temperature!r}')
    temperature_schedule("held-out" if isinstance(temperature, str) else temperature, TEMPERATURES, has_held_out=True)
    if engine != "auto" and engine not in ENGINES:
        raise InputError(f'engine={engine!r} is not known; choose "auto" or one of {sorted(ENGINES)}')


def _check_loaders(train_loader: Iterable[Any], val_loader: Iterable[Any]) -> None:
    require_rereadable(train_loader)
    if isinstance(val_loader, Iterator):
        raise InputError(
            f"val_loader is a {type(val_loader).__name__}, which can be read only once, but every fit reads it; give a "
            f"DataLoader or a list of batches"
        )


def _first(choices: Sequence[LayerChoice]) -> str:
    """The layer that `bayesianize` takes by itself; "" where it takes none."""
    return next((choice.name for choice in choices if not choice.passed_over), "")


def _choose(
    choices: Sequence[LayerChoice], layers: Sequence[str] | Literal["all"] | None, most: int
) -> tuple[list[LayerChoice], tuple[str, ...]]:
    """The layers to compare, in execution order, and those that are left out for being too many."""
    known = [choice.name for choice in choices]
    if layers is not None and layers != "all":
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers or len(set(layers)) < len(layers):
            raise InputError(
                f'layers must be different names of layers, at least one, "all" or None, but it is {layers!r}'
            )
        unknown = [name for name in layers if name not in known]
        if unknown:
            raise LayerError(
                f"the model has no layer {unknown[0]!r} to compare; there are {', '.join(map(repr, known))}"
            )
        return [choice for choice in choices if choice.name in layers], ()
    candidates = [choice for choice in choices if not choice.passed_over]
    if not candidates:
        raise LayerError(
            f"the only layers with parameters that the model calls are normalisations or activations "
            f"({', '.join(map(repr, known)) or 'none'}), which are passed over; name them with layers="
        )
    if layers == "all" or len(candidates) <= most:
        return candidates, ()
    if most < 2:
        raise InputError("most must be at least 2, for the first layer and the last; name a single layer with layers=")
    places = {round(number * (len(candidates) - 1) / (most - 1)) for number in range(most)}
    left = tuple(choice.name for place, choice in enumerate(candidates) if place not in places)
    return [candidates[place] for place in sorted(places)], left
