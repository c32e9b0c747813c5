"""Fitting a mixture: every component in turn, and then their weights."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stfbnn.checkpoint import previous_path
from stfbnn.inference.components.scoring import disagreement, distance, training_nll
from stfbnn.inference.components.start import kept_where_unused, start_vector
from stfbnn.inference.components.weights import Choice, weigh_by_free_energy, weigh_by_held_out, weigh_equally
from stfbnn.inference.estimators import Estimator
from stfbnn.inference.held_out import HeldOut
from stfbnn.inference.history import ComponentRecord, FitRecord, FitRun
from stfbnn.inference.maximum_a_posteriori import MaximumAPosteriori, adam_rate
from stfbnn.inference.options import EarlyStop
from stfbnn.inference.run import Run
from stfbnn.posterior import Mixture, MixturePosterior, PointMassPosterior, Posterior, components_of
from stfbnn.predictive import Prediction
from stfbnn.predictive.weighting import mean_over_examples
from stfbnn.randomness import derive_seed
from stfbnn.trunk.sharding import found_by_first

# Retraining takes about so many steps where the recipe does not say how many epochs.
_RETRAINING_STEPS = 250
_RETRAINING_EPOCHS = (2, 10)
# With fewer held-out examples a component, the weights are mostly noise.
_EXAMPLES_A_COMPONENT = 50
# A component's score takes this share of the draws of other scores, for the mixture's has those of all components.
_SCORE_SHARE = 0.5
# Draws for the free energies of which the weights are an exponential.
_FREE_ENERGY_DRAWS = 32


@dataclass(frozen=True)
class Component:
    """One component, once it is inferred.

    Attributes:
        number: From 0.
        start: How it began.
        posterior: q_k.
        history: Of its inference, or of its retraining where it is a point mass.
        retraining: Of its retraining before that.
        nll: E_q[−log p] on the training data, nats per example.
        free_energy: nll + (T/N) KL, nats per example; for a point mass nll − (T/N) log p(w).
        retraining_seconds: Wall time.
        inference_seconds: Wall time.
    """

    number: int
    start: str
    posterior: Posterior
    history: tuple[FitRecord, ...]
    retraining: tuple[FitRecord, ...]
    nll: float
    free_energy: float
    retraining_seconds: float
    inference_seconds: float


class MixtureFit:
    """Runs every component with the machinery of a single posterior, which stands in for the mixture meanwhile.

    Component 0 starts from the trained weights and settles what all share: T, the prior's scale where it is learned, and the
    likelihood's noise. Every other one is retrained from a start of its own and then inferred at that T.

    All ranks take part in every component, as in a single posterior. Where a component starts, and which weights they have, is
    what rank 0 says.

    Args:
        lead: The run of component 0, which has looked at the data.
        choices: What `fit` was asked for, for the checkpoints.
        estimator: Of E_q[NLL] and its gradients.
        checkpoint: Component 0's file; those of the others lie beside it.
        resume: Go on from those that are there.
        predictive_temperature: τ, or "held-out".
        early_stop: Of every component's inference.
        patience: Of ``early_stop``.
    """

    def __init__(
        self,
        lead: Run,
        choices: Mapping[str, Any],
        estimator: Estimator,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        predictive_temperature: float | Literal["held-out"],
        early_stop: EarlyStop | None,
        patience: int,
    ) -> None:
        recipe = lead.bnn.family
        assert isinstance(recipe, Mixture)  # noqa: S101 - what `fit` asks before it comes here
        self._lead, self._bnn, self._recipe = lead, lead.bnn, recipe
        self._choices, self._estimator = choices, estimator
        self._checkpoint, self._resume = checkpoint, resume
        self._predictive_temperature = predictive_temperature
        self._early_stop, self._patience = early_stop, patience
        self._temperature = lead.schedule[0]
        self._tau = 1.0 if predictive_temperature == "held-out" else float(predictive_temperature)

    def run(self) -> FitRun:
        """Infer all components, weigh them, and put the mixture of those that are kept into the network."""
        if self._checkpoint is not None:
            self._lead.processes.from_first(partial(self._forget_others, self._checkpoint))
        first, *rest = components_of(self._bnn.posterior)
        components = [self._first(first)]
        components += [self._further(number, len(rest)) for number in range(1, len(rest) + 1)]
        self._lead.take_settled()
        held_out_nll, records = self._combine(components)
        return self._lead.conclude(self._temperature, self._tau, held_out_nll, records)

    def _first(self, posterior: Posterior) -> Component:
        lead, bnn = self._lead, self._bnn
        bnn.posterior = posterior
        began = time.perf_counter()
        lead.title = "component 0: infer"
        lead.start(self._choices, self._estimator, self._checkpoint, self._resume)
        look = time.perf_counter() - began
        if isinstance(posterior, PointMassPosterior):
            # The trained weights as they are.
            lead.save()
            nll = self._training_nll(posterior, 1, lead.seed)
            penalty = -float(bnn.prior.log_prob(posterior.loc.detach())) * self._temperature / lead.num_examples
            return Component(0, "trained", posterior, (), (), nll, nll + penalty, 0.0, look)
        lead.infer(self._predictive_temperature, self._early_stop, self._patience)
        best = lead.take_best()
        self._temperature, self._tau = float(best["temperature"]), float(best["tau"])
        last = [record for record in lead.history if record.temperature == self._temperature][-1]
        history = tuple(lead.history)
        return Component(0, "trained", posterior, history, (), last.nll, last.free_energy, 0.0, look + lead.seconds)

    def _further(self, number: int, last: int) -> Component:
        lead, bnn, recipe = self._lead, self._bnn, self._recipe
        seed = derive_seed(lead.seed, "component", number)
        title = f"component {number} of {last}"
        start = lead.processes.from_first(lambda: start_vector(bnn, recipe, seed).cpu())
        point = PointMassPosterior(bnn.layout, start.to(bnn.device))
        retraining = lead.follower(derive_seed(seed, "retraining"), self._temperature, f"{title}: retrain")
        bnn.posterior = point
        fewest, most = _RETRAINING_EPOCHS
        epochs = recipe.retrain_epochs or min(most, max(fewest, math.ceil(_RETRAINING_STEPS / lead.batches)))
        rate = adam_rate(bnn.layout, bnn.trained_vector(), recipe.retrain_learning_rate)
        engine = {"engine": MaximumAPosteriori.name, "engine_options": {"learning_rate": rate}}
        choices = {**self._choices, **engine, "epochs": epochs, "component": number}
        self._infer(retraining, choices, "retraining", None)
        assert isinstance(retraining.engine, MaximumAPosteriori)  # noqa: S101 - by that name
        with torch.no_grad():
            point.loc.copy_(kept_where_unused(bnn, point.loc, retraining.engine.used))
        course, seconds = tuple(retraining.history), retraining.seconds
        family = recipe.component_family()
        if family.name == PointMassPosterior.family:
            end = course[-1]
            return Component(number, recipe.start, point, course, (), end.nll, end.free_energy, seconds, 0.0)
        posterior = family.build(bnn.layout, point.loc.detach(), bnn.prior)
        if lead.processes.several:
            # A family that starts at random does so differently on every rank.
            state = {name: value.cpu() for name, value in posterior.state_dict().items()}
            posterior.load_state_dict(lead.processes.from_first(lambda: state))
        inference = lead.follower(seed, self._temperature, f"{title}: infer")
        bnn.posterior = posterior
        epochs = recipe.inference_epochs or int(self._choices["epochs"])
        choices = {**self._choices, "epochs": epochs, "component": number}
        look = self._infer(inference, choices, "component", self._early_stop)
        history = tuple(inference.history)
        return Component(
            number=number,
            start=recipe.start,
            posterior=posterior,
            history=history,
            retraining=course,
            nll=history[-1].nll,
            free_energy=history[-1].free_energy,
            retraining_seconds=seconds,
            inference_seconds=look + inference.seconds,
        )

    def _infer(self, run: Run, choices: Mapping[str, Any], kind: str, early_stop: EarlyStop | None) -> float:
        """Run one part to its end; returns the seconds of the look at the data before it."""
        file = None if self._checkpoint is None else _beside(self._checkpoint, kind, int(choices["component"]))
        began = time.perf_counter()
        run.start(choices, self._estimator, file, self._resume)
        look = time.perf_counter() - began
        run.infer(1.0, early_stop, self._patience)
        run.take_best()
        return look

    def _forget_others(self, checkpoint: str | os.PathLike[str]) -> None:
        """Remove what an earlier run left beside a checkpoint, if that is begun anew."""
        if self._resume and Path(checkpoint).exists():
            return
        for number in range(1, self._recipe.components):
            for kind in ("retraining", "component"):
                file = _beside(checkpoint, kind, number)
                file.unlink(missing_ok=True)
                previous_path(file).unlink(missing_ok=True)

    def _combine(self, components: list[Component]) -> tuple[float | None, tuple[ComponentRecord, ...]]:
        """Weigh the components, and put the mixture of those that are kept into the network."""
        energies = self._free_energies(components) if self._recipe.weighting == "free-energy" else None
        # By the first rank alone: what ranks on machines of different kinds find may differ in its last digits.
        judge = partial(self._judge, components, energies)
        choice, self._tau, held_out_nll, records = found_by_first(self._bnn.network, self._lead.processes, judge)
        self._install(components, choice)
        return held_out_nll, records

    def _judge(
        self, components: list[Component], energies: Tensor | None
    ) -> tuple[Choice, float, float | None, tuple[ComponentRecord, ...]]:
        """The components' weights, τ, the held-out NLL of the mixture, and what is told of each component."""
        held_out = self._lead.held_out
        predictions: list[Prediction] = []
        held_out_nll: float | None = None
        scores: list[float | None] = [None] * len(components)
        if held_out is None:
            choice = self._weigh(components, energies, None)
        else:
            predictions, logs, choice = self._weigh_at(components, energies, held_out)
            if self._predictive_temperature == "held-out":
                self._install(components, choice)
                self._tau = held_out.best_predictive_temperature()
                predictions, logs, choice = self._weigh_at(components, energies, held_out)
            scores = (-mean_over_examples(logs, held_out.weights)).tolist()
            mixed = (logs[choice.kept] + choice.weights[choice.kept].log().unsqueeze(1)).logsumexp(dim=0)
            held_out_nll = -float(mean_over_examples(mixed, held_out.weights))
            if logs.shape[1] < _EXAMPLES_A_COMPONENT * len(components):
                warnings.warn(
                    f"{logs.shape[1]} held-out examples are few for the weights of {len(components)} components: they are "
                    f"noisy, and flattered by about {(len(components) - 1) / (2 * logs.shape[1]):.3f} nats per example; hold "
                    f'out more, or take posterior=stfbnn.Mixture(…, weighting="equal")',
                    stacklevel=6,
                )
        counted = None if held_out is None else held_out.counted
        records = tuple(
            ComponentRecord(
                number=one.number,
                start=one.start,
                history=one.history,
                retraining=one.retraining,
                nll=one.nll,
                held_out_nll=scores[one.number],
                distance=distance(one.posterior, components[0].posterior),
                disagreement=disagreement(predictions[one.number], predictions[0], counted) if predictions else None,
                weight=float(choice.weights[one.number]),
                reason=choice.reasons[one.number],
                retraining_seconds=one.retraining_seconds,
                inference_seconds=one.inference_seconds,
            )
            for one in components
        )
        return choice, self._tau, held_out_nll, records

    def _weigh_at(
        self, components: list[Component], energies: Tensor | None, held_out: HeldOut
    ) -> tuple[list[Prediction], Tensor, Choice]:
        """Every component's held-out predictions at τ, their log densities (K, N), and the weights by them."""
        predictions = []
        for one in components:
            self._bnn.posterior = one.posterior
            predictions.append(held_out.predict(self._tau, share=_SCORE_SHARE))
        logs = torch.stack([held_out.log_density(prediction) for prediction in predictions])
        return predictions, logs, self._weigh(components, energies, logs, held_out.weights)

    def _weigh(
        self,
        components: list[Component],
        energies: Tensor | None,
        log_densities: Tensor | None,
        example_weights: Tensor | None = None,
    ) -> Choice:
        recipe = self._recipe
        if energies is not None:
            return weigh_by_free_energy(energies, self._lead.num_examples, self._temperature, recipe.min_weight)
        if log_densities is None:
            if recipe.weighting == "held-out":
                warnings.warn(
                    f"nothing is held out to weigh the components: those whose training objective is within "
                    f"{recipe.max_excess:g} nats per example of the best have equal weights; pass val_loader= (data that no "
                    f'stage has seen), or weighting="equal" if that is meant',
                    stacklevel=7,
                )
            reached = torch.tensor([one.free_energy for one in components], dtype=torch.float64)
            return weigh_equally(reached, recipe.max_excess, "training objective")
        if recipe.weighting == "equal":
            scores = -mean_over_examples(log_densities, example_weights)
            return weigh_equally(scores, recipe.max_excess, "held-out NLL")
        return weigh_by_held_out(log_densities, recipe.max_excess, recipe.min_weight, example_weights)

    def _free_energies(self, components: list[Component]) -> Tensor:
        """F_k, for which the epochs' own averages are too stale: the weights are an exponential of N F_k."""
        lead, prior = self._lead, self._bnn.prior
        seed = derive_seed(lead.seed, "weights")
        found = []
        for one in components:
            penalty = float(one.posterior.kl(prior).detach()) * self._temperature / lead.num_examples
            found.append(self._training_nll(one.posterior, _FREE_ENERGY_DRAWS, seed) + penalty)
        return torch.tensor(found, dtype=torch.float64)

    def _training_nll(self, posterior: Posterior, samples: int, seed: int) -> float:
        lead = self._lead
        self._bnn.posterior = posterior
        settings = lead.target_key, samples, seed, lead.weight_key, lead.processes
        return training_nll(self._bnn, lead.loader, lead.likelihood, *settings)

    def _install(self, components: list[Component], choice: Choice) -> None:
        kept = [components[number].posterior for number in choice.kept]
        self._bnn.posterior = MixturePosterior(self._bnn.layout, kept, choice.weights[choice.kept])


def _beside(checkpoint: str | os.PathLike[str], kind: str, number: int) -> Path:
    path = Path(checkpoint)
    return path.with_name(f"{path.name}.{kind}-{number}")
