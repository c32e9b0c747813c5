"""What went wrong in a run of stage two: each trouble by its name, with its figures and with what to do.

Everything is read off the run's history and the posterior that was kept, without data. The thresholds are the constants
below; they are meant to be silent on a healthy run, and no proof of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.bayes_by_backprop import BayesByBackprop
from stfbnn.inference.engines import ENGINES
from stfbnn.inference.history import FitRecord, FitRun
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture, PointMassPosterior, Posterior, components_of
from stfbnn.prior import GaussianPrior

# Share by which KL has to change over a stage for anything to have moved.
MOVED = 0.01
# By how much KL may change over the second half of a stage's learning, as a share of KL itself …
DRIFT = 0.05
# … and where that is less, but not below this share, as a share of its change over the whole stage. At constant speed this
# would be a half.
SLIGHT_DRIFT, DRIFT_OF_CHANGE = 0.005, 1 / 3
# Learning rates fall along half a cosine: the integral over this share of the epochs is half of that over all.
HALF_OF_LEARNING = 0.264
# A stage of fewer epochs is not judged for drift.
FEWEST_EPOCHS = 4
# Nats per example by which the free energy may end above its start, or above the lowest earlier quarter of the stage; the start
# is known from one minibatch alone. Where the free energy is large, this share of it.
RISE, RISE_OF_ENERGY = 0.5, 0.1
# Mean |log σ/σ₀| that Bayes by Backprop must reach from a width which the recipe gave.
WIDTH_MOVED = 0.1
# A weight has learned nothing below so many nats of KL (σ within a tenth of s, and μ within 0.14 s of the prior's mean), and
# the posterior has not if so large a share of its weights has not.
LEARNED_NATS, UNLEARNED_SHARE = 0.01, 0.9
# RMS(σ) / RMS(μ) below which draws change the layer's outputs by less than this share.
POINT = 0.01
# 1/Σπ² below which a mixture predicts as one component.
COMPONENTS = 1.25
# Factor between τ and 1.
TAU = 1.5


@dataclass(frozen=True)
class Finding:
    """One trouble.

    Attributes:
        name: Its fixed name, such as ``"not-converged"``.
        severity: "problem" where the posterior is not to be trusted before it is repaired; "note" for what is worth knowing.
        message: What was seen, with figures.
        advice: What to do.
    """

    name: str
    severity: Literal["problem", "note"]
    message: str
    advice: str


def diagnose(bnn: BayesianNetwork, run: FitRun) -> tuple[Finding, ...]:
    """Look for trouble in a run and the posterior that it left.

    Args:
        bnn: The network, as `fit` left it.
        run: What `fit` returned.

    Returns:
        Findings, problems first; empty where nothing was found.

    Raises:
        NotFittedError: `fit` has not run.
        InputError: The run is of another fit.
    """
    bnn.require_fitted()
    if bnn.temperature != run.temperature or bnn.num_examples != run.num_examples:
        raise InputError(
            f"this run is not of this network: it chose T={run.temperature:g} with {run.num_examples} examples, but the "
            f"network was fitted at T={bnn.temperature} with {bnn.num_examples}; pass what its last fit returned"
        )
    found = (*_width(bnn, run), *_course(bnn, run), *_choices(run), *_mixture(bnn, run))
    return tuple(sorted(found, key=lambda finding: finding.severity == "note"))


def findings_table(findings: Iterable[Finding]) -> Table:
    """Findings, for a terminal."""
    table = Table(title="Findings", title_justify="left")
    for heading in ("", "what", "what was seen", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        style = "bold" if finding.severity == "problem" else None
        table.add_row(finding.severity, finding.name, finding.message, finding.advice, style=style)
    return table


def _width(bnn: BayesianNetwork, run: FitRun) -> Iterator[Finding]:
    """Is q as narrow as a point, as wide as the prior, or where it started?"""
    parts = _gaussians(bnn)
    if not parts:
        return
    std, mean = _joined(part.std_vector() for part in parts), _joined(part.mean_vector() for part in parts)
    if _is_prior(parts, bnn.prior):
        yield Finding(
            "collapsed-to-prior",
            "problem",
            f"{_unlearned(parts, bnn.prior):.0%} of the weights are as the prior has them (less than {LEARNED_NATS:g} nats of "
            f"KL each): the data have told them next to nothing",
            "lower the temperature; if the prior is very narrow, widen it (suggest_prior tries scales); in an embedding of "
            "which few rows ever occur, this is as it should be",
        )
        return
    relative = float(std.square().mean().sqrt() / mean.square().mean().sqrt().clamp_min(torch.finfo(mean.dtype).tiny))
    if relative < POINT:
        yield Finding(
            "collapsed-to-point",
            "problem",
            f"the standard deviations are {relative:.2g} of the weights (root mean squares), so all draws predict nearly the "
            f"same",
            "raise the temperature, or choose it on held-out data that no stage has seen; with engine='bayes-by-backprop' "
            "see whether the initial standard deviation was too small",
        )
    if run.engine == BayesByBackprop.name and run.starts and _initial_std(bnn) is not None:
        moved = float((std / run.starts[0].mean_std).log().abs().mean())
        if moved < WIDTH_MOVED:
            yield Finding(
                "widths-stuck",
                "problem",
                f"the standard deviations have moved by {moved:.1%} on average from the {run.starts[0].mean_std:.3g} that they "
                f"were given: what they say is that number, not the data",
                "use engine='natural-gradient' where the family has it, or leave initial_std open, so that the curvature sets "
                "it; else more epochs or a higher learning_rate",
            )


def _course(bnn: BayesianNetwork, run: FitRun) -> Iterator[Finding]:
    """Did the kept stage fall, move, and come to rest?"""
    records = [record for record in run.history if record.temperature == run.temperature]
    kept = _up_to_best(records)
    # An ensemble's component 0 is the trained layer as it is: nothing was run for it.
    if not records or not ENGINES[run.engine].iterates:
        return
    begun = [start for start in run.starts if start.temperature == run.temperature]
    first = [start.nll + start.temperature / run.num_examples * start.kl for start in begun]
    rise = _rise(first, [record.free_energy for record in kept])
    if rise > 0:
        yield Finding(
            "free-energy-rises",
            "problem",
            f"the free energy at T={run.temperature:g} ended {rise:.3g} nats per example above where it had been before",
            "lower the engine's learning_rate; average more draws a step (draws=), or take larger batches",
        )
    started = [start.kl for start in begun]
    parts = _gaussians(bnn)
    # Stopping early is meant to end before rest, and nothing can move where the prior allows nothing else.
    if not parts or not started or len(kept) < len(records) or _is_prior(parts, bnn.prior):
        return
    course = [*started[:1], *(record.kl for record in records)]
    size = max(abs(course[-1]), 1.0)
    change, late = abs(course[-1] - course[0]), abs(course[-1] - _at_half_of_learning(course))
    if max(abs(kl - course[0]) for kl in course) < MOVED * size:
        yield Finding(
            "nothing-moved",
            "problem",
            f"KL stayed within {MOVED:.0%} of the {course[0]:.4g} nats from which it started: inference has hardly begun, or "
            f"it started at its end, as it may for a model that is linear in the first layer",
            "compare with ten times the epochs, or with a higher learning_rate: if KL moves there, this run was too short",
        )
    elif len(records) >= FEWEST_EPOCHS and (
        late > DRIFT * size or (late > SLIGHT_DRIFT * size and late > DRIFT_OF_CHANGE * change)
    ):
        yield Finding(
            "not-converged",
            "problem",
            f"KL was still moving: over the second half of the learning it went from {_at_half_of_learning(course):.4g} to "
            f"{course[-1]:.4g} nats, and only the falling learning rate brought it to rest",
            "take more epochs or a higher learning_rate; the figures of an unconverged run are early stopping in disguise",
        )


def _choices(run: FitRun) -> Iterator[Finding]:
    """What was chosen on held-out data."""
    own, reached = run.network_held_out_nll, _held_out_nll(run)
    if own is not None and reached is not None and reached >= own:
        yield Finding(
            "no-better-than-network",
            "problem",
            f"on the held-out data the Bayesian network's NLL is {reached:.4f}, the trained network's own {own:.4f}",
            "if other findings say that inference has not converged, repair that first; else there was nothing to repair, and "
            "the trained network, perhaps with temperature scaling, is the better choice",
        )
    tried = [trial.temperature for trial in run.trials]
    if len(tried) > 1 and run.temperature == min(tried):
        yield Finding(
            "temperature-at-edge",
            "note",
            f"T={run.temperature:g} is the lowest that was tried, and it was the best",
            "try lower ones with temperatures=; make sure that no stage has seen the held-out data, for on seen data the "
            "lowest always wins",
        )
    if len(tried) > 1 and run.temperature == max(tried) < 1:
        yield Finding(
            "temperature-at-edge",
            "note",
            f"T={run.temperature:g} is the highest that was tried, and it was the best",
            "try higher ones with temperatures=, up to 1",
        )
    tau = run.predictive_temperature
    if max(tau, 1 / tau) > TAU:
        sure = "too sure" if tau > 1 else "not sure enough"
        width = "wider (a higher T, a wider prior)" if tau > 1 else "narrower (a lower T, a narrower prior)"
        yield Finding(
            "predictive-temperature-far-from-1",
            "note",
            f"the predictive temperature τ is {tau:.2f}: averaged over the posterior, the predictions alone are {sure}",
            f"a {width} posterior might do without it; or the first layer cannot repair what is wrong in the trunk, and τ does",
        )


def _mixture(bnn: BayesianNetwork, run: FitRun) -> Iterator[Finding]:
    """Do several components predict?"""
    weights = getattr(bnn.posterior, "weights", None)
    if not isinstance(weights, Tensor) or max(len(weights), len(run.components)) < 2:
        return
    effective = 1 / float(weights.double().square().sum())
    if effective < COMPONENTS:
        dropped = sum(not component.kept for component in run.components)
        lost = f", {dropped} were dropped" if dropped else ""
        yield Finding(
            "one-component",
            "note",
            f"the mixture is in effect one component: its weights count as {effective:.2f} components (1/Σπ²){lost}",
            "see run.component_table() for how good each one became: more retraining epochs may help those that are behind; "
            "weighting='free-energy' is nearly one-hot by its nature; else one component is what the data ask for",
        )


def _gaussians(bnn: BayesianNetwork) -> list[Posterior]:
    """The components that have a width: all, or none where they are point masses, on purpose."""
    return [part for part in components_of(bnn.posterior) if not isinstance(part, PointMassPosterior)]


def _joined(vectors: Iterable[Tensor]) -> Tensor:
    return torch.cat([vector.detach() for vector in vectors])


def _is_prior(parts: Sequence[Posterior], prior: GaussianPrior) -> bool:
    return _unlearned(parts, prior) > UNLEARNED_SHARE


def _unlearned(parts: Sequence[Posterior], prior: GaussianPrior) -> float:
    """The share of weights whose marginal is the prior's, by KL_i = ½ (σ²/s² + (μ−m)²/s² − 1 − log σ²/s²)."""
    shares = []
    for part in parts:
        ratio = (part.std_vector().detach() / prior.std).square()
        shift = ((part.mean_vector().detach() - prior.mean) / prior.std).square()
        shares.append((0.5 * (ratio + shift - 1 - ratio.log()) < LEARNED_NATS).double().mean())
    return float(torch.stack(shares).mean())


