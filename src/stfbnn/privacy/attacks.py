"""All membership attacks on one model at once, each a score an example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite, as_labels, as_log_probabilities
from stfbnn.privacy.lira import Variance, checked_shadows, lira
from stfbnn.privacy.rmia import rmia
from stfbnn.privacy.scores import SCORES, as_membership, loss_score, scaled_confidence

ATTACKS = {
    "loss": "loss",
    "confidence": "confidence",
    "entropy": "entropy",
    "modified_entropy": "modified entropy",
    "correctness": "correctness",
    "class_wise_loss": "loss, by class",
    "lira_online": "LiRA, online",
    "lira_offline": "LiRA, offline",
    "rmia_online": "RMIA, online",
    "rmia_offline": "RMIA, offline",
}
"""The names of all attacks, weak ones first, and how tables and pictures call them."""


@dataclass(frozen=True, eq=False)
class ShadowScores:
    """What M shadow models say of N examples.

    Attributes:
        log_p: log p_y, (M, N).
        phi: φ = log(p_y / (1 − p_y)), (M, N).
        member: Which shadow had which example, (M, N) bool.

    Raises:
        InputError: Numbers are not finite, or the shapes are not one.
    """

    log_p: Tensor
    phi: Tensor
    member: Tensor

    def __post_init__(self) -> None:
        shape = as_finite(self.log_p, "shadow log p").shape
        if len(shape) != 2 or as_finite(self.phi, "shadow φ").shape != shape:
            raise InputError(
                f"shadow log p and φ must be of one shape (M, N), but they are {tuple(shape)} and {tuple(self.phi.shape)}"
            )
        as_membership(self.member, tuple(shape), "shadow membership")

    def __len__(self) -> int:
        return len(self.log_p)

    @classmethod
    def from_log_probs(cls, log_probs: Iterable[ArrayLike], labels: ArrayLike, member: ArrayLike) -> ShadowScores:
        """From whole predictions, (N, K) of one shadow after another, so that they need not be in memory together.

        Raises:
            InputError: There are none, or they are no log-probabilities, or labels or membership do not fit.
        """
        rows = [(loss_score(one, labels), scaled_confidence(one, labels)) for one in log_probs]
        if not rows:
            raise InputError("there are no shadow models")
        log_p, phi = (torch.stack(side) for side in zip(*rows, strict=True))
        return cls(log_p, phi, as_membership(member, tuple(log_p.shape), "shadow membership"))


def membership_attacks(
    target_log_probs: ArrayLike,
    labels: ArrayLike,
    member: ArrayLike,
    *,
    shadow: ShadowScores | None = None,
    online: bool = True,
    variance: Variance = "auto",
    gamma: float = 1.0,
    a: float = 0.3,
    population: Literal["all", "non-members"] = "all",
) -> dict[str, Tensor]:
    """The scores of all attacks that can be made.

    Without shadow models these are the thresholds on single predictions. A threshold on φ is not among them: φ grows with
    p_y alone, so it would be the loss attack again.

    Args:
        target_log_probs: log p(k | x) of the attacked predictive, (N, K).
        labels: True classes, (N,).
        member: Who was in its training data, (N,) bool. No attack sees it, but for the choice of ``population``.
        shadow: The shadow models' scores of the same N examples; the attacked model must not be among them.
        online: Whether the attacker trains shadows with the examples it asks about. If not, shadows that had an example
            are not used for it, and there are only the offline attacks.
        variance: Of LiRA.
        gamma: γ of RMIA; 1 tells scores apart most finely, see `rmia`.
        a: Of RMIA offline.
        population: RMIA's population points: all other examples, or those not in the training data, as in its paper.

    Returns:
        For each of `ATTACKS` that can be made, in that order, its scores, (N,) in float64, higher for members.

    Raises:
        InputError: Shapes or values do not fit, or an example lacks the shadow models that an attack needs.
    """
    logs = as_log_probabilities(target_log_probs)
    classes = as_labels(labels, *logs.shape)
    members = as_membership(member, (len(logs),))
    if population not in ("all", "non-members"):
        raise InputError(f'population must be "all" or "non-members", but it is {population!r}')
    found = {name: SCORES[name](logs, classes) for name in ATTACKS if name in SCORES}
    if shadow is None:
        return found
    phi, log_p = scaled_confidence(logs, classes), found["loss"]
    points = None if population == "all" else ~members
    for mode in ("online", "offline") if online else ("offline",):
        found[f"lira_{mode}"] = lira(phi, shadow.phi, shadow.member, mode=mode, variance=variance)
        found[f"rmia_{mode}"] = rmia(log_p, shadow.log_p, shadow.member, mode=mode, gamma=gamma, a=a, population=points)
    if online:
        found["class_wise_loss"] = class_wise(phi, classes, shadow.phi, shadow.member)
    return {name: found[name] for name in ATTACKS if name in found}


def class_wise(
    target_scores: ArrayLike, labels: ArrayLike, shadow_scores: ArrayLike, shadow_member: ArrayLike
) -> Tensor:
    """Scores less the best threshold of their class (Song and Mittal 2021), learnt from the shadow models.

    The threshold of a class is the one with the greatest TPR − FPR among what all shadows say of all its examples.

    Args:
        target_scores: (N,), on a scale where differences mean the same for all classes: φ rather than log p_y.
        labels: Classes, (N,).
        shadow_scores: (M, N).
        shadow_member: Which shadow had which example, (M, N) bool.

    Returns:
        (N,) in float64, positive where an example is taken for a member.

    Raises:
        InputError: Shapes do not fit, numbers are not finite, or a class has no members or no others in any shadow.
    """
    target, shadows, member = checked_shadows(target_scores, shadow_scores, shadow_member)
    classes = as_labels(labels, len(target), int(as_finite(labels, "labels").max()) + 1)
    shifted = target.clone()
    for label in sorted(set(classes.tolist())):
        own = classes == label
        inside = member[:, own]
        if bool(inside.all()) or not bool(inside.any()):
            raise InputError(
                f"a threshold for class {label} needs shadow models that had some of its examples and not others, but "
                f"{int(inside.sum())} of {inside.numel()} had them"
            )
        shifted[own] -= _best_threshold(shadows[:, own].flatten(), inside.flatten())
    return shifted


def _best_threshold(scores: Tensor, member: Tensor) -> Tensor:
    """Midway between the two neighbouring scores between which TPR − FPR is greatest."""
    ordered, order = scores.sort(descending=True)
    inside = member[order].double()
    gain = inside.cumsum(0) / inside.sum() - (1 - inside).cumsum(0) / (1 - inside).sum()
    # Equal scores are on one side of any threshold.
    gain[:-1].masked_fill_(ordered[:-1] == ordered[1:], -1)
    best = int(gain.argmax())
    return ordered[best : best + 2].mean()
