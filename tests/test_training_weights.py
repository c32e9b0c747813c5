"""Stage one with weights of examples: a weight of 2 is an example that is there twice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stfbnn.errors import InputError
from stfbnn.training import TrainRun, train
from stfbnn.training_choices import Objective

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=RANDOM)
Y = torch.tensor([0, 2, 1, 1, 0, 2])
COUNTS = torch.tensor([2, 0, 1, 1, 3, 1])
ROWS = torch.arange(6).repeat_interleave(COUNTS)


def trained(data: list[Any], lr: float = 0.5, **options: Any) -> TrainRun:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"epochs": 2, "optimizer": "sgd", "momentum": 0.0, "schedule": "constant", **options}
    return train(nn.Linear(4, 3), data, lr=lr, accelerator="cpu", progress=False, **settings)


def weight_of(run: TrainRun) -> Tensor:
    assert isinstance(run.model, nn.Linear)
    return run.model.weight.detach()


def test_weights_are_copies() -> None:
    # The sum is divided by the number of rows, of which the copies have 8.
    run = trained([(X, Y, COUNTS.float())], lr=0.5 * 6 / 8, val_loader=[(X, Y, COUNTS.float())])
    copies = trained([(X[ROWS], Y[ROWS])], val_loader=[(X[ROWS], Y[ROWS])])
    torch.testing.assert_close(weight_of(run), weight_of(copies))
    assert run.history[1].loss == pytest.approx(copies.history[1].loss * 8 / 6, rel=1e-5)
    assert run.history[1].val_loss == pytest.approx((copies.history[1].val_loss or 0) * 8 / 6, rel=1e-5)
    assert not torch.allclose(weight_of(run), weight_of(trained([(X, Y)])), atol=1e-3)
    mapping = [{"input": X, "labels": Y, "w": COUNTS.float()}]
    again = trained(mapping, lr=0.5 * 6 / 8, weight_key="w")
    torch.testing.assert_close(weight_of(again), weight_of(run), rtol=0, atol=0)
    # The provenance is of the inputs alone.
    assert again.provenance.count == trained([{"input": X, "labels": Y}]).provenance.count == 6


def test_a_loss_of_ones_own_is_given_the_weights() -> None:
    def own(outputs: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(outputs, labels, reduction="none") * weight).mean()

    run, plain = trained([(X, Y, COUNTS.float())], loss=own), trained([(X, Y, COUNTS.float())])
    torch.testing.assert_close(weight_of(run), weight_of(plain))
    with pytest.raises(InputError, match=r"function of \(outputs, target, weight\)"):
        trained([(X, Y, COUNTS.float())], loss=lambda outputs, labels: outputs.sum())


def test_objectives() -> None:
    outputs, weight = torch.randn(6, 3, generator=RANDOM), torch.rand(6, generator=RANDOM)
    numbers = torch.randn(6, 3, generator=RANDOM)
    entropies = F.cross_entropy(outputs, Y, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(Objective(label_smoothing=0.1)(outputs, Y, weight), (weight * entropies).mean())
    squares = (outputs - numbers).square().mean(1)
    torch.testing.assert_close(Objective()(outputs, numbers, weight), (weight * squares).mean())
    dense, grid = torch.randn(2, 3, 5, generator=RANDOM), torch.zeros(2, 5, dtype=torch.int64)
    expected = (torch.tensor([1.0, 3.0])[:, None] * F.cross_entropy(dense, grid, reduction="none")).mean()
    torch.testing.assert_close(Objective()(dense, grid, torch.tensor([1.0, 3.0])), expected)


def test_labels_that_are_no_classes_are_not_counted_as_wrong() -> None:
    outputs = torch.randn(6, 3, generator=RANDOM)
    some = torch.tensor([0, -100, 2, 255, 1, 2])
    right = int((outputs.argmax(1) == some)[[0, 2, 4, 5]].sum())
    assert Objective.correct(outputs, some) == (right, 4)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(InputError, match="not negative"):
        trained([(X, Y, -COUNTS.float())])
    with pytest.raises(InputError, match=r"\(x1, x2\), target"):
        trained([(X, Y, COUNTS)])
