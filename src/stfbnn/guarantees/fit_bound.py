"""Fit the posterior with a generalisation bound as the objective."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY
from stfbnn.errors import InputError
from stfbnn.guarantees.bound_history import BoundRun
from stfbnn.guarantees.bound_loop import BoundLoop, Start
from stfbnn.guarantees.bounds import require_level
from stfbnn.guarantees.objective import Form, check_form, check_p_min
from stfbnn.inference.checks import require_count, require_gradients
from stfbnn.inference.engines import check_engine, resolve_engine
from stfbnn.inference.estimators import Estimator, resolve_estimator
from stfbnn.inference.loaders import require_rereadable
from stfbnn.likelihood import LikelihoodLike
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MixturePosterior, PointMassPosterior, SampledPosterior

_ENGINES = ("auto", "natural-gradient", "bayes-by-backprop")


def fit_bound(
    bnn: BayesianNetwork,
    train_loader: Iterable[Any],
    *,
    objective: Form = "quadratic",
    epochs: int = 20,
    delta: float = 0.025,
    priors: int = 1,
    p_min: float = 1e-5,
    start: Start = "auto",
    engine: str = "auto",
    engine_options: Mapping[str, Any] | None = None,
    estimator: str | Estimator = "auto",
    draws: int | None = None,
    likelihood: LikelihoodLike = "categorical",
    seed: int = 0,
    num_examples: int | None = None,
    keep_best: bool = True,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> BoundRun:
    """Move the posterior, in place, to where a PAC-Bayes bound on the risk is least.

    The loss is the bounded cross-entropy −log max(p_y, p_min)/log(1/p_min); the bound's empirical risk is that of the sampled
    classifier over the n examples of ``train_loader``. Every epoch minimises the bound's tangent in risk and KL, which is a
    variational free energy at some temperature, with one of the library's engines; then the tangent is taken anew, at an
    estimate over the whole data (see `objective`). Only the posterior changes. For a network of
    ``stfbnn.baselines.bayesianize_whole`` this is PAC-Bayes with backprop (Pérez-Ortiz et al. 2021).

    **The prior** is that of ``bnn`` and must not depend on the examples that the bound is later certified on, nor may the
    trunk: train the network and choose the prior on other examples. Take it centred on the trained weights,
    ``prior=stfbnn.Normal(std=s, center="pretrained")``. Its scale decides what can be won. Where s is small, P is the trained
    network itself, and the bound that of Q = P: KL is 0, and nothing is left to fit. Where s is large, P is a poor
    classifier, and Q pays about log(s/σ) nats for every weight it has to know better. In between, an s at which the
    sampled error of P is a little above the trained network's lets Q win back the difference for few nats. Choose s on
    the data of stage one, or certify with each of k scales and pay ln k for the choice (``priors=k``, here and in the
    certificate). All that shapes Q alone is free: objective, epochs, engine, seed, δ used here, and which epoch is kept.

    **The engines.** Natural gradient, where the family has it, knows the posterior's geometry: the gradient of KL/n by a
    width is tiny beside the noise of the loss's, and plain gradients hardly move the widths. Else Adam on the posterior's
    parameters ("bayes-by-backprop"): the slopes of a bound are 1/log(1/p_min) and less of the usual loss's, and its steps do
    not depend on the scale of the gradient as those of momentum do.

    Args:
        bnn: The network, from `bayesianize`.
        train_loader: The examples whose risk is bounded, as for ``stfbnn.fit``: without weights, and without augmentation,
            for the certificate is about the examples as they are.
        objective: "quadratic", "lambda" (λ set to its best value after every epoch; the least over λ is the quadratic form, so
            both take the same course) or "mcallester" (looser where the risk is small, it lets KL count more).
        epochs: Passes over the data.
        delta: δ, as it enters the objective.
        priors: k, as it enters the objective.
        p_min: Of the bounded cross-entropy.
        start: "prior": q = p, so KL is 0 (up to the slight correlations with which low-rank families start); "posterior": where
            q is now, so that a fit before it is a warm start. "auto" is "prior" for a network that was not fitted, whose prior
            is centred on the trained weights and whose family leaves the initial width open; else "posterior".
        engine: "auto", "natural-gradient" or "bayes-by-backprop".
        engine_options: The engine's settings, such as ``learning_rate``.
        estimator: As for ``stfbnn.fit``: how gradients are drawn, one draw for a minibatch or one an example.
        draws: As for ``stfbnn.fit``.
        likelihood: "categorical", or a ``Categorical`` that weighs and leaves out nothing.
        seed: Everything random follows from it.
        num_examples: n; None counts them.
        keep_best: End with the epoch, or the start, whose estimated bound is least, instead of with the last.
        target_key: The target's entry in mappings.
        weight_key: The entry of examples' weights, which are refused.
        checkpoint: A file to which the state is written after every epoch.
        resume: Go on from ``checkpoint`` if it is there: the result is that of a run that was never stopped.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        The course of bound, risk and KL. The network counts as fitted: its likelihood is the categorical one, its predictive
        temperature 1 (the loss was that of the plain logits), and its ``temperature`` log(1/p_min) times the tangent's: that
        of `fit`, at which the free energy is stationary where the bound is, as long as no probability is below ``p_min``. It is
        above 1, mostly by far: a bound on n examples trusts them less than Bayes does. What it saw is in ``bnn.seen``.

    Raises:
        InputError: An argument, the posterior or prior, or a batch is not usable; raised before the first step where possible.
        ModelChangedError: The user's model was changed since `bayesianize`.
        CheckpointError: The checkpoint is damaged or of a run with other settings.
    """
    check_form(objective)
    check_p_min(p_min)
    require_level(delta, "delta")
    require_count(epochs=epochs, priors=priors)
    if num_examples is not None:
        require_count(num_examples=num_examples)
    if start not in ("auto", "prior", "posterior"):
        raise InputError(f'start must be "auto", "prior" or "posterior", but it is {start!r}')
    if engine not in _ENGINES:
        raise InputError(f"engine must be one of {sorted(_ENGINES)} to minimise a bound, but it is {engine!r}")
    require_rereadable(train_loader)
    require_gradients(bnn.posterior)
    _require_usable(bnn)
    bnn.check_unchanged()
    name, options = resolve_engine(engine, bnn.posterior), dict(engine_options or {})
    choices = {
        "objective": objective,
        "epochs": epochs,
        "delta": delta,
        "priors": priors,
        "p_min": p_min,
        "start": start,
        "engine": name,
        "engine_options": options,
        "num_examples": num_examples,
        "keep_best": keep_best,
        "seed": seed,
    }
    before = bnn.posterior_state()
    with bnn.computing_in(None):
        try:
            run = BoundLoop(bnn, train_loader, choices, likelihood, target_key, weight_key)
            chosen = resolve_estimator(estimator, draws, bnn, run.example)
            check_engine(name, options, bnn.posterior, bnn.prior, chosen)
            run.begin(chosen, checkpoint, resume, progress)
            return run.run(progress)
        except BaseException:
            bnn.load_posterior_state(before)
            raise


def _require_usable(bnn: BayesianNetwork) -> None:
    """Refuse posteriors without a divergence in closed form, and priors that are learned.

    Raises:
        InputError: It is one of these.
    """
    families = 'take posterior="mean-field", "low-rank", "filterwise" or "full"'
    if isinstance(bnn.posterior, PointMassPosterior | SampledPosterior):
        raise InputError(
            f"the posterior {bnn.posterior.family!r} has an infinite divergence from the prior, so no bound; {families}"
        )
    if isinstance(bnn.posterior, MixturePosterior):
        raise InputError(
            f"the divergence of a mixture from the prior has no closed form, and a bound needs it exactly; {families}"
        )
    if bnn.prior.learned:
        raise InputError(
            "the prior's scale is learned, so it would depend on the examples that the bound is for, which no bound allows; "
            'give it a scale that was chosen on other data, such as stfbnn.Normal(std=0.05, center="pretrained")'
        )
