"""The study of a network's layers: which optima each has when it alone is reinitialised and retrained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, OutputFunction
from stfbnn.errors import InputError, LayerError
from stfbnn.inference.checks import require_count
from stfbnn.inference.first_look import first_batch, two_rows
from stfbnn.inference.loaders import kept_generators, require_rereadable, shared_examples
from stfbnn.inference.survey import counted_labels
from stfbnn.layer_listing import LayerChoice, layer_choices
from stfbnn.likelihood import LikelihoodLike
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.optima.pairs import Pair, cosine_similarities, disagreements, relative_distances, total_variations
from stfbnn.optima.paths import BEND_STEPS, beziers, fit_bends, lines
from stfbnn.optima.plane import Embedding, PlaneSlice, embed, plane_slice, plane_through
from stfbnn.optima.result import Landscape, LayerLandscape
from stfbnn.optima.retraining import Optimum, RetrainingOptions, retrain, trained_optimum
from stfbnn.randomness import derive_seed, seeded
from stfbnn.wrappers import unwrap

_FEWEST_POINTS = 3


def landscape(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    layers: Sequence[str] | Literal["auto"] = "auto",
    options: RetrainingOptions | None = None,
    examples: int = 2000,
    points: int = 21,
    curves: bool = True,
    curve_steps: int = BEND_STEPS,
    plane: int = 21,
    likelihood: LikelihoodLike = "auto",
    seed: int = 0,
    target_key: str = TARGET_KEY,
    output: OutputFunction | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> Landscape:
    """Reinitialise one layer again and again, retrain it alone, and compare what comes of it: the paper's discovery.

    Every layer is studied by itself, all others keeping their trained weights. Each run stops when its held-out loss no longer
    falls. Losses along paths and in the plane are those of training examples; predictions are compared on held-out ones.
    Examples' weights are not used.

    Args:
        model: The trained network; it is left as it was.
        train_loader: Batches (inputs, target), or mappings with ``target_key``, to retrain on.
        val_loader: Held-out data, by which every run stops.
        layers: Names of layers; "auto" takes the first one, a middle one and the last one, normalisations being passed over.
        options: How the layers are retrained, and how many times.
        examples: How many of the first training examples losses are computed on, and of the held-out ones predictions compared.
        points: Along every path.
        curves: Fit a Bézier curve between every two optima.
        curve_steps: Minibatches that each of them is fitted on.
        plane: Points along each side of the plane through three optima; 0 for no plane.
        likelihood: As for `fit`.
        seed: A non-negative integer.
        target_key: The target's entry in mappings.
        output: How to take the tensor of predictions out of what the model returns.
        checkpoint: A folder in which every layer's retraining is kept, so that a run that was stopped goes on.
        resume: Go on from what is there.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        Optima, pairs, paths and planes of each layer, with a verdict in words.

    Raises:
        InputError: An argument or a batch is not usable, or the held-out data are the training data.
        LayerError: A named layer does not exist, or cannot be taken by itself.
    """
    options = options or RetrainingOptions()
    require_count(examples=examples, points=points, curve_steps=curve_steps)
    if points < _FEWEST_POINTS or plane < 0 or plane == 1:
        raise InputError(
            f"a path needs at least {_FEWEST_POINTS} points, and a plane 2 along each side, or 0 for none; they are {points} "
            f"and {plane}"
        )
    require_rereadable(train_loader)
    if shared_examples(train_loader, val_loader):
        raise InputError("val_loader reads rows that train_loader reads, too; hold data out before stage one")
    chosen = choose_layers(model, train_loader, layers, seed, target_key)
    with seeded(seed, "examples"), kept_generators(train_loader), kept_generators(val_loader):
        train, held_out = Examples(train_loader, target_key, most=examples), Examples(val_loader, target_key)
    compared_on = Examples([(one.inputs, one.target) for one in held_out.batches], most=examples)
    functions = [
        LayerFunction(model, train_loader, choice.name, likelihood, seed, target_key, output) for _, choice in chosen
    ]
    found = []
    for (place, choice), function in zip(chosen, functions, strict=True):
        name = choice.name or "model"
        own = derive_seed(seed, "layer", choice.name)
        run = retrain(
            function,
            train_loader,
            train,
            held_out,
            options,
            own,
            checkpoint=None if checkpoint is None else Path(checkpoint) / f"{name}.ckpt",
            resume=resume,
            progress=progress,
            target_key=target_key,
            title=f"{name}: retrain",
        )
        optima = (trained_optimum(function, train, held_out), *run.optima)
        weights = torch.stack([one.weights for one in optima])
        pairs = tuple(combinations(range(len(optima)), 2))
        bends = (
            fit_bends(
                function,
                weights,
                pairs,
                train_loader,
                steps=curve_steps,
                seed=own,
                target_key=target_key,
                progress=progress,
            )
            if curves
            else None
        )
        corners = three_of(optima)
        embedding, compared = compare(function, weights, pairs, train, compared_on, points, bends)
        found.append(
            LayerLandscape(
                layer=choice.name,
                kind=choice.kind,
                place=place,
                parameters=function.size,
                optima=optima,
                pairs=compared,
                embedding=tuple((float(x), float(y)) for x, y in embedding.points),
                explained=embedding.explained,
                plane=_slice(function, weights[list(corners)], train, plane) if plane and len(corners) == 3 else None,
                plane_optima=corners if plane else (),
                seconds=run.seconds,
                execution=run.execution,
            )
        )
    settings = {
        **asdict(options),
        "examples": train.count,
        "compared": compared_on.count,
        "points": points,
        "seed": seed,
    }
    return Landscape(tuple(found), settings)


def choose_layers(
    model: nn.Module, loader: Iterable[Any], layers: Sequence[str] | Literal["auto"], seed: int, target_key: str
) -> list[tuple[str, LayerChoice]]:
    """The layers to study, with their places.

    Args:
        model: The network.
        loader: Batches, of the first of which the network is run on two examples.
        layers: Names; "auto" for the first, the middle one and the last of those that `bayesianize` would not pass over.
        seed: Of what the loader draws.
        target_key: The target's entry in mappings.

    Returns:
        "first", "middle", "last" or "" for what was named, and the layer; in execution order for "auto".

    Raises:
        InputError: The loader is empty.
        LayerError: There is no such layer, or none at all.
    """
    plain = unwrap(model)
    choices = layer_choices(plain, two_rows(first_batch(loader, seed, target_key, WEIGHT_KEY), plain))
    if layers != "auto":
        by_name = {choice.name: choice for choice in choices}
        unknown = [name for name in layers if name not in by_name]
        if unknown or not layers:
            wrong = f"there is no layer {unknown[0]!r}" if unknown else "no layer is named"
            raise LayerError(f"{wrong}; there are {', '.join(by_name)}")
        return [("", by_name[name]) for name in layers]
    own = [choice for choice in choices if not choice.passed_over]
    if not own:
        raise LayerError("the network has no layer with parameters beside normalisations and activations")
    places = {0: "first", len(own) - 1: "last"}
    if len(own) > 2:
        places[len(own) // 2] = "middle"
    # A network of one layer has a first one.
    places[0] = "first"
    return [(places[number], own[number]) for number in sorted(places)]


def compare(
    function: LayerFunction,
    weights: Tensor,
    pairs: Sequence[tuple[int, int]],
    train: Examples,
    held_out: Examples,
    points: int,
    bends: Tensor | None,
) -> tuple[Embedding, tuple[Pair, ...]]:
    """Everything about every two of the optima, and their places in a plane."""
    outputs = held_out.outputs(function, weights)
    likelihood = function.likelihood
    distances, cosines = relative_distances(weights), cosine_similarities(weights)
    counted = counted_labels(likelihood, held_out.targets)
    labels = disagreements(outputs, likelihood, counted)
    variations = total_variations(outputs, likelihood, counted)
    straight = lines(function, weights, pairs, train, points)
    curved = None if bends is None else beziers(function, weights, pairs, bends, train, points)
    found = tuple(
        Pair(
            first=one,
            second=other,
            relative_distance=float(distances[one, other]),
            cosine_distance=1 - float(cosines[one, other]),
            disagreement=None if labels is None else float(labels[one, other]),
            total_variation=None if variations is None else float(variations[one, other]),
            line=straight[number],
            curve=None if curved is None else curved[number],
        )
        for number, (one, other) in enumerate(pairs)
    )
    return embed(distances if variations is None else variations), found


def three_of(optima: Sequence[Optimum]) -> tuple[int, ...]:
    """Those that a plane is laid through: the trained weights, and the two of the lowest held-out losses."""
    others = sorted(range(1, len(optima)), key=lambda number: optima[number].held_out_loss)
    return (0, *others[:2])


def _slice(function: LayerFunction, corners: Tensor, train: Examples, size: int) -> PlaneSlice | None:
    try:
        plane = plane_through(*corners)
    except InputError:
        # Three on one line have no plane, as when retraining came back to the trained weights.
        return None
    return plane_slice(function, plane, train, size)
