"""Does uncertainty tell attacked inputs from clean ones, and does it still when the attacker knows that it is looked at?

An attack that only fools says little about a detector (Carlini & Wagner, 2017, "Adversarial examples are not easily
detected"). So each score is also attacked: by steps that fool, and meanwhile keep that score low. What counts in the end is how
many examples are fooled and not flagged. An AUROC below ½ means that attacked inputs look more ordinary than clean ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import as_labels
from stfbnn.evaluation.ood import OODMetrics, ood_metrics
from stfbnn.predictive.categorical import CategoricalPrediction
from stfbnn.predictive.weighting import log_average
from stfbnn.robustness.attack import Attack, AttackResult, check_attacked, margin
from stfbnn.robustness.gradient import GradientAttack
from stfbnn.robustness.result import Accuracy
from stfbnn.robustness.victim import Victim
from stfbnn.threat import Threat

Score = Literal["entropy", "epistemic", "one minus confidence"]
"""What detects: the entropy of the average, the mutual information of class and member, or 1 − the average's largest entry."""

SCORES: tuple[Score, ...] = get_args(Score)

KEPT = 0.8
"""An attack counts against a detector's AUROC if it fools this share of what the plain attack fools."""


@dataclass(frozen=True)
class Evasion:
    """What an attacker who knows of a detector maximises: min(margin, enough) − weight · score, of each example.

    The margin is that of the averaged probabilities, max_{k≠y} log p_k − log p_y. Beyond ``enough`` it counts no more, so that
    all further steps go into the score.

    Attributes:
        score: Which detects.
        weight: λ, positive.
        enough: In nats, positive.
    """

    score: Score
    weight: float
    enough: float = 1.0

    def __post_init__(self) -> None:
        _require_score(self.score)
        for what in ("weight", "enough"):
            _require_positive(getattr(self, what), what)

    def __call__(self, log_probs: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
        """The objective (B,), differentiable, from members' log-probabilities (S, B, K), labels (B,) and shares (S,)."""
        ahead = margin(log_average(log_probs, shares), targets).clamp_max(self.enough)
        return ahead - self.weight * score_of_members(self.score, log_probs, shares)


@dataclass(frozen=True)
class Separation:
    """How one score does under one attack.

    Attributes:
        whole: All attacked inputs against clean ones; positives are the attacked ones.
        fooling: Those that fooled against clean ones; None where none did.
        flagged: Which attacked inputs are above the threshold.
    """

    whole: OODMetrics
    fooling: OODMetrics | None
    flagged: tuple[bool, ...]


@dataclass(frozen=True)
class Attempt:
    """One attack.

    Attributes:
        attack: Its name.
        evades: The score that it keeps low; None for the plain attack.
        weight: λ; 0 for the plain attack.
        fooled: For each example whether the victim was wrong on what the attack found.
        separations: Every score's figures.
    """

    attack: str
    evades: Score | None
    weight: float
    fooled: tuple[bool, ...]
    separations: Mapping[Score, Separation]

    def unseen(self, score: Score) -> tuple[bool, ...]:
        """For each example whether it was fooled and not flagged."""
        return tuple(one and not other for one, other in zip(self.fooled, self.separations[score].flagged, strict=True))


@dataclass(frozen=True)
class Detection:
    """Attacked inputs against clean ones that are classified rightly, the same examples.

    Attributes:
        epsilon: Of the threat.
        norm: Likewise.
        examples: How many are classified rightly without an attack: all of them are attacked, and no others.
        false_alarms: The largest share of clean inputs that a threshold may flag.
        thresholds: An input is flagged where the score is greater.
        attempts: The plain attack first, then those that know of a detector.
    """

    epsilon: float
    norm: str
    examples: int
    false_alarms: float
    thresholds: Mapping[Score, float]
    attempts: tuple[Attempt, ...]

    @property
    def scores(self) -> tuple[Score, ...]:
        """Those that were looked at."""
        return tuple(self.thresholds)

    def worst(self, score: Score) -> Attempt:
        """The attack with the lowest AUROC of what fooled, of those that fool 80 % of what the plain one fools, or more."""
        plain = self.attempts[0]
        able = [one for one in self.attempts if sum(one.fooled) >= KEPT * sum(plain.fooled)]

        def area(one: Attempt) -> float:
            fooling = one.separations[score].fooling
            return math.inf if fooling is None else fooling.auroc

        return min(able, key=area)

    def unseen(self, score: Score) -> tuple[bool, ...]:
        """For each example whether some attack fooled without being flagged: the attacker takes what works."""
        return tuple(any(each) for each in zip(*(one.unseen(score) for one in self.attempts), strict=True))

    def unseen_share(self, score: Score) -> Accuracy:
        """The share of such examples."""
        return Accuracy.of(sum(self.unseen(score)), self.examples)

    def best(self) -> Score:
        """The score with which the fewest examples are fooled unseen."""
        return min(self.scores, key=lambda score: sum(self.unseen(score)))

    def table(self) -> Table:
        """A line for every score and attack, for a terminal."""
        title = f"Attacked against clean inputs, {self.norm} {self.epsilon:.3g}, {self.false_alarms:.1%} false alarms"
        table = Table(title=title, title_justify="left")
        heads = ("score", "attack", "fooled", "AUROC, all", "AUROC, fooled", "flagged", "fooled, not flagged")
        for head in heads:
            table.add_column(head, justify="left" if head in heads[:2] else "right")
        for score in self.scores:
            for one in self.attempts:
                if one.evades in (None, score):
                    table.add_row(score, *self._cells(one, score))
            table.add_row(score, "any of all", "", "", "", "", str(self.unseen_share(score)), end_section=True)
        return table

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        return {
            "epsilon": self.epsilon,
            "norm": self.norm,
            "examples": self.examples,
            "false_alarms": self.false_alarms,
            "thresholds": dict(self.thresholds),
            "attempts": [self._attempt_dict(one) for one in self.attempts],
            "worst": {score: self.attempts.index(self.worst(score)) for score in self.scores},
            "unseen": {score: asdict(self.unseen_share(score)) for score in self.scores},
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """What the best score does, without and with an attacker who knows of it."""
        plain, score = self.attempts[0], self.best()
        fooled = sum(plain.fooled) / self.examples
        said = f"{plain.attack} at {self.norm} ε = {self.epsilon:.3g} fools {fooled:.1%} of {self.examples} examples. "
        before, after = plain.separations[score].fooling, self.worst(score).separations[score].fooling
        if before is None or after is None:
            return said + "So there is nothing to detect."
        name = "epistemic uncertainty" if score == "epistemic" else score
        said += f"The {name} tells those from clean inputs with an AUROC of {before.auroc:.3f}"
        if len(self.attempts) > 1:
            said += f", and of {after.auroc:.3f} where the attacker knows of it"
        else:
            said += "; no attacker knew of it, so that this is an upper limit"
        share = self.unseen_share(score)
        return (
            f"{said}. Where at most {self.false_alarms:.1%} of clean inputs are flagged, {share} are fooled by some attack and "
            f"not flagged."
        )

    def _cells(self, one: Attempt, score: Score) -> tuple[str, ...]:
        figures, count = one.separations[score], self.examples
        return (
            "plain" if one.evades is None else f"λ = {one.weight:g}",
            f"{sum(one.fooled) / count:.1%}",
            f"{figures.whole.auroc:.3f}",
            "" if figures.fooling is None else f"{figures.fooling.auroc:.3f}",
            f"{sum(figures.flagged) / count:.1%}",
            f"{sum(one.unseen(score)) / count:.1%}",
        )

    def _attempt_dict(self, one: Attempt) -> dict[str, Any]:
        scores = {
            score: {
                "whole": asdict(figures.whole),
                "fooling": None if figures.fooling is None else asdict(figures.fooling),
                "flagged": sum(figures.flagged),
                "unseen": sum(one.unseen(score)),
            }
            for score, figures in one.separations.items()
        }
        return {
            "attack": one.attack,
            "evades": one.evades,
            "weight": one.weight,
            "fooled": sum(one.fooled),
            "scores": scores,
        }


def detection(
    victim: Victim,
    inputs: Tensor,
    targets: Tensor,
    threat: Threat,
    *,
    attack: Attack,
    scores: Sequence[Score] = SCORES,
    aware: bool = True,
    weights: Sequence[float] = (0.1, 1.0, 10.0),
    false_alarms: float = 0.05,
    seed: int = 0,
    progress: bool | None = None,
) -> Detection:
    """Attack what is classified rightly, and see which scores tell; then attack each score, too.

    Args:
        victim: Who is attacked.
        inputs: (N, …) in the victim's input space.
        targets: True labels, (N,).
        threat: What may be changed.
        attack: The plain attack. Those that know of a detector are the same with another objective (`Evasion`).
        scores: What detects. "epistemic" is left out for a victim of one member, for which it is always zero.
        aware: Also attack with knowledge of the detector, once for every score and weight.
        weights: λ of these attacks.
        false_alarms: The largest share of clean inputs that a threshold may flag, in (0, 1).
        seed: Of the attacks.
        progress: Show progress bars; None shows them on a terminal.

    Raises:
        InputError: An argument does not fit, no score is left, no example is classified rightly, or the attack is targeted or
            cannot take another objective.
    """
    chosen = _usable_scores(victim, scores)
    if not 0 < false_alarms < 1:
        raise InputError(f"false_alarms must be a share in (0, 1), but it is {false_alarms!r}")
    aims = [Evasion(score, weight) for score in chosen for weight in weights] if aware else []
    attacks = [(attack, None), *_aware_attacks(victim, attack, aims)] if aware else [(attack, None)]
    if getattr(attack, "targeted", False):
        raise InputError("detection is of inputs that leave their true label: pass an attack that is not targeted")
    labels = as_labels(targets, len(inputs), check_attacked(victim, inputs, targets, threat))
    clean = victim.predict(inputs)
    right = clean.labels == labels
    if not bool(right.any()):
        raise InputError("no example is classified rightly without an attack, so that there is nothing to compare")
    before = {score: score_of(score, clean)[right] for score in chosen}
    thresholds = {score: threshold(values, false_alarms) for score, values in before.items()}
    attacked, wanted = inputs[right.to(inputs.device)], targets[right.to(targets.device)]
    attempts = []
    for one, aim in attacks:
        result = one(victim, attacked, wanted, threat, seed=seed, progress=progress)
        attempts.append(_attempt(attack.name, result, aim, before, thresholds))
    return Detection(threat.epsilon, threat.norm, int(right.sum()), false_alarms, thresholds, tuple(attempts))


def threshold(clean: Tensor, false_alarms: float) -> float:
    """The lowest score of a clean input above which no more than a share ``false_alarms`` of the clean ones lie.

    Args:
        clean: Scores, (N,).
        false_alarms: In (0, 1).
    """
    allowed = math.floor(false_alarms * len(clean))
    return float(clean.sort(descending=True).values[allowed])


def score_of(score: Score, prediction: CategoricalPrediction) -> Tensor:
    """A score of every example of a prediction, (N,); higher is stranger."""
    if score == "entropy":
        return prediction.entropy
    return prediction.epistemic if score == "epistemic" else 1 - prediction.confidence


def score_of_members(score: Score, log_probs: Tensor, shares: Tensor | None = None) -> Tensor:
    """The same, (B,), from the log-probabilities of members, (S, B, K), and their shares, (S,); differentiable."""
    averaged = log_average(log_probs, shares)
    if score == "one minus confidence":
        return 1 - averaged.amax(dim=1).exp()
    if score == "entropy":
        return _entropy(averaged)
    each = _entropy(log_probs)
    return _entropy(averaged) - (each.mean(dim=0) if shares is None else torch.tensordot(shares, each, dims=1))


def _entropy(log_probs: Tensor) -> Tensor:
    # A probability of zero has no part in it.
    return -(log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(dim=-1)


def _attempt(
    name: str,
    result: AttackResult,
    aim: Evasion | None,
    before: Mapping[Score, Tensor],
    thresholds: Mapping[Score, float],
) -> Attempt:
    fooled = result.fooled.cpu()
    separations = {}
    for score, clean in before.items():
        values = score_of(score, result.prediction)
        separations[score] = Separation(
            whole=ood_metrics(clean, values),
            fooling=ood_metrics(clean, values[fooled]) if bool(fooled.any()) else None,
            flagged=tuple((values > thresholds[score]).tolist()),
        )
    told = tuple(fooled.tolist())
    if aim is None:
        return Attempt(name, None, 0.0, told, separations)
    return Attempt(f"{name}, keeping the {aim.score} low, λ = {aim.weight:g}", aim.score, aim.weight, told, separations)


def _usable_scores(victim: Victim, scores: Sequence[Score]) -> tuple[Score, ...]:
    for score in scores:
        _require_score(score)
    several = len(victim.deployed()) > 1
    chosen = tuple(dict.fromkeys(score for score in scores if several or score != "epistemic"))
    if not chosen:
        why = " beside the epistemic uncertainty, which is zero for a victim of one member" if scores else ""
        raise InputError(f"there is no score to detect by{why}: name some of {', '.join(SCORES)}")
    return chosen


def _aware_attacks(victim: Victim, attack: Attack, aims: Sequence[Evasion]) -> list[tuple[Attack, Evasion]]:
    if not aims:
        raise InputError("an attack that knows of the detector needs at least one weight; or pass aware=False")
    if not isinstance(attack, GradientAttack) or attack.objective is not None:
        raise InputError(
            "attacks that know of the detector are gradient attacks with an objective of their own: pass "
            "stfbnn.robustness.pgd(…) without an objective, or aware=False"
        )
    hidden = victim.random and attack.knowledge != "deployed"
    if hidden and attack.draws < 2 and any(aim.score == "epistemic" for aim in aims):
        raise InputError("of one draw the epistemic uncertainty is zero: give the attack at least 2 draws")
    return [(replace(attack, objective=aim), aim) for aim in aims]


def _require_score(score: object) -> None:
    if score not in SCORES:
        raise InputError(f"a score must be one of {', '.join(map(repr, SCORES))}, but it is {score!r}")


def _require_positive(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{what} must be positive and finite, but it is {value!r}")
