"""Recognising, and the way in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stfbnn.data import data_root, load, recognise
from stfbnn.errors import DataError, InputError


@pytest.fixture(autouse=True)
def _no_root(monkeypatch):
    monkeypatch.delenv("STFBNN_DATA", raising=False)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["train-images-idx3-ubyte.gz", "README.md"], "idx"),
        (["t10k-labels.idx1-ubyte"], "idx"),
        (["train.parquet", "test.parquet"], "parquet"),
        (["a.npz"], "npz"),
        (["train.csv", "notes.txt"], "csv"),
        (["a.TSV"], "csv"),
        (["data.txt", "index_train_0.txt"], "uci"),
        (["cat/1.png", "README.md"], "image-folder"),
        (["train/cat/1.JPG"], "image-folder"),
        (["1.png"], "image-folder"),
    ],
)
def test_recognise_folders(tmp_path, files, kind):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert recognise(tmp_path) == kind


@pytest.mark.parametrize(
    ("name", "kind"), [("a.npz", "npz"), ("a.parquet", "parquet"), ("a.csv", "csv"), ("a.TSV", "csv")]
)
def test_recognise_files(tmp_path, name, kind):
    (tmp_path / name).touch()
    assert recognise(tmp_path / name) == kind


def test_recognise_errors(tmp_path):
    with pytest.raises(DataError, match=r"no file or folder .*nowhere.*STFBNN_DATA"):
        recognise(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds nothing\. Supported are idx: .*uci: "):
        recognise(tmp_path)
    (tmp_path / "data.txt").touch()
    with pytest.raises(DataError, match=r"holds data\.txt\. Supported"):
        recognise(tmp_path)
    with pytest.raises(DataError, match=r"has the suffix '\.txt'"):
        recognise(tmp_path / "data.txt")
    for name in ("a.csv", "a.npz"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="may be any of npz, csv; say which with kind="):
        recognise(tmp_path)


def test_kind_may_be_said(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n")
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
    assert load(tmp_path, "csv").kind == "csv"
    assert load(tmp_path, kind="npz").kind == "npz"


def test_data_root(tmp_path, monkeypatch):
    assert data_root() is None
    monkeypatch.setenv("STFBNN_DATA", str(tmp_path))
    assert data_root() == tmp_path
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
    assert len(load("a.npz").train) == 3
    with pytest.raises(DataError, match=rf"no file or folder nowhere or {tmp_path}/nowhere$"):
        load("nowhere")
    monkeypatch.setenv("STFBNN_DATA", str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match="no folder"):
        data_root()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "hdf5"}, "kind must be one of 'idx'"),
        ({"kind": "npz", "target": "y"}, "'npz' has no option target; it knows limit, task"),
        ({"split": 1}, "no option split"),
        ({"image_size": 3}, "no option image_size"),
        ({"cache_dir": "x"}, "no option cache_dir"),
        ({"split": -1}, "split must be"),
        ({"task": "ranking"}, "task must be"),
        ({"limit": 0}, "limit must be"),
        ({"image_size": (0, 3)}, "image_size must be"),
        ({"image_size": (1, 2, 3)}, "image_size must be"),
    ],
)
def test_options_are_checked(tmp_path, options, said):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
    with pytest.raises(InputError, match=said):
        load(tmp_path / "a.npz", **options)


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").touch()
    with pytest.raises(DataError, match="give the folder"):
        load(tmp_path / "train-images-idx3-ubyte", "idx")


def test_digits():
    from sklearn.datasets import load_digits

    found = load("digits")
    assert (found.kind, found.input_shape, len(found.classes)) == ("digits", (1, 8, 8), 10)
    assert (len(found.train), len(found.test)) == (1438, 359)
    original = load_digits()
    assert found.train.inputs.max() == 1
    ours = torch.cat([found.train.inputs, found.test.inputs]).flatten(1).numpy() * 16
    targets = torch.cat([found.train.targets, found.test.targets]).numpy()
    rows = sorted(map(tuple, np.column_stack([ours, targets]).astype(int).tolist()))
    assert rows == sorted(map(tuple, np.column_stack([original.data, original.target]).astype(int).tolist()))
    for label in range(10):
        share = (original.target == label).sum() * 359 / 1797
        assert abs(int((found.test.targets == label).sum()) - share) < 1
    again = load("digits", limit=10)
    assert torch.equal(again.test.stored, found.test.stored[:10])
    with pytest.raises(InputError, match="'digits' has no option task"):
        load("digits", task="regression")
