"""What one method came to on one task and seed: the unit in which results are kept, resumed, compared and shown.

Every record is a JSON file of its own, ``DIR/records/TASK/SEED/METHOD.json``; the report and the statistics read nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stfbnn.errors import DataError
from stfbnn.files import plain, write_text

SCHEMA = 2
"""Raised where older records can no longer be read."""

Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Candidate:
    """One setting of a method's hyper-parameters.

    Attributes:
        setting: The hyper-parameters.
        held_out_nll: Mean negative log density of the held-out examples, in nats; None where only that with a temperature was
            looked at.
        held_out_nll_scaled: The same with the best predictive temperature; None for a regression.
        tau: That temperature; None for a regression.
        seconds: That it took.
    """

    setting: Mapping[str, Any]
    held_out_nll: float | None
    held_out_nll_scaled: float | None
    tau: float | None
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What a method takes, measured in the run that gave the figures.

    Attributes:
        stage_one_seconds: Of the one network that everything starts from, at its chosen setting.
        seconds: What the method takes after that at its chosen setting; 0 for the network itself. A method that trains
            networks of its own needs no stage one, but it is compared by what it takes beyond having one network.
        search_seconds: The same for all settings that were tried.
        predict_seconds: For 1,000 inputs.
        predict_ratio: The same over the network's, measured alternately.
        peak_bytes: Most bytes of tensors alive in one step of its training, parameters and optimiser included; None where it
            has no steps.
        trainable_parameters: Numbers that it learns, all members together.
        artifact_bytes: On disk, what has to be kept to predict, the network itself apart.
    """

    stage_one_seconds: float
    seconds: float
    search_seconds: float
    predict_seconds: float
    predict_ratio: float
    peak_bytes: int | None
    trainable_parameters: int
    artifact_bytes: int


@dataclass(frozen=True)
class Row:
    """The figures of one method, raw or with a predictive temperature.

    Attributes:
        metrics: Figures on the test data by name, those of ``evaluation`` and ``aurc``; None where one is not finite.
        tau: The predictive temperature; None for raw and for a regression.
        ood: For each foreign set and each score ("entropy", "epistemic", "confidence") auroc, aupr and fpr_at_95_tpr.
        shift: For each corruption five mappings of figures, by severity 1 to 5.
        reliability: ``edges``, ``confidences``, ``accuracies`` (None where a bin is empty) and ``counts``; empty for a
            regression.
        risk_coverage: ``coverage`` and ``risk``, at most 101 points of each; empty for a regression.
        entropies: Histograms: ``edges``, then counts under ``test`` and under each foreign set; empty for a regression.
        abstention: ``target_risk``, ``confidence_level``, ``threshold`` (None where no threshold is valid), all from one half
            of the test data, and on the other half ``coverage``, ``risk`` (None where nothing is answered) and
            ``risk_of_all``; empty where there is no such rule.
    """

    metrics: Mapping[str, float | None]
    tau: float | None = None
    ood: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    shift: Mapping[str, list[Mapping[str, float]]] = field(default_factory=dict)
    reliability: Mapping[str, list[float | None]] = field(default_factory=dict)
    risk_coverage: Mapping[str, list[float]] = field(default_factory=dict)
    entropies: Mapping[str, list[float]] = field(default_factory=dict)
    abstention: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One method on one task and seed.

    Attributes:
        task: Name of the task.
        kind: What the targets are.
        seed: Of the division of the data, of stage one and of the method.
        method: Name of the method.
        environment: Hardware, versions and command.
        settings: What the task and its suite fix for every method.
        candidates: What was tried.
        chosen: Which of the candidates the raw row shows, and which the scaled one; None where the method failed.
        cost: What it takes; None where it failed.
        raw: The figures as the method gives them; None where it failed.
        scaled: The same with a predictive temperature; None for a regression too.
        failed: Why there are no figures: a library that is not there, an error; None where there are.
        notes: What else the method says of itself.
        course: Runs of several lengths at the chosen setting, that of the usual length among them, the shortest first: how good
            the method is after how much time. Empty where that is not measured.
    """

    task: str
    kind: Kind
    seed: int
    method: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    candidates: tuple[Candidate, ...] = ()
    chosen: tuple[int, int | None] | None = None
    cost: Cost | None = None
    raw: Row | None = None
    scaled: Row | None = None
    failed: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    course: tuple[Candidate, ...] = ()

    def save(self, folder: Path) -> Path:
        """Write the record under ``folder``, atomically, and return its file."""
        path = record_path(folder, self.task, self.seed, self.method)
        content = {"schema": SCHEMA, **plain(dataclasses.asdict(self))}
        # On one line: a suite has hundreds of records, most of them lists of numbers.
        write_text(path, json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")
        return path


def record_path(folder: Path, task: str, seed: int, method: str) -> Path:
    """Where a record is kept."""
    return folder / "records" / task / str(seed) / f"{method}.json"


def load_record(path: Path) -> Record:
    """Read one record.

    Raises:
        DataError: The file is damaged or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise DataError(f"{path} has another schema than {SCHEMA}: run that task again")
        for name, cls in (("cost", Cost), ("raw", Row), ("scaled", Row)):
            if content[name] is not None:
                content[name] = cls(**content[name])
        for name in ("candidates", "course"):
            content[name] = tuple(Candidate(**one) for one in content[name])
        content["chosen"] = None if content["chosen"] is None else tuple(content["chosen"])
        return Record(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no record of a benchmark ({error}): delete it and run that task again") from error


def load_records(folder: Path) -> list[Record]:
    """Read all records under a folder, ordered by task, seed and method.

    Raises:
        DataError: There are none, or one is damaged.
    """
    found = [load_record(path) for path in sorted((folder / "records").glob("*/*/*.json"))]
    if not found:
        raise DataError(f"{folder} holds no records of a benchmark (records/TASK/SEED/METHOD.json)")
    return sorted(found, key=lambda one: (one.task, one.seed, one.method))


def succeeded(records: Iterable[Record]) -> list[Record]:
    """Those that have figures."""
    return [record for record in records if record.raw is not None]
