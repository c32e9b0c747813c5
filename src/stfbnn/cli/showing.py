"""Methods side by side for a person and for a program: tables, pictures, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from stfbnn.evaluation import reliability_curve
from stfbnn.evaluation.evaluate import SideBySide
from stfbnn.predictive import CategoricalPrediction
from stfbnn.report import (
    Column,
    compare,
    known_column,
    reliability_diagram,
    save_figure,
    uncertainty_histogram,
)

_CLASSES = ("accuracy", "nll", "brier", "ece", "adaptive_ece", "classwise_ece")
_NUMBERS = ("rmse", "mean_log_density", "crps", "sharpness", "coverage_50", "coverage_90", "coverage_95")
_OUTSIDE = (
    Column("auroc_entropy", "AUROC, entropy", "higher"),
    Column("auroc_epistemic", "AUROC, epistemic", "higher"),
    Column("fpr_at_95_tpr", "FPR at 95 % TPR", "lower"),
    Column("confidence", "mean confidence", "lower"),
)


def figures_table(side: SideBySide, title: str) -> Table:
    """The figures on the test data."""
    first = asdict(next(iter(side.metrics.values())))
    names = _CLASSES if "accuracy" in first else _NUMBERS
    return compare(side.metrics, tuple(known_column(name) for name in names), title).table()


def outside_table(side: SideBySide, name: str) -> Table:
    """How the methods tell one set of strange examples from the test data."""
    return compare(_outside(side, name), _OUTSIDE, f"Out of distribution: {name}").table()


def pictures(side: SideBySide, folder: Path) -> list[Path]:
    """Draw what can be drawn, and return the files: reliability diagrams, and entropies of each strange set."""
    classes = {
        name: prediction
        for name, prediction in side.predictions.items()
        if isinstance(prediction, CategoricalPrediction) and prediction.log_probs.ndim == 2
    }
    if not classes:
        return []
    written = [folder / "reliability.png"]
    curves = {name: reliability_curve(prediction.probs, side.targets) for name, prediction in classes.items()}
    save_figure(reliability_diagram(curves, "Confidence against accuracy on the test data"), written[0])
    for name, methods in side.outside.items():
        scores = {method: (classes[method].entropy, seen.prediction.entropy) for method, seen in methods.items()}
        path = folder / f"entropy_{_file_name(name)}.png"
        save_figure(uncertainty_histogram(scores, f"Entropy on the test data and on {name}"), path)
        written.append(path)
    return written


def as_json(side: SideBySide) -> dict[str, Any]:
    """All figures."""
    return {
        "methods": {name: asdict(metrics) for name, metrics in side.metrics.items()},
        "out_of_distribution": {name: _outside(side, name) for name in side.outside},
        "notes": dict(side.notes),
    }


def _outside(side: SideBySide, name: str) -> dict[str, Mapping[str, float | None]]:
    return {
        method: {column.key: getattr(seen, column.key) for column in _OUTSIDE}
        for method, seen in side.outside[name].items()
    }


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in name)
