"""numpy archives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stfbnn.data import load
from stfbnn.errors import DataError

X, Y = np.arange(12.0).reshape(4, 3), np.array([1, 0, 1, 0])


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("names", "test"),
    [
        (("x_train", "y_train", "x_test", "y_test"), True),
        (("X_train", "Y_train", "X_test", "Y_test"), True),
        (("train_images", "train_labels", "test_images", "test_labels"), True),
        (("x", "y"), False),
        (("inputs", "targets"), False),
        (("data", "target"), False),
    ],
)
def test_names(tmp_path, names, test):
    arrays = [X, Y, X[:2], Y[:2]][: len(names)]
    np.savez(tmp_path / "set.npz", other=np.zeros(2), **dict(zip(names, arrays, strict=True)))
    for source in (tmp_path / "set.npz", tmp_path):
        found = load(source)
        assert found.kind == "npz"
        np.testing.assert_array_equal(found.train.inputs, X)
        assert found.train.targets.tolist() == Y.tolist()
        assert (found.test is not None) == test
        if test:
            np.testing.assert_array_equal(found.test.inputs, X[:2])


def test_without_targets(tmp_path):
    np.savez(tmp_path / "set.npz", x=X)
    assert load(tmp_path / "set.npz").train.targets is None


def kmnist(folder: Path, parts=("train", "test")) -> Path:
    for part in parts:
        np.savez(folder / f"kmnist-{part}-imgs.npz", np.zeros((4, 2, 2), np.uint8))
        np.savez(folder / f"kmnist-{part}-labels.npz", Y.astype(np.uint8))
    return folder


def test_one_array_a_file(tmp_path):
    found = load(kmnist(tmp_path))
    assert found.input_shape == (1, 2, 2)
    assert len(found.train) == len(found.test) == 4
    (tmp_path / "kmnist-train-imgs.npz").unlink()
    alone = load(tmp_path)
    assert alone.test is None
    assert alone.train.targets.tolist() == Y.tolist()


def test_errors_of_one_array_a_file(tmp_path):
    kmnist(tmp_path)
    np.savez(tmp_path / "kmnist-train-labels.npz", Y[:3])
    with pytest.raises(DataError, match="4 examples and 3 targets"):
        load(tmp_path)
    np.savez(tmp_path / "kmnist-train-labels.npz", a=Y, b=Y)
    with pytest.raises(DataError, match="must hold one array"):
        load(tmp_path)
    (tmp_path / "kmnist-train-labels.npz").unlink()
    with pytest.raises(DataError, match=r"looked for kmnist-train-labels\.npz"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"weights": X}, r"no inputs.*weights \(4, 3\)"),
        ({"y": Y}, "targets but no inputs"),
        ({"x": X, "inputs": X}, "several arrays"),
        ({"x": X, "y": Y[:2]}, "4 examples and 2 targets"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
    ],
)
def test_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "set.npz")


def test_code_in_a_file_is_never_run(tmp_path):
    flag = tmp_path / "flag"
    np.savez(tmp_path / "set.npz", x=X, y=np.array([Bomb(flag)], dtype=object))
    with pytest.raises(DataError, match="never loaded"):
        load(tmp_path / "set.npz")
    assert not flag.exists()


def test_damage(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, x=X, y=Y)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"set\.npz"):
            load(path)
    np.save(tmp_path / "a.npy", X)
    path.write_bytes((tmp_path / "a.npy").read_bytes())
    with pytest.raises(DataError, match=r"no \.npz archive"):
        load(path)


def test_several_files_without_a_name(tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", x=X)
    with pytest.raises(DataError, match=r"a\.npz, b\.npz"):
        load(tmp_path)
