"""Methods side by side for a person and for a program: tables, pictures, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from stfbnn.decision import AbstentionFigures
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

# What fits a terminal of 80 characters; the rest is in the JSON.
_CLASSES = tuple(known_column(name) for name in ("accuracy", "nll", "ece", "brier"))
_NUMBERS = (
    *(known_column(name) for name in ("rmse", "mean_log_density", "crps")),
    Column("coverage_90", "in 90 %", 0.9, 3),
)
_OUTSIDE = (
    Column("auroc_entropy", "entropy", "higher", 3),
    Column("auroc_epistemic", "epistemic", "higher", 3),
    Column("fpr_at_95_tpr", "FPR95", "lower", 3),
    Column("confidence", "confidence", "lower", 3),
)


_RULES = (
    Column("coverage", "answered", "higher", 3),
    Column("risk", "wrong of them", None, 3),
    Column("low", "95 % from", None, 3),
    Column("high", "to", None, 3),
    Column("risk_of_all", "wrong of all", None, 3),
)


def figures_table(side: SideBySide, title: str, extra: Mapping[str, float] | None = None) -> Table:
    """The figures on the test data.

    Args:
        side: The methods.
        title: What the table is about.
        extra: For each method the number of its trainable parameters, where that is to be shown.
    """
    rows: dict[str, dict[str, Any]] = {name: asdict(metrics) for name, metrics in side.metrics.items()}
    columns = _CLASSES if all("accuracy" in row for row in rows.values()) else _NUMBERS
    if extra is not None:
        rows = {name: {**row, "trainable": extra[name]} for name, row in rows.items()}
        columns = (*columns, Column("trainable", "trainable", None, 0))
    return compare(rows, columns, title).table()


def outside_table(side: SideBySide, name: str) -> Table:
    """How the methods tell one set of strange examples from the test data."""
    title = f"Out of distribution: {name} (AUROC by entropy, by its epistemic part)"
    return compare(_outside(side, name), _OUTSIDE, title).table()


def rules_table(figures: Mapping[str, AbstentionFigures], title: str) -> Table:
    """What the rules of several methods do on examples that did not choose them."""
    rows: dict[str, dict[str, float | None]] = {
        name: {
            "coverage": one.coverage,
            "risk": one.risk,
            "low": one.risk_interval[0],
            "high": one.risk_interval[1],
            "risk_of_all": one.risk_of_all,
        }
        for name, one in figures.items()
    }
    return compare(rows, _RULES, title).table()


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
