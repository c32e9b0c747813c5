"""Guarantees: a certificate of generalisation, and a bound on the confidence far from the data."""

from stfbnn.guarantees.bound_history import BoundRecord, BoundRun
from stfbnn.guarantees.certificate import Bound, RiskCertificate
from stfbnn.guarantees.far_field import confidence_along, far_field
from stfbnn.guarantees.far_field_result import ConfidenceAlong, Direction, FarField
from stfbnn.guarantees.fit_bound import fit_bound
from stfbnn.guarantees.homogeneous_rules import NoLimitError
from stfbnn.guarantees.risk_certificate import risk_certificate

__all__ = [
    "Bound",
    "BoundRecord",
    "BoundRun",
    "ConfidenceAlong",
    "Direction",
    "FarField",
    "NoLimitError",
    "RiskCertificate",
    "confidence_along",
    "far_field",
    "fit_bound",
    "risk_certificate",
]
