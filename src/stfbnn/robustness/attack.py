"""What every attack is called with and gives back, and the one way in which it is judged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.predictive.categorical import CategoricalPrediction
from stfbnn.randomness import derive_seed
from stfbnn.robustness.victim import Members, Victim
from stfbnn.threat import Threat

Loss = Literal["ce", "margin", "dlr"]
"""What is maximised: −log p_y; max_{k≠y} log p_k − log p_y; or the same over a difference of scores (Croce & Hein, 2020)."""

Knowledge = Literal["deployed", "common", "fresh"]
"""Which members an attacker sees: the deployed ones, some of its own for each restart, or new ones at every step."""

Average = Literal["loss", "probability"]
"""What is averaged over members before it is differentiated: each one's loss, or the probability whose loss is taken."""

JUDGES = 32
"""Members, drawn by the attacker, by which one that does not see the deployed ones picks the best of what it found."""


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found.

    Attributes:
        name: A short label, such as "PGD-20, 8 fresh draws".
        inputs: The changed inputs, (N, …) in the input space, within the threat.
        fooled: Where the deployed members give another label than the target, (N,); for a targeted attack, where they give the
            target.
        prediction: Of the deployed members, on ``inputs``.
        notes: What the attack saw on its way, such as "zero_gradient_share".
    """

    name: str
    inputs: Tensor
    fooled: Tensor
    prediction: CategoricalPrediction
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The share of examples that are not fooled."""
        return float((~self.fooled).double().mean())

    def as_dict(self) -> dict[str, Any]:
        """The figures, without the tensors, for JSON."""
        return {
            "name": self.name,
            "examples": len(self.fooled),
            "fooled": int(self.fooled.sum()),
            "accuracy": self.accuracy,
            "notes": dict(self.notes),
        }


class Attack(Protocol):
    """A search for inputs near given ones that a victim gets wrong; its fields are its configuration."""

    @property
    def name(self) -> str:
        """A short label."""

    def __call__(
        self,
        victim: Victim,
        inputs: Tensor,
        targets: Tensor,
        threat: Threat,
        *,
        seed: int = 0,
        progress: bool | None = None,
    ) -> AttackResult:
        """Attack.

        Args:
            victim: Who is attacked.
            inputs: (N, …) in the victim's input space, on any device.
            targets: Labels (N,), true ones; for a targeted attack those to be reached.
            threat: What may be changed.
            seed: Of everything random in the attack.
            progress: Show a progress bar; None shows it on a terminal.

        Raises:
            InputError: An argument does not fit.
        """


def check_attacked(victim: Victim, inputs: Tensor, targets: Tensor, threat: Threat) -> int:
    """Refuse what cannot be attacked, before the work; it costs one pass of one member on two rows.

    Args:
        victim: Who is attacked.
        inputs: (N, …) in the input space.
        targets: (N,), integers of classes.
        threat: What may be changed.

    Returns:
        K, the number of classes.

    Raises:
        InputError: The inputs do not lie in the space, the targets are not one label an example, there is nothing to change
            (ε = 0), or the victim's outputs are no class scores (B, K).
    """
    victim.space.check(inputs)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype is torch.bool:
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets must be an integer tensor of class numbers, but they are {found}")
    if targets.shape != inputs.shape[:1]:
        raise InputError(f"{len(inputs)} inputs need targets of shape ({len(inputs)},), but got {tuple(targets.shape)}")
    if threat.epsilon == 0:
        raise InputError("epsilon is 0, so nothing may be changed: give a positive one, or take victim.predict(inputs)")
    few = victim.predict(inputs[:2], Members(victim.deployed().functions[:1]))
    classes = few.log_probs.shape[1]
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise InputError(f"targets must be class numbers from 0 to {classes - 1}, but they span {low} … {high}")
    return classes


def require_one_of(value: object, what: str, values: tuple[str, ...]) -> None:
    """Refuse another value than one of those; ``what`` is the field's name.

    Raises:
        InputError: It is another.
    """
    if value not in values:
        raise InputError(f"{what} must be one of {', '.join(map(repr, values))}, but it is {value!r}")


def require_classes_for(loss: str, classes: int) -> None:
    """Refuse a loss that is not defined for so few classes.

    Raises:
        InputError: It needs more.
    """
    least = {"dlr": 3, "dlr-targeted": 4}.get(loss, 2)
    if classes < least:
        raise InputError(f"the loss {loss!r} needs at least {least} classes, but there are {classes}: take 'ce'")


def margin(log_probs: Tensor, targets: Tensor) -> Tensor:
    """How far the best other class is ahead, max_{k≠y} log p_k − log p_y, (B,); positive where the label is not y.

    Args:
        log_probs: (B, K); scores that differ from them by a constant for each row give the same.
        targets: y, (B,).
    """
    others = log_probs.scatter(1, targets.unsqueeze(1), -math.inf)
    return others.amax(dim=1) - log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)


