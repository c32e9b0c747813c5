"""Write docs/results.md, its figure and the README's table from the raw results of the benchmarks.

python benchmarks/summary.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attack_tables import privacy_tables, robustness_picture, robustness_tables
from common import RESULTS
from guarantee_tables import far_field_picture, guarantee_tables
from landscape_tables import optima_table, widths_table
from large_trunk_tables import faults_table, large_trunk_table
from scaling_tables import scaling_tables
from stfbnn.benchmark.claims import claims_of
from stfbnn.benchmark.records import Record, load_records, succeeded
from stfbnn.benchmark.reporting import rankings
from stfbnn.benchmark.statistics import summary as summarise
from stfbnn.files import write_text
from stfbnn.report import save_figure

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- written by benchmarks/summary.py -->", "<!-- end -->"
# What the README shows of the overfit MLP.
README_METHODS = {
    "network": "network",
    "network + τ": "temperature scaling",
    "mean-field": "STF-BNN",
    "mean-field + τ": "STF-BNN + τ",
    "mixture of 4": "STF-BNN, mixture of 4",
    "mixture of 4 + τ": "STF-BNN, mixture of 4 + τ",
    "deep ensemble of 4": "deep ensemble of 4 networks",
    "deep ensemble of 4 + τ": "deep ensemble of 4 networks + τ",
}
SHOWN = (
    ("accuracy", "accuracy"),
    ("nll", "NLL"),
    ("ece", "ECE"),
    ("brier", "Brier"),
)


def read(name: str) -> dict[str, Any]:
    """One benchmark's raw results."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def spread(runs: list[dict[str, Any]], method: str, key: str) -> str:
    """Mean ± standard deviation over the seeds."""
    values = [run["methods"][method][key] for run in runs if key in run["methods"][method]]
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if values else ""


