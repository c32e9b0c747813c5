"""What a study of robustness found: every attack at every ε, the worst of them, the checks, and what that says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from stfbnn.decision.bounds import interval
from stfbnn.errors import InputError
from stfbnn.threat import Norm

Kind = Literal["one step", "many steps", "black box", "other"]
"""One gradient step, several of them, no gradient of the victim, or what is not known to be one of these."""

CONFIDENCE = 0.95
"""Of all intervals."""

CLEAN_GAP = 0.01
"""By how much clean accuracies may differ for robustness to be compared: a network that is worse is easily "more robust"."""


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its interval.

    Attributes:
        value: The share.
        low: Lower limit of the interval of Clopper and Pearson (1934) at ``CONFIDENCE``.
        high: Upper limit.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, count: int) -> Accuracy:
        """``right`` answers of ``count``, at least 1."""
        return cls(right / count, *interval(right, count, CONFIDENCE, whole=True))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Outcome:
    """One attack at one ε.

    Attributes:
        attack: Its name.
        kind: What it needs.
        epsilon: ε.
        fooled: For each example whether the victim is wrong on what the attack found; examples that it gets wrong without any
            attack count as fooled.
        seconds: Wall time; it is no part of a comparison of two outcomes.
        notes: What the attack saw on its way.
    """

    attack: str
    kind: Kind
    epsilon: float
    fooled: tuple[bool, ...]
    seconds: float = field(compare=False)
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> Accuracy:
        """The share of all examples that are not fooled."""
        return _accuracy(self.fooled)


@dataclass(frozen=True)
class DrawsCurve:
    """One attack with more and more draws in every gradient (expectation over transformation).

    Attributes:
        epsilon: At which ε.
        counts: Draws a step, rising.
        outcomes: The attack with each.
        needed: From how many draws on the accuracy no longer fell; None where it was still falling at the last.
    """

    epsilon: float
    counts: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    needed: int | None


@dataclass(frozen=True)
class Finding:
    """One check of the attacks themselves.

    Attributes:
        name: Its fixed name, such as "black-box-beats-white-box".
        passed: Whether nothing was found; None where it could not be checked.
        numbers: The figures that it rests on.
        explanation: What was seen, and what it means where it failed.
    """

    name: str
    passed: bool | None
    numbers: Mapping[str, float]
    explanation: str


@dataclass(frozen=True)
class Robustness:
    """How many examples stay right under attack.

    Attributes:
        norm: In which ε is measured.
        epsilons: Rising.
        fooled_clean: For each example whether the victim is wrong without any attack.
        outcomes: Every attack at every ε, attack after attack.
        draws: The curve against the number of draws; None for what draws nothing.
        findings: The checks.
        settings: What was asked for.
        seconds: Wall time of all attacks and checks; no part of a comparison.
        detection: Of adversarial inputs by uncertainty, as its own ``as_dict`` gives it; for the caller to fill in.
        smoothing: Of certified radii, likewise.
    """

    norm: Norm
    epsilons: tuple[float, ...]
    fooled_clean: tuple[bool, ...]
    outcomes: tuple[Outcome, ...]
    draws: DrawsCurve | None
    findings: tuple[Finding, ...]
    settings: Mapping[str, Any]
    seconds: float = field(compare=False)
    detection: Mapping[str, Any] | None = None
    smoothing: Mapping[str, Any] | None = None

    @property
    def clean(self) -> Accuracy:
        """Without an attack."""
        return _accuracy(self.fooled_clean)

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks, in order."""
        return tuple(dict.fromkeys(one.attack for one in self.outcomes))

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed: where there are any, accuracies under attack may be too high."""
        return tuple(finding for finding in self.findings if finding.passed is False)

    def outcome(self, attack: str, epsilon: float) -> Outcome:
        """One attack at one ε.

        Raises:
            InputError: There is no such one.
        """
        for one in self.outcomes:
            if one.attack == attack and one.epsilon == epsilon:
                return one
        raise InputError(
            f"there is no attack {attack!r} at ε = {epsilon}; there are {', '.join(map(repr, self.attacks))} at "
            f"{', '.join(map(str, self.epsilons))}"
        )

    def worst_fooled(self, epsilon: float) -> tuple[bool, ...]:
        """For each example whether any attack fools it within ε.

        What was found within a smaller ε is within this one, too, and counts. What the attacks of the curve and of the checks
        found does not, so that every ε is met by the same attacks.
        """
        within = [one.fooled for one in self.outcomes if one.epsilon <= epsilon]
        return tuple(any(flags) for flags in zip(self.fooled_clean, *within, strict=True))

    def worst(self, epsilon: float) -> Accuracy:
        """The share of examples that no attack fools within ε: the figure to quote."""
        return _accuracy(self.worst_fooled(epsilon))

    def table(self) -> Table:
        """Accuracy under every attack at every ε, with intervals, for a terminal; the worst case below."""
        table = Table(
            title=f"Share of {len(self.fooled_clean)} examples that stay right, with {CONFIDENCE:.0%} intervals",
            title_justify="left",
        )
        table.add_column(f"attack ({self.norm})", overflow="fold")
        for epsilon in self.epsilons:
            table.add_column(f"ε = {show_epsilon(epsilon)}", justify="right", overflow="fold")
        table.add_row("none", *[str(self.clean)] * len(self.epsilons), end_section=True)
        for attack in self.attacks:
            cells = [str(self.outcome(attack, epsilon).accuracy) for epsilon in self.epsilons]
            # Text and not str, so that a name in brackets is not read as markup.
            table.add_row(Text(attack), *map(Text, cells))
        table.add_section()
        table.add_row("worst case", *[Text(str(self.worst(epsilon))) for epsilon in self.epsilons], style="bold")
        return table

    def draws_table(self) -> Table:
        """The curve against the number of draws, for a terminal.

        Raises:
            InputError: The victim draws nothing, so there is none.
        """
        if self.draws is None:
            raise InputError("there is no curve against the number of draws: this victim draws nothing")
        table = Table(title=f"ε = {show_epsilon(self.draws.epsilon)}", title_justify="left")
        for head in ("draws a step", "right under attack"):
            table.add_column(head, justify="right", no_wrap=True)
        for count, outcome in zip(self.draws.counts, self.draws.outcomes, strict=True):
            table.add_row(f"{count}{' (enough)' if count == self.draws.needed else ''}", Text(str(outcome.accuracy)))
        return table

    def findings_table(self) -> Table:
        """The checks, for a terminal."""
        table = Table(title="Checks of the attacks", title_justify="left")
        for head in ("", "check", "what was seen"):
            table.add_column(head, overflow="fold")
        words = {True: "passed", False: "FAILED", None: "not checked"}
        for one in self.findings:
            style = "bold" if one.passed is False else None
            table.add_row(words[one.passed], one.name, Text(one.explanation), style=style)
        return table

    def verdict(self) -> str:
        """What was found, in words with the numbers that carry it."""
        count, number = len(self.fooled_clean), len(self.attacks)
        said = f"Clean accuracy {self.clean} on {count} examples. Under the worst of {number} attacks ({self.norm}): "
        said += ", ".join(f"{self.worst(epsilon)} at ε = {show_epsilon(epsilon)}" for epsilon in self.epsilons) + ". "
        last = self.epsilons[-1]
        best = min(self.attacks, key=lambda attack: self.outcome(attack, last).accuracy.value)
        said += f"The strongest single attack at the largest ε is {best} ({self.outcome(best, last).accuracy}). "
        if self.draws is not None:
            first, final = self.draws.outcomes[0].accuracy.value, self.draws.outcomes[-1].accuracy.value
            said += (
                f"From {self.draws.counts[0]} to {self.draws.counts[-1]} draws a step the accuracy goes from "
                f"{100 * first:.1f} % to {100 * final:.1f} % at ε = {show_epsilon(self.draws.epsilon)}"
            )
            needed = self.draws.needed
            said += "; it was still falling. " if needed is None else f"; it no longer falls from {needed} on. "
        checked = sum(one.passed is not None for one in self.findings)
        if self.failed:
            names = ", ".join(one.name for one in self.failed)
            return said + f"{len(self.failed)} of {checked} checks failed ({names}): the figures may be too high."
        return said + (f"All checks passed ({checked})." if checked else "The attacks were not checked.")

    def as_dict(self) -> dict[str, Any]:
        """All that was found as plain values, for JSON; `from_dict` reads it.

        Examples are written as one text an attack: 1 for fooled, 0 for not.
        """
        summary = {
            "clean": asdict(self.clean),
            "worst": [{"epsilon": epsilon, **asdict(self.worst(epsilon))} for epsilon in self.epsilons],
            "verdict": self.verdict(),
        }
        draws = None
        if self.draws is not None:
            outcomes = [_outcome_dict(one) for one in self.draws.outcomes]
            draws = {"epsilon": self.draws.epsilon, "counts": list(self.draws.counts), "needed": self.draws.needed}
            draws["outcomes"] = outcomes
        return {
            "norm": self.norm,
            "epsilons": list(self.epsilons),
            "fooled_clean": to_text(self.fooled_clean),
            "outcomes": [_outcome_dict(one) for one in self.outcomes],
            "draws": draws,
            "findings": [asdict(one) for one in self.findings],
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "detection": self.detection,
            "smoothing": self.smoothing,
            "summary": summary,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Robustness:
        """What ``as_dict`` wrote.

        Raises:
            InputError: It is something else.
        """
        try:
            draws = content["draws"]
            curve = draws and DrawsCurve(
                draws["epsilon"],
                tuple(draws["counts"]),
                tuple(map(_outcome_of, draws["outcomes"])),
                draws["needed"],
            )
            return cls(
                norm=content["norm"],
                epsilons=tuple(content["epsilons"]),
                fooled_clean=from_text(content["fooled_clean"]),
                outcomes=tuple(map(_outcome_of, content["outcomes"])),
                draws=curve,
                findings=tuple(Finding(**one) for one in content["findings"]),
                settings=content["settings"],
                seconds=content["seconds"],
                detection=content["detection"],
                smoothing=content["smoothing"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"this is not what Robustness.as_dict() gives: {error!r}") from error


def robustness_table(results: Mapping[str, Robustness]) -> Table:
    """Several methods side by side: clean accuracy, the worst case at every ε, and what speaks against comparing them.

    Args:
        results: By the methods' names; the first is what the others are held against.

    Raises:
        InputError: There are none, or they are not of the same examples, norm and values of ε.
    """
    first = require_alike(results)
    table = Table(
        title=f"Share of {len(first.fooled_clean)} examples right under the worst attack, with {CONFIDENCE:.0%} intervals",
        title_justify="left",
    )
    for head in ("method", "clean", *(f"{first.norm} {show_epsilon(epsilon)}" for epsilon in first.epsilons), ""):
        table.add_column(head, justify="left" if head in ("method", "") else "right", overflow="fold")
    for name, one in results.items():
        worst = [Text(str(one.worst(epsilon))) for epsilon in first.epsilons]
        table.add_row(Text(name), Text(str(one.clean)), *worst, Text("; ".join(objections(one, first))))
    return table


def objections(one: Robustness, reference: Robustness) -> list[str]:
    """What speaks against comparing a method's robustness with another's; empty where nothing does."""
    found = []
    gap = one.clean.value - reference.clean.value
    # In examples, so that a gap of exactly the limit is not decided by rounding.
    if abs(round(gap * len(one.fooled_clean))) > CLEAN_GAP * len(one.fooled_clean) + 1e-9:
        found.append(f"clean accuracy differs by {100 * gap:+.1f} points")
    if one.failed:
        found.append(f"failed: {', '.join(finding.name for finding in one.failed)}")
    return found


def require_alike(results: Mapping[str, Robustness]) -> Robustness:
    """Refuse what cannot stand in one table.

    Returns:
        The first.

    Raises:
        InputError: There are none, or they are not of as many examples, one norm and the same values of ε.
    """
    if not results:
        raise InputError("a comparison needs at least one method; none was given")
    first_name, first = next(iter(results.items()))
    for name, one in results.items():
        if (one.norm, one.epsilons, len(one.fooled_clean)) != (first.norm, first.epsilons, len(first.fooled_clean)):
            raise InputError(
                f"{name!r} and {first_name!r} cannot be compared: {_asked(one)} there, {_asked(first)} here; attack the same "
                f"examples within the same threats"
            )
    return first


def show_epsilon(epsilon: float) -> str:
    """ε as a fraction of 255 where it is one, as those of images are, but for numbers that are short without."""
    levels = round(255 * epsilon)
    short = abs(epsilon - round(epsilon, 3)) < 1e-9
    return f"{epsilon:g}" if short or levels < 1 or abs(255 * epsilon - levels) > 1e-6 else f"{levels}/255"


def to_text(flags: Sequence[bool]) -> str:
    """One 0 or 1 an example."""
    return "".join("1" if flag else "0" for flag in flags)


def from_text(text: str) -> tuple[bool, ...]:
    """The inverse of `to_text`.

    Raises:
        InputError: There is another character.
    """
    if not isinstance(text, str) or set(text) - {"0", "1"}:
        raise InputError("fooled examples are written as a text of 0 and 1, but this holds something else")
    return tuple(character == "1" for character in text)


def _accuracy(fooled: Sequence[bool]) -> Accuracy:
    return Accuracy.of(len(fooled) - sum(fooled), len(fooled))


def _outcome_dict(one: Outcome) -> dict[str, Any]:
    return {**asdict(one), "fooled": to_text(one.fooled), "accuracy": asdict(one.accuracy)}


def _outcome_of(content: Mapping[str, Any]) -> Outcome:
    kept = {key: value for key, value in content.items() if key != "accuracy"}
    return Outcome(**{**kept, "fooled": from_text(content["fooled"])})


def _asked(one: Robustness) -> str:
    return f"{len(one.fooled_clean)} examples, {one.norm}, ε in {', '.join(map(show_epsilon, one.epsilons))}"
