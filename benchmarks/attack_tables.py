"""The tables and pictures of docs/robustness.md and docs/privacy.md, from the raw results of their benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from common import RESULTS
from landscape_tables import over_seeds
from stfbnn.robustness.result import Robustness, show_epsilon

NETWORK = "network"
NOT_YET = "Not measured on three seeds yet; the script is there, and what it says will stand here."


def robustness_tables() -> str:
    """For every task: the worst case of every method, the strongest attack, detection and certified radii."""
    texts = []
    for path in sorted(RESULTS.glob("robustness_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        name, runs = path.stem.removeprefix("robustness_"), content["runs"]
        texts += [f"### {name}\n", _worst(runs), "", _detection(runs)]
        texts += [f"\n{_verdict(runs)}\n\n{_where(content)}\n"]
    return "\n".join(texts) or NOT_YET


def _methods(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in runs[0]["methods"] if all(name in run["methods"] for run in runs)]


def _studies(runs: Sequence[dict[str, Any]], method: str) -> list[Robustness]:
    return [Robustness.from_dict(run["methods"][method]["robustness"]) for run in runs]


def _worst(runs: Sequence[dict[str, Any]]) -> str:
    epsilons = _studies(runs, NETWORK)[0].epsilons
    heads = ["method", "clean", *(f"worst case, {show_epsilon(one)}" for one in epsilons)]
    heads += [f"less the network's, {show_epsilon(epsilons[-1])}", "strongest attack there", "checks failed"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    base = [one.worst(epsilons[-1]).value for one in _studies(runs, NETWORK)]
    for method in _methods(runs):
        found = _studies(runs, method)
        cells = [method, over_seeds([one.clean.value for one in found])]
        cells += [over_seeds([one.worst(epsilon).value for one in found]) for epsilon in epsilons]
        gaps = [one.worst(epsilons[-1]).value - other for one, other in zip(found, base, strict=True)]
        cells.append("" if method == NETWORK else over_seeds(gaps))
        cells.append(", ".join(dict.fromkeys(_strongest(one, epsilons[-1]) for one in found)))
        failed = [finding.name for one in found for finding in one.failed]
        cells.append(", ".join(f"{name} ({failed.count(name)})" for name in dict.fromkeys(failed)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _strongest(one: Robustness, epsilon: float) -> str:
    return min(one.attacks, key=lambda attack: one.outcome(attack, epsilon).accuracy.value)


def _detection(runs: Sequence[dict[str, Any]]) -> str:
    """Whether uncertainty shows attacks at the largest ε, and how far certificates reach."""
    heads = ["method"]
    for score in ("entropy", "epistemic"):
        heads += [f"{score}: AUROC, unaware attack", "the worst for the defender", "fooled and not flagged"]
    heads += ["mean certified l2 radius", "certified above 0"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in _methods(runs):
        found = [run["methods"][method] for run in runs]
        cells = [method]
        for score in ("entropy", "epistemic"):
            cells += _detected([one["detection"] for one in found], score)
        radii = [one["certified"] for one in found]
        if all(one is not None and "radius" in one for one in radii):
            cells.append(over_seeds([float(np.mean(one["radius"])) for one in radii]))
            cells.append(over_seeds([float(np.mean(np.array(one["radius"]) > 0)) for one in radii]))
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _detected(found: Sequence[dict[str, Any]], score: str) -> list[str]:
    """AUROC of what fooled, by the plain attack and by the one that hurts most; and what is fooled unseen by any."""
    if any(score not in one["thresholds"] for one in found):
        return ["", "", ""]
    plain = [one["attempts"][0]["scores"][score]["fooling"] for one in found]
    worst = [one["attempts"][one["worst"][score]]["scores"][score]["fooling"] for one in found]
    areas = [
        over_seeds([each["auroc"] for each in chosen]) if all(chosen) else "nothing was fooled"
        for chosen in (plain, worst)
    ]
    return [*areas, over_seeds([one["unseen"][score]["value"] for one in found])]


def _verdict(runs: Sequence[dict[str, Any]]) -> str:
    """The claim in words, by a paired test over seeds."""
    epsilon = _studies(runs, NETWORK)[0].epsilons[-1]

    def worst(method: str) -> list[float]:
        return [one.worst(epsilon).value for one in _studies(runs, method)]

    return _compared(runs, "STF-BNN", worst, "accuracy under the worst attack", show_epsilon(epsilon))


def _compared(
    runs: Sequence[dict[str, Any]], method: str, value: Callable[[str], list[float]], what: str, place: str
) -> str:
    ours, alone = value(method), value(NETWORK)
    gaps = [one - other for one, other in zip(ours, alone, strict=True)]
    said = f"{method}: {what} at {place} {np.mean(ours):.3f} against the network's {np.mean(alone):.3f}"
    if len(runs) < 2:
        return f"{said} (one seed)."
    p = float(ttest_rel(ours, alone).pvalue) if np.ptp(gaps) > 0 else float(not any(gaps))
    signs = ", ".join(f"{gap:+.3f}" for gap in gaps)
    return f"{said}; seed by seed {signs} (paired t-test over {len(runs)} seeds: p = {p:.2g})."


def privacy_tables() -> str:
    """For every task: the strongest attack on every release, on its predictive and on its file."""
    texts = []
    for path in sorted(RESULTS.glob("privacy_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        texts += [f"### {path.stem.removeprefix('privacy_')}\n", _releases(content["runs"])]
        texts += [f"\n{_leak(content['runs'])}\n\n{_where(content)}\n"]
    return "\n".join(texts) or NOT_YET


def _releases(runs: Sequence[dict[str, Any]]) -> str:
    heads = ["release", "right, members", "right, others", "strongest attack", "AUC", "advantage", "members at 1 % FPR"]
    heads += ["at 0.1 %", "AUC less the network's", "strongest on the file", "its AUC"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in runs[0]["study"]["releases"]:
        found = [run["study"]["releases"][name] for run in runs]
        attacks = [one["attacks"][one["strongest"]["predictive"]] for one in found]
        cells = [
            name,
            *(over_seeds([one[key]["mean"] for one in found]) for key in ("accuracy_members", "accuracy_others")),
        ]
        cells.append(", ".join(dict.fromkeys(one["attack"] for one in attacks)))
        cells += [over_seeds([one[key]["mean"] for one in attacks]) for key in ("auc", "advantage")]
        cells += [
            over_seeds([float(np.mean([row[place] for row in one["tprs"]])) for one in attacks]) for place in (0, 1)
        ]
        gaps = [run["study"]["differences"].get(name) for run in runs]
        cells.append("" if name == NETWORK else over_seeds([gap["mean"] for gap in gaps]))
        files = [one["attacks"][one["strongest"]["artifact"]] for one in found if one["strongest"]["artifact"]]
        cells += (
            ["", ""]
            if not files
            else [
                ", ".join(dict.fromkeys(one["attack"] for one in files)),
                over_seeds([one["auc"]["mean"] for one in files]),
            ]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _leak(runs: Sequence[dict[str, Any]]) -> str:
    def auc(name: str) -> list[float]:
        found = [run["study"]["releases"][name] for run in runs]
        return [one["attacks"][one["strongest"]["predictive"]]["auc"]["mean"] for one in found]

    models = runs[0]["study"]["settings"]["models"]
    return _compared(runs, "STF-BNN", auc, "AUC of the strongest attack on the predictive", f"{models} models")


def _where(content: dict[str, Any]) -> str:
    found = content["environment"]
    device = found["gpu"] or f"{found['processor']}, {found['threads']} thread(s)"
    spread = f"mean ± standard deviation over {len(content['runs'])} seed(s)"
    return f"`{found['command']}` on {device}, torch {found['torch']}; {spread}."


def robustness_picture() -> Figure | None:
    """Accuracy under the worst attack against ε, one panel a task; None where nothing is measured."""
    paths = sorted(RESULTS.glob("robustness_*.json"))
    if not paths:
        return None
    figure = Figure(figsize=(5.2 * len(paths), 4.2), layout="constrained", facecolor="white")
    for axes, path in zip(np.atleast_1d(figure.subplots(1, len(paths))), paths, strict=True):
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for number, method in enumerate(_methods(runs)):
            found = _studies(runs, method)
            epsilons = [0.0, *found[0].epsilons]
            values = np.array([[one.clean.value, *(one.worst(e).value for e in found[0].epsilons)] for one in found])
            error = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(epsilons))
            places = [255 * one for one in epsilons]
            axes.errorbar(places, values.mean(axis=0), error, label=method, marker="osDv^<>Pp"[number % 9], capsize=2)
        axes.set(
            title=path.stem.removeprefix("robustness_"), xlabel="ε, of 255 (l∞)", ylabel="right under the worst attack"
        )
        axes.grid(alpha=0.3)
    np.atleast_1d(figure.axes)[-1].legend(fontsize=7)
    return figure
