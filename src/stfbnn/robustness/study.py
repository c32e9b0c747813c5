"""The study of a victim's robustness: several attacks at several ε, the worst of them, and checks of the attacks themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stfbnn.checkpoint import prepare_checkpoint
from stfbnn.errors import InputError
from stfbnn.files import write_json
from stfbnn.progress import Reporter, progress_bar
from stfbnn.randomness import derive_seed
from stfbnn.robustness import checks as sanity
from stfbnn.robustness.attack import Attack, Average, Knowledge, check_attacked
from stfbnn.robustness.gradient import GradientAttack, fgsm, pgd
from stfbnn.robustness.library import APGD, Square, Transfer
from stfbnn.robustness.result import DrawsCurve, Finding, Kind, Outcome, Robustness, from_text, show_epsilon, to_text
from stfbnn.robustness.victim import Victim
from stfbnn.threat import Norm, Threat

STEPS = 20
"""Of the attacks by projected gradients."""

DRAWS = 8
"""That each of their steps averages where the victim draws at random."""

_FORMAT = 1
# Predictions of some rows alone are those among all others up to this, but where a row's place decides, as with dropout.
_SAME = 1e-4


def evaluate_robustness(
    victim: Victim,
    inputs: Tensor,
    targets: Tensor,
    epsilons: Sequence[float] = (2 / 255, 4 / 255, 8 / 255),
    *,
    norm: Norm = "linf",
    attacks: Sequence[Attack] | Mapping[str, Attack] | None = None,
    source: Victim | None = None,
    draw_counts: Sequence[int] = (1, 2, 4, 8, 16, 32),
    checks: bool = True,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Robustness:
    """Attack a classifier in several ways, and find out whether the attacks are to be trusted.

    Examples that the victim gets wrong without any attack count as fooled by all. An attack gets the others only, which changes
    nothing for attacks that treat every example by itself; what is random in an attack, such as where it starts, does differ.
    Where a prediction depends on an example's place among others, as with dropout, all are attacked and judged in place.

    Args:
        victim: From `stfbnn.robustness.victim`.
        inputs: (N, …) in the victim's input space.
        targets: Their true labels, (N,).
        epsilons: The radii, each positive.
        norm: In which they are measured, "linf" or "l2".
        attacks: None for `default_attacks`; else untargeted ones, by names of the caller's where those are given.
        source: The network that a transfer attack is made on, for `default_attacks`; the trained network itself, for one.
        draw_counts: Of the curve against the number of draws, rising; at the middle ε, for victims that draw at random. It
            ends where two successive steps lower the accuracy by no more than a standard error of their difference, but not
            before it has passed the number of draws of the attacks.
        checks: Whether to check the attacks; those checks that fail warn.
        seed: Of everything random.
        checkpoint: A folder in which each attack at each ε is kept when it is done, so that a study that was stopped goes on,
            and in which further attacks find room; results of other settings stay untouched there.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        Accuracies with their intervals, the worst case, the curve, and the findings.

    Raises:
        InputError: An argument does not fit the others.
        CheckpointError: The folder cannot be written to.
    """
    if not isinstance(victim, Victim):
        raise InputError(
            f"evaluate_robustness attacks a Victim, but it got a {type(victim).__name__}; make one by "
            f"stfbnn.robustness.victim(predictor, space=…)"
        )
    threats = _threats(epsilons, norm)
    classes = check_attacked(victim, inputs, targets, threats[0])
    _require_counts(draw_counts)
    derive_seed(seed)
    chosen = _named(default_attacks(victim, inputs, classes, norm, source) if attacks is None else attacks)
    began = time.perf_counter()
    course = _Course(victim, inputs, targets, norm, seed, None if checkpoint is None else Path(checkpoint))
    described = {name: course.describe(attack) for name, attack in chosen.items()}
    used = max((count for count in map(_draws, chosen.values()) if count), default=None) if victim.random else None
    counts = tuple(draw_counts) if victim.random else ()
    total = len(chosen) * len(threats) + len(counts) + checks
    with progress_bar("attack", total, progress) as bar:
        outcomes = tuple(
            course.run(name, attack, threat.epsilon, bar) for name, attack in chosen.items() for threat in threats
        )
        middle = threats[len(threats) // 2].epsilon
        curve = _curve(course, counts, middle, used or 0, bar) if counts else None
        findings = _findings(course, chosen, outcomes, curve, used, bar) if checks else ()
    found = Robustness(
        norm=norm,
        epsilons=tuple(threat.epsilon for threat in threats),
        fooled_clean=course.fooled_clean,
        outcomes=outcomes,
        draws=curve,
        findings=findings,
        settings={
            "examples": len(inputs),
            "attacks": described,
            "draw_counts": list(counts),
            "seed": seed,
            "attacked": "all examples" if course.all_rows else "the examples that are right without an attack",
        },
        seconds=time.perf_counter() - began,
    )
    for finding in found.failed:
        warnings.warn(f"{finding.name}: {finding.explanation}", stacklevel=2)
    return found


def default_attacks(
    victim: Victim, inputs: Tensor, classes: int, norm: Norm = "linf", source: Victim | None = None
) -> tuple[Attack, ...]:
    """FGSM and PGD; APGD on two losses and Square where pyautoattack is installed; and a transfer where there is a source.

    Against victims that draw at random PGD sees the deployed draws in one attack, and in two others averages losses or
    probabilities over ``DRAWS`` fresh ones at every step, as many as APGD does. The difference-of-logits ratio needs three
    classes, and Square images: of any size for l∞, of 5 × 5 pixels for l2.

    Args:
        victim: Who is attacked.
        inputs: (N, …), for their shape.
        classes: K.
        norm: "linf" or "l2".
        source: Whose adversarial inputs are tried on the victim; None for no transfer attack.
    """
    attacks: list[Attack] = [fgsm(), pgd(STEPS)]
    if victim.random:
        attacks += [_drawing(DRAWS), _drawing(DRAWS, average="probability")]
    if importlib.util.find_spec("pyautoattack") is not None:
        knowledge: Knowledge = "fresh" if victim.random else "deployed"
        attacks.append(APGD(loss="ce", knowledge=knowledge, draws=DRAWS))
        if classes > 2:
            attacks.append(APGD(loss="dlr", knowledge=knowledge, draws=DRAWS))
        if inputs.ndim <= 4 and (norm == "linf" or (inputs.ndim > 2 and min(inputs.shape[-2:]) >= 5)):
            attacks.append(Square())
    if source is not None:
        attacks.append(Transfer(source, pgd(STEPS)))
    return tuple(attacks)


class _Course:
    """Runs attacks on one victim and one set of examples, each once, and keeps what came of them.

    Args:
        victim: Who is attacked.
        inputs: (N, …).
        targets: (N,).
        norm: Of all threats.
        seed: Of everything random.
        folder: Where outcomes are kept; None for nowhere.

    Attributes:
        fooled_clean: For each example whether it is wrong without an attack.
        all_rows: Whether all examples are attacked, for their places matter.

    Raises:
        CheckpointError: The folder cannot be written to.
    """

    def __init__(
        self, victim: Victim, inputs: Tensor, targets: Tensor, norm: Norm, seed: int, folder: Path | None
    ) -> None:
        self.victim, self.inputs, self.targets = victim, inputs, targets
        self._norm, self._seed, self._folder = norm, seed, folder
        if folder is not None:
            prepare_checkpoint(folder / "outcome", {})
        prediction = victim.predict(inputs)
        right = prediction.labels == targets.to(prediction.labels.device)
        self.fooled_clean: tuple[bool, ...] = tuple((~right).tolist())
        self._rows = right.nonzero().squeeze(1)
        self.all_rows = bool(len(self._rows)) and not torch.allclose(
            victim.predict(inputs[self._rows.to(inputs.device)]).probs, prediction.probs[self._rows], rtol=0, atol=_SAME
        )
        if self.all_rows:
            self._rows = torch.arange(len(inputs))
        self._victims: dict[Victim, dict[str, Any]] = {}
        self._shaped_by = {
            "format": _FORMAT,
            "inputs": _digest(inputs),
            "targets": _digest(targets),
            "victim": self._victim_settings(victim),
            "norm": norm,
            "seed": seed,
        }
        self._known: dict[str, Outcome] = {}

    def run(self, name: str, attack: Attack, epsilon: float, bar: Reporter) -> Outcome:
        """One attack at one ε, unless it was made before."""
        bar.describe(f"{name}, ε = {show_epsilon(epsilon)}")
        settings = {**self._shaped_by, "name": name, "attack": self.describe(attack), "epsilon": epsilon}
        key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
        if key not in self._known:
            self._known[key] = self._load(key, name, attack, epsilon) or self._attack(key, name, attack, epsilon)
        outcome = self._known[key]
        bar.advance(1, right=outcome.accuracy.value)
        return outcome

    def describe(self, attack: Attack) -> Any:
        """An attack's class and settings, as JSON values; an `InputError` where they are needed and cannot be seen."""
        return self._settings(attack, attack.name)

    def _attack(self, key: str, name: str, attack: Attack, epsilon: float) -> Outcome:
        fooled, began = torch.tensor(self.fooled_clean), time.perf_counter()
        notes: dict[str, float] = {}
        if len(self._rows):
            rows = self._rows.to(self.inputs.device)
            result = attack(
                self.victim,
                self.inputs[rows],
                self.targets[rows.to(self.targets.device)],
                Threat(epsilon, self._norm),
                seed=derive_seed(self._seed, "attack", name),
                progress=False,
            )
            fooled[self._rows] |= result.fooled.cpu()
            notes = {note: float(value) for note, value in result.notes.items() if math.isfinite(value)}
        seconds = time.perf_counter() - began
        outcome = Outcome(name, kind_of(attack), epsilon, tuple(fooled.tolist()), seconds, notes)
        if self._folder is not None:
            kept = {"attack": name, "epsilon": epsilon, "norm": self._norm, "seconds": seconds, "notes": notes}
            write_json(self._folder / f"{key}.json", {**kept, "fooled": to_text(outcome.fooled)})
        return outcome

    def _load(self, key: str, name: str, attack: Attack, epsilon: float) -> Outcome | None:
        """What was kept; a file that is damaged is as good as none."""
        if self._folder is None:
            return None
        try:
            content = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            fooled, seconds = from_text(content["fooled"]), float(content["seconds"])
            notes = {str(note): float(value) for note, value in content["notes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if len(fooled) != len(self.inputs):
            return None
        return Outcome(name, kind_of(attack), epsilon, fooled, seconds, notes)

    @property
    def whole_space(self) -> float:
        """The ε that allows everything."""
        space = self.victim.space
        width = space.upper - space.lower
        return width if self._norm == "linf" else width * math.sqrt(self.inputs[0].numel())

    def _settings(self, value: Any, where: str) -> Any:
        """Settings as JSON values: dataclasses by their fields, victims by what they predict."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Victim):
            return self._victim_settings(value)
        if isinstance(value, tuple | list):
            return [self._settings(one, where) for one in value]
        if isinstance(value, Tensor):
            return _digest(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {one.name: self._settings(getattr(value, one.name), where) for one in dataclasses.fields(value)}
            return {"class": type(value).__qualname__, **fields}
        if self._folder is not None and not hasattr(value, "__qualname__"):
            raise InputError(
                f"{where} holds a {type(value).__name__}, whose settings cannot be seen, so that what is kept could be of "
                f"others: make it a dataclass of numbers and texts, or a function, or evaluate without a checkpoint"
            )
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"class": f"{type(value).__module__}.{name}"}

    def _victim_settings(self, victim: Victim) -> dict[str, Any]:
        """What shapes an attack on a victim, as far as it can be seen: what it predicts, also by a draw not deployed."""
        if victim not in self._victims:
            members = victim.draw(1, 0) if victim.random else None
            self._victims[victim] = {
                "class": type(victim).__qualname__,
                "predictions": _digest(victim.predict(self.inputs).log_probs),
                "drawn": None if members is None else _digest(victim.predict(self.inputs, members).log_probs),
                "space": self._settings(victim.space, "the space"),
            }
        return self._victims[victim]


def kind_of(attack: Attack) -> Kind:
    """What an attack needs, as the checks must know it; "other" for attacks that the library does not have."""
    if isinstance(attack, GradientAttack):
        return "one step" if attack.steps == 1 else "many steps"
    if isinstance(attack, APGD):
        return "many steps"
    return "black box" if isinstance(attack, Square | Transfer) else "other"


def _curve(course: _Course, counts: Sequence[int], epsilon: float, used: int, bar: Reporter) -> DrawsCurve:
    """The attack with more and more draws, until that no longer helps."""
    outcomes: list[Outcome] = []
    flat = 0
    for count in counts:
        attack = _drawing(count)
        outcomes.append(course.run(attack.name, attack, epsilon, bar))
        if len(outcomes) > 1:
            flat = flat + 1 if sanity.falls_no_more(*outcomes[-2:]) else 0
        # Few draws of wide noise fool no more than one does: a curve that is flat at its beginning says nothing yet.
        if flat >= 2 and count > used:
            break
    needed = counts[len(outcomes) - 1 - flat] if flat >= 2 else None
    return DrawsCurve(epsilon, tuple(counts[: len(outcomes)]), tuple(outcomes), needed)


def _findings(
    course: _Course,
    attacks: Mapping[str, Attack],
    outcomes: Sequence[Outcome],
    curve: DrawsCurve | None,
    used: int | None,
    bar: Reporter,
) -> tuple[Finding, ...]:
    largest = max(one.epsilon for one in outcomes)
    best = sanity.strongest([one for one in outcomes if one.epsilon == largest], ["many steps"])
    unbounded = None if best is None else course.run(best.attack, attacks[best.attack], course.whole_space, bar)
    return (
        sanity.one_step_beats_many(outcomes),
        sanity.black_box_beats_white_box(outcomes),
        sanity.gradients_exist(course.victim, course.inputs, course.targets),
        sanity.unbounded_attack(unbounded),
        sanity.more_draws(curve, used),
        sanity.falls_with_epsilon(outcomes),
    )


def _drawing(draws: int, average: Average = "loss") -> GradientAttack:
    return pgd(STEPS, knowledge="fresh", draws=draws, average=average)


def _draws(attack: Attack) -> int | None:
    """How many members of its own an attack averages at a step; None where it sees the deployed ones, or none."""
    draws = getattr(attack, "draws", None)
    return draws if isinstance(draws, int) and getattr(attack, "knowledge", "deployed") != "deployed" else None


def _named(attacks: Sequence[Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks by name, after a look at them."""
    pairs = list(attacks.items()) if isinstance(attacks, Mapping) else [(attack.name, attack) for attack in attacks]
    if not pairs:
        raise InputError("there must be at least one attack; None takes the default ones")
    for name, attack in pairs:
        if not callable(attack):
            raise InputError(
                f"an attack must be callable, as those of stfbnn.robustness are, but {name!r} is {attack!r}"
            )
        if getattr(attack, "targeted", False):
            raise InputError(
                f"{name} is to reach given labels, but accuracy under attack is of attacks that may reach any wrong one: "
                f"give it targeted=False"
            )
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two attacks are called {twice[0]!r}: give attacks as a mapping from names of your own")
    return dict(pairs)


def _threats(epsilons: Sequence[float], norm: Norm) -> tuple[Threat, ...]:
    """One a value of ε, rising."""
    threats = tuple(sorted((Threat(epsilon, norm) for epsilon in epsilons), key=lambda threat: threat.epsilon))
    distinct = {threat.epsilon for threat in threats}
    if not threats or len(distinct) < len(threats) or 0 in distinct:
        raise InputError(f"epsilons must be different positive numbers, at least one, but they are {list(epsilons)}")
    return threats


def _require_counts(counts: Sequence[int]) -> None:
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
    if not counts or not whole or any(first >= second for first, second in pairwise(counts)):
        raise InputError(f"draw_counts must be rising positive integers, at least one, but they are {list(counts)}")


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype}{tuple(plain.shape)}".encode()
    return hashlib.blake2b(head + plain.flatten().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()
