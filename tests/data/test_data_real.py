"""Known facts of real data sets."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from stfbnn.data import data_root, load, recognise

pytestmark = pytest.mark.data

IN_TEN = tuple(str(label) for label in range(10))


@pytest.fixture(autouse=True)
def _root():
    if data_root() is None:
        pytest.skip("the environment variable STFBNN_DATA does not name a data root")


@pytest.mark.parametrize(
    ("name", "first", "mean", "std", "zeros"),
    [
        # Mean and standard deviation as everybody quotes them for these sets.
        ("mnist", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], 0.1307, 0.3081, 5923),
        ("fashion-mnist", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], 0.2860, 0.3530, 6000),
    ],
)
def test_idx(name, first, mean, std, zeros):
    found = load(name)
    assert (found.kind, found.classes, found.input_shape) == ("idx", IN_TEN, (1, 28, 28))
    assert (len(found.train), len(found.test)) == (60_000, 10_000)
    assert found.train.targets[:10].tolist() == first
    assert int((found.train.targets == 0).sum()) == zeros
    assert found.mean.item() == pytest.approx(mean, abs=5e-5)
    assert found.std.item() == pytest.approx(std, abs=5e-5)


def test_kmnist():
    found = load("kmnist-test")
    assert (found.kind, found.input_shape, found.test) == ("npz", (1, 28, 28), None)
    assert found.train.targets.bincount().tolist() == [1000] * 10
    assert found.train.targets[:5].tolist() == [2, 9, 3, 8, 3]


def test_cifar():
    pytest.importorskip("pyarrow")
    pytest.importorskip("PIL")
    found = load("cifar10-jpeg", limit=100)
    assert (found.kind, found.classes, found.input_shape) == ("parquet", IN_TEN, (3, 32, 32))
    assert (len(found.train), len(found.test)) == (100, 100)
    # The original order: frog, truck, truck, deer, car; cat, ship, ship, plane, frog.
    assert found.train.targets[:5].tolist() == [6, 9, 9, 4, 1]
    assert found.test.targets[:5].tolist() == [3, 8, 8, 0, 6]
    # The first original pixel is (59, 62, 63); JPEG comes near it.
    np.testing.assert_allclose(found.train.stored[0, :, 0, 0], [59, 62, 63], atol=15)


@pytest.mark.parametrize(
    ("name", "rows", "features"),
    [
        ("bostonHousing", 506, 13),
        ("concrete", 1030, 8),
        ("energy", 768, 8),
        ("power-plant", 9568, 4),
        ("wine-quality-red", 1599, 11),
        ("yacht", 308, 6),
    ],
)
def test_uci(name, rows, features):
    path = f"uci-gal-splits/{name}"
    assert recognise(path) == "uci"
    seen = set()
    for split in (0, 19):
        found = load(path, split=split)
        assert (found.task, found.input_shape) == ("regression", (features,))
        assert len(found.train) + len(found.test) == rows
        assert len(found.test) == pytest.approx(rows / 10, abs=1)
        seen.add(hashlib.sha256(found.test.stored.numpy().tobytes()).hexdigest())
    assert len(seen) == 2
