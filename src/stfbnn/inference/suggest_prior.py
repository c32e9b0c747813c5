"""Choose the prior's scale on held-out data: short fits with several scales, compared example by example."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.table import Table
from torch import Tensor, nn

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, Batch, OutputFunction, join_targets
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_positive
from stfbnn.inference.fit import fit
from stfbnn.inference.loaders import kept_generators, require_rereadable
from stfbnn.inference.quiet import told_once
from stfbnn.inference.survey import checked_batch
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import PosteriorFamily, resolve_family
from stfbnn.prediction import predict
from stfbnn.predictive.weighting import mean_and_error, mean_over_examples
from stfbnn.prior import Normal, ScaleChoice
from stfbnn.progress import progress_bar
from stfbnn.randomness import seeded

# What is tried by default, in units of the root mean square of the layer's trained weights.
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Differences of up to so many standard errors may be chance.
STANDARD_ERRORS = 2.0

# Options of `fit` that have the same value in every fit and an argument of their own.
_TAKEN = ("epochs", "seed", "val_loader", "val_samples", "target_key", "weight_key", "checkpoint", "resume", "progress")


@dataclass(frozen=True)
class PriorTrial:
    """One scale that was tried.

    Attributes:
        scale: s, the prior's standard deviation.
        temperature: T, chosen for this scale.
        held_out_nll: Of the averaged predictive, nats per example.
        difference: This NLL less that of the best scale; 0 for the best.
        standard_error: Of that difference, from the differences of single examples; 0 for the best.
        free_energy: F of the last epoch at that T, nats per example; not to be compared between rows of different T. None for
            an ensemble, whose component 0 is the trained layer as it is.
        seconds: Wall time of the fit and its score.
    """

    scale: float
    temperature: float
    held_out_nll: float
    difference: float
    standard_error: float
    free_energy: float | None
    seconds: float

    @property
    def within_noise(self) -> bool:
        """Whether chance explains that it is not the best: the difference is at most two standard errors."""
        return self.difference <= STANDARD_ERRORS * self.standard_error


@dataclass(frozen=True)
class PriorSuggestion:
    """What `suggest_prior` found.

    The NLL of the best scale is a little too good, because it was chosen by it: judge the final fit on other data.

    Attributes:
        prior: The recipe with the best scale, for ``bayesianize(prior=…)``.
        trials: One for each scale, from small to large.
        rms: The root mean square of the layer's trained weights.
        network_held_out_nll: The trained network's own held-out NLL, nats per example.
        num_held_out: Held-out examples.
    """

    prior: Normal
    trials: tuple[PriorTrial, ...]
    rms: float
    network_held_out_nll: float
    num_held_out: int

    @property
    def best(self) -> PriorTrial:
        """The trial with the lowest held-out NLL."""
        return min(self.trials, key=lambda trial: trial.held_out_nll)

    @property
    def at_edge(self) -> Literal["smallest", "largest"] | None:
        """Which end of the grid the best scale is, if it is one: then a scale beyond it may be better still."""
        if self.best is self.trials[0]:
            return "smallest"
        return "largest" if self.best is self.trials[-1] else None

    @property
    def as_good(self) -> tuple[float, ...]:
        """The other scales that these held-out examples cannot tell from the best."""
        return tuple(trial.scale for trial in self.trials if trial.within_noise and trial is not self.best)

    def notes(self) -> tuple[str, ...]:
        """What to bear in mind, in words; empty where the best scale is inside the grid and clearly the best."""
        notes = []
        if self.at_edge is not None:
            beyond = "smaller" if self.at_edge == "smallest" else "larger"
            notes.append(
                f"the best scale, {self.best.scale:.4g}, is the {self.at_edge} that was tried: try {beyond} ones with scales="
            )
        if self.as_good:
            notes.append(
                f"{self.num_held_out} held-out examples cannot tell the scales {_listed(self.as_good)} from the best: a "
                f"difference is at most {STANDARD_ERRORS:g} standard errors"
            )
        return tuple(notes)

    def table(self) -> Table:
        """All trials, for a terminal; the best one in bold."""
        caption = ". ".join(
            f"{note[0].upper()}{note[1:]}"
            for note in (*self.notes(), f"the trained network's own held-out NLL is {self.network_held_out_nll:.4f}.")
        )
        table = Table(title="Prior scales", title_justify="left", caption=caption, caption_justify="left")
        for heading in ("s", "s / RMS", "T", "held-out NLL", "above the best", "free energy", "seconds"):
            table.add_column(heading, justify="right")
        for trial in self.trials:
            is_best = trial is self.best
            table.add_row(
                f"{trial.scale:.4g}",
                f"{trial.scale / self.rms:.2f}",
                f"{trial.temperature:g}",
                f"{trial.held_out_nll:.4f}",
                "" if is_best else f"{trial.difference:.4f} ± {trial.standard_error:.4f}",
                "" if trial.free_energy is None else f"{trial.free_energy:.4f}",
                f"{trial.seconds:.1f}",
                style="bold" if is_best else None,
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        plain = {**asdict(replace(self, prior=Normal())), "prior": self.prior.config()}
        return {**plain, "at_edge": self.at_edge, "as_good": list(self.as_good), "notes": list(self.notes())}


def suggest_prior(
    model: nn.Module,
    example_inputs: Any,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    scales: Iterable[float] | None = None,
    center: Literal["zero", "pretrained"] | None = None,
    layer: str | None = None,
    posterior: str | PosteriorFamily = "mean-field",
    output: OutputFunction | None = None,
    epochs: int = 5,
    seed: int = 0,
    val_samples: int = 32,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    fit_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> PriorSuggestion:
    """Choose the prior's scale by the NLL of short fits on held-out data that no stage has seen.

    Every scale gets a fit of its own, all with one seed, the same batches in the same order and, unless ``fit_options`` say
    otherwise, a temperature T of its own chosen on the same held-out data. The model, the loaders' generators and the global
    generators are left as they were; nothing of the fits is kept.

    Args:
        model: The trained network, as for `bayesianize`.
        example_inputs: As for `bayesianize`.
        train_loader: As for `fit`.
        val_loader: Held-out data, as for `fit`. They are kept in memory.
        scales: Standard deviations s to try, at least two; None takes ¼, ½, 1, 2 and 4 times the root mean square of the
            layer's trained weights.
        center: Where the prior is centred; None as `bayesianize` does: "pretrained" for embeddings, else "zero".
        layer: As for `bayesianize`.
        posterior: As for `bayesianize`.
        output: As for `bayesianize`.
        epochs: Of each fit, for each T. So few that a fit is far from converged favour scales that converge fast.
        seed: Of every fit.
        val_samples: Draws for a held-out score.
        target_key: The target's entry in mappings.
        weight_key: The examples' weights' entry in mappings, where they have any; scores are weighted means.
        fit_options: Further arguments of `fit`, such as ``{"temperature": 0.1}``, which saves most of the time.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        What was tried, and the recipe to pass to ``bayesianize(prior=…)``. A warning is given where the best scale is at the
        edge of the grid.

    Raises:
        InputError: An argument is wrong, or what `bayesianize` and `fit` refuse.
        LayerError: As for `bayesianize`.
    """
    options = _checked_options(fit_options or {})
    require_count(epochs=epochs, val_samples=val_samples)
    require_rereadable(train_loader)
    if not isinstance(val_loader, Iterable) or isinstance(val_loader, Iterator):
        raise InputError(
            f"suggest_prior compares the scales on val_loader, data that no stage has seen, and reads it several times: give "
            f"a DataLoader or a list of batches, not a {type(val_loader).__name__}"
        )
    given = None if scales is None else _checked_scales(scales)
    family = resolve_family(posterior)

    def network(prior: Normal | None) -> BayesianNetwork:
        return bayesianize(model, example_inputs, layer=layer, posterior=family, prior=prior, output=output)

    first = network(None)
    rms = float(first.trained_vector().double().square().mean().sqrt())
    where = first.prior_recipe.center if center is None else center
    chosen = given or [multiple * rms for multiple in MULTIPLES]
    recipes = [Normal(std=scale, center=where) for scale in chosen]
    with seeded(seed, "held-out"), kept_generators(val_loader):
        held_out = [checked_batch(batch, target_key, weight_key) for batch in val_loader]
    if not held_out:
        raise InputError("val_loader gave no batch: it is empty")
    target, weights = join_targets(held_out)
    trials: list[PriorTrial] = []
    densities: list[Tensor] = []
    with progress_bar("try prior scales", len(chosen), progress) as bar:
        for scale, recipe in zip(chosen, recipes, strict=True):
            bar.describe(f"fit with s={scale:.3g}")
            began = time.perf_counter()
            with kept_generators(train_loader), kept_generators(val_loader), told_once(first=not trials):
                bnn = network(recipe)
                run = fit(
                    bnn,
                    train_loader,
                    epochs=epochs,
                    seed=seed,
                    val_loader=val_loader,
                    val_samples=val_samples,
                    target_key=target_key,
                    weight_key=weight_key,
                    progress=False,
                    **options,
                )
            found = _log_densities(bnn, held_out, target, val_samples, seed)
            nll = -float(mean_over_examples(found, weights))
            energies = [record.free_energy for record in run.history if record.temperature == run.temperature]
            seconds = time.perf_counter() - began
            densities.append(found)
            last = energies[-1] if energies else None
            trials.append(PriorTrial(scale, run.temperature, nll, 0.0, 0.0, last, seconds))
            bar.advance(1, held_out_nll=nll)
    assert run.network_held_out_nll is not None  # noqa: S101 - there are held-out data
    best = min(range(len(trials)), key=lambda number: trials[number].held_out_nll)
    suggestion = PriorSuggestion(
        # A certificate has to know that these data picked the scale.
        prior=replace(recipes[best], choice=ScaleChoice(bnn.seen.inference, len(recipes))),
        trials=tuple(
            _compared(trial, own, densities[best], weights) for trial, own in zip(trials, densities, strict=True)
        ),
        rms=rms,
        network_held_out_nll=run.network_held_out_nll,
        num_held_out=len(densities[best]),
    )
    if suggestion.at_edge is not None:
        warnings.warn(suggestion.notes()[0], stacklevel=2)
    return suggestion


def _log_densities(bnn: BayesianNetwork, held_out: Sequence[Batch], target: Tensor, samples: int, seed: int) -> Tensor:
    """log p(y_n | x_n) of every held-out example, (N,), in double."""
    pairs = [(batch.inputs, batch.target) for batch in held_out]
    return predict(bnn, pairs, samples=samples, seed=seed, progress=False).log_density(target.cpu()).double()


def _compared(trial: PriorTrial, densities: Tensor, best: Tensor, weights: Tensor | None) -> PriorTrial:
    """A trial with its difference from the best one, and the standard error of the (weighted) mean of paired differences."""
    mean, error = mean_and_error(best - densities, weights)
    return replace(trial, difference=mean, standard_error=error)


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    known = [
        name
        for name, parameter in inspect.signature(fit).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _TAKEN
    ]
    taken, unknown = sorted(set(options) & set(_TAKEN)), sorted(set(options) - set(known) - set(_TAKEN))
    if taken:
        raise InputError(f"fit_options has {taken}, which suggest_prior sets itself or takes as arguments of its own")
    if unknown:
        raise InputError(f"fit_options has {unknown}, but the further arguments of fit are {known}")
    return dict(options)


def _checked_scales(scales: Iterable[float]) -> list[float]:
    if not isinstance(scales, Iterable):
        raise InputError(
            f"scales must be standard deviations to compare, such as (0.1, 0.3, 1.0), but it is {scales!r}"
        )
    values = list(scales)
    require_positive(**{f"scales[{number}]": value for number, value in enumerate(values)})
    if len(set(values)) < 2:
        raise InputError(f"scales must be at least two different standard deviations, but they are {values}")
    return sorted({float(value) for value in values})


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
