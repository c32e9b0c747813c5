"""The certificate of generalisation: a PAC-Bayes-kl bound of the risk, with what could be checked of its assumptions checked.

For a loss in [0, 1] and a prior P that does not depend on the n certified examples, with probability 1 − δ for all Q at once
kl(R̂_S(Q)‖R(Q)) ≤ (KL(Q‖P) + ln(2√n/δ) + ln k)/n (Maurer, Seeger), for any of k such priors; the estimate of R̂_S(Q) by M
independent draws is charged to a δ' of its own. The trunk is part of the hypotheses that P and Q are over, so it must not
depend on S either.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY
from stfbnn.decision.bounds import upper_limit
from stfbnn.errors import InputError
from stfbnn.guarantees.bounds import maurer_seeger, monte_carlo_upper, require_level
from stfbnn.guarantees.certificate import Bound, Predictor, RiskCertificate, Trunk
from stfbnn.guarantees.eligibility import Eligibility, check_eligibility, hashes_of, require_fresh
from stfbnn.guarantees.sampled_risk import (
    P_MIN,
    Loss,
    SampledRisk,
    as_loader,
    checked_options,
    require_classifier,
    sampled_risk,
)
from stfbnn.inference.loaders import kept_generators
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import (
    MeanFieldPosterior,
    MixturePosterior,
    PointMassPosterior,
    Posterior,
    SampledPosterior,
    components_of,
)
from stfbnn.provenance import Provenance
from stfbnn.randomness import derive_seed, seeded

# Whose risk each loss bounds: the predictor, what is bounded, and by what factor of the sampled risk.
_STATEMENTS: dict[Loss, tuple[tuple[Predictor, str, int], ...]] = {
    "0-1": (("sampled", "error", 1), ("plurality vote", "error", 2)),
    "1 - p": (("averaged", "error", 2),),
    "cross-entropy": (("sampled", "cross-entropy", 1),),
}


def risk_certificate(
    bnn: BayesianNetwork,
    data: Any,
    *,
    delta: float = 0.025,
    delta_monte_carlo: float = 0.025,
    loss: Loss = "0-1",
    passes: int = 1,
    priors_considered: int = 1,
    p_min: float = P_MIN,
    predictive_temperature: float | None = None,
    hold_out: Any = None,
    deterministic: bool = True,
    trivial: bool = True,
    max_seen_share: float = 0.0,
    allow_invalid: bool = False,
    seed: int = 0,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    progress: bool | None = None,
) -> RiskCertificate:
    """Bound the risk of a Bayesian network on unseen examples, from examples that its trunk and its prior never saw.

    Train stage one on one part of the data, make the network Bayesian with a prior that is centred on the trained weights
    (``prior="pretrained"``) or has a fixed scale, infer the posterior on S (or on both parts), and certify on S. What shapes
    only the posterior is free to see S. What shapes the trunk, the prior or the loss is not, and is refused where it is known;
    it is YOUR responsibility that the constants by which inputs are normalised, numbers that were passed by hand (the prior's
    scale, τ, ``p_min``) and the architecture were settled without S, and that S is drawn independently.

    With loss "0-1" the sampled classifier's error is bounded, and with it, at twice that, the plurality vote's; beside it the
    averaged prediction's error, at most 2 E_q[1 − p_y], as a statement of its own, where τ allows. With "1 - p" it alone; with
    "cross-entropy" the sampled classifier's expected loss −ln max(p_y, p_min)/ln(1/p_min).

    Args:
        bnn: The fitted network: a classifier with one label an example, whose posterior has a density.
        data: S: a loader, a list of batches or one batch. It is read several times, and must give the same examples each time,
            without random augmentation.
        delta: δ, the probability with which the PAC-Bayes part may fail.
        delta_monte_carlo: δ', that with which the estimate of the empirical risk may fail.
        loss: What to certify first.
        passes: Weight draws for each example; the Monte-Carlo part shrinks with their number.
        priors_considered: k, the number of priors among which P was picked by looking at S; costs ln k. δ' is shared among
            them, too, so that the best of k certificates, one for each, is a certificate.
        p_min: See above.
        predictive_temperature: τ; None takes the network's, which must not have been chosen by S for losses other than 0-1.
        hold_out: Further data that nothing has seen, for a Clopper–Pearson bound (Hoeffding–Bentkus where the loss is not 0 or
            1) of the same predictor.
        deterministic: Also bound the trained network's error on S (Clopper–Pearson), which is the plain hold-out bound.
        trivial: Also bound Q = P, without inference.
        max_seen_share: The largest share of S that may equal examples which a stage saw, where that is chance.
        allow_invalid: Compute the numbers where there is no certificate, too; they are labelled so wherever they are shown.
        seed: Of the draws, to be fixed before looking at results.
        target_key: The target's entry in mappings.
        weight_key: The entry of the examples' weights in mappings; a risk counts every example as one.
        progress: Show progress bars; None shows them on a terminal.

    Returns:
        The certificate.

    Warns:
        UserWarning: S has repeated examples.

    Raises:
        CertificateError: A stage saw examples of S, or it is not known which examples it saw; says which, and how many.
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: The network is no classifier, its posterior has no finite KL divergence from the prior, there are fewer than
            8 examples, or an argument is out of range.
    """
    started = time.perf_counter()
    require_classifier(bnn)
    tau = checked_options(bnn, (loss,), passes, p_min, predictive_temperature)
    require_level(delta, "delta")
    require_level(delta_monte_carlo, "delta_monte_carlo")
    if delta + delta_monte_carlo >= 1:
        raise InputError(f"delta + delta_monte_carlo must be below 1, but it is {delta + delta_monte_carlo:g}")
    kl, kl_is_bound = divergence(bnn)
    maurer_seeger(0.0, kl, 8, delta, priors_considered)
    bnn.check_unchanged()
    loader = as_loader(data)[0]
    with kept_generators(loader), seeded(seed, "certificate"):
        found = check_eligibility(
            bnn,
            loader,
            predictive_temperature=predictive_temperature,
            priors_considered=priors_considered,
            max_seen_share=max_seen_share,
            target_key=target_key,
            weight_key=weight_key,
        )
    fresh = _check_hold_out(bnn, hold_out, found.provenance, max_seen_share, (target_key, weight_key))
    found = replace(found, reasons=(*found.reasons, *fresh))
    if not allow_invalid:
        found.require(tau_matters=loss != "0-1")
    losses, notes = _losses(loss, found)

    def run(
        which: Any, posterior: Posterior | None, wanted: tuple[Loss, ...], name: str, count: int = 1
    ) -> SampledRisk:
        return sampled_risk(
            bnn,
            which,
            losses=wanted,
            posterior=posterior,
            passes=count,
            p_min=p_min,
            predictive_temperature=tau,
            seed=derive_seed(seed, "certificate", name),
            target_key=target_key,
            weight_key=weight_key,
            progress=progress,
        )

    risk = run(loader, None, losses, "posterior", passes)
    if risk.examples != found.examples or risk.provenance.digest() != found.provenance.digest():
        raise InputError(
            "the data gave other examples when they were read again: the certified set must be fixed; leave out random "
            "augmentation, drop_last and samplers that draw"
        )
    level = delta + delta_monte_carlo
    prior = run(loader, _as_posterior(bnn), losses, "prior") if trivial else None
    further = None if hold_out is None else run(as_loader(hold_out)[0], None, losses, "hold-out")
    trunk = None
    if deterministic:
        exact = run(loader, PointMassPosterior(bnn.layout, _trained(bnn)), ("0-1",), "trunk")
        errors = round(exact.totals["0-1"])
        trunk = Trunk(errors, exact.examples, upper_limit(errors, exact.examples, level, whole=True))
    bounds = []
    for one in losses:
        empirical = monte_carlo_upper(
            min(risk.totals[one], risk.draws), risk.draws, delta_monte_carlo / priors_considered
        )
        value = maurer_seeger(empirical, kl, risk.examples, delta, priors_considered)
        for predictor, what, factor in _STATEMENTS[one]:
            bounds.append(
                Bound(
                    predictor,
                    what,
                    one,
                    factor,
                    risk.mean(one),
                    empirical,
                    min(1.0, factor * value),
                    _limit(prior, one, level / priors_considered, factor),
                    _limit(further, one, level, factor),
                )
            )
    return RiskCertificate(
        bounds=tuple(bounds),
        reasons=found.reasons + (found.tau_reasons if loss != "0-1" else ()),
        notes=notes,
        assumptions=_assumptions(found, loss, p_min),
        examples=found.examples,
        draws=risk.draws,
        kl=kl,
        kl_is_bound=kl_is_bound,
        delta=delta,
        delta_monte_carlo=delta_monte_carlo,
        priors_considered=priors_considered,
        predictive_temperature=tau,
        p_min=p_min,
        trunk=trunk,
        stages=found.stages,
        further_examples=0 if further is None else further.examples,
        way=risk.way,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def divergence(bnn: BayesianNetwork) -> tuple[float, bool]:
    """KL(Q‖P) in nats, in double precision, for a certificate.

    For a mixture it is the upper bound Σ_k π_k KL(q_k‖P), by convexity, and never an estimate. What is drawn follows from the
    weight vector: a folded batch norm is a fixed map of it, so it leaves the bound as it is; a parameter that the layer holds
    twice is one entry of it; and rows set aside for padding, which keep their trained values, are entries that nothing reads,
    so they can only make this number too large, never too small.

    Returns:
        The number, and whether it is an upper bound.

    Raises:
        InputError: It is infinite.
    """
    posterior = bnn.posterior
    if any(isinstance(part, PointMassPosterior | SampledPosterior) for part in components_of(posterior)):
        raise InputError(
            f"a posterior of single weight vectors ({posterior.family!r}) is infinitely far from any prior that has a density: "
            f'there is no certificate for it; infer one with a density, such as posterior="mean-field"'
        )
    own, prior = copy.deepcopy(posterior).cpu().double(), copy.deepcopy(bnn.prior).cpu().double()
    if isinstance(own, MixturePosterior):
        # In double they are to sum to 1 again.
        own.set_weights(own.weights)
        value = float(own.kl_bounds(prior)[1])
    else:
        value = float(own.kl(prior))
    if not value < float("inf"):
        raise InputError(f"KL(Q‖P) is {value}: the posterior or the prior is degenerate, so there is no certificate")
    return max(0.0, value), isinstance(own, MixturePosterior) and len(own) > 1


def _trained(bnn: BayesianNetwork) -> torch.Tensor:
    return bnn.trained_vector().to(bnn.posterior.mean_vector())


def _as_posterior(bnn: BayesianNetwork) -> Posterior:
    """P, to draw from."""
    return MeanFieldPosterior(bnn.layout, bnn.prior.mean, bnn.prior.std)


def _losses(loss: Loss, found: Eligibility) -> tuple[tuple[Loss, ...], tuple[str, ...]]:
    """What to estimate, and why something was left out."""
    if loss != "0-1":
        return (loss,), ()
    if found.tau_reasons:
        return ("0-1",), (f"nothing is said of the averaged prediction, for {'; '.join(found.tau_reasons)}",)
    return ("0-1", "1 - p"), ()


def _limit(risk: SampledRisk | None, loss: Loss, level: float, factor: int) -> float | None:
    """The upper limit of a risk whose predictor does not depend on the examples, by as many independent draws."""
    if risk is None:
        return None
    whole = loss == "0-1"
    total = round(risk.totals[loss]) if whole else risk.totals[loss]
    return min(1.0, factor * upper_limit(total, risk.draws, level, whole))


def _assumptions(found: Eligibility, loss: Loss, p_min: float) -> tuple[str, ...]:
    own = (f"p_min = {p_min:g} was chosen without these examples",) if loss == "cross-entropy" else ()
    return found.assumptions + own


def _check_hold_out(
    bnn: BayesianNetwork, hold_out: Any, certified: Provenance, max_seen_share: float, keys: tuple[str, str]
) -> list[str]:
    if hold_out is None:
        return []
    loader: Iterable[Any] = as_loader(hold_out)[0]
    with kept_generators(loader), seeded(0, "certificate", "hold-out"):
        hashes = hashes_of(loader, *keys)
    if not len(hashes):
        raise InputError("hold_out gave no batch: it is empty")
    return require_fresh(bnn, certified, np.asarray(hashes), max_seen_share)
