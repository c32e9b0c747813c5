"""Attacks along gradients: FGSM (Goodfellow et al., 2015) and PGD (Madry et al., 2018), averaged over a victim's members.

A randomised victim is attacked by expectation over transformation (Athalye et al., 2018): the gradient is that of the loss
averaged over members. Members are differentiated one after another, so that memory holds the graph of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from stfbnn.baselines.predictor import require_count
from stfbnn.draws import chunk_rows
from stfbnn.errors import InputError
from stfbnn.predictive.weighting import log_average
from stfbnn.progress import progress_bar
from stfbnn.randomness import generator
from stfbnn.robustness.attack import (
    AttackResult,
    Average,
    Best,
    Knowledge,
    Loss,
    Sight,
    check_attacked,
    judge,
    margin,
    require_classes_for,
    require_one_of,
)
from stfbnn.robustness.victim import Members, Victim
from stfbnn.threat import InputSpace, Threat

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From log-probabilities of members (S, B, K), targets (B,) and shares (S,) or None to what is maximised, (B,)."""


@dataclass(frozen=True, kw_only=True)
class GradientAttack:
    """Steps along the sign of the gradient (l∞), or along the gradient at unit length (l2), projected back after each.

    The result is the best point that the attacker saw. One that sees the deployed members takes the best of the clean input
    and all iterates, by the margin of their average. Another takes the last iterate, of several restarts the one of the largest
    margin under 32 members of its own. Results do not depend on the batch size but for rounding, and on no global generator;
    dropout is an exception, since an example's masks follow from its place in a chunk: there the chunks are `predict`'s.

    Attributes:
        steps: Of each restart.
        step_size: Relative to ε; None for 2.5 / steps.
        restarts: From how many starts; all but the first are useless without a random start.
        random_start: Begin at a point drawn uniformly from the threat's ball, not at the input.
        loss: What is maximised, of each example.
        knowledge: Which members are differentiated: "deployed", ``draws`` others for each restart ("common"), or as many new
            ones at every step ("fresh"). Victims that draw nothing have only the deployed ones.
        draws: How many for "common" and "fresh"; at least one a component of a mixture.
        average: "loss" for the mean of the members' losses, "probability" for the loss of their mean probability, whose graph
            holds all members at once.
        targeted: The targets are labels to reach; the losses change their sign.
        batch_size: Rows run at once.
        objective: What is maximised instead of ``loss`` and ``average``, and judges iterates instead of the margin; its sign
            is not changed for targeted attacks. For attackers that know of more than the label, such as of a detector.

    Raises:
        InputError: A field is not of these values.
    """

    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "ce"
    knowledge: Knowledge = "deployed"
    draws: int = 8
    average: Average = "loss"
    targeted: bool = False
    batch_size: int = 100
    objective: Objective | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "restarts", "draws", "batch_size"):
            require_count(getattr(self, field), field)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise InputError(f"step_size must be positive and finite, in units of ε, but it is {self.step_size!r}")
        for field, values in (("loss", Loss), ("knowledge", Knowledge), ("average", Average)):
            require_one_of(getattr(self, field), field, get_args(values))
        if self.restarts > 1 and not self.random_start and self.knowledge == "deployed":
            raise InputError("restarts without a random start are all the same: pass random_start=True or restarts=1")
        if self.objective is not None and not callable(self.objective):
            raise InputError(f"objective must be a function, but it is a {type(self.objective).__name__}")

    @property
    def name(self) -> str:
        """Such as "PGD-20 × 5, margin, 8 fresh draws"."""
        single = self.steps == 1 and not self.random_start
        parts = [("FGSM" if single else f"PGD-{self.steps}") + (f" × {self.restarts}" if self.restarts > 1 else "")]
        if self.targeted:
            parts[0] = f"targeted {parts[0]}"
        if self.objective is not None:
            parts.append("own objective")
        elif self.loss != "ce":
            parts.append(self.loss)
        if self.knowledge != "deployed":
            parts.append(f"{self.draws} {self.knowledge} draws")
        if self.average == "probability" and self.objective is None:
            parts.append("of the averaged probability")
        return ", ".join(parts)

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
        """Attack; arguments as of `Attack`.

        The notes have "zero_gradient_share": of how many examples the gradient at the clean input is zero or not finite.

        Raises:
            InputError: An argument does not fit, or there are too few classes for the loss.
        """
        require_classes_for(
            self.loss if self.objective is None else "ce", check_attacked(victim, inputs, targets, threat)
        )
        climb = _Climb(self, victim, inputs.detach(), targets, threat, seed)
        size = chunk_rows(inputs, victim.device) if victim.by_place else self.batch_size
        batches = torch.split(torch.arange(len(inputs)), size)
        with progress_bar(self.name, self.restarts * len(batches) * self.steps, progress) as bar:
            for restart in range(self.restarts):
                starts = climb.starts(restart)
                for rows in batches:
                    climb.run(restart, rows, starts, bar.advance)
        notes = {"zero_gradient_share": float(climb.without_gradient.double().mean())}
        return judge(self.name, victim, climb.best.inputs, inputs, targets, threat, targeted=self.targeted, notes=notes)


