"""The tables and the picture of docs/guarantees.md, from the raw results of ``guarantees.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attack_tables import NOT_YET
from common import RESULTS
from landscape_tables import over_seeds

OURS = "STF-BNN, ten draws an example"


def guarantee_tables() -> str:
    """For every task: certificates beside what they have to beat, and the confidence far away."""
    texts = []
    for path in sorted(RESULTS.glob("guarantees_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        runs, found = content["runs"], content["environment"]
        texts += [f"### {path.stem.removeprefix('guarantees_')}\n", _certificates(runs), "", _far_field(runs)]
        where = f"`{found['command']}` on {found['processor']}, {found['threads']} thread(s), torch {found['torch']}"
        texts.append(f"\n{_verdict(runs)}\n\n{where}; mean ± standard deviation over {len(runs)} seed(s).\n")
    return "\n".join(texts) or NOT_YET


def _best(run: dict[str, Any], method: str) -> dict[str, Any]:
    """The scale with the lowest bound, which every bound has paid for."""
    found: dict[str, Any] = min(run["methods"][method]["by_scale"], key=lambda one: _bound(one)["value"])
    return found


def _bound(one: dict[str, Any], predictor: str = "sampled") -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in one["certificate"]["bounds"] if each["predictor"] == predictor)
    return found


def _certificates(runs: Sequence[dict[str, Any]]) -> str:
    heads = ["method", "n", "bound, sampled", "the same with Q = P", "trained network, Clopper–Pearson", "averaged"]
    heads += ["error on S, sampled", "test error, averaged", "KL, nats", "prior's std", "seconds of one fit"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in runs[0]["methods"]:
        best = [_best(run, method) for run in runs]
        cells = [method, f"{runs[0]['n']:,}", over_seeds([_bound(one)["value"] for one in best])]
        cells.append(over_seeds([_bound(one)["prior"] for one in best]))
        cells.append(over_seeds([one["certificate"]["trunk"]["limit"] for one in best]))
        cells.append(over_seeds([_bound(one, "averaged")["value"] for one in best]))
        cells.append(over_seeds([_bound(one)["estimate"] for one in best]))
        cells.append(over_seeds([one["test_error_averaged"] for one in best]))
        cells.append(over_seeds([one["certificate"]["kl"] for one in best]))
        cells.append(", ".join(f"{one['scale']:g}" for one in best))
        cells.append(f"{np.median([one['fit_seconds'] for one in best]):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _far_field(runs: Sequence[dict[str, Any]]) -> str:
    """Limits over directions, beside what was measured at the largest distance."""
    heads = [
        "directions",
        "mean limit",
        "mean bound",
        "bound below 0.9",
        "measured at the largest distance",
        "the network's",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for kind in ("data", "random"):
        each = [[one for one in run["far_field"]["limits"]["directions"] if one["kind"] == kind] for run in runs]
        cells = [kind]
        for key in ("limit", "bound"):
            cells.append(over_seeds([float(np.mean([one[key] for one in found])) for found in each]))
        cells.append(over_seeds([float(np.mean([one["bound"] < 0.9 for one in found])) for found in each]))
        if kind == "data":
            for key in ("averaged", "trained"):
                cells.append(
                    over_seeds([float(np.mean(np.array(run["far_field"]["along"][key])[:, -1])) for run in runs])
                )
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Against the two targets: below the bound of Q = P, and within a point of the trunk's."""
    best = [_best(run, OURS) for run in runs]
    gains = [_bound(one)["prior"] - _bound(one)["value"] for one in best]
    gaps = [_bound(one)["value"] - one["certificate"]["trunk"]["limit"] for one in best]
    below = "below" if min(gains) > 0 else "not below"
    within = "within" if max(gaps) <= 0.01 else "not within"
    under, over = (", ".join(f"{100 * one:+.2f}" for one in each) for each in ([-gain for gain in gains], gaps))
    return (
        f"The bound is {below} that of Q = P on every seed ({under} points), and {within} one point of the trained network's "
        f"own ({over} points)."
    )


def far_field_picture() -> Figure | None:
    """Mean confidence against distance, with the mean limit as a line; None where nothing is measured."""
    paths = sorted(RESULTS.glob("guarantees_*.json"))
    if not paths:
        return None
    figure = Figure(figsize=(4.6 * len(paths), 3.8), layout="constrained", facecolor="white")
    for axes, path in zip(np.atleast_1d(figure.subplots(1, len(paths))), paths, strict=True):
        run = json.loads(path.read_text(encoding="utf-8"))["runs"][0]["far_field"]
        along = run["along"]
        for key, label in (("trained", "trained network"), ("averaged", "STF-BNN")):
            axes.plot(along["distances"], np.array(along[key]).mean(axis=0), marker="o", label=label)
        limits = [one["limit"] for one in run["limits"]["directions"] if one["kind"] == "data"]
        axes.axhline(float(np.mean(limits)), linestyle="--", color="black", label="STF-BNN, limit")
        axes.set(
            title=path.stem.removeprefix("guarantees_"), xlabel="distance from the origin", ylabel="mean confidence"
        )
        axes.set_xscale("log")
        axes.legend(fontsize=7)
    return figure
