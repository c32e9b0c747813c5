"""Adversarial robustness: attacks that know of the posterior, checks of the attacks themselves, and what they found."""

from stfbnn.robustness.attack import Attack, AttackResult
from stfbnn.robustness.detection import Detection, detection
from stfbnn.robustness.gradient import GradientAttack, fgsm, pgd
from stfbnn.robustness.library import APGD, Square, Transfer
from stfbnn.robustness.result import Finding, Robustness, robustness_table
from stfbnn.robustness.smoothing import CertifiedRadii, certified_radius
from stfbnn.robustness.study import default_attacks, evaluate_robustness
from stfbnn.robustness.victim import Members, Victim, victim
from stfbnn.threat import InputSpace, Threat

__all__ = [
    "APGD",
    "Attack",
    "AttackResult",
    "CertifiedRadii",
    "Detection",
    "Finding",
    "GradientAttack",
    "InputSpace",
    "Members",
    "Robustness",
    "Square",
    "Threat",
    "Transfer",
    "Victim",
    "certified_radius",
    "default_attacks",
    "detection",
    "evaluate_robustness",
    "fgsm",
    "pgd",
    "robustness_table",
    "victim",
]
