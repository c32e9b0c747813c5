"""What a study says in words and numbers, on figures that are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from stfbnn.errors import InputError
from stfbnn.privacy.figures import by_class, membership_figures
from stfbnn.privacy.result import Attacked, AttackOutcome, PrivacyStudy, ReleaseOutcome, Spread

COUNT = 400


def attack(name: str, shifts: Sequence[float], on: Attacked = "predictive", count: int = COUNT) -> AttackOutcome:
    """An attack whose scores of members are higher by a shift, of its own for each attacked model."""
    random = torch.Generator().manual_seed(0)
    member = torch.arange(count) % 2 == 0
    scores = [torch.randn(count, generator=random) + shift * member for shift in shifts]
    apart = [membership_figures(one, member, bootstrap=100) for one in scores]
    return AttackOutcome(
        name=name,
        on=on,
        figures=membership_figures(torch.cat(scores), member.repeat(len(shifts)), bootstrap=100),
        aucs=tuple(one.auc.value for one in apart),
        advantages=tuple(one.held_out_advantage.value for one in apart),
        tprs=tuple(tuple(point.tpr.value for point in one.tpr_at) for one in apart),
    )


def release(name: str, *attacks: AttackOutcome, accuracy: float = 0.8) -> ReleaseOutcome:
    member = torch.arange(20) % 2 == 0
    classes = by_class(torch.arange(20.0), member, torch.arange(20) // 10)
    quality = [Spread.of([value, value]) for value in (0.99, accuracy, 0.05, 0.7)]
    return ReleaseOutcome(name, *quality, {one.name: one for one in attacks}, classes)


@pytest.fixture(scope="module")
def found() -> PrivacyStudy:
    releases = [
        release("network", attack("loss", [0.5] * 6), attack("lira_online", [1.0] * 6)),
        release("quiet", attack("loss", [0.0] * 6), accuracy=0.75),
        release(
            "ours",
            attack("lira_online", [0.5] * 6),
            attack("artifact_logistic", [1.2] * 6, "artifact"),
            attack("artifact_boosting", [1.5] * 6, "artifact"),
        ),
        release("same", attack("lira_online", [1.0] * 6)),
    ]
    return PrivacyStudy({one.name: one for one in releases}, {"models": 6, "targets": 6})


def text(table: Table) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_spread_is_that_of_students_interval() -> None:
    values = [0.61, 0.64, 0.58, 0.66, 0.6]
    spread = Spread.of(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert spread.interval() == pytest.approx(expected)
    assert spread.show() == "0.618 ± 0.014"
    assert spread.show(sign="+") == "+0.618 ± 0.014"
    one = Spread.of([0.5])
    assert one.error is None
    assert one.show() == "0.500"
    assert one.interval() == (-math.inf, math.inf)


def test_the_strongest_attack_is_the_one_of_the_highest_auc(found: PrivacyStudy) -> None:
    assert found.releases["network"].strongest().name == "lira_online"
    assert found.releases["ours"].strongest().name == "artifact_boosting"
    assert found.releases["ours"].strongest("predictive").name == "lira_online"


def test_an_attack_finds_something_where_the_interval_over_examples_says_so() -> None:
    assert attack("loss", [1.0] * 4).finds
    assert attack("loss", [1.0]).finds
    assert not attack("loss", [0.0] * 4).finds
    # One model of four leaks: no interval over models shows it, and it does all the same.
    uneven = attack("loss", [1.5, 0.0, 0.0, 0.0])
    assert uneven.auc.interval()[0] < 0.5
    assert uneven.finds


def test_releases_are_compared_model_by_model(found: PrivacyStudy) -> None:
    gap = found.difference("ours")
    own, base = (found.releases[name].attacks["lira_online"].aucs for name in ("ours", "network"))
    assert gap == Spread.of([one - other for one, other in zip(own, base, strict=True)])
    # The same scores but for the shift: the differences hardly vary, though the figures themselves do.
    assert gap.error is not None
    assert gap.error < Spread.of(own).error  # type: ignore[operator]
    assert found.difference("same") == Spread(0.0, 0.0, 6)
    assert found.difference("ours", "artifact").mean > 0


def test_the_verdict_says_who_leaks_less(found: PrivacyStudy) -> None:
    lines = found.verdict().splitlines()
    assert lines[0].startswith("network: the strongest of 2 attacks on its predictive, LiRA, online, tells members")
    assert "quiet: the strongest of 1 attacks" in lines[1]
    assert "not told apart from guessing" in lines[1]
    assert "file tells more than its predictive" in lines[2]
    assert "gradient boosting" in lines[2]
    assert lines[4].startswith("quiet leaks less than network")
    assert lines[4].endswith("clean accuracy -5.0 points, so not at matched accuracy.")
    assert lines[5].startswith("ours leaks less than network")
    assert "with its file +" in lines[5]
    assert lines[6].startswith("same is not told apart from network")
    assert lines[6].endswith("clean accuracy +0.0 points.")
    assert "6 of 6 models, each by the other 5" in lines[7]
    assert "cannot resolve a false-positive rate of 0.1 %" in lines[7]


def test_a_single_attacked_model_gives_no_comparison_of_models() -> None:
    releases = [release("first", attack("loss", [1.0])), release("second", attack("loss", [0.2]))]
    study = PrivacyStudy({one.name: one for one in releases}, {"models": 6, "targets": 1})
    assert study.baseline == "first"
    assert "second is not told apart from first" in study.verdict()
    json.dumps(study.as_dict(), allow_nan=False)


def test_tables_show_every_release_and_what_cannot_be_resolved(found: PrivacyStudy) -> None:
    shown = text(found.table())
    for name in ("network", "quiet", "ours", "same", "LiRA, online", "file, gradient boosting"):
        assert name in shown
    assert "file, logistic" not in shown
    network = found.releases["network"].attacks["lira_online"]
    assert network.auc.show() in shown
    # 1,200 non-members resolve 1 %, not 0.1 %.
    row = next(line for line in shown.splitlines() if "network" in line)
    assert row.count("?") == 1
    assert found.table().row_count == 5
    assert found.class_table().row_count == 2
    assert "ours, LiRA, online" in text(found.class_table("ours"))
    assert "file, logistic regression" in text(found.attack_table("ours"))
    with pytest.raises(InputError, match="no release 'what'"):
        found.class_table("what")


def test_all_figures_are_plain_values(found: PrivacyStudy) -> None:
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["baseline"] == "network"
    assert plain["releases"]["ours"]["strongest"] == {"predictive": "lira_online", "artifact": "artifact_boosting"}
    assert plain["releases"]["quiet"]["strongest"]["artifact"] is None
    assert plain["differences"]["same"] == {"mean": 0.0, "error": 0.0, "models": 6}
    assert plain["releases"]["network"]["attacks"]["loss"]["pooled"]["members"] == 6 * COUNT / 2
    assert len(plain["releases"]["network"]["attacks"]["loss"]["aucs"]) == 6