def _initial_std(bnn: BayesianNetwork) -> float | None:
    """The width that the recipe gave, if it gave one."""
    family = bnn.family.component_family() if isinstance(bnn.family, Mixture) else bnn.family
    return getattr(family, "initial_std", None)


def _up_to_best(records: Sequence[FitRecord]) -> Sequence[FitRecord]:
    """The epochs that were kept: with early stopping, those up to the best on held-out data."""
    scores = [record.held_out_nll for record in records if record.held_out_nll is not None]
    return records[: scores.index(min(scores)) + 1] if scores else records


def _rise(first: Sequence[float], energies: Sequence[float]) -> float:
    """By how much the last quarter's mean lies above the start and the earlier quarters; 0 where that may be noise."""
    quarters = torch.tensor(energies, dtype=torch.float64).tensor_split(min(4, len(energies)))
    means = [float(quarter.mean()) for quarter in quarters]
    lowest = min([*first, *means])
    rise = means[-1] - lowest
    return rise if rise > max(RISE, RISE_OF_ENERGY * abs(lowest)) else 0.0


def _at_half_of_learning(course: Sequence[float]) -> float:
    """The value, between epochs on a straight line, when the falling learning rate had done half of all that it would."""
    place = HALF_OF_LEARNING * (len(course) - 1)
    before = math.floor(place)
    after = min(before + 1, len(course) - 1)
    return course[before] + (place - before) * (course[after] - course[before])


def _held_out_nll(run: FitRun) -> float | None:
    """Of the posterior that was kept."""
    if run.held_out_nll is not None:
        return run.held_out_nll
    return min((trial.held_out_nll for trial in run.trials), default=None)
