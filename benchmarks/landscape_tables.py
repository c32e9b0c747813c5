"""The tables of docs/landscape.md, from the raw results of ``landscape.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from common import RESULTS


def optima_table() -> str:
    """Every network's layers: their optima, and what lies between them; mean ± standard deviation over seeds."""
    heads = [
        "network",
        "layer",
        "weights",
        "held-out loss, trained",
        "retrained",
        "distance",
        "barrier, line",
        "barrier, curve",
    ]
    heads += ["labels told differently", "total variation", "basins", "functions"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for path in sorted(RESULTS.glob("landscape_*.json")):
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for layers in zip(*(run["landscape"]["layers"] for run in runs), strict=True):
            one = layers[0]
            cells = [path.stem.removeprefix("landscape_"), f"{one['place']} `{one['layer']}`", f"{one['parameters']:,}"]
            cells.append(over_seeds([layer["optima"][0]["held_out_loss"] for layer in layers]))
            cells.append(over_seeds([np.mean([o["held_out_loss"] for o in layer["optima"][1:]]) for layer in layers]))
            cells += [
                over_seeds([np.mean([value(pair) for pair in layer["pairs"]]) for layer in layers])
                for value in (
                    lambda pair: pair["relative_distance"],
                    lambda pair: pair["line"]["barrier"],
                    lambda pair: pair["curve"]["barrier"],
                    lambda pair: pair["disagreement"],
                    lambda pair: pair["total_variation"],
                )
            ]
            cells += [
                f"{', '.join(str(len(layer[name])) for layer in layers)} of {len(one['optima'])}"
                for name in ("basins", "functions")
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def widths_table() -> str:
    """Every network's layers made Bayesian one by one; mean ± standard deviation over seeds."""
    heads = [
        "network",
        "layer",
        "weights",
        "σ / RMS",
        "KL a weight",
        "held-out NLL",
        "test NLL",
        "ECE",
        "AUROC",
        "seconds",
        "best",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for path in sorted(RESULTS.glob("landscape_*.json")):
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        name = path.stem.removeprefix("landscape_")
        own = [run["widths"]["network"] for run in runs]
        foreign = next(iter(own[0]["auroc"]))
        cells = [name, "the network itself", "", "", "", over_seeds([one["held_out_nll"] for one in own])]
        cells += [over_seeds([one["metrics"][key] for one in own]) for key in ("nll", "ece")]
        lines.append("| " + " | ".join([*cells, over_seeds([one["auroc"][foreign] for one in own]), "", ""]) + " |")
        for layers in zip(*(run["widths"]["layers"] for run in runs), strict=True):
            cells = [name, f"`{layers[0]['layer']}`", f"{layers[0]['parameters']:,}"]
            cells += [
                over_seeds([one[key] for one in layers]) for key in ("relative_std", "kl_per_parameter", "held_out_nll")
            ]
            cells += [over_seeds([one["metrics"][key] for one in layers]) for key in ("nll", "ece")]
            cells.append(over_seeds([one["auroc"][foreign]["entropy"] for one in layers]))
            cells.append(f"{np.median([one['seconds'] for one in layers]):.0f}")
            best = sum(run["widths"]["recommended"] == layers[0]["layer"] for run in runs)
            lines.append("| " + " | ".join([*cells, f"{best} of {len(runs)}" if best else ""]) + " |")
    return "\n".join(lines)


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    spread_of = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread_of}"
