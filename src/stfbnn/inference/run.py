"""One run of stage two: its state from the first look at the data to the result, and its checkpoints."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from stfbnn.batches import WEIGHT_KEY, Batch
from stfbnn.checkpoint import load_checkpoint, prepare_checkpoint, save_checkpoint
from stfbnn.errors import InputError
from stfbnn.inference.engines import ENGINES, blocks_of, build_engine, no_curvature
from stfbnn.inference.estimators import AcrossRanks, Estimator
from stfbnn.inference.first_look import first_look
from stfbnn.inference.held_out import HeldOut, held_out_data, warn_of_no_gain
from stfbnn.inference.history import ComponentRecord, FitRecord, FitRun, StageStart, TemperatureTrial
from stfbnn.inference.loaders import count_examples, length
from stfbnn.inference.maximum_a_posteriori import is_flat
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.inference.options import EarlyStop
from stfbnn.inference.ranks import mean_learned, rank_path, require_batches
from stfbnn.inference.run_state import signature, state_of, take_state
from stfbnn.inference.survey import checked_batch, survey
from stfbnn.launching import set_epoch
from stfbnn.likelihood import Likelihood, LikelihoodLike
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture, PointMassPosterior
from stfbnn.processes import Processes
from stfbnn.progress import progress_bar
from stfbnn.provenance import Provenance
from stfbnn.randomness import generator, seeded
from stfbnn.trunk.sharding import found_by_first


class Run:
    """One call of `fit`: the state that its parts share and that a checkpoint holds."""

    def __init__(
        self,
        bnn: BayesianNetwork,
        loader: Iterable[Any],
        likelihood: LikelihoodLike,
        seed: int,
        target_key: str,
        schedule: tuple[float, ...],
        progress: bool | None,
        weight_key: str = WEIGHT_KEY,
        processes: Processes | None = None,
        part: Iterable[Any] | None = None,
    ) -> None:
        self.bnn, self.seed = bnn, seed
        self.processes = Processes() if processes is None else processes
        # All the data, and what this rank learns from.
        self.source, self.loader = loader, loader if part is None else part
        self.step_bytes = 0
        self.target_key, self.weight_key = target_key, weight_key
        self.schedule, self.progress = schedule, progress if self.processes.rank == 0 else False
        self.held_out: HeldOut | None = None
        self.most_seen = 0.0
        self.network_nll: float | None = None
        self.title = "infer"
        self.follows = False
        self._begin()
        self.likelihood, self.example = first_look(bnn, loader, likelihood, seed, target_key, weight_key)
        self.given_likelihood = self.likelihood.config()

    def _begin(self) -> None:
        self.history: list[FitRecord] = []
        self.trials: list[TemperatureTrial] = []
        self.starts: list[StageStart] = []
        self.best: dict[str, Any] | None = None
        self.stage = self.epoch = self.waited = self.worse_stages = 0
        self.stage_best: dict[str, Any] | None = None
        self.origin: dict[str, Any] | None = None
        self.seconds = 0.0

    def follower(self, seed: int, temperature: float, title: str) -> Run:
        """A run on the same data for another component of a mixture, to be started once this one has ended.

        It keeps to the temperature, the prior's scale and the likelihood's noise that are there by then, for the components
        of a mixture share them, and is not scored on held-out data.

        Args:
            seed: Its own.
            temperature: T.
            title: What the progress bar says.
        """
        other = copy.copy(self)
        other.seed, other.schedule, other.title, other.follows = seed, (temperature,), title, True
        other.likelihood = copy.deepcopy(self.likelihood)
        other._begin()
        return other

    def prepare_held_out(self, loader: Iterable[Any] | None, samples: int, most_seen: float) -> None:
        """Read the held-out data once, for all scores."""
        if loader is not None:
            keys = self.target_key, self.weight_key
            self.held_out = held_out_data(self.bnn, self.source, loader, self.likelihood, self.seed, samples, *keys)
            if self.bnn.provenance is not None:
                self.held_out.refuse_seen(self.bnn.provenance, "stage one", most_seen)
            self.most_seen = most_seen

    def start(
        self,
        choices: Mapping[str, Any],
        estimator: Estimator,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        """Make the engine, from a checkpoint or from a first pass over the data."""
        self.checkpoint = checkpoint
        self.epochs = int(choices["epochs"]) if ENGINES[str(choices["engine"])].iterates else 1
        self.signature = signature(self, choices)
        engine, options = str(choices["engine"]), dict(choices["engine_options"])
        num_examples = choices["num_examples"]
        if checkpoint is not None:
            self.processes.from_first(lambda: prepare_checkpoint(checkpoint, self.signature))
        # Bayes by Backprop keeps to a width that the recipe gives.
        recipe = self.bnn.family.component_family() if isinstance(self.bnn.family, Mixture) else self.bnn.family
        open_width = engine != "bayes-by-backprop" or getattr(recipe, "initial_std", None) is None
        curved = open_width and not isinstance(self.bnn.posterior, PointMassPosterior)
        load = partial(load_checkpoint, checkpoint, self.signature) if checkpoint is not None else None
        saved = self.processes.from_first(load) if load is not None and resume else None
        if saved is None:
            curvature = self._look_at_the_data(curved, num_examples)
        else:
            # A resumed engine brings its own.
            curvature = no_curvature(self.bnn.posterior)
            if not self.follows:
                self.take_survey(saved["survey"])
        if self.held_out is not None and not self.follows:
            self.held_out.refuse_seen(self.provenance, "train_loader", self.most_seen)
        posterior, prior = self.bnn.posterior, self.bnn.prior
        self._ranks = AcrossRanks(estimator, self.processes)
        # Most likelihoods learn nothing, of which the ranks need not tell each other.
        silent = type(self.likelihood).estimate is Likelihood.estimate
        self._learners = Processes() if silent else self.processes
        self.engine = build_engine(
            engine, posterior, prior, self.num_examples, self.batches, curvature, self._ranks, options
        )
        if self.held_out is not None and not self.follows:
            # The survey has set a noise that is learned, and the posterior's mean is still at the trained weights.
            score = partial(self.held_out.nll, weights="mean")
            first = partial(found_by_first, self.bnn.network, self.processes)
            self.network_nll = first(score) if saved is None else saved["network_nll"]
        # Every temperature starts from here.
        several = len(self.schedule) > 1
        self.origin = {**self.snapshot(), "engine": copy.deepcopy(self.engine.state())} if several else None
        if saved is not None:
            take_state(self, saved)

    def _look_at_the_data(self, curved: bool, num_examples: int | None) -> Tensor | None:
        """Survey the data at the posterior's mean; what follows another run knows all but the curvature there."""
        if self.follows and not curved:
            return None
        with seeded(self.seed, "survey"), progress_bar("look at the data", length(self.loader), self.progress) as bar:
            found = survey(
                self.bnn,
                self.loader,
                # Where it is settled, what the survey says of the noise is not taken.
                copy.deepcopy(self.likelihood) if self.follows else self.likelihood,
                self.target_key,
                self.seed,
                curvature=curved,
                blocks=blocks_of(self.bnn.posterior),
                record=not self.follows,
                bar=bar,
                weights=self.bnn.posterior.mean_vector(),
                weight_key=self.weight_key,
                processes=self.processes,
            )
        if not self.follows:
            counted = count_examples(self.source, found.num_examples, self.processes.several)
            self.take_survey(found.state(num_examples or counted))
        return found.curvature

    def take_survey(self, found: Mapping[str, Any]) -> None:
        """Take what the first look at the data counted."""
        self.num_examples, self.batches = int(found["num_examples"]), int(found["batches"])
        self.rows, self.total_weight = int(found["rows"]), float(found.get("total_weight", found["rows"]))
        self.provenance = Provenance.from_tensor(found["provenance"])

    def infer(
        self,
        predictive_temperature: float | Literal["held-out"],
        early_stop: EarlyStop | None,
        patience: int,
    ) -> None:
        """Run the stages, one for each temperature."""
        epochs = self.epochs
        total = len(self.schedule) * epochs * self.batches
        with progress_bar("infer", total, self.progress) as bar:
            bar.advance((self.stage * epochs + self.epoch) * self.batches)
            while self.stage < len(self.schedule):
                at = self.schedule[self.stage]
                if self.epoch == 0:
                    if self.stage > 0:
                        assert self.origin is not None  # noqa: S101 - kept where there are several stages
                        self.restore(self.origin)
                        self.engine.load_state(copy.deepcopy(self.origin["engine"]))
                    self.engine.begin(at, epochs * self.batches)
                bar.describe(f"{self.title} at T={at:g}")
                while self.epoch < epochs and (early_stop is None or self.waited < patience) and not self._stops():
                    self._one_epoch(at, early_stop, bar)
                    if self.epoch < epochs:
                        self.save()
                if self.stage_best is not None:
                    self.restore(self.stage_best)
                    self.engine.load_state(self.stage_best["engine"])
                self.worse_stages = self.worse_stages + 1 if self._score(at, predictive_temperature) else 0
                self.stage, self.epoch, self.waited, self.stage_best = self.stage + 1, 0, 0, None
                if self.worse_stages == 2:
                    self.stage = len(self.schedule)
                self.save()

    def _one_epoch(self, temperature: float, early_stop: EarlyStop | None, bar: Any) -> None:
        bnn, began = self.bnn, time.perf_counter()
        bnn.check_unchanged()
        # The same at every temperature, so that they differ by T alone, and not by their places among those that are tried.
        noise = generator(self.seed, "noise", 0, self.epoch, *rank_path(self.processes))
        total, examples, steps = 0.0, 0, 0
        kl, mean_std = self.width()
        if self.processes.several:
            set_epoch(self.loader, self.epoch)
        with seeded(self.seed, "epoch", 0, self.epoch):
            for batch in self.loader:
                one = checked_batch(batch, self.target_key, self.weight_key).to(bnn.device)
                nll = self.step(one, noise, temperature)
                if self.epoch == examples == 0:
                    # The estimate is of q before the step.
                    self.starts.append(StageStart(temperature, kl, mean_std, nll))
                total += nll * self._ranks.examples
                examples += self._ranks.examples
                steps += 1
                bar.advance(
                    1, free_energy=nll + temperature / self.num_examples * kl, nll=nll, KL=kl, mean_std=mean_std
                )
        if not examples:
            raise InputError(
                "train_loader gave no batch in this epoch, though it did before; it must be readable again"
            )
        require_batches(steps, self.batches, self.processes)
        if bnn.prior.learned and not self.follows:
            bnn.prior.update(bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach())
            self.engine.prior_changed()
        self.epoch += 1
        kl, mean_std = self.width()
        nll, penalty = total / examples, temperature / self.num_examples * kl
        held_out = self._watch(early_stop, penalty)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.history.append(FitRecord(temperature, self.epoch, nll + penalty, nll, kl, mean_std, held_out, seconds))

    def step(self, batch: Batch, noise: torch.Generator, temperature: float) -> float:
        """One step of the engine on a batch that is on the network's device, and of what the likelihood learns.

        Returns:
            The estimate of E_q[NLL] before the step, nats per example; an InputError where it is not finite.
        """
        loss = MinibatchLoss(self.bnn, self.likelihood, batch.inputs, batch.target, batch.weight)
        sent = self.processes.sent
        nll = self.engine.step(loss, noise)
        self.step_bytes = self.processes.sent - sent
        # In proportion to what the batch counts: the survey's estimate counts as one pass over the data, and so does every
        # epoch, until the average reaches back over a hundred batches.
        recent = max(1 / (self.batches * (self.epoch + 1)), 0.01)
        if not self.follows:
            learned, counts = mean_learned(loss.learned, loss.total_weight, self._learners)
            self.likelihood.move(learned, min(1.0, recent * counts * self.batches / self.total_weight))
        if not nll < float("inf"):
            raise InputError(
                f"the loss became {nll} at T={temperature:g}, epoch {self.epoch + 1}: lower the learning rate with "
                f"engine_options={{'learning_rate': …}}, or check the data for extreme values"
            )
        return nll

    def _stops(self) -> bool:
        """Whether the retraining of a point mass has stopped to pay; inference always runs its schedule to its end."""
        records = self.history[-self.epoch :] if self.epoch else []
        return isinstance(self.bnn.posterior, PointMassPosterior) and is_flat(records, self.epochs)

    @torch.no_grad()
    def width(self) -> tuple[float, float]:
        """KL(q‖p) in nats, and the mean standard deviation; for a point mass −log p(w) and 0."""
        posterior = self.bnn.posterior
        if isinstance(posterior, PointMassPosterior):
            return -float(self.bnn.prior.log_prob(posterior.loc)), 0.0
        return float(posterior.kl(self.bnn.prior)), float(posterior.std_vector().mean())

    def _watch(self, early_stop: EarlyStop | None, penalty: float) -> float | None:
        if early_stop is None or self.held_out is None:
            return None
        held_out = found_by_first(self.bnn.network, self.processes, self.held_out.nll)
        # The held-out score is a weighted mean; the free energy's sum over the data is divided by the number of rows.
        score = held_out + (penalty * self.rows / self.total_weight if early_stop == "free-energy" else 0.0)
        if self.stage_best is None or score < self.stage_best["score"]:
            engine = copy.deepcopy(self.engine.state())
            self.stage_best, self.waited = {**self.snapshot(), "engine": engine, "score": score}, 0
        else:
            self.waited += 1
        return held_out

    def _score(self, temperature: float, predictive_temperature: float | Literal["held-out"]) -> bool:
        """Score the stage that has ended; keep it if it is the best. Returns whether it was worse than the best."""
        chosen = predictive_temperature == "held-out"
        tau = 1.0 if predictive_temperature == "held-out" else float(predictive_temperature)
        if self.held_out is None or self.follows:
            self.best = {**self.snapshot(), "temperature": temperature, "tau": tau}
            return False
        score = self.held_out.tuned if chosen else partial(self.held_out.at, tau)
        tau, nll = found_by_first(self.bnn.network, self.processes, score)
        self.trials.append(TemperatureTrial(temperature, nll, tau))
        if self.best is not None and not nll < self.best["nll"]:
            return True
        self.best = {**self.snapshot(), "temperature": temperature, "tau": tau, "nll": nll}
        return False

    def take_best(self) -> dict[str, Any]:
        """Put the best posterior in its place; returns what was noted of it."""
        assert self.best is not None  # noqa: S101 - there is at least one stage
        self.restore(self.best)
        return self.best

    def take_settled(self) -> None:
        """Let the held-out data be scored with this run's likelihood again, once its followers have ended."""
        if self.held_out is not None:
            self.held_out.likelihood = self.likelihood

    def finish(self) -> FitRun:
        """Take the best posterior and tell the network that it is fitted."""
        best = self.take_best()
        return self.conclude(float(best["temperature"]), float(best["tau"]), best.get("nll"))

    def conclude(
        self,
        temperature: float,
        predictive_temperature: float,
        held_out_nll: float | None,
        components: tuple[ComponentRecord, ...] = (),
    ) -> FitRun:
        """Tell the network that it is fitted, with the posterior that it has, and say how it went."""
        warn_of_no_gain(self.network_nll, held_out_nll, temperature)
        self.bnn.likelihood = self.likelihood
        self.bnn.num_examples = self.num_examples
        self.bnn.temperature, self.bnn.predictive_temperature = temperature, predictive_temperature
        self.bnn.seen = self.bnn.seen.after_inference(
            self._seen_by_inference(),
            learned_prior=self.bnn.prior.learned,
            chosen_tau=self.signature.get("predictive_temperature") == "held-out",
        )
        return FitRun(
            history=tuple(self.history),
            trials=tuple(self.trials),
            network_held_out_nll=self.network_nll,
            temperature=temperature,
            predictive_temperature=predictive_temperature,
            num_examples=self.num_examples,
            seconds=self.seconds + sum(one.retraining_seconds + one.inference_seconds for one in components[1:]),
            held_out_nll=held_out_nll,
            components=components,
            starts=tuple(self.starts),
            engine=self.engine.name,
            ranks=self.processes.count,
            bytes_per_step=self.step_bytes,
        )

    def _seen_by_inference(self) -> Provenance | None:
        """What shaped the posterior; None where the checkpoint of an older version did not note the training data."""
        if not self.provenance.count:
            return None
        return self.provenance if self.held_out is None else self.provenance.union(self.held_out.provenance)

    def snapshot(self) -> dict[str, Any]:
        """Note the posterior, and the likelihood with it."""
        return {**self.bnn.posterior_state(), "likelihood": self.likelihood.config()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put a posterior, and the likelihood that it was noted with, in their places."""
        self.bnn.load_posterior_state(snapshot)
        self.likelihood = self.likelihood.rebuilt(snapshot["likelihood"]).to(self.bnn.device)
        if self.held_out is not None:
            self.held_out.likelihood = self.likelihood

    def save(self) -> None:
        """Write the checkpoint, where one was asked for."""
        if self.checkpoint is not None:
            path = self.checkpoint
            self.processes.from_first(lambda: save_checkpoint(path, state_of(self), self.signature))
