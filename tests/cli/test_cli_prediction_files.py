"""Prediction files: every kind says the same, and none appears half-written."""

import csv
import json

import numpy as np
import pytest
import torch

from stfbnn.cli import prediction_files
from stfbnn.errors import InputError
from stfbnn.predictive import CategoricalPrediction, GaussianPrediction


@pytest.fixture
def classes():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    probs = logits.softmax(2)
    return CategoricalPrediction(2, False, probs.mean(0).log(), -(probs * probs.log()).sum(2).mean(0))


def read(path):
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [row[name] for row in rows] for name in rows[0]}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: [row[name] for row in rows] for name in rows[0]}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name].tolist() for name in archive.files}
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(path).to_pydict()


@pytest.mark.parametrize("suffix", prediction_files.SUFFIXES)
def test_all_kinds_hold_the_same_classes_and_exact_numbers(suffix, classes, tmp_path):
    names = ("cat, big", "dog", "größer")
    path = tmp_path / f"out{suffix}"
    prediction_files.write(prediction_files.columns_of(classes, names), path)
    found = read(path)
    assert list(found) == [
        "class",
        "confidence",
        "entropy",
        "aleatoric",
        "epistemic",
        *(f"probability_{name}" for name in names),
    ]
    assert found["class"] == [names[index] for index in classes.labels]
    for name, values in (
        ("confidence", classes.confidence),
        ("entropy", classes.entropy),
        ("aleatoric", classes.aleatoric),
        ("epistemic", classes.epistemic),
        ("probability_dog", classes.probs[:, 1]),
    ):
        assert [float(value) for value in found[name]] == values.tolist()


def test_numbers_have_their_uncertainty_in_the_targets_unit():
    draws = torch.tensor([[[1.0, 10.0], [2.0, 20.0]], [[3.0, 10.0], [2.0, 26.0]]])
    columns = prediction_files.columns_of(GaussianPrediction(2, False, draws, torch.tensor([0.5, 4.0])), None)
    assert columns["mean_0"].tolist() == [2.0, 2.0]
    assert columns["epistemic_std_0"].tolist() == [1.0, 0.0]
    assert columns["epistemic_std_1"].tolist() == [0.0, 3.0]
    assert columns["aleatoric_std_1"].tolist() == [4.0, 4.0]
    assert columns["std_1"].tolist() == [4.0, 5.0]
    single = GaussianPrediction(2, False, draws[:, :, :1], torch.tensor(0.5))
    assert list(prediction_files.columns_of(single, None)) == ["mean", "std", "aleatoric_std", "epistemic_std"]


def test_unknown_suffixes_and_predictions_of_positions_are_refused(tmp_path):
    with pytest.raises(InputError, match="must end in"):
        prediction_files.check_suffix(tmp_path / "out.xls")
    with pytest.raises(InputError, match="several positions"):
        prediction_files.columns_of(CategoricalPrediction(1, True, torch.zeros(2, 3, 4), torch.zeros(2, 4)), None)


def test_a_failed_write_leaves_the_old_file(classes, tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    path.write_text("old")
    columns = prediction_files.columns_of(classes, None)

    def fails(columns):
        yield ("half", "a row")
        raise OSError("no space left")

    monkeypatch.setattr(prediction_files, "_rows", fails)
    with pytest.raises(OSError, match="no space"):
        prediction_files.write(columns, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]
