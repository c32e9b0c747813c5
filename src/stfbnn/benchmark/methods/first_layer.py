"""The library's own methods, as a user calls them: its defaults, and a temperature that is chosen on held-out examples.

The temperatures that are tried are the settings: as many of them as every other method has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import Predictor
from stfbnn.benchmark.clock import clock
from stfbnn.benchmark.methods.base import BOTH, Context, Fitted, Method, score
from stfbnn.benchmark.records import Candidate
from stfbnn.conversion import bayesianize
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.network import BayesianNetwork

TEMPERATURES = (0.1, 0.03, 0.3, 1.0, 0.01)
"""What is tried, the most usual first, as every method's settings are."""


def run_options(context: Context, name: str) -> dict[str, Any]:
    """What every fit on the library's engines is called with.

    Args:
        context: The task and its data.
        name: Of the checkpoint.
    """
    return {
        "val_loader": context.held_loader,
        "temperatures": sorted(TEMPERATURES[: context.budget], reverse=True),
        "predictive_temperature": "held-out" if context.data.kind == "classification" else 1.0,
        # The parts are disjoint rows; that rows are equal, as a sixth of those of red wines are, is how the data are.
        "max_seen_share": 1.0,
        "seed": context.seed,
        "precision": "bf16-mixed" if context.task.precision == "bf16-mixed" else None,
        "checkpoint": None if context.folder is None else context.folder / f"{name}.ckpt",
        "progress": False,
    }


def given_temperature(context: Context, usual: Candidate) -> dict[str, Any]:
    """What a fit is called with whose T is given, so that it looks at no held-out example."""
    options = run_options(context, "")
    return {
        **{name: options[name] for name in ("seed", "precision", "progress")},
        "temperature": usual.setting["temperature"],
    }


def course_lengths(usual: int, shares: Sequence[float]) -> list[int]:
    """Epochs of the runs of a course, without the same number twice."""
    return sorted({max(1, round(share * usual)) for share in shares})


def run_default(context: Context, posterior: str) -> tuple[BayesianNetwork, FitRun]:
    """The default call of stage two."""
    bnn = bayesianize(context.model, context.example, posterior=posterior)
    options = run_options(context, f"stf-{posterior}")
    return bnn, fit(bnn, context.train_loader, epochs=context.task.fit_epochs, **options)


def from_run(context: Context, predictor: Predictor, run: FitRun, search_seconds: float) -> Fitted:
    """A run that chose its temperature itself, as a list of candidates.

    Its score at each T is that with the best predictive temperature, by which it chose. Seconds of one T are its share of all
    epochs.
    """
    epochs = len(run.history)
    chosen = next(index for index, trial in enumerate(run.trials) if trial.temperature == run.temperature)
    candidates = []
    for index, trial in enumerate(run.trials):
        share = sum(record.temperature == trial.temperature for record in run.history) / epochs
        setting = {"temperature": trial.temperature}
        if index == chosen:
            candidates.append(score(context, predictor, setting, share * search_seconds))
        else:
            scaled = trial.held_out_nll if context.data.kind == "classification" else None
            raw = None if context.data.kind == "classification" else trial.held_out_nll
            tau = None if scaled is None else trial.predictive_temperature
            candidates.append(Candidate(setting, raw, scaled, tau, share * search_seconds))
    predictors: tuple[Predictor | None, ...] = tuple(
        predictor if index == chosen else None for index in range(len(candidates))
    )
    return Fitted(
        candidates=tuple(candidates),
        raw=chosen,
        scaled=chosen if context.data.kind == "classification" else None,
        predictors=predictors,
        seconds=candidates[chosen].seconds,
        search_seconds=search_seconds,
        notes={"layer_epochs": epochs, "engine": run.engine, "run": run.as_dict()},
    )


def _fit(context: Context, posterior: str) -> Fitted:
    began = clock()
    bnn, run = run_default(context, posterior)
    seconds = clock() - began
    predictor = BayesianPredictor(bnn, samples=context.task.samples, seed=context.seed)
    return from_run(context, predictor, run, seconds)


def _step(context: Context) -> Any:
    return run_default(context, "mean-field")


def _course(context: Context, usual: Candidate) -> list[Candidate]:
    """One fit each, at the T that was chosen, on the training examples alone."""
    found = []
    for epochs in course_lengths(context.task.fit_epochs, (0.25, 0.5, 1.0, 2.0)):
        began = clock()
        bnn = bayesianize(context.model, context.example)
        fit(bnn, context.train_loader, epochs=epochs, **given_temperature(context, usual))
        seconds = clock() - began
        predictor = BayesianPredictor(bnn, samples=context.task.samples, seed=context.seed)
        found.append(
            score(context, predictor, {"temperature": usual.setting["temperature"], "epochs": epochs}, seconds)
        )
    return found


FIRST_LAYER = (
    Method("stf-bnn", "STF-BNN", BOTH, partial(_fit, posterior="mean-field"), _step, course=_course),
    Method("stf-bnn-mixture", "STF-BNN, mixture of 4", BOTH, partial(_fit, posterior="mixture"), _step),
)