class Sight:
    """The members that an attacker sees.

    Args:
        victim: Who is attacked; one that draws nothing has only the deployed members, whatever the knowledge.
        knowledge: Which.
        draws: How many of its own.
        seed: Which of its own.

    Attributes:
        victim: As given.
        deployed: Whether they are the deployed ones, so that the attacker can tell whether it has succeeded.
    """

    def __init__(self, victim: Victim, knowledge: Knowledge, draws: int, seed: int) -> None:
        self.victim, self.deployed = victim, knowledge == "deployed" or not victim.random
        self._knowledge, self._draws, self._seed = knowledge, draws, seed
        self._last: tuple[tuple[int | str, ...], Members] | None = None

    def members(self, restart: int, step: int) -> Members:
        """Those of one step; step -1 is before the first."""
        if self.deployed:
            return self.victim.deployed()
        if self._knowledge == "common":
            return self._drawn(self._draws, "common", restart)
        return self._drawn(self._draws, "fresh", restart, step + 1)

    def judges(self) -> Members:
        """Those by which the attacker picks among what it found: 32 of a seed of its own where it does not see the deployed."""
        if self.deployed:
            return self.victim.deployed()
        return self._drawn(JUDGES, "judges")

    def _drawn(self, count: int, *path: int | str) -> Members:
        """Drawn once while the same are asked for again: drawing may cost as much as running."""
        if self._last is None or self._last[0] != path:
            self._last = (path, self.victim.draw(count, derive_seed(self._seed, "attack", *path)))
        return self._last[1]


class Best:
    """The best changed inputs so far, row by row; the clean ones until something better is offered.

    Args:
        inputs: Clean ones, (N, …).

    Attributes:
        inputs: The best, (N, …).
        values: What they were worth to the attacker, (N,), in float64 on the CPU.
    """

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs.detach().clone()
        self.values = torch.full((len(inputs),), -math.inf, dtype=torch.float64)

    def offer(self, rows: Tensor, changed: Tensor, values: Tensor) -> None:
        """Take those of the changed inputs that are worth more.

        Args:
            rows: Their numbers, (B,).
            changed: (B, …).
            values: (B,); NaN is worth nothing.
        """
        values = values.detach().cpu().double()
        better = values > self.values[rows]
        self.values[rows[better]] = values[better]
        self.inputs[rows[better].to(self.inputs.device)] = changed.detach()[better.to(changed.device)].to(self.inputs)


def judge(
    name: str,
    victim: Victim,
    changed: Tensor,
    inputs: Tensor,
    targets: Tensor,
    threat: Threat,
    *,
    targeted: bool = False,
    notes: Mapping[str, float] | None = None,
) -> AttackResult:
    """What an attack achieved, by the prediction of the deployed members, whatever the attacker knew.

    Args:
        name: The attack's.
        victim: Who is attacked.
        changed: What the attack found, (N, …).
        inputs: Where it began, (N, …).
        targets: As the attack was given them, (N,).
        threat: What was allowed.
        targeted: Whether the targets were to be reached.
        notes: For the result.

    Raises:
        InputError: The attack did not keep to its threat, so that its figures would mean nothing.
    """
    changed = changed.detach().to(inputs)
    _require_within(name, victim, changed, inputs, threat)
    prediction = victim.predict(changed)
    reached = prediction.labels == targets.to(prediction.labels.device)
    return AttackResult(name, changed, reached if targeted else ~reached, prediction, dict(notes or {}))


def _require_within(name: str, victim: Victim, changed: Tensor, inputs: Tensor, threat: Threat) -> None:
    space = victim.space
    if changed.shape != inputs.shape or not bool(changed.isfinite().all()):
        raise InputError(
            f"{name} gave inputs of shape {tuple(changed.shape)} for {tuple(inputs.shape)}, or ones that are not finite"
        )
    # x + δ − x is δ but for rounding at the size of x, once for each number.
    rounding = 4 * torch.finfo(inputs.dtype).eps * max(abs(space.lower), abs(space.upper), threat.epsilon)
    slack = rounding * (math.sqrt(inputs[0].numel()) if threat.norm == "l2" else 1)
    length = float(threat.length(changed.double() - inputs.double()).max())
    # Inputs themselves may stand out of the range by the rounding that the space allows.
    low, high = min(space.lower, float(inputs.min())), max(space.upper, float(inputs.max()))
    if length > threat.epsilon + slack or float(changed.min()) < low or float(changed.max()) > high:
        raise InputError(
            f"{name} left its threat: a change of length {length:.6g} where {threat.epsilon:.6g} is allowed, or values from "
            f"{float(changed.min()):.6g} to {float(changed.max()):.6g} where the space is {space.lower} … {space.upper}"
        )
