"""What a study of membership inference found: each attack on each release, and what that says in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from scipy.special import stdtrit

from stfbnn.errors import InputError
from stfbnn.privacy.attacks import ATTACKS
from stfbnn.privacy.figures import ByClass, MembershipFigures, membership_table

Attacked = Literal["predictive", "artifact"]
"""The released predictive, as users see it; or the released file of the posterior."""

ARTIFACT_ATTACKS = {
    "artifact_logistic": "file, logistic regression",
    "artifact_boosting": "file, gradient boosting",
}
"""The names of the attacks on the posterior's file, and how tables call them."""

_COVERAGE = 0.95
# Accuracies that differ by more are not called matched.
_MATCHED = 0.01


@dataclass(frozen=True)
class Spread:
    """A figure of several models.

    Attributes:
        mean: Their mean.
        error: Its standard error, from how the models differ; None for one model. The attacked models are one another's
            shadows, so they are not quite independent.
        models: How many there are.
    """

    mean: float
    error: float | None
    models: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and standard error of at least one number."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval; infinite for one model."""
        if self.error is None:
            return -math.inf, math.inf
        reach = float(stdtrit(self.models - 1, 0.5 + _COVERAGE / 2)) * self.error
        return self.mean - reach, self.mean + reach

    def show(self, digits: int = 3, sign: str = "") -> str:
        """The mean, with ± its standard error where there is one."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{error}"


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """One attack on one release.

    Attributes:
        name: Of `ATTACKS` or `ARTIFACT_ATTACKS`.
        on: What was attacked.
        figures: Of all attacked models in one ranking. An example is there once for each of them, which the intervals do not
            know of.
        aucs: AUC of each attacked model, (T,).
        advantages: Held-out advantage of each.
        tprs: Rate of true positives at each of the limits, for each.
    """

    name: str
    on: Attacked
    figures: MembershipFigures
    aucs: tuple[float, ...]
    advantages: tuple[float, ...]
    tprs: tuple[tuple[float, ...], ...]

    @property
    def label(self) -> str:
        """How tables call it."""
        return {**ATTACKS, **ARTIFACT_ATTACKS}[self.name]

    @property
    def auc(self) -> Spread:
        """AUC over the attacked models."""
        return Spread.of(self.aucs)

    @property
    def advantage(self) -> Spread:
        """Held-out advantage over the attacked models."""
        return Spread.of(self.advantages)

    @property
    def finds(self) -> bool:
        """Whether it is better than chance: the interval over all attacked examples lies above one half.

        How the models differ is not asked here: that some leak and others do not is no reason to say that none does.
        """
        return self.figures.auc.low > 0.5

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values."""
        return {
            "attack": self.label,
            "on": self.on,
            "auc": asdict(self.auc),
            "advantage": asdict(self.advantage),
            "finds": self.finds,
            "aucs": list(self.aucs),
            "tprs": [list(one) for one in self.tprs],
            "pooled": self.figures.as_dict(),
        }


@dataclass(frozen=True, eq=False)
class ReleaseOutcome:
    """All attacks on one release.

    Attributes:
        name: The release's.
        accuracy_members: Accuracy on the examples that the model was trained on, over all shadow models.
        accuracy_others: On the others: the clean accuracy.
        nll_members: Mean negative log-likelihood, in nats, likewise.
        nll_others: Likewise.
        attacks: By name.
        classes: The member gap of each class under the strongest attack on the predictive.
    """

    name: str
    accuracy_members: Spread
    accuracy_others: Spread
    nll_members: Spread
    nll_others: Spread
    attacks: Mapping[str, AttackOutcome]
    classes: ByClass

    def strongest(self, on: Attacked | None = None) -> AttackOutcome:
        """The attack of the highest AUC, chosen after the fact, which favours the attacker.

        Args:
            on: Only attacks on this; None for any.

        Raises:
            InputError: There is none: the release has no posterior's file.
        """
        found = [one for one in self.attacks.values() if on in (None, one.on)]
        if not found:
            raise InputError(f"the release {self.name!r} has no attack on its {on}: it is no posterior with a file")
        return max(found, key=lambda one: one.auc.mean)

    @property
    def has_file(self) -> bool:
        """Whether a posterior's file was attacked."""
        return any(one.on == "artifact" for one in self.attacks.values())

    def table(self) -> Table:
        """One row an attack, for a terminal; all attacked models in one ranking."""
        return membership_table({one.label: one.figures for one in self.attacks.values()}, title=self.name)

    def verdict(self) -> str:
        """What an attacker learns, in words with the numbers that carry it."""
        count = sum(one.on == "predictive" for one in self.attacks.values())
        said = f"{self.name}: {_told(self.strongest('predictive'), count)}"
        if not self.has_file:
            return said
        file, predictive = self.strongest("artifact"), self.strongest("predictive")
        gap = Spread.of([one - other for one, other in zip(file.aucs, predictive.aucs, strict=True)])
        low, high = gap.interval()
        tells = (
            "tells more than" if low > 0 else "tells less than" if high < 0 else "tells no more, to be sure of, than"
        )
        return (
            f"{said} Its posterior's file {tells} its predictive: AUC {file.auc.show()} by {file.label} "
            f"({gap.show(sign='+')})."
        )

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        quality = ("accuracy_members", "accuracy_others", "nll_members", "nll_others")
        return {
            "release": self.name,
            **{name: asdict(getattr(self, name)) for name in quality},
            "attacks": {name: one.as_dict() for name, one in self.attacks.items()},
            "strongest": {
                "predictive": self.strongest("predictive").name,
                "artifact": self.strongest("artifact").name if self.has_file else None,
            },
            "classes": self.classes.as_dict(),
            "verdict": self.verdict(),
        }