def fgsm(**options: Any) -> GradientAttack:
    """The fast gradient (sign) method: one step of size ε from the input; options as of `GradientAttack`."""
    return GradientAttack(steps=1, step_size=1.0, random_start=False, **options)


def pgd(steps: int = 20, **options: Any) -> GradientAttack:
    """Projected gradient ascent from a random start; options as of `GradientAttack`."""
    return GradientAttack(steps=steps, **options)


def input_gradient(
    victim: Victim,
    inputs: Tensor,
    targets: Tensor,
    members: Members,
    *,
    loss: Loss = "ce",
    average: Average = "loss",
    targeted: bool = False,
    objective: Objective | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient that an attacker follows; parameters get none.

    Args:
        victim: Who is attacked.
        inputs: (B, …) in the input space, on the victim's device.
        targets: (B,), there too.
        members: Which are differentiated.
        loss: As of `GradientAttack`.
        average: Likewise.
        targeted: Likewise.
        objective: Likewise.

    Returns:
        The gradient (B, …), as it comes: it may hold NaN; and the members' log-probabilities (S, B, K), detached.

    Raises:
        InputError: The objective does not give one number an example.
    """
    sign = -1 if targeted else 1
    if objective is None and average == "loss":
        gradient, logs = torch.zeros_like(inputs), []
        for index, function in enumerate(members.functions):
            leaf = inputs.detach().requires_grad_()
            share = 1 / len(members) if members.shares is None else float(members.shares[index])
            with torch.enable_grad():
                (log_probs,) = victim.member_log_probs(leaf, Members((function,)))
                value = sign * share * _each_loss(loss, log_probs, targets)
            gradient += _slope(value, leaf)
            logs.append(log_probs.detach())
        return gradient, torch.stack(logs)
    leaf = inputs.detach().requires_grad_()
    with torch.enable_grad():
        stacked = torch.stack(list(victim.member_log_probs(leaf, members)))
        shares = None if members.shares is None else members.shares.to(stacked)
        if objective is None:
            value = sign * _each_loss(loss, log_average(stacked, shares), targets)
        else:
            value = _checked(objective(stacked, targets, shares), targets)
    return _slope(value, leaf), stacked.detach()


class _Climb:
    """One call of an attack: its starts, its members, its best points."""

    def __init__(
        self, attack: GradientAttack, victim: Victim, inputs: Tensor, targets: Tensor, threat: Threat, seed: int
    ) -> None:
        self._attack, self._victim, self._threat, self._seed = attack, victim, threat, seed
        self._sight = Sight(victim, attack.knowledge, attack.draws, seed)
        self._inputs, self._targets = inputs, targets
        self.best = Best(inputs)
        self.without_gradient = torch.zeros(len(inputs), dtype=torch.bool)

    def starts(self, restart: int) -> Tensor:
        """Where a restart begins, (N, …): drawn for all examples at once, so that batches change nothing."""
        if not self._attack.random_start:
            return self._inputs
        random = generator(self._seed, "attack", "start", restart)
        return random_start(self._inputs, self._threat, self._victim.space, random)

    def run(self, restart: int, rows: Tensor, starts: Tensor, advance: Callable[[], None]) -> None:
        """Climb from the starts of some rows."""
        attack, device = self._attack, self._victim.device
        where = rows.to(self._inputs.device)
        clean, current = (tensor[where].to(device) for tensor in (self._inputs, starts))
        targets = self._targets[rows.to(self._targets.device)].to(device).long()
        ahead = None
        if restart == 0:
            ahead = self._gradient(rows, clean, targets, self._sight.members(0, -1 if attack.random_start else 0))
            self.without_gradient[rows] = ~_is_usable(ahead).cpu()
        size = self._threat.epsilon * (2.5 / attack.steps if attack.step_size is None else attack.step_size)
        for step in range(attack.steps):
            if step or attack.random_start or ahead is None:
                ahead = self._gradient(rows, current, targets, self._sight.members(restart, step))
            moved = current + size * _direction(ahead, self._threat)
            current = self._threat.project(moved, clean, self._victim.space)
            advance()
        if self._sight.deployed or attack.restarts > 1:
            judges = self._sight.judges()
            with torch.no_grad():
                logs = torch.stack(list(self._victim.member_log_probs(current, judges)))
            self.best.offer(rows, current, self._worth(logs, targets, judges))
        else:
            self.best.offer(rows, current, torch.zeros(len(rows)))

    def _gradient(self, rows: Tensor, points: Tensor, targets: Tensor, members: Members) -> Tensor:
        attack = self._attack
        gradient, logs = input_gradient(
            self._victim,
            points,
            targets,
            members,
            loss=attack.loss,
            average=attack.average,
            targeted=attack.targeted,
            objective=attack.objective,
        )
        if self._sight.deployed:
            # What the points are worth is known from the same pass.
            self.best.offer(rows, points, self._worth(logs, targets, members))
        return gradient

    def _worth(self, logs: Tensor, targets: Tensor, members: Members) -> Tensor:
        shares = None if members.shares is None else members.shares.to(logs)
        if self._attack.objective is not None:
            return _checked(self._attack.objective(logs, targets, shares), targets)
        ahead = margin(log_average(logs, shares), targets)
        return -ahead if self._attack.targeted else ahead


def random_start(inputs: Tensor, threat: Threat, space: InputSpace, random: torch.Generator) -> Tensor:
    """Points drawn uniformly from the threat's ball around each input, cut off at the range, (N, …)."""
    if threat.norm == "linf":
        delta = 2 * torch.rand(inputs.shape, generator=random, dtype=inputs.dtype) - 1
    else:
        normal = torch.randn(inputs.shape, generator=random, dtype=inputs.dtype)
        radius = torch.rand(len(inputs), generator=random, dtype=inputs.dtype) ** (1 / inputs[0].numel())
        delta = _unit_rows(normal) * radius.reshape(-1, *[1] * (inputs.ndim - 1))
    return threat.project(inputs + threat.epsilon * delta.to(inputs.device), inputs, space)


def _each_loss(loss: Loss, log_probs: Tensor, targets: Tensor) -> Tensor:
    if loss == "ce":
        return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    ahead = margin(log_probs, targets)
    if loss == "margin":
        return ahead
    top = log_probs.topk(3, dim=1).values
    return ahead / (top[:, 0] - top[:, 2] + 1e-12)


def _slope(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        # The network cuts the graph, by rounding to integers or by detaching: a gradient of zero, which is reported.
        return torch.zeros_like(leaf)
    gradient: Tensor = torch.autograd.grad(value, leaf, torch.ones_like(value), materialize_grads=True)[0]
    return gradient


def _is_usable(gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    return flat.isfinite().all(dim=1) & (flat != 0).any(dim=1)


def _direction(gradient: Tensor, threat: Threat) -> Tensor:
    usable = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return usable.sign() if threat.norm == "linf" else _unit_rows(usable)


def _unit_rows(values: Tensor) -> Tensor:
    """Every row at length 1; zero stays zero. First by the largest number, for squares of tiny ones would vanish."""
    flat = values.flatten(1)
    tiny = torch.finfo(values.dtype).tiny
    scaled = flat / flat.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    return (scaled / scaled.square().sum(dim=1, keepdim=True).sqrt().clamp_min(tiny)).reshape(values.shape)


def _checked(worth: Tensor, targets: Tensor) -> Tensor:
    if not isinstance(worth, Tensor) or worth.shape != targets.shape:
        found = f"shape {tuple(worth.shape)}" if isinstance(worth, Tensor) else type(worth).__name__
        raise InputError(f"the objective must give one number an example, ({len(targets)},), but it gave {found}")
    return worth
