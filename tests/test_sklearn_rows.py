"""The rows of a table: batches, scale, and what is held out."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from stfbnn.estimators_sklearn.rows import RowBatches, Scale, Table, hold_out_rows


def test_equal_rows_are_held_out_together_and_classes_in_proportion() -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(100, 3))
    y = np.repeat([0, 1, 2, 3], [50, 30, 16, 4])
    rest, held = hold_out_rows(X, y, 0.25, seed=0)
    assert sorted([*rest, *held]) == list(range(100))
    assert np.abs(np.bincount(y[held], minlength=4) - 0.25 * np.bincount(y)).max() < 1
    again = random.integers(0, 40, 100)
    drawn = X[again]
    drawn[:, 0] = np.where(random.random(100) < 0.5, 0.0, -0.0)
    rest, held = hold_out_rows(drawn, None, 0.25, seed=1)
    assert not set(again[rest]) & set(again[held])
    assert len(set(again[held])) == round(0.25 * len(set(again)))


def test_batches_hold_every_row_once_in_nearly_equal_parts() -> None:
    batches = RowBatches(TensorDataset(torch.arange(33), torch.arange(33) % 3), 32, shuffle=True)
    parts = [part for part, _ in batches]
    assert [len(part) for part in parts] == [17, 16]
    assert len(batches) == 2
    assert sorted(torch.cat(parts).tolist()) == list(range(33))
    assert torch.cat(parts).tolist() != list(range(33))
    assert all(torch.equal(target, part % 3) for part, target in batches)


def test_constant_columns_are_left_at_their_scale() -> None:
    values = np.column_stack([np.full(7, 0.1), np.arange(7)])
    scale = Scale.of(values)
    np.testing.assert_allclose(scale.std, [1, 2])
    np.testing.assert_allclose(scale.apply(values).mean(0), 0, atol=1e-12)


def test_the_scale_of_weighted_rows_is_that_of_repeated_ones() -> None:
    random = np.random.default_rng(0)
    values, weights = random.normal(3, 2, size=(20, 4)), random.integers(1, 5, 20)
    weighted, repeated = Scale.of(values, weights), Scale.of(np.repeat(values, weights, axis=0))
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    np.testing.assert_allclose(weighted.std, repeated.std)


def test_rows_that_do_not_count_are_left_out() -> None:
    table = Table.of(np.arange(8.0).reshape(4, 2), np.arange(4), [1, 0, 2.5, 0])
    assert table.X.tolist() == [[0, 1], [4, 5]]
    assert table.y.tolist() == [0, 2]
    assert table.weights is not None
    assert table.weights.tolist() == [1, 2.5]
