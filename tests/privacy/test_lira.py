"""LiRA on Gaussians whose moments are known, where the likelihood-ratio test has a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.privacy.lira import lira


def gaussian_case(
    shifts: Tensor, shadows: int, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target scores, its members, shadow scores and theirs: N(easiness, scale²), plus the shift where the example was had."""
    random = torch.Generator().manual_seed(seed)
    count = len(shifts)
    # How easy examples are hides everything from a threshold common to all.
    easiness = 10 * torch.randn(count, generator=random, dtype=torch.float64)
    member = torch.rand(shadows + 1, count, generator=random) < 0.5
    noise = scale * torch.randn(shadows + 1, count, generator=random, dtype=torch.float64)
    scores = easiness + shifts * member + noise
    return scores[0], member[0], scores[1:], member[1:]


def area(scores: Tensor, member: Tensor) -> float:
    return float(roc_auc_score(member, scores))


def error(count: int) -> float:
    """Above the standard error of an area from half as many members and others."""
    return math.sqrt(1 / (3 * count))


@pytest.mark.parametrize("variance", ["per-example", "global"])
@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_reaches_the_area_of_the_likelihood_ratio_test(shift: float, mode: str, variance: str) -> None:
    shifts = torch.full((4000,), shift, dtype=torch.float64)
    target, member, shadows, theirs = gaussian_case(shifts, shadows=200)
    found = area(lira(target, shadows, theirs, mode=mode, variance=variance), member)
    assert found == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=3 * error(4000))
    # The scores alone say next to nothing.
    assert area(target, member) < 0.57


def test_online_beats_offline_where_examples_move_differently() -> None:
    shifts = torch.linspace(-1, 2, 4000, dtype=torch.float64)
    target, member, shadows, theirs = gaussian_case(shifts, shadows=200, seed=3)
    online, offline = (
        area(lira(target, shadows, theirs, mode=mode, variance="global"), member) for mode in ("online", "offline")
    )
    # The log likelihood ratio of an example with shift d is N(±d²/2, d²): two of them differ by N((d² + e²)/2, d² + e²).
    squares = np.square(np.asarray(shifts))[::10]
    best = norm.cdf(np.sqrt(squares[:, None] + squares) / 2).mean()
    assert online == pytest.approx(best, abs=3 * error(4000))
    assert offline == pytest.approx(norm.cdf(np.asarray(shifts) / math.sqrt(2)).mean(), abs=3 * error(4000))
    assert online > offline + 0.02


@pytest.mark.parametrize("own", [True, False])
def test_scores_are_those_of_normal_distributions_fitted_by_hand(own: bool) -> None:
    target, _, shadows, theirs = gaussian_case(torch.ones(9, dtype=torch.float64), shadows=40, seed=1)
    kind = "per-example" if own else "global"
    online = lira(target, shadows, theirs, mode="online", variance=kind)
    offline = lira(target, shadows, theirs, mode="offline", variance=kind)
    columns = [(shadows[theirs[:, n], n].numpy(), shadows[~theirs[:, n], n].numpy()) for n in range(9)]
    pooled = [
        sum(((one[side] - one[side].mean()) ** 2).sum() for one in columns) / sum(len(one[side]) - 1 for one in columns)
        for side in (0, 1)
    ]
    for n, (having, without) in enumerate(columns):
        spread = (having.var(ddof=1), without.var(ddof=1)) if own else pooled
        inside, outside = norm(having.mean(), spread[0] ** 0.5), norm(without.mean(), spread[1] ** 0.5)
        phi = float(target[n])
        assert float(online[n]) == pytest.approx(inside.logpdf(phi) - outside.logpdf(phi))
        assert float(offline[n]) == pytest.approx(-outside.logsf(phi))


def test_auto_takes_a_common_variance_below_64_shadows_and_own_ones_from_there() -> None:
    target, _, shadows, theirs = gaussian_case(torch.ones(30, dtype=torch.float64), shadows=64, seed=2)
    for count, kind in ((63, "global"), (64, "per-example")):
        chosen = lira(target, shadows[:count], theirs[:count])
        assert torch.equal(chosen, lira(target, shadows[:count], theirs[:count], variance=kind))
    # One example with a single shadow that had it has no variance of its own.
    theirs[1:, 0], theirs[0, 0] = False, True
    assert torch.equal(lira(target, shadows, theirs), lira(target, shadows, theirs, variance="global"))


def test_offline_does_not_look_at_shadows_that_had_the_example() -> None:
    target, _, shadows, theirs = gaussian_case(torch.ones(30, dtype=torch.float64), shadows=16, seed=2)
    other = torch.where(theirs, shadows + 100, shadows)
    assert torch.equal(lira(target, other, theirs, mode="offline"), lira(target, shadows, theirs, mode="offline"))
    assert not torch.equal(lira(target, other, theirs), lira(target, shadows, theirs))


def test_offline_scores_of_certain_members_still_differ() -> None:
    shadows = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    found = lira([30.0, 40.0], shadows, torch.zeros(2, 2, dtype=torch.bool), mode="offline")
    assert float(found[1]) > float(found[0]) > 500


def test_shadows_that_agree_give_finite_scores() -> None:
    theirs = torch.tensor([[True], [True], [False], [False]])
    found = lira([2.0], torch.tensor([[3.0], [3.0], [1.0], [1.0]]), theirs)
    assert bool(found.isfinite().all())


SHADOWS = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
THEIRS = torch.tensor([[True, False, True], [False, True, True], [True, False, True]])


def test_examples_without_a_shadow_of_a_kind_are_counted() -> None:
    with pytest.raises(InputError, match="1 of 3 examples have no shadow model trained without them, of 3 shadows"):
        lira(torch.zeros(3), SHADOWS, THEIRS)
    with pytest.raises(InputError, match=r"2 of 3 examples .* with them.*offline"):
        lira(torch.zeros(3), SHADOWS, torch.tensor([[True, False, False]] + [[False] * 3] * 2))
    lira(torch.zeros(3), SHADOWS, torch.zeros(3, 3, dtype=torch.bool), mode="offline")
    with pytest.raises(InputError, match=r"two shadow models of each kind, but 2 of 2 examples.*global"):
        lira(torch.zeros(2), SHADOWS[:, :2], THEIRS[:, :2], variance="per-example")
    with pytest.raises(InputError, match="nothing says how much their scores vary"):
        lira(torch.zeros(2), SHADOWS[:2, :2], THEIRS[:2, :2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_scores": [0.0, math.nan, 0.0]}, "target scores hold 1 NaN"),
        ({"shadow_scores": torch.full((3, 3), math.inf)}, "shadow scores hold 9 infinite"),
        ({"target_scores": [0.0, 0.0]}, r"\(2,\) and \(3, 3\)"),
        ({"shadow_member": THEIRS[:2]}, r"shadow membership must have shape \(3, 3\)"),
        ({"shadow_member": THEIRS.long()}, "int64"),
        ({"mode": "both"}, '"online" or "offline"'),
        ({"variance": "local"}, "'local'"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], message: str) -> None:
    given = {"target_scores": torch.zeros(3), "shadow_scores": SHADOWS, "shadow_member": THEIRS} | changed
    with pytest.raises(InputError, match=message):
        lira(**given)
