"""Attacks of AutoAttack (Croce & Hein, 2020) through pyautoattack, and transfer from another network.

The package searches in [0, 1] with one function from inputs to scores, and may be asked for an expectation over
transformation, for which it calls that function several times. Here the function's scores are log-probabilities (in float64,
so that a sure network's loss does not round to zero); and of all that the package found, the attacker keeps what it holds
to be the best by the members that it sees, where the package alone would stop at the first single draw that is fooled.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stfbnn.baselines.predictor import require_count
from stfbnn.errors import InputError
from stfbnn.progress import Reporter, progress_bar
from stfbnn.randomness import generator, seeded
from stfbnn.robustness.attack import (
    Attack,
    AttackResult,
    Best,
    Knowledge,
    Sight,
    check_attacked,
    judge,
    margin,
    require_classes_for,
    require_one_of,
)
from stfbnn.robustness.gradient import random_start
from stfbnn.robustness.victim import Victim
from stfbnn.threat import Norm, Threat

LibraryLoss = Literal["ce", "dlr", "dlr-targeted"]
"""Of APGD: cross-entropy, the difference-of-logits ratio, or that towards one other class after another (APGD-T)."""

_NORMS: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD: gradient ascent with momentum, whose step is halved where progress stalls.

    Results do not depend on the batch size but for rounding; dropout is an exception.

    Attributes:
        loss: "ce", "dlr" (three classes at least), or "dlr-targeted" (four): AutoAttack's APGD-CE, APGD-DLR and APGD-T. All
            are untargeted: any wrong label will do.
        steps: Of each restart (and class, with "dlr-targeted").
        restarts: Each from a start drawn uniformly from the threat's ball.
        knowledge: "deployed" follows the deployed members' average probability, "common" that of ``draws`` others for each
            restart, and "fresh" averages the gradients of ``draws`` new members at every step, which is AutoAttack's
            randomised version.
        draws: How many for "common" and "fresh".
        target_classes: With "dlr-targeted", how many of the most probable other classes.
        batch_size: Rows run at once.

    Raises:
        InputError: A field is not of these values.
    """

    loss: LibraryLoss = "ce"
    steps: int = 100
    restarts: int = 1
    knowledge: Knowledge = "deployed"
    draws: int = 8
    target_classes: int = 9
    batch_size: int = 100

    def __post_init__(self) -> None:
        for field in ("steps", "restarts", "draws", "target_classes", "batch_size"):
            require_count(getattr(self, field), field)
        require_one_of(self.loss, "loss", get_args(LibraryLoss))
        require_one_of(self.knowledge, "knowledge", get_args(Knowledge))

    @property
    def name(self) -> str:
        """Such as "APGD-DLR-100, 8 fresh draws"."""
        kind = {"ce": "CE", "dlr": "DLR", "dlr-targeted": "T"}[self.loss]
        return _named(f"APGD-{kind}-{self.steps}", self.restarts, self.knowledge, self.draws)

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

        Raises:
            InputError: An argument does not fit, there are too few classes for the loss, or pyautoattack is not installed.
        """
        classes = check_attacked(victim, inputs, targets, threat)
        require_classes_for(self.loss, classes)
        library = _import("pyautoattack.autopgd_base")
        # Of fresh draws each call of the function gives one, and the package averages the gradients.
        fresh = self.knowledge == "fresh" and victim.random
        search = _Search(
            victim, inputs, targets, threat, Sight(victim, self.knowledge, 1 if fresh else self.draws, seed)
        )
        tries = min(self.target_classes, classes - 1) if self.loss == "dlr-targeted" else 1
        calls = (self.steps + 1) * (self.draws if fresh else 1)
        options = {
            "n_iter": self.steps,
            "norm": _NORMS[threat.norm],
            "eps": search.epsilon,
            "eot_iter": self.draws if fresh else 1,
            "logger": _Unheard(),
        }
        batches = torch.split(torch.arange(len(inputs)), self.batch_size)
        with progress_bar(self.name, self.restarts * len(batches) * tries * calls, progress) as bar:
            for rows in batches:
                search.offer_clean(rows)
            for restart in range(self.restarts):
                starts = random_start(inputs, threat, victim.space, generator(seed, "attack", "start", restart))
                for batch in batches:
                    for rank in range(tries):
                        rows = search.pending(batch)
                        if not len(rows):
                            bar.advance(calls)
                            continue
                        function = search.function(restart, classes, bar)
                        if self.loss == "dlr-targeted":
                            run = library.APGDAttack_targeted(function, **options)
                            run.y_target = search.other_class(rows, rank)
                        else:
                            run = library.APGDAttack(function, loss=self.loss, **options)
                        unit, labels = search.unit(inputs, rows), search.labels(rows)
                        run.init_hyperparam(unit)
                        with seeded(seed, "attack", "apgd"):
                            highest, _, _, fooling = run.attack_single_run(unit, labels, search.unit(starts, rows))
                        search.offer(rows, highest)
                        search.offer(rows, fooling)
        return judge(self.name, victim, search.best.inputs, inputs, targets, threat)


@dataclass(frozen=True, kw_only=True)
class Square:
    """The square attack (Andriushchenko et al., 2020): random squares, kept where they lower the margin; no gradients.

    Images (B, C, H, W) are changed in squares. Inputs (B, H, W) are taken as images of one channel, and columns (B, D) are
    changed one at a time, which takes many queries, for l∞ only.

    Attributes:
        queries: Of each restart.
        restarts: From how many random starts.
        knowledge: Whose average probability is asked: of the deployed members, of ``draws`` others for each restart
            ("common"), or of as many new ones at every query ("fresh").
        draws: How many.
        batch_size: Rows run at once; it changes nothing else.

    Raises:
        InputError: A field is not of these values.
    """

    queries: int = 1000
    restarts: int = 1
    knowledge: Knowledge = "deployed"
    draws: int = 8
    batch_size: int = 100

    def __post_init__(self) -> None:
        for field in ("queries", "restarts", "draws", "batch_size"):
            require_count(getattr(self, field), field)
        require_one_of(self.knowledge, "knowledge", get_args(Knowledge))

    @property
    def name(self) -> str:
        """Such as "Square-1000"."""
        return _named(f"Square-{self.queries}", self.restarts, self.knowledge, self.draws)

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

        Raises:
            InputError: An argument does not fit, the inputs are no images, or pyautoattack is not installed.
        """
        classes = check_attacked(victim, inputs, targets, threat)
        image = _image_shape(inputs, threat.norm)
        library = _import("pyautoattack.square")
        search = _Search(victim, inputs, targets, threat, Sight(victim, self.knowledge, self.draws, seed))
        everything = torch.arange(len(inputs))
        with progress_bar(self.name, self.restarts * (self.queries + 1), progress) as bar:
            for rows in torch.split(everything, self.batch_size):
                search.offer_clean(rows)
            for restart in range(self.restarts):
                rows = search.pending(everything)
                if not len(rows):
                    break
                function = search.function(restart, classes, bar, self.batch_size)
                run = library.SquareAttack(
                    function, n_queries=self.queries, norm=_NORMS[threat.norm], eps=search.epsilon
                )
                unit = search.unit(inputs, rows).reshape(-1, *image)
                run.init_hyperparam(unit)
                with seeded(seed, "attack", "square", restart):
                    _, found = run.attack_single_run(unit, search.labels(rows))
                for place in torch.split(torch.arange(len(rows)), self.batch_size):
                    search.offer(rows[place], found[place.to(found.device)])
        return judge(self.name, victim, search.best.inputs, inputs, targets, threat)


