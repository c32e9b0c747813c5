"""A rule that says when not to answer: a threshold on a score, what it promises and how it came to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from stfbnn.decision.scores import SCORES, Loss, Score, name_of, score_of
from stfbnn.errors import InputError
from stfbnn.predictive import CategoricalPrediction, Prediction

Guarantee = Literal["selective", "marginal"]

_NUMBER = (int, float)
_ENTRIES: dict[str, tuple[type, ...]] = {
    "score": (str,),
    "loss": (str,),
    "threshold": (*_NUMBER, type(None)),
    "guarantee": (str,),
    "max_risk": _NUMBER,
    "confidence": (*_NUMBER, type(None)),
    "method": (str,),
    "examples": (int,),
    "answered": (int,),
    "held_out_loss": _NUMBER,
    "bound": (*_NUMBER, type(None)),
    "needed": (int,),
    "reason": (str,),
    "kind": (str,),
    "classes": (int, type(None)),
    "samples": (int,),
    "at_mean": (bool,),
}
"""What a file holds of a rule."""


@dataclass(frozen=True)
class AbstentionRule:
    """Answer where the score is at most the threshold; made by `abstention_rule`.

    Attributes:
        score: Name of the score, the lower the safer; of the confidence the score is 1 − confidence.
        loss: Name of the loss; "error" for a wrong class or label.
        threshold: Of the score; None for a rule that answers nothing.
        guarantee: Whether ``max_risk`` is of the loss among the answered ("selective") or of the loss of answers over all
            examples ("marginal").
        max_risk: The risk asked for.
        confidence: The probability over the held-out data with which it is kept; None for "marginal", which holds on average.
        method: How the threshold was chosen.
        examples: Held-out examples.
        answered: How many of them are answered.
        held_out_loss: Sum of the losses of those; the number of errors.
        bound: "selective": upper limit of the risk that the test at the chosen threshold alone would give, at most
            ``max_risk``; "marginal": the controlled estimate (sum of losses + 1) / (examples + 1). None where nothing is
            answered. What is guaranteed is ``max_risk``, not this.
        needed: Held-out examples without which no rule could answer anything, even if the network made no error.
        reason: Why nothing is answered; "" otherwise.
        kind: What the predictions are, such as "CategoricalPrediction".
        classes: Number of their classes; None for labels and numbers.
        samples: Posterior draws that they average.
        at_mean: Whether they are those at the posterior mean.
        score_function: The score of the user's own; None for one that has a name.
        loss_function: Likewise.
    """

    score: str
    loss: str
    threshold: float | None
    guarantee: Guarantee
    max_risk: float
    confidence: float | None
    method: str
    examples: int
    answered: int
    held_out_loss: float
    bound: float | None
    needed: int
    reason: str
    kind: str
    classes: int | None
    samples: int
    at_mean: bool
    score_function: Score | None = field(default=None, repr=False, compare=False)
    loss_function: Loss | None = field(default=None, repr=False, compare=False)

    @property
    def coverage(self) -> float:
        """Share of the held-out examples that are answered."""
        return self.answered / self.examples

    @property
    def risk(self) -> float | None:
        """Mean loss of the answered held-out examples: an estimate, biased low by the choice; None where none is answered."""
        return self.held_out_loss / self.answered if self.answered else None

    def answers(self, prediction: Prediction) -> Tensor:
        """Which predictions the rule answers, (N,) booleans; ``prediction.abstain(rule)`` is the opposite.

        A score that is NaN is never answered.

        Raises:
            InputError: The predictions are of another kind, number of classes or number of draws than the held-out ones, or the
                rule was read from a file and its score is a function, which no file holds.
        """
        self._require_alike(prediction)
        if self.score_function is None and self.score not in SCORES:
            raise InputError(
                f"the rule's score {self.score!r} is a function, which no file holds: give it to "
                f"AbstentionRule.from_dict(…, score=…)"
            )
        scores = score_of(prediction, self.score, self.score_function)
        return scores <= (-math.inf if self.threshold is None else self.threshold)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the functions, for JSON."""
        return {name: getattr(self, name) for name in _ENTRIES}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, score: Score | None = None, loss: Loss | None = None
    ) -> AbstentionRule:
        """The rule that `as_dict` wrote.

        Args:
            values: What it wrote.
            score: The score, if it is a function of the user's own.
            loss: The loss, likewise; needed for `evaluate_abstention` alone.

        Raises:
            InputError: Entries are missing, unknown or of a wrong type or range, or the functions are not those of the rule.
        """
        _check_entries(values)
        for what, function in (("score", score), ("loss", loss)):
            if function is not None and name_of(function) != values[what]:
                raise InputError(f"the rule was made with the {what} {values[what]!r}, not with {name_of(function)!r}")
        return cls(**values, score_function=score, loss_function=loss)

    def __str__(self) -> str:
        """A few lines for a person."""
        risk = "errors" if self.loss == "error" else f"mean {self.loss}"
        promised = f"{risk} of at most {self.max_risk:.4g} " + (
            f"among the answered, with confidence {self.confidence:.4g} over the choice of the held-out examples"
            if self.guarantee == "selective"
            else "(answered, as a share of all examples), on average over the held-out and the new examples"
        )
        if self.threshold is None:
            return f"Answers nothing: {self.reason}.\nAsked for: {promised} ({self.method})."
        line = f"{self.score} ≤ {self.threshold:.6g}"
        if self.score == "confidence":
            line = f"confidence ≥ {1 - self.threshold:.6g}"
        wrong = f"{self.held_out_loss:g} errors" if self.loss == "error" else f"mean {self.loss} {self.risk:.4g}"
        return (
            f"Answers where {line}: {self.coverage:.1%} of {self.examples:,} held-out examples, with {wrong} among "
            f"{self.answered:,}.\nPromises {promised} ({self.method}, bound {self.bound:.4g})."
        )

    def _require_alike(self, prediction: Prediction) -> None:
        own = {"kind": self.kind, "classes": self.classes, "samples": self.samples, "at_mean": self.at_mean}
        for what, value in nature_of(prediction).items():
            if value != own[what]:
                raise InputError(
                    f"the rule was chosen on predictions with {what} = {own[what]!r}, but these have {value!r}: its threshold "
                    f"holds for scores made in the same way alone; predict both with the same network and arguments"
                )


