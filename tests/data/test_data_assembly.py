"""Arrays to data sets: pixels, labels, tasks, statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stfbnn.data.assembly import assemble, statistics
from stfbnn.data.source import Options, Part
from stfbnn.errors import DataError

RNG = np.random.default_rng(0)


def table(targets, rows=None, test_targets=None, **options):
    values = RNG.normal(size=(len(targets) if rows is None else rows, 3))
    test = None
    if test_targets is not None:
        test = Part(values[: len(test_targets)], np.asarray(test_targets), "the test part")
    return assemble("npz", Part(values, np.asarray(targets), "the table"), test, Options(**options))


def images(array, targets=None):
    return assemble("npz", Part(np.asarray(array), targets, "the images"), None, Options())


def test_statistics_are_those_of_numpy_per_channel():
    pixels = RNG.integers(0, 256, (3000, 3, 5, 4), dtype=np.uint8)
    mean, std = statistics(torch.from_numpy(pixels))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 2, 3)), rtol=1e-6)


def test_statistics_of_columns_with_an_offset_and_without_variance():
    rounded = np.where(np.arange(5001) % 2, np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1)))
    values = np.float32(np.stack([RNG.normal(1e4, 1, 5001), np.full(5001, 0.1), np.zeros(5001), rounded], 1))
    mean, std = statistics(torch.from_numpy(values))
    np.testing.assert_allclose(mean, values.astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, [values[:, 0].astype(float).std(), 1, 1, 1], rtol=1e-6)


def test_statistics_come_from_training_alone():
    train, test = np.zeros((4, 2)), np.full((2, 2), 100.0)
    found = assemble("npz", Part(train, None, "train"), Part(test, None, "test"), Options())
    assert found.mean.tolist() == [0, 0]
    assert found.task == "unlabelled"
    assert found.input_shape == (2,)


def test_layouts_of_images():
    grey, first, last = np.zeros((2, 5, 6)), np.zeros((2, 3, 5, 6)), np.zeros((2, 5, 6, 3))
    assert images(grey).input_shape == (1, 5, 6)
    assert images(first).input_shape == (3, 5, 6)
    assert images(last).input_shape == (3, 5, 6)
    # Both orders are possible: torch's own is taken.
    assert images(np.zeros((2, 3, 3, 3))).input_shape == (3, 3, 3)
    assert images(np.zeros((2, 16, 5, 6))).input_shape == (16, 5, 6)
    pixels = RNG.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images(pixels).train.stored, np.moveaxis(pixels, 3, 1))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[[0, 255]]], np.uint8), [0.0, 1.0]),
        (np.array([[[0, 51]]], np.int64), [0.0, 0.2]),
        (np.array([[[False, True]]]), [0.0, 1.0]),
        (np.array([[[0.25, 0.5]]]), [0.25, 0.5]),
    ],
)
def test_pixels_are_scaled_by_their_type(array, expected):
    assert images(array).train.inputs.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((1, 2, 2), 255.0), "floats from 0 to 1"),
        (np.full((1, 2, 2), -1), "from 0 to 255|integers from 0"),
        (np.full((1, 2, 2), 256), "integers from 0"),
        (np.full((1, 2, 2), np.nan), "NaN"),
        (np.zeros((1, 2, 2, 2, 2)), "shape"),
        (np.zeros((1, 0, 2)), "no pixels"),
        (np.zeros((0, 2, 2)), "empty"),
        (np.array([["a", "b"]]), "numbers are expected"),
        (np.zeros((1, 0)), "no column"),
    ],
)
def test_inputs_refused(array, said):
    with pytest.raises(DataError, match=said):
        images(array)


def test_labels_of_any_kind_become_indices_with_their_names():
    found = table(["b", "a", "c", "a"] * 2, test_targets=["c", "a"])
    assert found.classes == ("a", "b", "c")
    assert found.train.targets.tolist() == [1, 0, 2, 0] * 2
    assert found.test.targets.tolist() == [2, 0]
    # By value, not by text: "10" would come before "2".
    assert table([10, 2, 2, 10]).classes == ("2", "10")
    assert table([10.0, -1.0, -1.0, 10.0]).train.targets.tolist() == [1, 0, 0, 1]
    assert table(np.array([b"x", b"w", b"x", b"w"])).classes == ("w", "x")
    assert table([True, False, True, False]).train.targets.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("targets", "task"),
    [
        ([0, 1] * 3, "classification"),
        ([0.0, 1.0] * 3, "classification"),
        ([0.5, 1.0] * 3, "regression"),
        (list(range(20)) * 2, "classification"),
        (list(range(21)) * 2, "regression"),
        ([1, 2, 3], "regression"),
        (["1", "2", "3"], "classification"),
        (RNG.normal(size=(6, 2)), "regression"),
        (np.array([[0], [1]] * 3), "classification"),
    ],
)
def test_task_of_a_table(targets, task):
    found = table(targets)
    assert found.task == task
    assert (found.classes is None) == (task == "regression")
    assert found.train.targets.dtype == (torch.int64 if task == "classification" else torch.float32)


def test_task_may_be_asked_for():
    assert table([1, 2, 3], task="classification").classes == ("1", "2", "3")
    assert table([0, 1] * 3, task="regression").train.targets.tolist() == [0.0, 1.0] * 3
    one_hot = np.eye(3)[[0, 1, 2, 0]]
    assert table(one_hot, task="regression").train.targets.shape == (4, 3)


def test_integers_of_images_are_classes_however_many():
    assert len(images(np.zeros((100, 2, 2)), np.arange(100)).classes) == 100


@pytest.mark.parametrize(
    ("targets", "options", "said"),
    [
        ([0.5, 1.0], {"task": "classification"}, "0.5, which is no class label"),
        (["a", "b"], {"task": "regression"}, "'a', which is no number"),
        (np.eye(3), {}, "one-hot"),
        (np.ones((4, 2)), {"task": "classification"}, "one label per example"),
        ([1.0, np.nan], {}, r"NaN or infinite values, the first \(nan\) in row 2"),
        ([1.0, np.inf], {"task": "classification"}, "row 2"),
        (np.array([1 + 1j, 2]), {}, "numbers or texts"),
        (np.zeros((2, 2, 2)), {}, "N x D"),
        ([1e300, 0.5], {"task": "regression"}, "infinite"),
    ],
)
def test_targets_refused(targets, options, said):
    with pytest.raises(DataError, match=said):
        table(targets, **options)


def test_test_part_must_fit():
    with pytest.raises(DataError, match="'d', but the training part has only 'a', 'b'"):
        table(["a", "b"], test_targets=["d"])
    with pytest.raises(DataError, match="both have numbers"):
        table([0, 1, 0, 1], test_targets=["0"])
    with pytest.raises(DataError, match=r"\(3,\) in the table and \(2,\) in other"):
        assemble("npz", Part(np.zeros((2, 3)), None, "the table"), Part(np.zeros((2, 2)), None, "other"), Options())
    with pytest.raises(DataError, match="has targets, but train has none"):
        assemble("npz", Part(np.zeros((2, 3)), None, "train"), Part(np.zeros((2, 3)), np.zeros(2), "test"), Options())
    with pytest.raises(DataError, match="which is no number"):
        table([0.5, 1.5], test_targets=["x"])
    with pytest.raises(DataError, match="targets have the shape"):
        table([0.5, 1.5], test_targets=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"-1.*2 classes"):
        assemble("x", Part(np.zeros((2, 3)), np.array([0, -1]), "t"), None, Options(task="classification"), names="ab")


def test_counts_must_agree():
    with pytest.raises(DataError, match="4 examples and 2 targets"):
        table([0.5, 1], rows=4)


def test_limit_keeps_the_classes_of_the_whole():
    found = table([3, 3, 3, 7, 7, 9, 9], limit=2, test_targets=[9, 7, 3])
    assert found.train.targets.tolist() == [0, 0]
    assert found.test.targets.tolist() == [2, 1]
    assert found.classes == ("3", "7", "9")
    assert len(found.train) == len(found.test) == 2
    torch.testing.assert_close(found.mean, found.train.inputs.mean(0))


def test_nan_is_named_with_row_and_column():
    values = np.zeros((5, 2))
    values[3, 1] = np.nan
    with pytest.raises(DataError, match="row 4, column 'b'"):
        assemble("csv", Part(values, None, "t"), None, Options(), columns=["a", "b"])
    values[3, 1] = 1e39  # too large for float32
    with pytest.raises(DataError, match=r"row 4, column 2"):
        assemble("csv", Part(values, None, "t"), None, Options())


def test_summary():
    assert table([0, 1] * 3, test_targets=[0]).summary() == "npz: inputs 3, 2 classes, 6 train, 1 test"
