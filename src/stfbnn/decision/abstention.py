"""When not to trust a prediction: a threshold on its uncertainty, chosen on held-out data for a stated risk.

What is guaranteed, under which conditions and why is in ``docs/decision.md``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from stfbnn.decision.bounds import binomial_p_values, hoeffding_bentkus_p_values, interval, upper_limit
from stfbnn.decision.rule import AbstentionRule, Guarantee, nature_of, require_share
from stfbnn.decision.scores import SCORES, Loss, Score, held_out_scores, losses_of, name_of
from stfbnn.decision.selection import certify, control_marginal, fewest_for_marginal, fewest_for_selective
from stfbnn.errors import InputError
from stfbnn.predictive import Prediction

CLOPPER_PEARSON = "fixed-sequence tests, Clopper–Pearson"
HOEFFDING_BENTKUS = "fixed-sequence tests, Hoeffding–Bentkus"
CONFORMAL = "conformal risk control"

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class AbstentionFigures:
    """What a rule did on labelled examples that had no part in choosing it; made by `evaluate_abstention`.

    Attributes:
        count: Number of examples.
        answered: How many the rule answered.
        risk: Mean loss of the answered; None where there are none.
        risk_interval: Its confidence interval: Clopper and Pearson's for errors, else Hoeffding and Bentkus's.
        marginal_risk: Sum of the losses of the answered over the number of all examples.
        marginal_interval: Its confidence interval.
        risk_of_all: Mean loss if everything were answered.
        confidence: Of each of the intervals.
    """

    count: int
    answered: int
    risk: float | None
    risk_interval: tuple[float, float]
    marginal_risk: float
    marginal_interval: tuple[float, float]
    risk_of_all: float
    confidence: float

    @property
    def coverage(self) -> float:
        """Share of the examples that the rule answered."""
        return self.answered / self.count

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {**asdict(self), "coverage": self.coverage}


def abstention_rule(
    prediction: Prediction,
    targets: Tensor,
    *,
    max_risk: float,
    confidence: float | None = None,
    score: str | Score = "entropy",
    loss: Literal["error"] | Loss = "error",
    guarantee: Guarantee = "selective",
) -> AbstentionRule:
    """Choose where to abstain, so that answers keep a stated risk.

    The held-out examples must be independent draws from where the later ones come from, and must have had no part in
    anything before: neither in training, nor as the ``val_loader`` of `fit`, which chooses T and τ, nor in choosing the
    score. "selective" promises: with probability ``confidence`` over these examples, the expected loss of an answer is at
    most ``max_risk``. "marginal" promises: on average over these and the new example, loss·(1 if answered, else 0) is at
    most ``max_risk``.

    Args:
        prediction: Of N held-out examples.
        targets: Their targets, (N,).
        max_risk: The risk to keep, in (0, 1).
        confidence: In (0, 1), 0.95 by default; "selective" alone has one.
        score: "entropy", "confidence" or "epistemic" for classes and for one 0-or-1 label; "std" or "epistemic" for numbers;
            or a function from a prediction to (N,) numbers, the lower the safer.
        loss: "error" for classes and one label; or a function from a prediction and targets to (N,) losses in [0, 1], or
            booleans, True where it is wrong.
        guarantee: "selective" or "marginal".

    Returns:
        The rule. One that answers nothing says why and comes with a warning.

    Raises:
        InputError: An argument is out of range, the targets do not fit, scores or losses are NaN, there are no examples, or
            there are several positions an example and no functions that make one number of them.
    """
    if guarantee not in get_args(Guarantee):
        raise InputError(f"guarantee must be 'selective' or 'marginal', but it is {guarantee!r}")
    require_share(max_risk, "max_risk")
    if guarantee == "marginal" and confidence is not None:
        raise InputError("a marginal guarantee holds on average and has no confidence; leave confidence= away")
    level = _CONFIDENCE if confidence is None else confidence
    require_share(level, "confidence")
    names: dict[str, Any] = {"score": name_of(score), "loss": name_of(loss)}
    functions: dict[str, Any] = {
        "score_function": _own(score, "score", SCORES),
        "loss_function": _own(loss, "loss", ("error",)),
    }
    if not len(prediction):
        raise InputError("the held-out predictions are of no example: there is nothing to choose a threshold by")
    scores = held_out_scores(prediction, names["score"], functions["score_function"]).numpy()
    found = losses_of(prediction, targets, names["loss"], functions["loss_function"])
    losses, count = found.values.numpy(), len(scores)

    if guarantee == "marginal":
        method, needed = CONFORMAL, fewest_for_marginal(max_risk)
        answered = control_marginal(scores, losses, max_risk)
    else:
        method = CLOPPER_PEARSON if found.whole else HOEFFDING_BENTKUS
        p_values = binomial_p_values if found.whole else hoeffding_bentkus_p_values
        needed = fewest_for_selective(max_risk, level)
        certified = certify(scores, losses, max_risk, level, p_values)
        answered = certified.rank
    threshold = bound = None
    total, reason = 0.0, ""
    if answered:
        order = scores.argsort(kind="stable")
        threshold, total = float(scores[order[answered - 1]]), math.fsum(losses[order[:answered]])
        if guarantee == "marginal":
            bound = (total + 1) / (count + 1)
        else:
            bound = upper_limit(total, answered, certified.level, found.whole)
    else:
        reason = _reason(count, needed, math.fsum(losses) / count, max_risk)
        warnings.warn(f"the rule answers nothing: {reason}", stacklevel=2)
    return AbstentionRule(
        **names,
        threshold=threshold,
        guarantee=guarantee,
        max_risk=float(max_risk),
        confidence=None if guarantee == "marginal" else float(level),
        method=method,
        examples=count,
        answered=answered,
        held_out_loss=total,
        bound=bound,
        needed=needed,
        reason=reason,
        **nature_of(prediction),
        **functions,
    )


def evaluate_abstention(
    prediction: Prediction, targets: Tensor, rule: AbstentionRule, *, confidence: float = _CONFIDENCE
) -> AbstentionFigures:
    """What a rule does on labelled examples other than the held-out ones.

    Args:
        prediction: Of N examples, made as the held-out ones were.
        targets: Their targets, (N,).
        rule: The rule.
        confidence: Of the intervals, in (0, 1).

    Raises:
        InputError: The predictions are not like the held-out ones, the targets do not fit, there are no examples, or the rule's
            loss is a function that a file did not hold.
    """
    require_share(confidence, "confidence")
    if not len(prediction):
        raise InputError("the predictions are of no example: there is nothing to evaluate on")
    if rule.loss != "error" and rule.loss_function is None:
        raise InputError(
            f"the rule's loss {rule.loss!r} is a function, which no file holds: give it to AbstentionRule.from_dict(…, loss=…)"
        )
    answers = rule.answers(prediction)
    found = losses_of(prediction, targets, rule.loss, rule.loss_function)
    count, answered = len(answers), int(answers.sum())
    total = math.fsum(found.values[answers].tolist())
    return AbstentionFigures(
        count=count,
        answered=answered,
        risk=total / answered if answered else None,
        risk_interval=interval(total, answered, confidence, found.whole),
        marginal_risk=total / count,
        marginal_interval=interval(total, count, confidence, found.whole),
        risk_of_all=float(found.values.mean()),
        confidence=confidence,
    )


def _own(given: Any, what: str, names: tuple[str, ...]) -> Any:
    """The function that was given, or None for one of our names."""
    if isinstance(given, str) and given in names:
        return None
    if isinstance(given, str) or not callable(given):
        raise InputError(f"{what} must be {' or '.join(map(repr, names))}, or a function, but it is {given!r}")
    return given


def _reason(count: int, needed: int, mean: float, max_risk: float) -> str:
    if count < needed:
        return (
            f"{count:,} held-out examples are too few to keep a risk of {max_risk:g}: it takes at least {needed:,}, even if "
            f"none of them is predicted wrongly"
        )
    return (
        f"no threshold is shown to keep a risk of {max_risk:g} by {count:,} held-out examples, whose mean loss is {mean:.4g} "
        f"when all are answered: allow a higher risk, hold out more examples, or take another score"
    )
