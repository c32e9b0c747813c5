"""Predictions with a likelihood of the user's own."""

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, StudentT

from stfbnn.errors import InputError
from stfbnn.likelihood import CustomLikelihood, Gaussian, Likelihood
from stfbnn.predictive import CustomPrediction, GaussianPrediction, sums_for

DRAWS = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))


def predicted(likelihood: Likelihood, weights: Tensor | None = None) -> CustomPrediction:
    sums = sums_for(likelihood, 1.0)
    sums.add(DRAWS, weights)
    prediction = sums.finish(at_mean=False)
    assert isinstance(prediction, CustomPrediction)
    return prediction


def test_it_keeps_the_outputs_and_averages_densities() -> None:
    pred = predicted(CustomLikelihood(lambda outputs, targets: Laplace(outputs, 2.0).log_prob(targets).sum(1)))
    assert torch.equal(pred.draws, DRAWS)
    torch.testing.assert_close(pred.mean, DRAWS.mean(0))
    each = Laplace(DRAWS, 2.0).log_prob(TARGETS).sum(2).double()
    torch.testing.assert_close(pred.log_density(TARGETS), each.logsumexp(0) - math.log(5))


def test_one_that_is_gaussian_agrees_with_the_librarys() -> None:
    weights = torch.tensor([1.0, 2, 3, 4, 5])
    own = CustomLikelihood(lambda outputs, targets: torch.distributions.Normal(outputs, 0.5).log_prob(targets).sum(1))
    sums = sums_for(Gaussian(noise_std=0.5), 1.0)
    sums.add(DRAWS, weights)
    library = sums.finish(at_mean=False)
    assert isinstance(library, GaussianPrediction)
    pred = predicted(own, weights)
    torch.testing.assert_close(pred.mean, library.mean)
    torch.testing.assert_close(pred.log_density(TARGETS), library.log_density(TARGETS), rtol=1e-5, atol=1e-5)


def test_what_only_the_user_knows_is_refused() -> None:
    pred = predicted(CustomLikelihood(lambda outputs, targets: -(outputs - targets).square().sum(1)))
    for name in ("std", "aleatoric", "epistemic", "entropy", "probs"):
        with pytest.raises(InputError, match=rf"\.{name} would be.*\.draws"):
            getattr(pred, name)


class Student(Likelihood):
    """A user's own class."""

    name: ClassVar[str] = "student"

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape != targets.shape:
            raise InputError("shapes differ")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return StudentT(4.0, outputs).log_prob(targets).sum(1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return outputs

    def config(self) -> dict[str, Any]:
        return {}


def test_a_class_of_the_users_own_has_predictions_too() -> None:
    each = StudentT(4.0, DRAWS).log_prob(TARGETS).sum(2).double()
    torch.testing.assert_close(predicted(Student()).log_density(TARGETS), each.logsumexp(0) - math.log(5))


def test_a_subclass_of_a_known_one_predicts_as_it_does() -> None:
    class Mine(Gaussian):
        pass

    sums = sums_for(Mine(noise_std=0.5), 1.0)
    sums.add(DRAWS)
    assert isinstance(sums.finish(at_mean=False), GaussianPrediction)
