"""Stage two: infer the first layer's posterior, the trunk being frozen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning_fabric.strategies.strategy import Strategy

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_gradients
from stfbnn.inference.engines import check_engine, resolve_engine
from stfbnn.inference.estimators import Estimator, resolve_estimator
from stfbnn.inference.history import FitRun
from stfbnn.inference.loaders import require_rereadable
from stfbnn.inference.mixture import MixtureFit
from stfbnn.inference.options import (
    DEFAULT_TEMPERATURE,
    TEMPERATURES,
    EarlyStop,
    check_held_out_options,
    temperature_schedule,
)
from stfbnn.inference.ranks import computing_on, require_same_network
from stfbnn.inference.run import Run
from stfbnn.launching import joined_fabric, sharded
from stfbnn.likelihood import LikelihoodLike
from stfbnn.mixed_precision import Precision
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MixturePosterior, PointMassPosterior, components_of
from stfbnn.processes import Processes, naming_lost_ranks
from stfbnn.trunk.sharding import EvenBatches, is_sharded


def fit(
    bnn: BayesianNetwork,
    train_loader: Iterable[Any],
    *,
    epochs: int = 10,
    engine: str = "auto",
    engine_options: Mapping[str, Any] | None = None,
    estimator: str | Estimator = "auto",
    draws: int | None = None,
    likelihood: LikelihoodLike = "auto",
    seed: int = 0,
    val_loader: Iterable[Any] | None = None,
    num_examples: int | None = None,
    temperature: float | Literal["held-out"] | None = None,
    temperatures: Iterable[float] = TEMPERATURES,
    predictive_temperature: float | Literal["held-out"] = 1.0,
    early_stop: EarlyStop | None = None,
    patience: int = 3,
    val_samples: int = 32,
    max_seen_share: float = 0.02,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    precision: Precision | None = None,
    progress: bool | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    strategy: str | Strategy = "auto",
    num_nodes: int = 1,
) -> FitRun:
    """Infer the posterior of the first layer, in place, starting from the trained weights.

    Minimises F(q) = (1/N) Σ_n a_n E_q[−log p(y_n|x_n,w)] + (T/N) KL(q‖p), with the examples' weights a_n, which are 1 where
    none are given. Only the posterior changes (and, where they are learned, the prior's scale and the noise of the
    likelihood). Everything random follows from ``seed``. A network that was fitted before starts anew; if the run fails or is
    interrupted, the network is left as it was.

    An example of weight 2 counts exactly as one that is there twice; N is the number of rows all the same, whatever the sum of
    their weights. Weights reach the likelihood's noise where it is learned, and held-out scores are weighted means where
    ``val_loader`` gives weights; predictions ignore them.

    Several processes: started by ``torchrun`` or ``fabric run``, the call takes part as one rank, as `train` does, and every
    rank ends with the same posterior. Each learns from its own part of the data, with draws of its own; a step averages the
    gradients and the curvature over the ranks, by the number of their examples, so the loader's batch size is per rank. N is
    that of all ranks, held-out data are read whole by each, and rank 0 alone writes and reads the checkpoint. For one number
    of ranks the result is the same every time; another number gives other draws. All ranks take part in each component of a
    mixture. Each has the whole network, unless `shard` shared out its trunk.

    Args:
        bnn: The network, from `bayesianize`.
        train_loader: Batches (inputs, target), three with the examples' weights (B,), finite, not negative and not all 0, or
            mappings with ``target_key`` and perhaps ``weight_key``; it is never split. It must end.
        epochs: Passes over the data, for each temperature.
        engine: "natural-gradient" (mean-field, filterwise and full-covariance Gaussians), "bayes-by-backprop" (every family),
            or "laplace" (a Gaussian at the trained weights, without optimisation; one pass a temperature, whatever ``epochs``).
            "auto" takes the first where the family has it, else the second.
        engine_options: Settings of the engine, by name: see `VariationalNewton` and `BayesByBackprop`.
        estimator: How E_q[NLL] and its gradient are drawn: "shared", "antithetic", "per-example", "flipout",
            "local-reparameterization", or an object such as ``stfbnn.SharedSample(draws=4)``. "auto" takes local
            reparameterisation for a mean-field Linear layer that is called once, else antithetic pairs of shared draws.
        draws: Passes through the network a step; None takes the estimator's own number, two for most.
        likelihood: "auto" (integer targets: categorical; bool: Bernoulli; float: Gaussian with learned noise), a name
            ("categorical", "bernoulli", "gaussian", "heteroscedastic", "poisson"), or an object.
        seed: A non-negative integer.
        val_loader: Held-out data that NO stage has seen, for choosing T and τ and for stopping early.
        num_examples: N, rows, by which the mean over a minibatch's rows is multiplied; None takes the size of the loader's data
            set.
        temperature: T; "held-out" tries ``temperatures`` and keeps the one with the lowest held-out NLL. None means
            "held-out" with a ``val_loader``, else 0.1 with a warning.
        temperatures: What is tried, from high to low, each from the trained weights, until the score got worse twice in a
            row.
        predictive_temperature: τ, by which every draw's logits are divided in predictions; "held-out" chooses it.
        early_stop: End a stage when the held-out NLL, or the held-out free energy (held-out NLL + (T/N) KL), has not
            improved for ``patience`` epochs, and take back the best epoch; None runs every stage to its end.
        patience: See ``early_stop``.
        val_samples: Draws for every held-out score; each component of a mixture takes half as many.
        max_seen_share: The largest share of the held-out examples that may equal examples which a stage saw: real data have
            duplicates. Any at all are a warning, more than these are refused.
        target_key: The target's entry in mappings.
        weight_key: The weights' entry in mappings, likewise removed before the model is called.
        checkpoint: A file to which the state is written after every epoch.
        resume: Go on from ``checkpoint`` if it is there: the result is that of a run that was never stopped.
        precision: "bf16-mixed" runs the network's forward passes under autocast to bfloat16, "32-true" does not; None takes
            what a surrounding ``torch.autocast`` says. The posterior and its updates are in full precision in any case.
        progress: Show a progress bar; None shows it on a terminal.
        accelerator: As for `train`. The network computes on the rank's device and is then taken back to where it was; a single
            process for which nothing of these four is said stays where the network is.
        devices: As for `train`.
        strategy: As for `train`.
        num_nodes: As for `train`.

    Returns:
        The history, what was tried, and what was chosen.

    Raises:
        InputError: An argument, a batch or the held-out data are not usable; raised before the first step where possible.
        ModelChangedError: The user's model was changed since `bayesianize`.
        CheckpointError: The checkpoint is damaged, of a run with other settings, or cannot be written at all.
        StorageError: A later one cannot be written, such as on a full disk; the one before it is whole.
        LostRankError: Another rank has ended, or cannot be reached.
    """
    require_count(epochs=epochs, patience=patience, val_samples=val_samples, num_nodes=num_nodes)
    if num_examples is not None:
        require_count(num_examples=num_examples)
    require_rereadable(train_loader)
    require_gradients(bnn.posterior)
    parts = components_of(bnn.posterior)
    if isinstance(parts[0], PointMassPosterior):
        if temperature == "held-out":
            raise InputError(
                "a point mass has no width for a temperature to be chosen for; pass temperature= a number, or leave it at None"
            )
        if bnn.prior.learned:
            raise InputError(
                "a point mass cannot learn the prior's scale: without widths it collapses; give it a scale"
            )
        # T only scales the prior's pull, and T = 1 would pull harder than stage one did.
        temperature = DEFAULT_TEMPERATURE if temperature is None else temperature
    schedule = temperature_schedule(temperature, temperatures, val_loader is not None)
    check_held_out_options(predictive_temperature, early_stop, max_seen_share, val_loader is not None)
    bnn.check_unchanged()
    fabric = joined_fabric(accelerator, devices, strategy, num_nodes)
    processes, part = Processes(fabric), train_loader
    if fabric is not None and processes.several:
        require_same_network(bnn, processes)
        part = sharded(fabric, train_loader, seed)
    if is_sharded(bnn.network):
        if not processes.several:
            raise InputError("the trunk is sharded among several processes: call fit in all of them, as shard was")
        part = EvenBatches(part, processes, target_key, weight_key)
    with naming_lost_ranks(processes), computing_on(bnn, fabric), bnn.computing_in(precision):
        run = Run(bnn, train_loader, likelihood, seed, target_key, schedule, progress, weight_key, processes, part)
        if predictive_temperature != 1 and not run.likelihood.has_logits:
            raise InputError("a predictive temperature belongs to a classification; leave predictive_temperature at 1")
        engine = resolve_engine(engine, parts[0])
        chosen = resolve_estimator(estimator, draws, bnn, run.example)
        check_engine(engine, engine_options or {}, parts[0], bnn.prior, chosen)
        run.prepare_held_out(val_loader, val_samples, max_seen_share)
        choices = {
            "epochs": epochs,
            "engine": engine,
            "engine_options": dict(engine_options or {}),
            "estimator": repr(chosen),
            "num_examples": num_examples,
            "predictive_temperature": predictive_temperature,
            "early_stop": early_stop,
            "patience": patience,
            "val_samples": val_samples,
        }
        posterior, before = bnn.posterior, bnn.posterior_state()
        try:
            bnn.reset_posterior()
            if processes.several:
                # A family that starts at random does so differently on every rank.
                bnn.load_posterior_state(processes.from_first(bnn.posterior_state))
            if isinstance(bnn.posterior, MixturePosterior):
                mixture = MixtureFit(
                    run, choices, chosen, checkpoint, resume, predictive_temperature, early_stop, patience
                )
                return mixture.run()
            run.start(choices, chosen, checkpoint, resume)
            run.infer(predictive_temperature, early_stop, patience)
            return run.finish()
        except BaseException:
            bnn.posterior = posterior
            bnn.load_posterior_state(before)
            raise
