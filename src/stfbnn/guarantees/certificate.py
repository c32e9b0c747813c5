"""A risk certificate: its numbers, which predictor each is about, and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from stfbnn.files import plain
from stfbnn.guarantees.eligibility import INFERENCE, STAGE_ONE, Stage
from stfbnn.guarantees.sampled_risk import Loss

Predictor = Literal["sampled", "plurality vote", "averaged"]
"""One fresh draw of weights for each answer; the class that most draws of Q answer; the class of the highest E_q[p]."""

NOT_A_CERTIFICATE = "not a certificate"
FRESH_DRAWS = (
    "It holds in expectation over fresh draws of the weights, "
    "not for the draws of a fixed seed and not for an exported graph"
)


@dataclass(frozen=True)
class Bound:
    """One statement.

    Attributes:
        predictor: Whose risk is bounded.
        risk: What is bounded: "error" for the probability of a wrong answer, or the loss whose expectation it is.
        loss: The loss in [0, 1] whose sampled risk is bounded.
        factor: What the bound of the sampled risk is multiplied by: 2 where the predictor's error is at most twice that.
        estimate: The Monte-Carlo estimate of R̂_S(Q), without the factor.
        empirical: Its upper limit, at δ', without the factor.
        value: The bound; never above 1.
        prior: The same predictor's bound for Q = P, without a KL and at the same total confidence; None where it was not asked
            for.
        further: The same predictor's bound for Q on the further held-out data, at the same total confidence; None where there
            are none.
    """

    predictor: Predictor
    risk: str
    loss: Loss
    factor: int
    estimate: float
    empirical: float
    value: float
    prior: float | None = None
    further: float | None = None


@dataclass(frozen=True)
class Trunk:
    """The network as it was trained, without a posterior.

    Attributes:
        errors: On S.
        examples: n.
        limit: Clopper and Pearson's upper limit of its error, at the same total confidence: the plain hold-out bound.
    """

    errors: int
    examples: int
    limit: float


@dataclass(frozen=True)
class RiskCertificate:
    """Upper bounds of the risk on examples yet unseen, each with probability 1 − δ − δ' over S and the draws.

    Each bound holds by itself at this confidence; those of the sampled classifier and of the plurality vote hold together, for
    one is twice the other. They hold in expectation over fresh draws of the weights, not for the draws of a fixed seed
    and not for an exported graph.

    Attributes:
        bounds: What is certified; the one that was asked for first.
        reasons: Why it is NOT a certificate; empty where it is one.
        notes: What was left out, and why.
        assumptions: What it rests on beyond what was checked.
        examples: n, the size of S.
        draws: M, the independent weight draws behind each estimate.
        kl: KL(Q‖P), nats.
        kl_is_bound: Whether that is an upper bound of it: Σ_k π_k KL(q_k‖P) for a mixture.
        delta: δ, the probability with which the PAC-Bayes part may fail.
        delta_monte_carlo: δ', that with which the estimates' part may fail.
        priors_considered: k, by which δ and δ' are divided.
        predictive_temperature: τ of the losses that it shapes.
        p_min: Where bounded cross-entropy cuts off.
        trunk: The deterministic network beside it; None where it was not asked for.
        stages: What stage one, the prior, τ and inference saw, and how much of it is in S: the split.
        further_examples: Of the further held-out set; 0 where there is none.
        way: How the draws were made.
        seed: Of the draws.
        seconds: Wall time; no part of a comparison.
    """

    bounds: tuple[Bound, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    examples: int
    draws: int
    kl: float
    kl_is_bound: bool
    delta: float
    delta_monte_carlo: float
    priors_considered: int
    predictive_temperature: float
    p_min: float
    trunk: Trunk | None
    stages: tuple[Stage, ...]
    further_examples: int
    way: str
    seed: int
    seconds: float = field(compare=False)

    @property
    def valid(self) -> bool:
        """Whether it is a certificate."""
        return not self.reasons

    @property
    def confidence(self) -> float:
        """1 − δ − δ'."""
        return 1 - self.delta - self.delta_monte_carlo

    @property
    def bound(self) -> float:
        """The bound that was asked for."""
        return self.bounds[0].value

    def of(self, predictor: Predictor) -> Bound | None:
        """The first bound of a predictor, if there is one."""
        return next((one for one in self.bounds if one.predictor == predictor), None)

    def __str__(self) -> str:
        return self.verdict()

    def table(self) -> Table:
        """All bounds, and what they are to be compared with, for a terminal."""
        title = f"Risk of unseen examples, upper bounds at confidence {self.confidence:.4g}"
        if not self.valid:
            title = f"{NOT_A_CERTIFICATE.upper()}. {title}"
        caption = ". ".join(_sentence(part) for part in (*self.reasons, self.split(), *self.notes, FRESH_DRAWS))
        table = Table(title=title, title_justify="left", caption=f"{caption}.", caption_justify="left")
        table.add_column("predictor", overflow="fold")
        table.add_column("bounded", overflow="fold")
        heads = ["on S", "bound"]
        heads += ["with Q = P"] if any(one.prior is not None for one in self.bounds) else []
        heads += [f"on {self.further_examples} more"] if self.further_examples else []
        for head in heads:
            table.add_column(head, justify="right", overflow="fold")
        for one in self.bounds:
            cells = [_percent(one.factor * one.estimate), _percent(one.value)]
            cells += [_percent(one.prior)] if "with Q = P" in heads else []
            cells += [_percent(one.further)] if self.further_examples else []
            what = one.risk if one.factor == 1 else f"{one.risk}, as {one.factor} × that of {one.loss!r}"
            table.add_row(one.predictor, Text(what), *cells, style="bold" if one is self.bounds[0] else None)
        if self.trunk is not None:
            cells = [_percent(self.trunk.errors / self.trunk.examples), _percent(self.trunk.limit)]
            table.add_section()
            table.add_row("trained network", "error (Clopper–Pearson)", *cells, *[""] * (len(heads) - 2))
        return table

    def split(self) -> str:
        """Which examples had which part, in words."""
        stages = {stage.name: stage for stage in self.stages}
        first, second = stages[STAGE_ONE], stages[INFERENCE]
        said = f"{self.examples} examples certify"
        if first.examples is None:
            said += "; what stage one saw is not known"
        else:
            among = f", {first.shared} of the certifying ones among them" if first.shared else " others"
            said += f"; stage one saw {first.examples}{among}"
        if second.examples:
            said += f"; the posterior was inferred on {second.examples}"
            said += f", {second.shared} of the certifying ones among them" if second.shared else ""
        return said

    def verdict(self) -> str:
        """What is certified, in words with the numbers that carry it."""
        one = self.bounds[0]
        said = ""
        if not self.valid:
            said = f"{NOT_A_CERTIFICATE.upper()}: {'; '.join(self.reasons)}. What follows bounds nothing. "
        kl = f"{'at most ' if self.kl_is_bound else ''}{self.kl:.4g} nats"
        said += (
            f"With confidence {self.confidence:.4g} {_whose(one)} is at most {_percent(one.value)} "
            f"({_percent(one.factor * one.estimate)} on {self.examples} examples, KL {kl}). "
        )
        for other in self.bounds[1:]:
            said += f"By itself at the same confidence, {_whose(other)} is at most {_percent(other.value)}. "
        if self.trunk is not None:
            said += (
                f"The trained network without a posterior errs on at most {_percent(self.trunk.limit)} (Clopper–Pearson on the "
                f"same examples, {_percent(self.trunk.errors / self.trunk.examples)} there)"
            )
            apart = 100 * (one.value - self.trunk.limit)
            where = f"; the bound is {abs(apart):.2f} points {'above' if apart > 0 else 'below'} that"
            said += f"{where if one.risk == 'error' else ''}. "
        if one.prior is not None:
            better = "below" if one.value < one.prior else "not below"
            said += f"The bound is {better} the trivial one of Q = P, {_percent(one.prior)}. "
        if one.further is not None:
            said += f"On {self.further_examples} further examples the same predictor's is {_percent(one.further)}. "
        if one.value >= 1:
            said += "A bound of 1 says nothing. "
        return f"{said}{_sentence(self.split())}. {FRESH_DRAWS}."

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON; "label" says first whether it is a certificate."""
        label = "certificate" if self.valid else NOT_A_CERTIFICATE
        summary: Mapping[str, Any] = {
            "label": label,
            "valid": self.valid,
            "bound": self.bound,
            "confidence": self.confidence,
            "verdict": self.verdict(),
        }
        found: dict[str, Any] = plain({**summary, **asdict(self)})
        return found


def _whose(bound: Bound) -> str:
    if bound.predictor == "sampled":
        what = "error" if bound.risk == "error" else f"expected loss {bound.risk!r}"
        return f"the {what} of the sampled classifier (weights drawn anew for each answer)"
    if bound.predictor == "averaged":
        return "the error of the averaged prediction"
    return "the error of the plurality vote of the draws"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
