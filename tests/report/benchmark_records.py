"""Made-up records of a benchmark, with all that a report can be asked to show."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from stfbnn.benchmark.records import Candidate, Cost, Record, Row
from stfbnn.report.html.content import Comparison, MethodRow, Ranking
from stfbnn.report.verdicts import Claim

SEEDS = (0, 1, 2)
METHODS = ("network", "deep ensemble", "full-bnn", "stf-bnn", "stf-bnn mixture")
SPEND = {"network": 0.0, "deep ensemble": 3.0, "full-bnn": 9.1, "stf-bnn": 0.21, "stf-bnn mixture": 0.9}
SHARP = {"network": 3.2, "deep ensemble": 1.5, "full-bnn": 1.9, "stf-bnn": 1.25, "stf-bnn mixture": 1.15}
COMMAND = "stfbnn benchmark quick --out results"
CLAIMS = (
    Claim("The first layer alone gives calibrated predictions.", "holds", "ECE .012 instead of .054.", "On all tasks."),
    Claim(
        "Training takes 10 % more time.",
        "holds in part",
        "8 % at a given T, 21 % with the search.",
        "The search counts.",
    ),
    Claim(
        "Foreign examples are told better.", "does not hold here", "AUROC .84 against .85.", "The ensemble is as good."
    ),
    Claim("It scales to ImageNet.", "not measured", "No machine for it."),
)


def records(tasks: tuple[str, ...] = ("digits", "fashion-mlp")) -> list[Record]:
    """Three seeds of five methods on classification tasks, with one regression; one method fails on the last task."""
    found = []
    for place, task in enumerate(tasks):
        for seed in SEEDS:
            for method in METHODS:
                failed = place == len(tasks) - 1 and method == "full-bnn"
                found.append(failure(task, seed, method) if failed else classification(task, seed, method))
    return [*found, *(regression("concrete", seed, method) for seed in SEEDS for method in METHODS[:1] + METHODS[3:4])]


def classification(task: str, seed: int, method: str) -> Record:
    """One record with all its curves."""
    rng = np.random.default_rng([seed, *task.encode(), *method.encode()])
    return Record(
        task=task,
        kind="classification",
        seed=seed,
        method=method,
        environment={"command": COMMAND, "torch": "2.13.0", "threads": 1},
        settings={"network": "MLP", "epochs": 25},
        candidates=(Candidate({"scale": 0.1}, 0.4, 0.3, 1.4, 2.0), Candidate({"scale": 1.0}, 0.5, 0.35, 1.5, 2.0)),
        chosen=(0, 1),
        cost=cost(method, rng),
        raw=row(rng, SHARP[method], method != "network", None),
        scaled=row(rng, 1.0 + 0.1 * SHARP[method], method != "network", 1.0 + 0.4 * SHARP[method]),
    )


def regression(task: str, seed: int, method: str) -> Record:
    """One record of a regression, without curves."""
    rng = np.random.default_rng([seed, *method.encode()])
    metrics = {
        "count": 103.0,
        "mean_log_density": -3.1 - 0.1 * SHARP[method] + 0.03 * rng.standard_normal(),
        "rmse": 5.0 + 0.2 * rng.standard_normal(),
        "crps": 2.7,
        "sharpness": 5.1,
        "coverage_50": 0.52,
        "coverage_90": 0.88,
        "coverage_95": None if method == "network" and seed == 1 else 0.94,
    }
    return Record(task, "regression", seed, method, {"command": COMMAND}, {}, cost=cost(method, rng), raw=Row(metrics))


def failure(task: str, seed: int, method: str) -> Record:
    """One record without figures."""
    reason = "the library it needs is not installed"
    return Record(task, "classification", seed, method, {"command": COMMAND}, {}, failed=reason)


def cost(method: str, rng: np.random.Generator) -> Cost:
    """What a method took."""
    stage_one = 40 + rng.random()
    spent = SPEND[method] * stage_one * (1 + 0.03 * rng.standard_normal())
    members = 4 if method == "deep ensemble" else 1
    peak = {"network": 10_000_000, "full-bnn": 21_000_000}.get(method, 5_600_000)
    return Cost(
        stage_one, spent, 1.4 * spent, 0.02 * members, float(members), peak, 203_530 * members, 814_120 * members
    )


def row(rng: np.random.Generator, sharp: float, samples: bool, tau: float | None) -> Row:
    """All figures of a classifier whose logits are ``sharp`` times what they should be."""
    edges = np.linspace(0, 1, 16)
    centres = (edges[:-1] + edges[1:]) / 2
    counts = np.floor(1000 * centres ** (1 + sharp))
    accuracies = np.clip(centres - 0.11 * (sharp - 1.2) * np.sin(np.pi * centres), 0.02, 1)
    filled = counts > 0
    ece = float((np.abs(centres - accuracies) * counts).sum() / counts.sum()) + 0.001 * rng.random()
    accuracy = 0.90 + 0.004 * rng.standard_normal()
    metrics = {
        "count": 1000.0,
        "accuracy": accuracy,
        "nll": 0.27 + 0.05 * sharp + 0.006 * rng.standard_normal(),
        "brier": 0.14 + 0.01 * sharp,
        "ece": ece,
        "adaptive_ece": ece * 1.1,
        "classwise_ece": ece / 5,
        "aurc": 0.014 + 0.002 * sharp,
    }
    scores = ("entropy", "confidence", "epistemic") if samples else ("entropy", "confidence")
    ood = {
        name: {score: foreign(rng, base - 0.02 * sharp) for score in scores}
        for name, base in (("letters", 0.88), ("noise", 0.97))
    }
    shift = {
        name: [
            {
                "nll": metrics["nll"] + step * sharp * 0.11 * rate,
                "accuracy": accuracy - 0.09 * step * rate,
                "ece": ece * step,
            }
            for step in range(1, 6)
        ]
        for name, rate in (("gaussian noise", 1.0), ("rotation", 1.4))
    }
    coverage = np.linspace(0.01, 1, 100)
    risk = (1 - accuracy) * coverage ** (2.5 - 0.3 * sharp)
    bins = np.linspace(0, math.log(10), 31)
    middle = (bins[:-1] + bins[1:]) / 2
    entropies = {
        "edges": bins.tolist(),
        "test": np.floor(900 * np.exp(-middle * 1.2 * sharp)).tolist(),
        "letters": np.floor(300 * np.exp(-((middle - 1.7 + 0.3 * sharp) ** 2) / 0.35)).tolist(),
        "noise": np.floor(300 * np.exp(-((middle - 2.2 + 0.3 * sharp) ** 2) / 0.1)).tolist(),
    }
    return Row(
        metrics=metrics,
        tau=tau,
        ood=ood,
        shift=shift,
        reliability={
            "edges": edges.tolist(),
            "confidences": [float(one) if some else None for one, some in zip(centres, filled, strict=True)],
            "accuracies": [float(one) if some else None for one, some in zip(accuracies, filled, strict=True)],
            "counts": counts.tolist(),
        },
        risk_coverage={"coverage": coverage.tolist(), "risk": risk.tolist()},
        entropies=entropies,
        abstention={
            "target_risk": 0.05,
            "confidence_level": 0.9,
            "threshold": None if sharp > 3 else 0.8,
            "coverage": 0.0 if sharp > 3 else 0.9 - 0.03 * sharp,
            "risk": None if sharp > 3 else 0.044 + 0.002 * rng.standard_normal(),
        },
    )


def foreign(rng: np.random.Generator, base: float) -> dict[str, float]:
    """How well a score tells a foreign set."""
    auroc, aupr, missed = base + 0.004 * rng.standard_normal(3)
    return {"auroc": auroc, "aupr": aupr - 0.05, "fpr_at_95_tpr": 1.1 - missed}


def comparison() -> Comparison:
    """Marks on one line of one task, and one ranking."""

    def mark(task: str, metric: str) -> set[MethodRow]:
        marked = {
            ("digits", "nll"): {MethodRow("stf-bnn mixture", True)},
            ("digits", "ood/letters/entropy/auroc"): {MethodRow("stf-bnn")},
        }
        return marked.get((task, metric), set())

    ranks = {"network": 4.6, "full-bnn": 3.5, "deep ensemble": 2.4, "stf-bnn": 2.3, "stf-bnn mixture": 2.2}
    cliques = [{"stf-bnn mixture", "stf-bnn", "deep ensemble", "full-bnn"}, {"full-bnn", "network"}]
    ranking = Ranking("NLL", ranks, 1.5, cliques, 7, "Friedman test, then Nemenyi's at .05.")
    return Comparison(
        mark, "Bold: significantly better than the network, paired t-test with Holm's correction, .05.", [ranking]
    )


HOSTILE = "</script><script>hacked=1</script><img src=x onerror=hacked=2><!-- \"a\" 'b' &amp; | `c` **d** ${e} \u202e"


def hostile() -> list[Record]:
    """Records whose every text tries to break out of where it is shown."""
    found = []
    for seed in (0, 1):
        network = classification("digits", seed, "network")
        ours = dataclasses.replace(
            classification("digits", seed, "stf-bnn"),
            method=HOSTILE,
            notes={HOSTILE: HOSTILE},
            candidates=(Candidate({HOSTILE: HOSTILE}, 0.4, 0.3, 1.4, 2.0),),
            chosen=(0, 0),
        )
        broken = failure("digits", seed, f"broken {HOSTILE}")
        for record in (network, ours, dataclasses.replace(broken, failed=HOSTILE)):
            settings, environment = {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE, "command": HOSTILE}
            found.append(dataclasses.replace(record, task=HOSTILE, settings=settings, environment=environment))
    rows = {"raw": found[1].raw, "scaled": found[1].scaled}
    for name, one in rows.items():
        assert one is not None
        ood = {HOSTILE: {HOSTILE: {"auroc": 0.5, "aupr": 0.5, "fpr_at_95_tpr": 0.5}}}
        shift = {HOSTILE: one.shift["rotation"], "rotation": one.shift["rotation"]}
        metrics = {**one.metrics, HOSTILE: 0.5}
        entropies = {**one.entropies, HOSTILE: one.entropies["noise"]}
        rows[name] = dataclasses.replace(one, ood=ood, shift=shift, metrics=metrics, entropies=entropies)
    found[1] = dataclasses.replace(found[1], **rows)
    return found


def hostile_statistics() -> tuple[list[Claim], Comparison]:
    """The same for what comes beside the records."""
    ranking = Ranking(HOSTILE, {HOSTILE: 1.0, "network": 2.0}, 0.5, [{HOSTILE, "network"}], 2, HOSTILE)
    return [Claim(HOSTILE, "holds", HOSTILE, HOSTILE)], Comparison(rule=HOSTILE, rankings=[ranking])
