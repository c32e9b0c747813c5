"""Figures, words and files of a study of robustness follow from what was fooled."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console
from scipy.stats import binomtest

from stfbnn.errors import InputError
from stfbnn.robustness.result import (
    Accuracy,
    DrawsCurve,
    Finding,
    Outcome,
    Robustness,
    objections,
    robustness_table,
    show_epsilon,
)


def flags(text: str) -> tuple[bool, ...]:
    return tuple(character == "1" for character in text)


def result(clean: str = "1000000000", **changes: object) -> Robustness:
    """Ten examples, two attacks, two values of ε."""
    outcomes = (
        Outcome("FGSM", "one step", 0.1, flags("1100000000"), 1.0),
        Outcome("FGSM", "one step", 0.2, flags("1000000000"), 1.0),
        Outcome("PGD-20 [x]", "many steps", 0.1, flags("1010000000"), 2.0, {"zero_gradient_share": 0.5}),
        Outcome("PGD-20 [x]", "many steps", 0.2, flags("1011100000"), 2.0),
    )
    curve = DrawsCurve(0.1, (1, 2), (outcomes[0], outcomes[3]), 2)
    findings = (
        Finding("no-gradients", True, {"share": 0.0}, "all have one"),
        Finding("more-draws-fool-more", None, {}, "not drawn"),
    )
    settings = {"attacks": {"FGSM": {"steps": 1}}, "seed": 0}
    made = Robustness("linf", (0.1, 0.2), flags(clean), outcomes, curve, findings, settings, 7.0)
    return dataclasses.replace(made, **changes)


def shown(table: object, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 10), (812, 1000), (1, 1)])
def test_intervals_are_those_of_scipy(right: int, count: int) -> None:
    found = Accuracy.of(right, count)
    expected = binomtest(right, count).proportion_ci(confidence_level=0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.value == right / count


def test_the_worst_case_joins_attacks_and_smaller_radii() -> None:
    found = result()
    assert found.worst_fooled(0.1) == flags("1110000000")
    # Example 1 was fooled within 0.1 alone, which is within 0.2, too.
    assert found.worst_fooled(0.2) == flags("1111100000")
    assert found.worst(0.2).value == 0.5
    for outcome in found.outcomes:
        assert found.worst(outcome.epsilon).value <= outcome.accuracy.value
    assert found.clean.value == 0.9


def test_tables_show_every_figure_once() -> None:
    text = shown(result().table())
    assert "PGD-20 [x]" in text
    assert "…" not in shown(result().table(), width=50)
    assert "none" in text
    assert "worst case" in text
    low, high = binomtest(5, 10).proportion_ci(method="exact")
    assert f"50.0 % [{100 * low:.1f}, {100 * high:.1f}]" in text
    draws = shown(result().draws_table())
    assert "2 (enough)" in draws
    assert "not checked" in shown(result().findings_table())
    with pytest.raises(InputError, match="draws nothing"):
        result(draws=None).draws_table()


def test_the_verdict_names_the_numbers_and_the_failed_checks() -> None:
    text = result().verdict()
    assert "Clean accuracy 90.0 % [55.5, 99.7] on 10 examples" in text
    assert "worst of 2 attacks (linf): 70.0 %" in text
    assert "50.0 % [18.7, 81.3] at ε = 0.2" in text
    assert "strongest single attack at the largest ε is PGD-20 [x] (60.0 %" in text
    assert (
        "From 1 to 2 draws a step the accuracy goes from 80.0 % to 60.0 % at ε = 0.1; it no longer falls from 2 on."
        in text
    )
    assert text.endswith("All checks passed (1).")
    bad = result(findings=(Finding("no-gradients", False, {}, "none"), *result().findings))
    assert "1 of 2 checks failed (no-gradients): the figures may be too high." in bad.verdict()
    assert "still falling" in result(draws=dataclasses.replace(result().draws, needed=None)).verdict()
    assert result(findings=()).verdict().endswith("The attacks were not checked.")


def test_json_brings_everything_back() -> None:
    found = result(detection={"auroc": 0.9}, smoothing={"radius": 0.1})
    text = json.dumps(found.as_dict(), allow_nan=False)
    again = Robustness.from_dict(json.loads(text))
    assert again == found
    assert again.seconds == found.seconds
    assert json.dumps(again.as_dict()) == text
    bare = result(draws=None, findings=())
    assert Robustness.from_dict(json.loads(json.dumps(bare.as_dict()))) == bare


@pytest.mark.parametrize("content", [{}, {"norm": "linf"}, {**result().as_dict(), "fooled_clean": "10x"}])
def test_other_content_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"as_dict|0 and 1"):
        Robustness.from_dict(content)


def test_methods_stand_side_by_side_with_what_speaks_against_it() -> None:
    one, other = result(), result(clean="1100000000")
    failing = result(findings=(Finding("no-gradients", False, {}, "none"),))
    assert "…" not in shown(robustness_table({"MAP": one, "ours [1]": other}), width=60)
    text = shown(robustness_table({"MAP": one, "ours [1]": other, "masked": failing}))
    assert "ours [1]" in text
    assert "clean accuracy differs by -10.0 points" in text
    assert "failed: no-gradients" in text
    assert objections(one, one) == []


def test_a_gap_of_one_point_is_no_objection_and_a_larger_one_is() -> None:
    def of(wrong: int) -> Robustness:
        clean = flags("1" * wrong + "0" * (1000 - wrong))
        return Robustness("linf", (0.1,), clean, (), None, (), {}, 0.0)

    assert objections(of(110), of(100)) == []
    assert objections(of(90), of(100)) == []
    assert objections(of(111), of(100)) == ["clean accuracy differs by -1.1 points"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="at least one method"):
        robustness_table({})
    with pytest.raises(InputError, match=r"'b' and 'a' cannot be compared: 10 examples, l2"):
        robustness_table({"a": result(), "b": result(norm="l2")})


def test_outcomes_are_found_by_name() -> None:
    assert result().outcome("FGSM", 0.2).seconds == 1.0
    with pytest.raises(InputError, match=r"no attack 'CW' at ε = 0\.2; there are 'FGSM'"):
        result().outcome("CW", 0.2)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(8 / 255, "8/255"), (0.2, "0.2"), (0.031, "0.031"), (1.0, "1"), (2.5, "2.5"), (1e-4, "0.0001")],
)
def test_radii_are_shown_as_people_write_them(epsilon: float, text: str) -> None:
    assert show_epsilon(epsilon) == text
