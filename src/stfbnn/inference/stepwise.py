"""Stage two step by step, for a training loop of one's own."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from typing import Any

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_gradients, require_positive
from stfbnn.inference.engines import ENGINES, check_engine, resolve_engine
from stfbnn.inference.estimators import Estimator, resolve_estimator
from stfbnn.inference.history import FitRecord, FitRun, StageStart
from stfbnn.inference.loaders import require_rereadable
from stfbnn.inference.run import Run
from stfbnn.inference.run_state import state_of, take_state
from stfbnn.inference.survey import checked_batch
from stfbnn.likelihood import LikelihoodLike
from stfbnn.mixed_precision import Precision
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MixturePosterior
from stfbnn.randomness import generator


class Inference:
    """The posterior's inference at one temperature, as an object with a `step`, as an optimizer has one.

        inference = stfbnn.Inference(bnn, train_loader, steps=len(train_loader) * epochs, temperature=0.1)
        for _ in range(epochs):
            for batch in train_loader:
                nll = inference.step(batch)
        inference.finish()

    `fit` does this, and chooses the temperature, stops early, fits mixtures and keeps checkpoints besides: take it where the
    loop need not be one's own.

    Args:
        bnn: The network, from `bayesianize`. Its posterior starts anew, at the trained weights, and until `finish` it counts
            as not fitted; where this raises, it is left as it was.
        train_loader: Batches as `fit` takes them. It is read once here, for N and for the curvature of the loss.
        steps: How many there will be: the learning rate falls to 0 with them.
        temperature: T.
        engine: As for `fit`; one that goes by steps.
        engine_options: Settings of the engine.
        estimator: As for `fit`.
        draws: Passes through the network a step; None takes the estimator's own number.
        likelihood: As for `fit`.
        num_examples: N; None takes the size of the loader's data set.
        seed: Everything random follows from it.
        target_key: The target's entry in mappings.
        weight_key: The entry of a mapping that holds the examples' weights.
        precision: As for `fit`.

    Attributes:
        num_examples: N.
        steps: In all.
        done: Steps so far.

    Raises:
        InputError: An argument, or a batch, is not usable, or the posterior is a mixture.
        ModelChangedError: The user's model was changed since `bayesianize`.
    """

    def __init__(
        self,
        bnn: BayesianNetwork,
        train_loader: Iterable[Any],
        *,
        steps: int,
        temperature: float,
        engine: str = "auto",
        engine_options: Mapping[str, Any] | None = None,
        estimator: str | Estimator = "auto",
        draws: int | None = None,
        likelihood: LikelihoodLike = "auto",
        num_examples: int | None = None,
        seed: int = 0,
        target_key: str = TARGET_KEY,
        weight_key: str = WEIGHT_KEY,
        precision: Precision | None = None,
    ) -> None:
        require_count(steps=steps)
        require_positive(temperature=temperature)
        if num_examples is not None:
            require_count(num_examples=num_examples)
        require_rereadable(train_loader)
        require_gradients(bnn.posterior)
        if isinstance(bnn.posterior, MixturePosterior):
            raise InputError("a mixture has several posteriors to infer, one after another: use stfbnn.fit")
        bnn.check_unchanged()
        self._bnn, self._precision = bnn, precision
        self.steps, self.done, self._finished = steps, 0, False
        with bnn.computing_in(precision):
            self._run = Run(bnn, train_loader, likelihood, seed, target_key, (float(temperature),), False, weight_key)
            name = resolve_engine(engine, bnn.posterior)
            if not ENGINES[name].iterates:
                raise InputError(f"engine={name!r} does not go by steps: use stfbnn.fit")
            chosen = resolve_estimator(estimator, draws, bnn, self._run.example)
            check_engine(name, engine_options or {}, bnn.posterior, bnn.prior, chosen)
            choices = {
                "epochs": 1,
                "engine": name,
                "engine_options": dict(engine_options or {}),
                "estimator": repr(chosen),
                "num_examples": num_examples,
                "steps": steps,
            }
            before = bnn.posterior_state()
            try:
                bnn.reset_posterior()
                self._run.start(choices, chosen, None, False)
                self._run.engine.begin(float(temperature), steps)
            except BaseException:
                bnn.load_posterior_state(before)
                raise
        bnn.likelihood, bnn.temperature, bnn.predictive_temperature = None, None, 1.0
        self._temperature = float(temperature)
        self._noise = generator(seed, "noise", 0, 0)
        self._sums = [0.0, 0.0, time.perf_counter()]

    @property
    def num_examples(self) -> int:
        """N."""
        return self._run.num_examples

    @property
    def kl(self) -> float:
        """KL(q‖p) now, in nats."""
        with self._bnn.computing_in(self._precision):
            return self._run.width()[0]

    def step(self, batch: Any) -> float:
        """Infer from one batch.

        Args:
            batch: In the form of the loader's: (inputs, target), three with the examples' weights, or a mapping.

        Returns:
            An estimate of E_q[−log p(y|x,w)] before the step, nats per example; the free energy is this + (T/N) KL.

        Raises:
            InputError: The batch is not usable, the loss is not finite, or all steps are done.
            ModelChangedError: The user's model was changed.
        """
        if self._finished:
            raise InputError(f"this inference was finished after {self.done} steps: begin another one")
        if self.done == self.steps:
            raise InputError(f"all {self.done} steps are done: give a larger number of steps when it begins")
        bnn, run = self._bnn, self._run
        one = checked_batch(batch, run.target_key, run.weight_key).to(bnn.device)
        bnn.check_unchanged()
        with bnn.computing_in(self._precision):
            before = run.width() if self.done == 0 else None
            nll = run.step(one, self._noise, self._temperature)
            if before is not None:
                run.starts.append(StageStart(self._temperature, *before, nll))
            self.done += 1
            self._sums[0] += nll * len(one)
            self._sums[1] += len(one)
            if self.done % run.batches == 0 or self.done == self.steps:
                self._record()
        return nll

    def _record(self) -> None:
        """Note what one pass over the data, or what is left of one, came to."""
        run, (total, examples, began) = self._run, self._sums
        if self._bnn.prior.learned:
            self._bnn.prior.update(
                self._bnn.posterior.mean_vector().detach(), self._bnn.posterior.std_vector().detach()
            )
            run.engine.prior_changed()
        run.epoch += 1
        kl, mean_std = run.width()
        nll, now = total / examples, time.perf_counter()
        free_energy = nll + self._temperature / self.num_examples * kl
        run.seconds += now - began
        run.history.append(FitRecord(self._temperature, run.epoch, free_energy, nll, kl, mean_std, None, now - began))
        self._sums = [0.0, 0.0, now]

    def finish(self) -> FitRun:
        """Tell the network that it is fitted, as it now is; no step can follow.

        Returns:
            The history, one record for each pass over the data.

        Raises:
            InputError: No step was done.
            ModelChangedError: The user's model was changed.
        """
        if self.done == 0:
            raise InputError(
                "no step was done, so there is nothing to finish: call step with the batches of the loader"
            )
        self._bnn.check_unchanged()
        if self._sums[1]:
            with self._bnn.computing_in(self._precision):
                self._record()
        self._finished = True
        return self._run.conclude(self._temperature, 1.0, None)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here, for ``torch.save``; later steps do not change it."""
        return {
            # An optimizer's state is what it goes on with, not a copy.
            "run": copy.deepcopy(state_of(self._run)),
            "made_with": copy.deepcopy(self._run.signature),
            "done": self.done,
            "sums": self._sums[:2],
            "noise": self._noise.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, in an object that was made with the same arguments.

        Raises:
            InputError: It is no such state, or of an inference on another network, on other data or with other settings.
        """
        if "made_with" not in state:
            raise InputError(
                "this is not what Inference.state_dict gave; pass it as it was returned or read by torch.load"
            )
        theirs, mine = state["made_with"], self._run.signature
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            raise InputError(
                f"the state is of an inference with another {', '.join(differing)}; make this one with the same arguments"
            )
        # Copied, for inference goes on in these tensors.
        take_state(self._run, copy.deepcopy(state["run"]))
        self._run.engine.total_steps = self.steps
        self.done, self._finished = int(state["done"]), False
        self._sums = [*map(float, state["sums"]), time.perf_counter()]
        self._noise.set_state(state["noise"])