def nature_of(prediction: Prediction) -> dict[str, Any]:
    """In what the predictions that a rule is used on must equal those that it was chosen on."""
    classes = prediction.log_probs.shape[1] if isinstance(prediction, CategoricalPrediction) else None
    return {
        "kind": type(prediction).__name__,
        "classes": classes,
        "samples": prediction.samples,
        "at_mean": prediction.at_mean,
    }


def require_share(value: float, what: str) -> None:
    """Refuse what is not a number in (0, 1).

    Raises:
        InputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputError(f"{what} must be a number above 0 and below 1, such as 0.05 for 5 %, but it is {value!r}")


def _check_entries(values: Mapping[str, Any]) -> None:
    if not isinstance(values, Mapping) or set(values) != set(_ENTRIES):
        odd = sorted(set(values) ^ set(_ENTRIES)) if isinstance(values, Mapping) else type(values).__name__
        raise InputError(
            f"these are not the entries of an abstention rule, as as_dict() writes them: {odd} missing or unknown"
        )
    for name, types in _ENTRIES.items():
        value = values[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise InputError(f"the entry {name!r} of an abstention rule is {value!r}, which is not of its type")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"the entry {name!r} of an abstention rule is {value!r}, and must be finite")
    selective = values["guarantee"] == "selective"
    require_share(values["max_risk"], "the entry 'max_risk' of an abstention rule")
    if selective:
        require_share(values["confidence"], "the entry 'confidence' of an abstention rule")
    consistent = (
        values["guarantee"] in get_args(Guarantee)
        and selective == (values["confidence"] is not None)
        and 0 <= values["answered"] <= values["examples"]
        and values["examples"] > 0
        and (values["answered"] == 0)
        == (values["threshold"] is None)
        == (values["bound"] is None)
        == bool(values["reason"])
    )
    if not consistent:
        raise InputError("the entries of the abstention rule contradict each other; make it anew with abstention_rule")
