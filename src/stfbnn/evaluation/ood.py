"""Does a score tell strange examples from ordinary ones? Detection of out-of-distribution examples.

Throughout, a higher score means "stranger" (entropy, mutual information, one minus the confidence), and the
out-of-distribution examples are the positive ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite


@dataclass(frozen=True)
class OODMetrics:
    """How well a score separates the two sets.

    Attributes:
        auroc: Probability that a strange example scores above an ordinary one, a tie counting half; .5 is chance.
        aupr: Average precision with the strange examples as positives; chance is their share of all examples.
        fpr_at_95_tpr: Share of ordinary examples flagged when at least 95 % of the strange ones are; lower is
            better.
    """

    auroc: float
    aupr: float
    fpr_at_95_tpr: float


def ood_metrics(inside: ArrayLike, outside: ArrayLike) -> OODMetrics:
    """Compute all the figures of a score.

    Args:
        inside: Scores of in-distribution examples, one dimension, finite.
        outside: Scores of out-of-distribution examples, one dimension, finite.

    Returns:
        The figures.

    Raises:
        InputError: One of the two is empty, not one-dimensional or not finite.
    """
    return OODMetrics(auroc(inside, outside), aupr(inside, outside), fpr_at_tpr(inside, outside))


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Area under the receiver operating characteristic; a tie counts half.

    Args:
        inside: Scores of in-distribution examples.
        outside: Scores of out-of-distribution examples.

    Raises:
        InputError: One of the two is empty, not one-dimensional or not finite.
    """
    return float(roc_auc_score(*_labelled(inside, outside)))


def aupr(inside: ArrayLike, outside: ArrayLike) -> float:
    """Average precision, the strange examples being the positives; equal scores enter together.

    Args:
        inside: Scores of in-distribution examples.
        outside: Scores of out-of-distribution examples.

    Raises:
        InputError: One of the two is empty, not one-dimensional or not finite.
    """
    return float(average_precision_score(*_labelled(inside, outside)))


def fpr_at_tpr(inside: ArrayLike, outside: ArrayLike, tpr: float = 0.95) -> float:
    """Share of ordinary examples flagged at the highest threshold that flags a share ``tpr`` of the strange ones.

    No interpolation: the threshold is one of the scores, so the rate is one that a user could get.

    Args:
        inside: Scores of in-distribution examples.
        outside: Scores of out-of-distribution examples.
        tpr: The share of strange examples to flag, in (0, 1].

    Raises:
        InputError: One of the two is empty, not one-dimensional or not finite, or ``tpr`` is out of range.
    """
    if not 0 < tpr <= 1:
        raise InputError(f"tpr must be a share in (0, 1], but it is {tpr}")
    # The points that the default leaves out change no area, but the threshold sought may be one of them.
    false_rates, true_rates, _ = roc_curve(*_labelled(inside, outside), drop_intermediate=False)
    return float(false_rates[np.argmax(true_rates >= tpr)])


def _labelled(inside: ArrayLike, outside: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    scores = [as_finite(inside, "scores inside"), as_finite(outside, "scores outside")]
    for name, values in zip(("inside", "outside"), scores, strict=True):
        if values.ndim != 1:
            raise InputError(f"scores {name} must be one number an example, but have shape {tuple(values.shape)}")
    labels = np.repeat(np.array([0, 1]), [len(values) for values in scores])
    return labels, np.concatenate([values.numpy() for values in scores])
