"""Bayesian alternatives: the fully Bayesian network, a Bayesian last layer, and Laplace's approximation."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from stfbnn.baselines.laplace import fit_laplace
from stfbnn.baselines.last_layer import LastLayerPredictor, fit_last_layer
from stfbnn.baselines.linearised import Subset
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import Predictor
from stfbnn.baselines.whole_network import Start, fit_whole_network
from stfbnn.benchmark.clock import clock
from stfbnn.benchmark.methods.base import BOTH, Context, Fitted, Method, by_grid, score
from stfbnn.benchmark.methods.first_layer import course_lengths, from_run, given_temperature, run_options
from stfbnn.benchmark.records import Candidate

LAPLACE = (
    {"structure": "kron", "prior_precision": "marglik"},
    {"structure": "diag", "prior_precision": "marglik"},
    {"structure": "kron", "prior_precision": 1.0},
    {"structure": "diag", "prior_precision": 1.0},
)
_LAPLACE_PARAMETERS = 100_000
"""Networks with more have no Laplace over all weights here."""


def _whole(context: Context, engine: str, start: Start) -> Fitted:
    # From scratch it has to learn everything, as stage one does; from the trained weights what stage two does.
    epochs = context.task.epochs if start == "scratch" else context.task.fit_epochs
    model = context.fresh("scratch") if start == "scratch" else context.model
    began = clock()
    bnn, run = fit_whole_network(
        model,
        context.train_loader,
        start=start,
        engine=engine,
        epochs=epochs,
        **run_options(context, f"bnn-{start}-{engine}"),
    )
    seconds = clock() - began
    predictor = BayesianPredictor(bnn, samples=context.task.samples, seed=context.seed)
    return from_run(context, predictor, run, seconds)


def _course(context: Context, usual: Candidate, engine: str, start: Start) -> list[Candidate]:
    """Shorter runs at the T that was chosen, and the usual one; longer ones would take too long."""
    epochs = context.task.epochs if start == "scratch" else context.task.fit_epochs
    found = [replace(usual, setting={**usual.setting, "epochs": epochs})]
    for number in course_lengths(epochs, (0.25, 0.5)):
        if number == epochs:
            continue
        model = context.fresh("scratch") if start == "scratch" else context.model
        began = clock()
        options = given_temperature(context, usual)
        bnn, _ = fit_whole_network(model, context.train_loader, start=start, engine=engine, epochs=number, **options)
        seconds = clock() - began
        predictor = BayesianPredictor(bnn, samples=context.task.samples, seed=context.seed)
        found.append(
            score(context, predictor, {"temperature": usual.setting["temperature"], "epochs": number}, seconds)
        )
    return found


def _last(context: Context) -> Fitted:
    began = clock()
    options = run_options(context, "last-layer")
    bnn, run = fit_last_layer(context.model, context.train_loader, epochs=context.task.fit_epochs, **options)
    predictor = LastLayerPredictor(bnn, samples=context.task.samples, seed=context.seed)
    return from_run(context, predictor, run, clock() - began)


def _laplace(context: Context, setting: Mapping[str, Any], subset: Subset) -> Predictor:
    return fit_laplace(
        context.model,
        context.train_loader,
        subset=subset,
        # Its own noise, for the curvature follows from it.
        likelihood="categorical" if context.data.kind == "classification" else "gaussian",
        samples=context.task.samples,
        seed=context.seed,
        **setting,
    )


def _no_laplace(context: Context, subset: Subset) -> str | None:
    if importlib.util.find_spec("laplace") is None:
        return "laplace-torch is not installed"
    size = sum(parameter.numel() for parameter in context.model.parameters())
    if subset == "all" and size > _LAPLACE_PARAMETERS:
        return f"the network has {size:,} parameters, left out for time: Laplace over all of them predicts too slowly"
    if subset == "all" and any(isinstance(module, nn.Conv2d) for module in context.model.modules()):
        return "left out for time: the factors of all convolutions take hours"
    return None


_SUBSETS: tuple[tuple[str, Subset], ...] = (("last", "last-layer"), ("all", "all"))

BAYESIAN = (
    *(
        Method(
            f"bnn-{start}" + ("-natural" if engine == "natural-gradient" else ""),
            f"Bayesian network, {label}, {start}",
            BOTH,
            partial(_whole, engine=engine, start=start),
            partial(_whole, engine=engine, start=start),
            course=partial(_course, engine=engine, start=start),
            holds_base=start == "pretrained",
        )
        for start in ("scratch", "pretrained")
        for engine, label in (("bayes-by-backprop", "Bayes by Backprop"), ("natural-gradient", "natural gradient"))
    ),
    Method("last-layer", "Bayesian last layer", BOTH, _last, _last),
    *(
        Method(
            f"laplace-{name}",
            f"Laplace, {name}",
            BOTH,
            by_grid(partial(_laplace, subset=subset), LAPLACE),
            missing=partial(_no_laplace, subset=subset),
        )
        for name, subset in _SUBSETS
    ),
)
