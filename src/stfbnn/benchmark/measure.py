"""From a method that is ready to predict to the figures of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from stfbnn.baselines.predictor import Predictor
from stfbnn.benchmark.methods.base import EVALUATION_BATCH, Fitted, adjusted
from stfbnn.benchmark.parts import Part, TaskData, targets_of_part
from stfbnn.benchmark.records import Row
from stfbnn.decision import abstention_rule, evaluate_abstention
from stfbnn.evaluation import ood_metrics, reliability_curve
from stfbnn.evaluation.evaluate import evaluate
from stfbnn.evaluation.selective import aurc, risk_coverage_curve
from stfbnn.predictive import CategoricalPrediction, MemberOutputs, Prediction

MAX_RISK, CONFIDENCE = 0.05, 0.9
"""The selective risk that is asked for in the reports, and how surely."""

_POINTS, _BINS = 101, 30


class Measured:
    """All raw outputs of one candidate, computed once for both rows.

    Args:
        fitted: The method.
        index: Of the candidate.
        data: The task's data.
    """

    def __init__(self, fitted: Fitted, index: int, data: TaskData) -> None:
        self._predictor: Predictor = fitted.predictor(index)
        self._candidate = fitted.candidates[index]
        self._data = data
        self._test = self._outputs(data.test)
        self._outside = {name: self._outputs(part) for name, part in data.outside.items()}
        self._shifted: dict[str, list[MemberOutputs]] = {}
        if data.corrupted is not None:
            for name in data.corruptions:
                self._shifted[name] = [self._outputs(data.corrupted(name, severity)) for severity in range(1, 6)]

    def row(self, tau: float | None = None) -> Row:
        """The figures at a predictive temperature, or without one.

        Args:
            tau: τ; None for the outputs as they are.
        """
        temperature = 1.0 if tau is None else tau
        pred, targets = self._test.at(temperature), targets_of_part(self._data.test)
        metrics = {name: float(value) for name, value in asdict(evaluate(pred, targets)).items()}
        shift = {name: self._curve(parts, temperature) for name, parts in self._shifted.items()}
        if not isinstance(pred, CategoricalPrediction):
            return Row(metrics, tau, shift=shift)
        errors = (pred.labels != targets).double()
        metrics["aurc"] = aurc(pred.entropy, errors)
        outside = {name: self._categorical(outputs.at(temperature)) for name, outputs in self._outside.items()}
        curve = risk_coverage_curve(pred.entropy, errors).at_most(_POINTS)
        return Row(
            metrics=metrics,
            tau=tau,
            ood={name: ood_figures(pred, other) for name, other in outside.items()},
            shift=shift,
            reliability=_reliability(pred, targets),
            risk_coverage={"coverage": _rounded(curve.coverages), "risk": _rounded(curve.risks)},
            entropies=_histograms({"test": pred, **outside}),
            abstention=self._abstention(targets, temperature),
        )

    def _outputs(self, part: Part) -> MemberOutputs:
        return adjusted(self._predictor.outputs(part.batches(EVALUATION_BATCH)), self._candidate)

    def _curve(self, parts: list[MemberOutputs], temperature: float) -> list[Mapping[str, float]]:
        assert self._data.shifted is not None  # noqa: S101 - there are corrupted examples
        targets = targets_of_part(self._data.shifted)
        found = [asdict(evaluate(outputs.at(temperature), targets)) for outputs in parts]
        return [{name: float(value) for name, value in one.items()} for one in found]

    def _abstention(self, targets: Tensor, temperature: float) -> dict[str, float | None]:
        """A rule chosen on every second test example and tried on the others.

        The held-out examples cannot choose it: the hyper-parameters were fitted to them, so they are not like new ones.
        """
        choose, try_on = slice(0, None, 2), slice(1, None, 2)
        parts = [
            self._categorical(replace(self._test, outputs=self._test.outputs[:, rows]).at(temperature))
            for rows in (choose, try_on)
        ]
        rule = abstention_rule(parts[0], targets[choose], max_risk=MAX_RISK, confidence=CONFIDENCE)
        found = evaluate_abstention(parts[1], targets[try_on], rule)
        return {
            "target_risk": MAX_RISK,
            "confidence_level": CONFIDENCE,
            "threshold": rule.threshold,
            "coverage": found.coverage,
            "risk": found.risk,
            "risk_of_all": found.risk_of_all,
        }

    @staticmethod
    def _categorical(pred: Prediction) -> CategoricalPrediction:
        assert isinstance(pred, CategoricalPrediction)  # noqa: S101 - one likelihood for all parts
        return pred


def ood_figures(inside: CategoricalPrediction, outside: CategoricalPrediction) -> dict[str, dict[str, float]]:
    """How well each score tells foreign examples from the test examples."""
    scores: dict[str, tuple[Any, Any]] = {
        "entropy": (inside.entropy, outside.entropy),
        "confidence": (-inside.confidence, -outside.confidence),
    }
    if not inside.at_mean:
        scores["epistemic"] = (inside.epistemic, outside.epistemic)
    found = {}
    for name, (ordinary, strange) in scores.items():
        metrics = asdict(ood_metrics(ordinary, strange))
        found[name] = metrics
    return found


def _rounded(values: Sequence[float]) -> list[float]:
    """Numbers of a curve that is only drawn."""
    return [round(value, 5) for value in values]


def _reliability(pred: CategoricalPrediction, targets: Tensor) -> dict[str, list[float | None]]:
    curve = reliability_curve(pred.probs, targets)

    def defined(values: tuple[float, ...]) -> list[float | None]:
        return [None if value != value else value for value in values]  # noqa: PLR0124 - NaN is not itself

    return {
        "edges": list(curve.edges),
        "confidences": defined(curve.confidences),
        "accuracies": defined(curve.accuracies),
        "counts": [float(count) for count in curve.counts],
    }


def _histograms(predictions: Mapping[str, CategoricalPrediction]) -> dict[str, list[float]]:
    """Counts of the total entropy in bins of equal width from 0 to that of equal probabilities."""
    classes = next(iter(predictions.values())).log_probs.shape[1]
    highest = float(torch.tensor(float(classes)).log())
    edges = torch.linspace(0, highest, _BINS + 1, dtype=torch.float64)
    found = {"edges": edges.tolist()}
    for name, pred in predictions.items():
        counts = torch.histogram(pred.entropy.double().clamp(0, highest), bins=edges).hist
        found[name] = counts.tolist()
    return found