def quality(runs: list[dict[str, Any]], far: tuple[str, ...]) -> str:
    """The table of one benchmark."""
    columns = [*SHOWN, *((f"auroc_entropy_{name}", f"{name}: AUROC by entropy") for name in far)]
    columns += [(f"auroc_epistemic_{name}", f"{name}: by epistemic part") for name in far]
    lines = ["| method | " + " | ".join(title for _, title in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in runs[0]["methods"]:
        lines.append(f"| {method} | " + " | ".join(spread(runs, method, key) for key, _ in columns) + " |")
    return "\n".join(lines)


def per_seed(runs: list[dict[str, Any]], method: str, network: str, scaled: str, fits: Mapping[int, Any]) -> str:
    """How far a method is from the network and from temperature scaling, seed by seed.

    Args:
        runs: One a seed.
        method: The row that is compared.
        network: The row of the network.
        scaled: The row of the temperature-scaled network.
        fits: For each seed the record of stage two.
    """
    head = (
        "| seed | T | τ | NLL, of the network's | ECE, of the network's | accuracy − network's | NLL − temp. scaling's "
    )
    lines = [head + "| Brier − temp. scaling's |", "|---" * 8 + "|"]
    for run in runs:
        ours, alone, other = (run["methods"][name] for name in (method, network, scaled))
        fit = fits[run["seed"]]
        cells = (
            f"{fit['temperature']:g}",
            f"{fit['predictive_temperature']:.2f}" if "τ" in method else "1",
            f"{ours['nll'] / alone['nll']:.3f}",
            f"{ours['ece'] / alone['ece']:.3f}",
            f"{ours['accuracy'] - alone['accuracy']:+.4f}",
            f"{ours['nll'] - other['nll']:+.4f}",
            f"{ours['brier'] - other['brier']:+.4f}",
        )
        lines.append(f"| {run['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trials(fits: Mapping[int, Any]) -> str:
    """What was tried on held-out data."""
    lines = ["| seed | T | held-out NLL with τ | τ |", "|---" * 4 + "|"]
    for seed, fit in fits.items():
        for trial in fit["trials"]:
            lines.append(
                f"| {seed} | {trial['temperature']:g} | {trial['held_out_nll']:.4f} | {trial['predictive_temperature']:.2f} |"
            )
    return "\n".join(lines)


def where(content: dict[str, Any]) -> str:
    """Hardware and command of a run."""
    found = content["environment"]
    device = found["gpu"] or f"{found['processor']}, {found['threads']} thread(s)"
    return f"`{found['command']}` on {device}, torch {found['torch']}."


def steps() -> str:
    """The cost of a step."""
    files = sorted(RESULTS.glob("step_cost*.json"))
    lines = [
        "| batch | threads | step of stage two | median of its ratio to a training step | min to max |",
        "|---" * 5 + "|",
    ]
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        threads = content["environment"]["threads"]
        for name, values in content["step_ratios"].items():
            spread_of = f"{values['min']:.3f} to {values['max']:.3f}"
            lines.append(f"| {content['batch']} | {threads} | {name} | {values['median']:.3f} | {spread_of} |")
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["convolutions_alone"]:
            name = "the convolutions of one draw alone (profiled)"
            threads = content["environment"]["threads"]
            lines.append(f"| {content['batch']} | {threads} | {name} | {content['convolutions_alone']:.3f} | |")
    lines += [
        "",
        "| batch | rows run at once | bytes kept for the backward pass, of a training step's |",
        "|---" * 3 + "|",
    ]
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        shares = content["saved_shares"]
        lines.append(f"| {content['batch']} | all | {shares['stage two, whole batch at once']:.3f} |")
        lines.append(f"| {content['batch']} | {content['chunk']} (what `fit` does) | {shares['stage two']:.3f} |")
    lines += ["", *(where(json.loads(file.read_text(encoding="utf-8"))) for file in files)]
    return "\n".join(lines)


def figure(runs: list[dict[str, Any]], methods: Mapping[str, str]) -> Figure:
    """NLL, ECE and Brier of some methods, a point for each seed."""
    shown = Figure(figsize=(9, 3.4), layout="constrained")
    axes = shown.subplots(1, 3, sharey=True)
    for axis, (key, title) in zip(axes, SHOWN[1:], strict=True):
        for place, method in enumerate(methods):
            values = [run["methods"][method][key] for run in runs]
            axis.plot(values, [place] * len(values), "o", color="#0072b2", alpha=0.7)
            axis.plot(np.mean(values), place, "|", color="black", markersize=16)
        axis.set_title(f"{title} (lower is better)")
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods.values())
    axes[0].invert_yaxis()
    return shown


def families(content: dict[str, Any], shown: Mapping[str, str] | None = None) -> str:
    """Every family beside the network and the ensemble; seconds as multiples of one network's training.

    Args:
        content: The raw results.
        shown: The methods to show and what to call them; None for all, with the foreign sets.
    """
    runs = content["runs"]
    chosen = shown or {method: method for method in runs[0]["methods"]}
    far = [key for key in runs[0]["methods"]["network"] if key.startswith("auroc_entropy_")]
    far = far if shown is None else [key for key in far if key.endswith("kmnist")]
    columns = [*SHOWN, *((key, f"{key.rsplit('_', 1)[1]}: AUROC") for key in far)]
    lines = ["| method | " + " | ".join(title for _, title in columns) + " | time |", "|---" * (len(columns) + 2) + "|"]
    for method, label in chosen.items():
        cells = [spread(runs, method, key) for key, _ in columns]
        times = [run["methods"][method]["seconds"] / run["notes"]["stage_one_seconds"][0] for run in runs]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {np.median(times):.2f} |")
    return "\n".join(lines)


def skipped(content: dict[str, Any]) -> str:
    """What was left out, and why."""
    return "\n".join(f"Left out: {name} ({why})." for name, why in content["settings"]["skipped"].items())


def further_components(content: dict[str, Any], family: str) -> str:
    """What one more component of a mixture took, as a share of one more network's training."""
    shares, retraining = [], []
    for run in content["runs"]:
        network = float(np.mean(run["notes"]["stage_one_seconds"][1:]))
        for one in run["notes"][f"mixture of {family}"]["components"][1:]:
            shares.append((one["retraining_seconds"] + one["inference_seconds"]) / network)
            retraining.append(one["retraining_seconds"] / network)
    return (
        f"{100 * np.median(shares):.0f} % of a further network's training, {100 * np.median(retraining):.0f} % for retraining "
        f"its first layer and the rest for its inference"
    )


def minilm(runs: list[dict[str, Any]]) -> str:
    """The sentence encoder, layer by layer; seconds as multiples of the fine-tuning."""
    far = ("auroc_entropy_questions", "auroc_epistemic_questions")
    columns = [*SHOWN, (far[0], "questions: AUROC by entropy"), (far[1], "by epistemic part")]
    head = ["method", "random weights", *(title for _, title in columns), "time"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in runs[0]["methods"]:
        note = runs[0]["notes"].get(method.removesuffix(" + τ"))
        weights = f"{note['weights']:,}" if isinstance(note, Mapping) else ""
        times = [run["methods"][method]["seconds"] / run["notes"]["stage_one_seconds"] for run in runs]
        cells = [weights, *(spread(runs, method, key) for key, _ in columns), f"{np.median(times):.2f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hmc_table(runs: list[dict[str, Any]]) -> str:
    """Families and engines against the reference."""
    keys = ("free energy", "predictive TV", "mean error", "std ratio", "covariance error", "test NLL")
    lines = ["| method | " + " | ".join(keys) + " | seconds |", "|---" * (len(keys) + 2) + "|"]
    for method in runs[0]["methods"]:
        seconds = [run["methods"][method]["seconds"] for run in runs if "seconds" in run["methods"][method]]
        cells = [spread(runs, method, key) for key in keys] + [f"{np.median(seconds):.1f}" if seconds else ""]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(name: str) -> str:
    """A table that a benchmark wrote itself."""
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()


def suite_table(records: list[Record]) -> str:
    """Each method's figure of every task, its average rank, and what it takes after the network."""
    (ranking,) = rankings(records)
    tasks = list(dict.fromkeys(record.task for record in records))
    lines = ["| method | rank | " + " | ".join(tasks) + " | time |", "|---" * (len(tasks) + 3) + "|"]
    methods = sorted(
        dict.fromkeys(record.method for record in succeeded(records)),
        key=lambda name: ranking.average_ranks.get(name, math.inf),
    )
    for method in methods:
        here = [record for record in succeeded(records) if record.method == method]
        rank = ranking.average_ranks.get(method)
        cells = [headline([record for record in here if record.task == task]) for task in tasks]
        times = [one.cost.search_seconds / one.cost.stage_one_seconds for one in here if one.cost is not None]
        # The network's own search is training others: what it takes after the network is nothing.
        spent = "" if method == "network" else f"{np.median(times):.2f}"
        lines.append(f"| {method} | {'' if rank is None else f'{rank:.1f}'} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def headline(records: list[Record]) -> str:
    """NLL with a predictive temperature, or for numbers the negative log density: mean ± standard error over seeds."""
    rows = [record.scaled or record.raw for record in records]
    values = [row.metrics["nll"] if "nll" in row.metrics else -row.metrics["mean_log_density"] for row in rows]
    if not values:
        return ""
    found = summarise(values)
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{found.mean:.3f}{error}"


def claims_table(records: list[Record]) -> str:
    """The paper's claims about what a suite measures, with its verdicts."""
    lines = ["| the paper's claim | verdict | figures |", "|---|---|---|"]
    lines += [
        f"| {one.text} | **{one.verdict}**, {one.why} | {one.evidence} |"
        for one in claims_of(records)
        if one.verdict != "not measured"
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page, and the table of the README."""
    cnn, on_mlp, on_cifar = read("pretrained_cnn"), read("families_fashion-mlp"), read("families_cifar-resnet20")
    hmc, newton = read("hmc_reference"), read("natural_gradient_reference")
    save_figure(figure(on_mlp["runs"], README_METHODS), DOCS / "figures" / "families_mlp.png")
    fits = {run["seed"]: run["stage_two"] for run in cnn["runs"]}
    mlp_fits = {run["seed"]: run["notes"]["mean-field"] for run in on_mlp["runs"]}
    own = ("network", "temperature scaling", fits)
    template = (Path(__file__).parent / "results.md.in").read_text(encoding="utf-8")
    parts = {
        "CNN_TABLE": quality(cnn["runs"], ("kmnist", "fashion")),
        "CNN_SEEDS": per_seed(cnn["runs"], "STF-BNN", *own),
        "CNN_SEEDS_TAU": per_seed(cnn["runs"], "STF-BNN + τ", *own),
        "CNN_TRIALS": trials(fits),
        "CNN_WHERE": where(cnn),
        "FAMILIES_MLP": families(on_mlp),
        "MLP_SEEDS_TAU": per_seed(on_mlp["runs"], "mean-field + τ", "network", "network + τ", mlp_fits),
        "MLP_TRIALS": trials(mlp_fits),
        "COMPONENT_MLP": further_components(on_mlp, "mean-field"),
        "FAMILIES_MLP_SKIPPED": skipped(on_mlp),
        "FAMILIES_MLP_WHERE": where(on_mlp),
        "FAMILIES_CIFAR": families(on_cifar),
        "COMPONENT_CIFAR": further_components(on_cifar, "mean-field"),
        "FAMILIES_CIFAR_WHERE": where(on_cifar),
        "STEPS": steps(),
        "MINILM": minilm(read("minilm_sst2")["runs"]),
        "MINILM_WHERE": where(read("minilm_sst2")),
        "HMC_TABLE": hmc_table(hmc["runs"]),
        "HMC_WHERE": where(hmc),
        "NEWTON_DIFFERENCE": f"{max(run['largest_difference_of_mean'] for run in newton['runs']):.0e}",
        "NEWTON_STEPS": str(newton["runs"][0]["steps"]),
        "NEWTON_COMMAND": newton["environment"]["command"],
        "ESTIMATORS": markdown("estimators"),
        "ESTIMATORS_WHERE": where(read("estimators")),
    }
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    write_text(DOCS / "results.md", template)
    put(DOCS.parent / "README.md", families(on_mlp, README_METHODS))
    for suite in ("quick", "full"):
        records = load_records(RESULTS / suite)
        put(DOCS / "claims.md", suite_table(records), f"<!-- suite {suite} -->")
        put(DOCS / "claims.md", claims_table(records), f"<!-- claims {suite} -->")
    put(DOCS.parent / "README.md", suite_table(load_records(RESULTS / "quick")), "<!-- suite quick -->")
    put(DOCS / "landscape.md", optima_table(), "<!-- optima -->")
    put(DOCS / "landscape.md", widths_table(), "<!-- widths -->")
    speed = f"{markdown('retraining_speed')}\n\n{where(read('retraining_speed'))}"
    put(DOCS / "landscape.md", speed, "<!-- speed -->")
    put(DOCS / "robustness.md", robustness_tables(), "<!-- robustness -->")
    put(DOCS / "privacy.md", privacy_tables(), "<!-- privacy -->")
    put(DOCS / "guarantees.md", guarantee_tables(), "<!-- guarantees -->")
    for mark, text in (("faults", faults_table()), ("large trunk", large_trunk_table()), ("scaling", scaling_tables())):
        put(DOCS / "distributed.md", text, f"<!-- {mark} -->")
    for name, picture in (("robustness", robustness_picture()), ("far_field", far_field_picture())):
        if picture is not None:
            save_figure(picture, DOCS / "figures" / f"{name}.png", dpi=100)
    put(DOCS / "any-network.md", f"{markdown('architectures')}\n\n{where(read('architectures'))}")


def put(page: Path, text: str, mark: str = BEGIN) -> None:
    """Put a text between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(mark)
    _, after = rest.split(END, 1)
    write_text(page, f"{before}{mark}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
