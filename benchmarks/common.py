"""What the benchmarks share: the record of a run, its hardware, and tables with the spread over seeds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import stfbnn
from stfbnn.data import data_root
from stfbnn.environment import environment
from stfbnn.evaluation import auroc, classification_metrics
from stfbnn.evaluation.evaluate import network_outputs
from stfbnn.files import write_json, write_text
from stfbnn.prediction import member_outputs
from stfbnn.predictive import CategoricalPrediction, MemberOutputs

RESULTS = Path(__file__).parent / "results"


def data(name: str) -> Path:
    """A data set's folder under the data root, or an end with the reason."""
    root = data_root()
    if root is None:
        sys.exit("STFBNN_DATA is not set: it names the folder of real data sets")
    return root / name


def figures_of(pred: CategoricalPrediction, targets: Tensor) -> dict[str, float]:
    """Accuracy, NLL, Brier and ECE of a prediction."""
    return asdict(classification_metrics(pred.probs, pred.log_probs, targets))


def ood_figures(name: str, inside: CategoricalPrediction, outside: CategoricalPrediction) -> dict[str, float]:
    """AUROC of telling ``outside`` from ``inside`` by total entropy and, where there is one, by its epistemic part."""
    found = {f"auroc_entropy_{name}": auroc(inside.entropy, outside.entropy)}
    if not inside.at_mean:
        found[f"auroc_epistemic_{name}"] = auroc(inside.epistemic, outside.epistemic)
    return found


def contest(
    model: nn.Module,
    bnn: stfbnn.BayesianNetwork,
    tau: float,
    test: tuple[Tensor, Tensor],
    outside: Mapping[str, Tensor],
) -> dict[str, dict[str, float]]:
    """All figures of the four methods: the network, temperature-scaled by ``tau``, STF-BNN, and STF-BNN with its own τ."""
    inputs, targets = test
    alone = {
        kind: MemberOutputs(network_outputs(model, list(x.split(128)))[None], stfbnn.Categorical(), at_mean=True)
        for kind, x in {"": inputs, **outside}.items()
    }
    draws = {kind: member_outputs(bnn, x) for kind, x in {"": inputs, **outside}.items()}
    methods: dict[str, dict[str, float]] = {}
    for name, outputs, temperature in (
        ("network", alone, 1.0),
        ("temperature scaling", alone, tau),
        ("STF-BNN", draws, 1.0),
        ("STF-BNN + τ", draws, bnn.predictive_temperature),
    ):
        inside = outputs[""].at(temperature)
        methods[name] = figures_of(inside, targets)
        for kind in outside:
            methods[name] |= ood_figures(kind, inside, outputs[kind].at(temperature))
    return methods


def write(name: str, runs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write the raw results, and a table of means ± standard deviations over the seeds."""
    content = {"environment": environment(), "settings": dict(settings), "runs": list(runs)}
    write_json(RESULTS / f"{name}.json", json.loads(json.dumps(content, default=float)))
    text = table(runs)
    write_text(RESULTS / f"{name}.md", text)
    print(text)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table: methods down, figures across, mean ± standard deviation over the seeds."""
    methods = list(runs[0]["methods"])
    keys = list(dict.fromkeys(key for method in methods for key in runs[0]["methods"][method] if key != "count"))
    lines = ["| method | " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for method in methods:
        cells = []
        for key in keys:
            values = [run["methods"][method][key] for run in runs if key in run["methods"][method]]
            cells.append(
                f"{np.mean(values):.4f} ± {np.std(values, ddof=min(1, len(values) - 1)):.4f}" if values else ""
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