@dataclass(frozen=True)
class Transfer:
    """What fools another network: an attack without any access to the victim.

    Attributes:
        source: Where the changes are found.
        attack: How.
    """

    source: Victim
    attack: Attack

    @property
    def name(self) -> str:
        """Such as "PGD-20, transferred"."""
        return f"{self.attack.name}, transferred"

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

        The notes have "source_accuracy", what the attack left of the source.

        Raises:
            InputError: An argument does not fit, or source and victim differ in the range of inputs or in the classes.
        """
        classes = check_attacked(victim, inputs, targets, threat)
        one, other = self.source.space, victim.space
        if (one.lower, one.upper) != (other.lower, other.upper):
            raise InputError(
                f"source and victim must have one range of inputs, but it is {one.lower} … {one.upper} for the source and "
                f"{other.lower} … {other.upper} for the victim (they may differ in mean and std)"
            )
        others = check_attacked(self.source, inputs, targets, threat)
        if others != classes:
            raise InputError(f"the source tells {others} classes apart, but the victim {classes}")
        found = self.attack(self.source, inputs, targets, threat, seed=seed, progress=progress)
        return judge(
            self.name,
            victim,
            found.inputs,
            inputs,
            targets,
            threat,
            targeted=bool(getattr(self.attack, "targeted", False)),
            notes={"source_accuracy": found.accuracy},
        )


class _Search:
    """The inputs as the package takes them, and the best of what it gives back."""

    def __init__(self, victim: Victim, inputs: Tensor, targets: Tensor, threat: Threat, sight: Sight) -> None:
        space = victim.space
        self._victim, self._inputs, self._targets, self._threat, self._sight = victim, inputs, targets, threat, sight
        self._width = space.upper - space.lower
        self.epsilon = threat.epsilon / self._width
        self.best = Best(inputs)

    def unit(self, points: Tensor, rows: Tensor) -> Tensor:
        """Some rows in [0, 1], on the victim's device."""
        chosen = points.detach()[rows.to(points.device)].to(self._victim.device)
        return ((chosen - self._victim.space.lower) / self._width).clamp(0, 1).contiguous()

    def labels(self, rows: Tensor) -> Tensor:
        """Their targets, there too."""
        return self._targets[rows.to(self._targets.device)].to(self._victim.device).long()

    def pending(self, rows: Tensor) -> Tensor:
        """The rows worth attacking: those not yet fooled; all where the attacker cannot tell."""
        return rows[self.best.values[rows] <= 0] if self._sight.deployed else rows

    def function(
        self, restart: int, classes: int, bar: Reporter, batch_size: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """From inputs in [0, 1] to log-probabilities; each call is a step."""
        victim, shape, calls = self._victim, self._inputs.shape[1:], 0

        def run(unit: Tensor) -> Tensor:
            nonlocal calls
            members = self._sight.members(restart, calls)
            calls += 1
            bar.advance()
            parts = torch.split(self._given(unit).reshape(-1, *shape), batch_size or max(1, len(unit)))
            logs = [victim.log_predictive(part, members) for part in parts if len(part)]
            if not logs:
                # Square asks about no rows at all where every margin is zero.
                return unit.new_zeros((0, classes))
            joined = torch.cat(logs)
            if unit.requires_grad and not joined.requires_grad:
                # A network that cuts the graph has a gradient of zero; the package would take it for a mistake.
                joined = joined + 0 * unit.flatten(1).sum(dim=1, keepdim=True)
            return joined

        return run

    def offer(self, rows: Tensor, unit: Tensor) -> None:
        """Keep what is better, by the members that the attacker can see, of points in [0, 1]."""
        clean = self._inputs[rows.to(self._inputs.device)].to(self._victim.device)
        points = self._given(unit).reshape(clean.shape)
        # Rounding of the change of units is cut off.
        self._offer(rows, self._threat.project(points, clean, self._victim.space))

    def offer_clean(self, rows: Tensor) -> None:
        """The inputs as they are: an attacker may leave alone what is wrong anyway."""
        self._offer(rows, self._inputs[rows.to(self._inputs.device)].to(self._victim.device))

    def other_class(self, rows: Tensor, rank: int) -> Tensor:
        """The most probable class but the target at rank 0, the next at rank 1 …, at the clean inputs, (B,)."""
        logs = self._log_probs(self._inputs[rows.to(self._inputs.device)].to(self._victim.device))
        others = logs.scatter(1, self.labels(rows).unsqueeze(1), -math.inf)
        return others.argsort(dim=1, descending=True, stable=True)[:, rank]

    def _given(self, unit: Tensor) -> Tensor:
        given = self._victim.space.lower + self._width * unit
        if given.requires_grad:
            # Where a gradient is not finite the package would carry NaN from step to step.
            given.register_hook(_finite)  # type: ignore[no-untyped-call]
        return given

    def _offer(self, rows: Tensor, points: Tensor) -> None:
        self.best.offer(rows, points, margin(self._log_probs(points), self.labels(rows)))

    @torch.no_grad()
    def _log_probs(self, points: Tensor) -> Tensor:
        return self._victim.log_predictive(points.detach(), self._sight.judges())


class _Unheard:
    """Takes the package's warning about gradients of zero, which the library's own sanity checks report."""

    def warning(self, message: str) -> None:
        """Drop it."""


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _named(base: str, restarts: int, knowledge: Knowledge, draws: int) -> str:
    repeated = f" × {restarts}" if restarts > 1 else ""
    return base + repeated + ("" if knowledge == "deployed" else f", {draws} {knowledge} draws")


def _image_shape(inputs: Tensor, norm: Norm) -> tuple[int, int, int]:
    shape = tuple(inputs.shape[1:])
    if len(shape) > 3:
        raise InputError(
            f"the square attack takes images (B, C, H, W), (B, H, W) or columns (B, D), but the inputs have shape "
            f"{tuple(inputs.shape)}"
        )
    image = (1,) * (3 - len(shape)) + shape
    if norm == "l2" and min(image[1:]) < 5:
        raise InputError(
            f"for l2 the square attack needs images of at least 5 × 5 pixels, but the inputs have shape "
            f"{tuple(inputs.shape)}: take l∞, or an attack by gradients"
        )
    return image[0], image[1], image[2]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f'this attack needs the package pyautoattack, but {error.name} is missing: pip install "stfbnn[attacks]"'
        ) from error
