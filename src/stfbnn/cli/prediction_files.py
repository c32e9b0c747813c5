"""Predictions as files: one row an example, in csv, JSON lines, parquet or a numpy archive."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.files import atomic_path
from stfbnn.predictive import (
    BernoulliPrediction,
    CategoricalPrediction,
    CustomPrediction,
    GaussianPrediction,
    HeteroscedasticPrediction,
    PoissonPrediction,
    Prediction,
)

SUFFIXES = (".csv", ".jsonl", ".parquet", ".npz")
# The columns whose means are worth a line.
SUMMARISED = ("probability", "confidence", "entropy", "aleatoric", "epistemic", "std")

Columns = dict[str, NDArray[Any]]


def check_suffix(path: Path) -> None:
    """Refuse a file whose kind is not known, or cannot be written here, before anything long begins.

    Raises:
        InputError: Says what is known.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--output must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, but it is {str(path)!r}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise InputError("writing parquet needs pyarrow: pip install 'stfbnn[data]'; or write .csv") from error


def columns_of(prediction: Prediction, classes: Sequence[str] | None) -> Columns:
    """A prediction as named columns of equal length.

    Args:
        prediction: One class, or one or more labels, numbers or counts, an example.
        classes: Names of the classes; None for their numbers.

    Raises:
        InputError: The prediction has several positions an example, or is one of a custom likelihood.
    """
    if isinstance(prediction, CategoricalPrediction) and prediction.log_probs.ndim == 2:
        probs = prediction.probs.numpy()
        names = list(classes) if classes is not None else [str(index) for index in range(probs.shape[1])]
        return {
            "class": np.array(names)[prediction.labels.numpy()],
            "confidence": prediction.confidence.numpy(),
            "entropy": prediction.entropy.numpy(),
            "aleatoric": prediction.aleatoric.numpy(),
            "epistemic": prediction.epistemic.numpy(),
            **{f"probability_{name}": probs[:, index] for index, name in enumerate(names)},
        }
    if isinstance(prediction, BernoulliPrediction) and prediction.aleatoric.ndim <= 2:
        figures = {
            "label": prediction.labels,
            "probability": prediction.probs,
            "entropy": prediction.entropy,
            "aleatoric": prediction.aleatoric,
            "epistemic": prediction.epistemic,
        }
        return _numbered(figures)
    numbers = GaussianPrediction | HeteroscedasticPrediction | PoissonPrediction
    if isinstance(prediction, numbers) and prediction.mean.ndim <= 2:
        figures = {
            "mean": prediction.mean,
            "std": prediction.std,
            "aleatoric_std": prediction.aleatoric.sqrt(),
            "epistemic_std": prediction.epistemic.sqrt(),
        }
        return _numbered(figures)
    if isinstance(prediction, CustomPrediction):
        raise InputError("predictions of a custom likelihood have no table; use stfbnn.predict from Python")
    raise InputError("predictions with several positions an example have no table; use stfbnn.predict from Python")


def write(columns: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write columns to a file that appears whole or not at all.

    Raises:
        InputError: The suffix is not known.
    """
    check_suffix(path)
    kind = path.suffix.lower()
    with atomic_path(path) as temporary:
        if kind == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(_rows(columns))
        elif kind == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                for row in _rows(columns):
                    file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
        elif kind == ".npz":
            with temporary.open("wb") as stream:
                arrays: dict[str, Any] = dict(columns)
                np.savez(stream, **arrays)
        else:
            _write_parquet(columns, temporary)


def _numbered(figures: Mapping[str, Tensor]) -> Columns:
    """One column for each figure, or one for each of the columns that it has."""
    columns: Columns = {}
    for name, values in figures.items():
        table = values.reshape(len(values), -1).numpy()
        for index in range(table.shape[1]):
            columns[name if table.shape[1] == 1 else f"{name}_{index}"] = table[:, index]
    return columns


def _rows(columns: Mapping[str, NDArray[Any]]) -> Any:
    # Plain Python values: the shortest decimals that give the same float again.
    return zip(*(values.tolist() for values in columns.values()), strict=True)


def _write_parquet(columns: Mapping[str, NDArray[Any]], path: Path) -> None:
    import pyarrow as pa  # noqa: PLC0415 - optional
    import pyarrow.parquet as pq  # noqa: PLC0415 - optional

    pq.write_table(pa.table({name: pa.array(values.tolist()) for name, values in columns.items()}), path)