@dataclass(frozen=True, eq=False)
class PrivacyStudy:
    """All releases of one study.

    Attributes:
        releases: By name, in the order in which they were given.
        settings: What was asked for, plain values.
    """

    releases: Mapping[str, ReleaseOutcome]
    settings: Mapping[str, Any]

    @property
    def baseline(self) -> str:
        """What others are compared with: the release "network" where there is one, else the first."""
        return "network" if "network" in self.releases else next(iter(self.releases))

    def table(self) -> Table:
        """Each release under the strongest attack on its predictive and, where it has one, on its posterior's file.

        AUC and held-out advantage with their standard errors over the attacked models; rates of true positives of all attacked
        models in one ranking, with a question mark where there are too few non-members.
        """
        table = Table(title="Membership inference, strongest attacks", title_justify="left")
        limits = [point.limit for point in self.releases[self.baseline].strongest().figures.tpr_at]
        heads = (
            "members right",
            "others right",
            "AUC",
            "advantage",
            *(f"TPR at {100 * one:g} % FPR" for one in limits),
        )
        table.add_column("release", no_wrap=True)
        table.add_column("attack", no_wrap=True)
        for head in heads:
            table.add_column(head, justify="right")
        for name, release in self.releases.items():
            kinds: tuple[Attacked, ...] = ("predictive", "artifact") if release.has_file else ("predictive",)
            for kind in kinds:
                one = release.strongest(kind)
                own = kind == "predictive"
                quality = (release.accuracy_members.show(), release.accuracy_others.show()) if own else ("", "")
                rates = [point.tpr.show(4) + ("" if point.resolved else " ?") for point in one.figures.tpr_at]
                table.add_row(name if own else "", one.label, *quality, one.auc.show(), one.advantage.show(), *rates)
        return table

    def class_table(self, release: str | None = None) -> Table:
        """The member gap of each class under the strongest attack on a release's predictive.

        Args:
            release: Its name; None for the `baseline`.

        Raises:
            InputError: There is no release of this name.
        """
        chosen = self._release(self.baseline if release is None else release)
        return chosen.classes.table(f"{chosen.name}, {chosen.strongest('predictive').label}")

    def attack_table(self, release: str | None = None) -> Table:
        """Every attack on one release; arguments and errors as of `class_table`."""
        return self._release(self.baseline if release is None else release).table()

    def difference(self, release: str, on: Attacked = "predictive") -> Spread:
        """AUC of the strongest attack on a release less that on the baseline's predictive, model by model.

        Both were attacked on the same models, which share stage one, so that much of how models differ drops out.

        Raises:
            InputError: There is no release of this name, or it has no such file.
        """
        one = self._release(release).strongest(on)
        other = self.releases[self.baseline].strongest("predictive")
        return Spread.of([left - right for left, right in zip(one.aucs, other.aucs, strict=True)])

    def verdict(self) -> str:
        """What an attacker learns of each release, how that compares with the baseline, and what limits the study."""
        lines = [release.verdict() for release in self.releases.values()]
        base = self.releases[self.baseline]
        for name, release in self.releases.items():
            if name == self.baseline:
                continue
            gap = self.difference(name)
            low, high = gap.interval()
            leaks = "leaks less than" if high < 0 else "leaks more than" if low > 0 else "is not told apart from"
            said = f"{name} {leaks} {self.baseline}: AUC {gap.show(sign='+')}"
            if release.has_file:
                said += f", with its file {self.difference(name, 'artifact').show(sign='+')}"
            accuracy = release.accuracy_others.mean - base.accuracy_others.mean
            said += f"; clean accuracy {100 * accuracy:+.1f} points"
            # Whoever answers worse has less to tell.
            lines.append(said + (", so not at matched accuracy." if abs(accuracy) > _MATCHED else "."))
        lines.append(self._limits())
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        return {
            "settings": dict(self.settings),
            "baseline": self.baseline,
            "releases": {name: one.as_dict() for name, one in self.releases.items()},
            "differences": {name: asdict(self.difference(name)) for name in self.releases if name != self.baseline},
            "verdict": self.verdict(),
        }

    def _release(self, name: str) -> ReleaseOutcome:
        if name not in self.releases:
            raise InputError(f"there is no release {name!r} in this study; there are {list(self.releases)}")
        return self.releases[name]

    def _limits(self) -> str:
        models, targets = self.settings["models"], self.settings["targets"]
        notes = self.releases[self.baseline].strongest("predictive").figures.notes()
        said = (
            f"Attacked: {targets} of {models} models, each by the other {models - 1}. The strongest attack was chosen after "
            f"the fact, which favours the attacker; more shadow models find more, and nothing found is no proof of privacy."
        )
        return " ".join([said, *(f"{note[0].upper()}{note[1:]}." for note in notes)])


def _told(one: AttackOutcome, count: int) -> str:
    points = ", ".join(f"{100 * one.tpr.value:.2g} % at {100 * one.limit:g} %" for one in one.figures.tpr_at)
    which = f"the strongest of {count} attacks on its predictive, {one.label},"
    found = f"AUC {one.auc.show()}, advantage {one.advantage.show()}; members found at false alarms: {points}"
    return f"{which} {'tells members' if one.finds else 'is not told apart from guessing'} ({found})."
