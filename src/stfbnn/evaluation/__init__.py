"""How good a prediction is, one question a file: probabilities or error bars in, figures out."""

from stfbnn.evaluation.calibration import (
    ClassificationMetrics,
    ReliabilityCurve,
    accuracy,
    adaptive_ece,
    brier,
    classification_metrics,
    classwise_ece,
    ece,
    nll,
    per_position,
    reliability_curve,
)
from stfbnn.evaluation.ood import OODMetrics, aupr, auroc, fpr_at_tpr, ood_metrics
from stfbnn.evaluation.regression import (
    RegressionMetrics,
    crps,
    interval_coverage,
    mean_log_density,
    regression_metrics,
    rmse,
    sharpness,
)

__all__ = [
    "ClassificationMetrics",
    "OODMetrics",
    "RegressionMetrics",
    "ReliabilityCurve",
    "accuracy",
    "adaptive_ece",
    "aupr",
    "auroc",
    "brier",
    "classification_metrics",
    "classwise_ece",
    "crps",
    "ece",
    "fpr_at_tpr",
    "interval_coverage",
    "mean_log_density",
    "nll",
    "ood_metrics",
    "per_position",
    "regression_metrics",
    "reliability_curve",
    "rmse",
    "sharpness",
]
