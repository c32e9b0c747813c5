"""Whether a certificate on a set S is one: what shaped the trunk, the prior and the loss must not depend on S.

What shapes only the posterior Q is free to see S: T, the number of epochs, the engine, and the inference itself. Examples are
compared by hashes of their inputs (``stfbnn.provenance``, which says what that cannot see). Nobody can check here that the
constants by which inputs are normalised, the architecture, or a number that was passed by hand (a prior's scale, τ, p_min)
were chosen without S, and that S is drawn independently from the population in question: a certificate assumes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, split_batch
from stfbnn.errors import CertificateError, InputError
from stfbnn.guarantees.bounds import FEWEST_EXAMPLES
from stfbnn.network import BayesianNetwork
from stfbnn.provenance import Hashes, Provenance, example_hashes

STAGE_ONE, INFERENCE, PRIOR, TAU = "stage one", "inference", "the prior", "the predictive temperature"


@dataclass(frozen=True)
class Stage:
    """What one stage has to do with S.

    Attributes:
        name: Of the stage.
        examples: Distinct examples that it saw; None where that is not known.
        shared: Rows of S whose inputs it saw; None likewise.
    """

    name: str
    examples: int | None
    shared: int | None


@dataclass(frozen=True)
class Eligibility:
    """What is known of S and of the stages.

    Attributes:
        examples: n, the rows of S.
        provenance: The distinct examples of S.
        stages: Stage one, inference, the prior and τ.
        reasons: Why a bound on S is no certificate, whatever the loss; empty where it is one.
        tau_reasons: Why one of a loss that τ shapes is none.
        assumptions: What it rests on that could not be checked.
    """

    examples: int
    provenance: Provenance
    stages: tuple[Stage, ...]
    reasons: tuple[str, ...]
    tau_reasons: tuple[str, ...]
    assumptions: tuple[str, ...]

    def stage(self, name: str) -> Stage:
        """One of the stages."""
        return next(stage for stage in self.stages if stage.name == name)

    def require(self, tau_matters: bool) -> None:
        """Refuse where there is a reason.

        Args:
            tau_matters: Whether the loss depends on τ.

        Raises:
            CertificateError: With all reasons.
        """
        found = self.reasons + (self.tau_reasons if tau_matters else ())
        if found:
            raise CertificateError(
                f"no certificate: {'; '.join(found)}. With allow_invalid=True the number is computed all the same, labelled "
                f"as not a certificate"
            )


def check_eligibility(
    bnn: BayesianNetwork,
    loader: Iterable[Any],
    *,
    predictive_temperature: float | None = None,
    priors_considered: int = 1,
    max_seen_share: float = 0.0,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
) -> Eligibility:
    """Compare S with what every stage saw.

    Args:
        bnn: The network.
        loader: S; read once.
        predictive_temperature: τ if it is given by hand; None for the network's own.
        priors_considered: k, by which the bound is charged for the choice of the prior.
        max_seen_share: The largest share of S that may equal examples which a stage saw. Only for data in which different
            examples are equal by chance, as in tables of few columns: an example of S that is independent of training may still
            be equal to one of its examples.
        target_key: The target's entry in mappings.
        weight_key: The weights' entry in mappings.

    Warns:
        UserWarning: S has repeated examples.

    Raises:
        InputError: S is too small or not readable, or an argument is out of range.
    """
    if not 0 <= max_seen_share < 1:
        raise InputError(f"max_seen_share must be at least 0 and below 1, but it is {max_seen_share!r}")
    hashes = hashes_of(loader, target_key, weight_key)
    if len(hashes) < FEWEST_EXAMPLES:
        raise InputError(
            f"a certificate needs at least {FEWEST_EXAMPLES} examples, but the data gave {len(hashes)}; certify on a set that "
            f"was held out before stage one"
        )
    provenance = Provenance(np.unique(hashes))
    repeated = len(hashes) - provenance.count
    if repeated:
        warnings.warn(
            f"{repeated} of the {len(hashes)} examples to certify on are repetitions of others: a certificate takes them as "
            f"independent draws. If the loader repeats rows (oversampling), read each once",
            stacklevel=3,
        )
    judge = _Judge(hashes, max_seen_share)
    reasons = [*judge.stage_one(bnn), *judge.prior(bnn, priors_considered)]
    tau_reasons = judge.tau(bnn, predictive_temperature)
    judge.stage(INFERENCE, bnn.seen.inference)
    given = "the data are independent draws from the population in question, and what prepared them (constants of "
    judge.assumptions.insert(0, f"{given}normalisation, a choice of columns) was settled without them")
    if repeated:
        judge.assumptions.append(f"{repeated} repeated examples are independent draws that are equal by chance")
    stages = tuple(judge.stages[name] for name in (STAGE_ONE, PRIOR, TAU, INFERENCE))
    return Eligibility(len(hashes), provenance, stages, tuple(reasons), tuple(tau_reasons), tuple(judge.assumptions))


def require_fresh(
    bnn: BayesianNetwork, certified: Provenance, hashes: Hashes, max_seen_share: float = 0.0
) -> list[str]:
    """What speaks against a further held-out set, which no stage and not even the certificate may have seen.

    Args:
        bnn: The network.
        certified: S.
        hashes: Of the further set, one for each row.
        max_seen_share: As for `check_eligibility`.

    Returns:
        Reasons; empty where there is none.
    """
    judge, found = _Judge(hashes, max_seen_share), []
    known = ((STAGE_ONE, bnn.provenance), (PRIOR, bnn.seen.prior), (INFERENCE, bnn.seen.inference))
    for name, seen in (*known, (TAU, bnn.seen.predictive_temperature), ("the certificate", certified)):
        shared = 0 if seen is None else judge.shared(seen)
        if shared > judge.allowed:
            found.append(f"{name} saw {shared} of the {len(hashes)} further held-out examples")
    return found


def hashes_of(loader: Iterable[Any], target_key: str = TARGET_KEY, weight_key: str = WEIGHT_KEY) -> Hashes:
    """One hash for each row that a loader gives, in order, repetitions included."""
    parts = [example_hashes(split_batch(batch, target_key, True, weight_key)[0]) for batch in loader]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


class _Judge:
    """Collects what each stage saw of S, and the assumptions made on the way."""

    def __init__(self, hashes: Hashes, max_seen_share: float) -> None:
        self._hashes = hashes
        self.allowed = max_seen_share * len(hashes)
        self.stages: dict[str, Stage] = {}
        self.assumptions: list[str] = []

    def shared(self, seen: Provenance) -> int:
        """Rows of S that a stage saw."""
        return int(np.isin(self._hashes, seen.hashes).sum())

    def stage(self, name: str, seen: Provenance | None) -> int:
        """Note a stage; returns how many rows of S it saw, where they are more than chance is granted, else 0."""
        shared = None if seen is None else self.shared(seen)
        self.stages[name] = Stage(name, None if seen is None else seen.count, shared)
        if not shared or name == INFERENCE:
            return 0
        if shared <= self.allowed:
            self.assumptions.append(f"the {shared} examples that {name} saw, too, are equal by chance")
            return 0
        return shared

    def _saw(self, name: str, shared: int) -> str:
        return f"{name} saw {shared} of the {len(self._hashes)} examples"

    def stage_one(self, bnn: BayesianNetwork) -> list[str]:
        shared = self.stage(STAGE_ONE, bnn.provenance)
        if bnn.provenance is None:
            return [
                "it is not known which examples the network was trained on: declare them before bayesianize with "
                "stfbnn.provenance.attach(model, stfbnn.provenance.provenance_of(its_training_loader)), or set "
                "bnn.provenance (a loader without augmentation, with the inputs prepared as here)"
            ]
        if not bnn.provenance.count:
            self.assumptions.append("stage one saw none of the examples, as was declared by an empty provenance")
        if shared:
            return [f"{self._saw(STAGE_ONE, shared)}: train it on others, and certify on what was held out before it"]
        return []

    def prior(self, bnn: BayesianNetwork, considered: int) -> list[str]:
        seen, loaded = bnn.seen, bnn.seen.inference is None and bnn.fitted
        if loaded and bnn.prior.learned:
            self.stages[PRIOR] = Stage(PRIOR, None, None)
            return ["the prior's scale was learned on data that the file does not name: fit the network again here"]
        shared = self.stage(PRIOR, seen.prior)
        if seen.prior is None:
            return [
                "it is not known which examples the prior's scale was chosen by: give it as a number chosen without these"
            ]
        if not seen.prior.count and bnn.prior_recipe.std not in ("rms", "rms-per-parameter"):
            how = " (how, is not in the file that it was loaded from)" if loaded else ""
            self.assumptions.append(f"the prior's scale was chosen without these examples{how}")
        if not shared:
            return []
        if bnn.prior.learned:
            return [
                f"{self._saw(PRIOR, shared)}: its scale was learned on them by empirical Bayes; take a fixed one, such as "
                f'prior="pretrained"'
            ]
        if considered < seen.prior_candidates:
            return [
                f"{self._saw(PRIOR, shared)}: its scale was picked by them among {seen.prior_candidates}; pass "
                f"priors_considered={seen.prior_candidates}, which costs ln {seen.prior_candidates}, or pick it by others"
            ]
        self.assumptions.append(
            f"the {seen.prior_candidates} scales that were tried were chosen without these examples"
        )
        return []

    def tau(self, bnn: BayesianNetwork, given: float | None) -> list[str]:
        if given is not None:
            self.stages[TAU] = Stage(TAU, 0, 0)
            if given != 1:
                self.assumptions.append(f"τ = {given:g} was chosen without these examples")
            return []
        if bnn.seen.inference is None and bnn.fitted and bnn.predictive_temperature != 1:
            self.stages[TAU] = Stage(TAU, None, None)
            return [
                f"it is not known which examples τ = {bnn.predictive_temperature:g} was chosen by: pass "
                f"predictive_temperature=, a number chosen without these"
            ]
        shared = self.stage(TAU, bnn.seen.predictive_temperature)
        if bnn.seen.predictive_temperature is None:
            return ["it is not known which examples τ was chosen by: pass predictive_temperature="]
        if shared:
            return [
                f"{self._saw(TAU, shared)} (τ was chosen for a posterior that was inferred or chosen on them): pass "
                f"predictive_temperature=, such as 1, or certify the sampled classifier's 0-1 loss, which τ does not change"
            ]
        if not bnn.seen.predictive_temperature.count and bnn.predictive_temperature != 1:
            self.assumptions.append(f"τ = {bnn.predictive_temperature:g} was chosen without these examples")
        return []


def stages_as_dict(stages: Iterable[Stage]) -> Mapping[str, Any]:
    """The stages as plain values, for JSON."""
    return {stage.name: {"examples": stage.examples, "shared": stage.shared} for stage in stages}
