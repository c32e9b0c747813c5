"""What a certificate shows: every number with whose risk it bounds, and never without its label."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from stfbnn.guarantees.certificate import FRESH_DRAWS, Bound, RiskCertificate, Trunk
from stfbnn.guarantees.eligibility import INFERENCE, PRIOR, STAGE_ONE, TAU, Stage


def certificate(**changes: Any) -> RiskCertificate:
    entries: dict[str, Any] = {
        "bounds": (
            Bound("sampled", "error", "0-1", 1, 0.05, 0.055, 0.0812, 0.0911, 0.0711),
            Bound("plurality vote", "error", "0-1", 2, 0.05, 0.055, 0.1624, 0.1822, 0.1422),
            Bound("averaged", "error", "1 - p", 2, 0.07, 0.08, 0.2133, 0.2244, 0.2011),
        ),
        "reasons": (),
        "notes": (),
        "assumptions": ("the data are independent draws",),
        "examples": 5000,
        "draws": 5000,
        "kl": 123.4,
        "kl_is_bound": False,
        "delta": 0.025,
        "delta_monte_carlo": 0.025,
        "priors_considered": 1,
        "predictive_temperature": 1.0,
        "p_min": 1e-5,
        "trunk": Trunk(200, 5000, 0.0462),
        "stages": (
            Stage(STAGE_ONE, 55_000, 0),
            Stage(PRIOR, 0, 0),
            Stage(TAU, 0, 0),
            Stage(INFERENCE, 60_000, 5000),
        ),
        "further_examples": 10_000,
        "way": "pre-activations",
        "seed": 0,
        "seconds": 1.5,
    }
    return RiskCertificate(**{**entries, **changes})


def shown(found: RiskCertificate) -> str:
    stream = io.StringIO()
    Console(width=160, file=stream).print(found.table())
    return stream.getvalue()


def test_the_table_has_every_bound_and_what_it_is_to_be_compared_with() -> None:
    text = shown(certificate())
    for number in ("8.12 %", "16.24 %", "21.33 %", "9.11 %", "7.11 %", "4.62 %", "4.00 %", "10000 more"):
        assert number in text
    for name in ("sampled", "plurality vote", "averaged", "trained network", "Clopper–Pearson", "confidence 0.95"):
        assert name in text
    assert "not a certificate" not in text.lower()


def test_columns_without_numbers_are_left_out() -> None:
    bounds = (Bound("sampled", "error", "0-1", 1, 0.05, 0.055, 0.0812),)
    text = shown(certificate(bounds=bounds, trunk=None, further_examples=0))
    assert "Q = P" not in text
    assert "more" not in text
    assert "Clopper" not in text


def test_the_verdict_says_whose_risk_it_is_and_what_does_not_follow() -> None:
    said = certificate().verdict()
    assert "error of the sampled classifier" in said
    assert "at most 8.12 %" in said
    assert "By itself at the same confidence, the error of the averaged prediction is at most 21.33 %" in said
    assert "the bound is 3.50 points above that" in said
    assert "below the trivial one of Q = P, 9.11 %" in said
    assert "10000 further examples" in said
    assert FRESH_DRAWS in said
    assert "not for an exported graph" in said
    assert "stage one saw 55000 others" in said
    assert "inferred on 60000, 5000 of the certifying ones among them" in said


def test_a_bound_that_does_not_beat_the_trivial_one_says_so() -> None:
    bounds = (Bound("sampled", "error", "0-1", 1, 0.05, 0.055, 0.0812, 0.07),)
    assert "not below the trivial one" in certificate(bounds=bounds).verdict()
    vacuous = (Bound("sampled", "error", "0-1", 1, 0.9, 0.92, 1.0),)
    assert "says nothing" in certificate(bounds=vacuous).verdict()


def test_other_losses_are_named() -> None:
    bounds = (Bound("sampled", "cross-entropy", "cross-entropy", 1, 0.05, 0.055, 0.08),)
    said = certificate(bounds=bounds).verdict()
    assert "expected loss 'cross-entropy'" in said
    assert "points" not in said


def test_a_mixtures_divergence_is_said_to_be_an_upper_bound() -> None:
    assert "KL at most 123.4 nats" in certificate(kl_is_bound=True).verdict()
    assert "KL 123.4 nats" in certificate().verdict()


def test_what_is_no_certificate_says_so_wherever_it_is_shown() -> None:
    found = certificate(reasons=("stage one saw 7 of the 5000 examples",))
    assert not found.valid
    assert shown(found).startswith("NOT A CERTIFICATE")
    assert "saw 7 of the 5000" in " ".join(shown(found).split())
    assert found.verdict().startswith("NOT A CERTIFICATE: stage one saw 7")
    assert str(found).startswith("NOT A CERTIFICATE")
    entries = found.as_dict()
    assert entries["label"] == "not a certificate"
    assert entries["valid"] is False
    assert next(iter(entries)) == "label"
    assert certificate().as_dict()["label"] == "certificate"


def test_all_of_it_is_json_with_the_numbers() -> None:
    found = certificate()
    entries = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert entries["bound"] == found.bound == 0.0812
    assert entries["confidence"] == pytest.approx(0.95)
    assert [one["value"] for one in entries["bounds"]] == [0.0812, 0.1624, 0.2133]
    assert entries["stages"][0] == {"name": "stage one", "examples": 55_000, "shared": 0}
    assert entries["trunk"] == {"errors": 200, "examples": 5000, "limit": 0.0462}
    assert entries["verdict"] == found.verdict()


def test_bounds_are_found_by_their_predictor() -> None:
    found = certificate()
    averaged = found.of("averaged")
    assert averaged is not None
    assert averaged.value == 0.2133
    assert certificate(bounds=found.bounds[:1]).of("averaged") is None


def test_an_unknown_stage_one_is_told() -> None:
    stages = (Stage(STAGE_ONE, None, None), Stage(INFERENCE, None, None))
    assert "what stage one saw is not known" in certificate(stages=stages).split()
    shared = (Stage(STAGE_ONE, 100, 7), Stage(INFERENCE, 0, 0))
    assert "stage one saw 100, 7 of the certifying ones among them" in certificate(stages=shared).split()
