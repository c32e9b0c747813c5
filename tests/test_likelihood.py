"""Likelihoods against torch.distributions and scipy, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical as TorchCategorical

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, build_likelihood, resolve_likelihood

LOGITS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(1))


def test_categorical_density() -> None:
    expected = TorchCategorical(logits=LOGITS).log_prob(LABELS)
    torch.testing.assert_close(Categorical().log_prob(LOGITS, LABELS), expected)
    torch.testing.assert_close(Categorical().log_prob(LOGITS.log_softmax(1), LABELS), expected)
    torch.testing.assert_close(Categorical("probabilities").log_prob(LOGITS.softmax(1), LABELS), expected)


def test_dense_categorical_density_sums_positions() -> None:
    logits, labels = torch.randn(3, 4, 5, 2), torch.randint(0, 4, (3, 5, 2))
    expected = TorchCategorical(logits=logits.movedim(1, -1)).log_prob(labels).sum((1, 2))
    Categorical().check(logits, labels)
    torch.testing.assert_close(Categorical().log_prob(logits, labels), expected)


def test_temperature_divides_logits() -> None:
    torch.testing.assert_close(Categorical().log_probs(LOGITS, 2.5), (LOGITS / 2.5).log_softmax(1))
    torch.testing.assert_close(
        Categorical("probabilities").log_probs(LOGITS.softmax(1), 2.5), (LOGITS / 2.5).log_softmax(1)
    )


def test_categorical_samples_have_the_right_law() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(40_000, 4)
    drawn = Categorical().sample(logits, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=4).numpy()
    # Chi-square at level 1e-4, fixed seed.
    assert stats.chisquare(counts, logits[0].double().softmax(0).numpy() * 40_000).pvalue > 1e-4
    dense = Categorical().sample(torch.randn(3, 4, 5, 2), torch.Generator().manual_seed(0))
    assert dense.shape == (3, 5, 2)


def test_gaussian_density() -> None:
    outputs, targets = torch.randn(10, 2).double(), torch.randn(10, 2).double()
    expected = stats.norm(outputs.numpy(), [0.5, 2.0]).logpdf(targets.numpy()).sum(1)
    ours = Gaussian(noise_std=[0.5, 2.0]).log_prob(outputs, targets)
    torch.testing.assert_close(ours, torch.as_tensor(expected))


def test_a_column_of_outputs_meets_a_vector_of_targets() -> None:
    outputs, targets = torch.randn(10, 1), torch.randn(10)
    likelihood = Gaussian(noise_std=0.5)
    likelihood.check(outputs, targets)
    expected = likelihood.log_prob(outputs[:, 0], targets)
    assert expected.shape == (10,)
    torch.testing.assert_close(likelihood.log_prob(outputs, targets), expected)
    torch.testing.assert_close(likelihood.log_prob(outputs[:, 0], targets[:, None]), expected)


def test_noise_is_learned_from_residuals() -> None:
    torch.manual_seed(0)
    outputs = torch.zeros(20_000, 2)
    targets = torch.randn(20_000, 2) * torch.tensor([0.5, 3.0])
    likelihood = Gaussian()
    for step in range(50):
        part = slice(400 * step, 400 * (step + 1))
        likelihood.move(likelihood.estimate(outputs[part], targets[part]), weight=1 / (step + 1))
    # The mean of 50 minibatch estimates is the estimate on all data.
    torch.testing.assert_close(likelihood.noise_std, targets.double().square().mean(0).sqrt())


def test_a_given_noise_is_kept() -> None:
    likelihood = Gaussian(noise_std=0.1)
    assert likelihood.estimate(torch.zeros(5), torch.ones(5)) is None
    likelihood.move(None, 1.0)
    assert float(likelihood.noise_std) == pytest.approx(0.1)


def test_gaussian_samples() -> None:
    drawn = Gaussian(noise_std=0.5).sample(torch.full((50_000,), 2.0), torch.Generator().manual_seed(0))
    assert abs(float(drawn.mean()) - 2) < 5 * 0.5 / math.sqrt(50_000)
    assert abs(float(drawn.std()) / 0.5 - 1) < 5 / math.sqrt(100_000)


def test_auto_and_names() -> None:
    assert isinstance(resolve_likelihood("auto", torch.zeros(3)), Gaussian)
    assert isinstance(resolve_likelihood("auto", torch.zeros(3).long()), Categorical)
    assert isinstance(resolve_likelihood("gaussian", torch.zeros(3)), Gaussian)
    mine = Gaussian(noise_std=0.1)
    copy = resolve_likelihood(mine, torch.zeros(3))
    assert copy is not mine
    assert copy.config() == mine.config()
    with pytest.raises(InputError, match="one-hot"):
        resolve_likelihood("auto", torch.nn.functional.one_hot(LABELS, 4).float())
    assert isinstance(resolve_likelihood("auto", torch.zeros(3).bool()), Bernoulli)
    for name in ("categorical", "bernoulli", "gaussian", "heteroscedastic", "poisson"):
        assert resolve_likelihood(name, torch.zeros(3)).name == name
    with pytest.raises(InputError, match=r"student.*bernoulli.*CustomLikelihood"):
        resolve_likelihood("student", torch.zeros(3))
    rebuilt = build_likelihood("gaussian", {"noise_std": [1.0, 2.0], "learned": True})
    assert rebuilt.config() == {"noise_std": [1.0, 2.0], "learned": True}


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (LOGITS, LABELS.float(), "integers"),
        (LOGITS, LABELS + 1, "0 … 3"),
        (LOGITS, LABELS - 1, "span -1"),
        (LOGITS, torch.nn.functional.one_hot(LABELS, 4), "argmax"),
        (LOGITS[:, :1], LABELS, "at least 2 classes"),
        (LOGITS.softmax(1), LABELS, "look like probabilities"),
        (LOGITS * float("nan"), LABELS, "NaN"),
        (LOGITS, LABELS[:, None], "squeeze"),
        (LOGITS.long(), LABELS, "float outputs"),
    ],
)
def test_categorical_refuses(outputs: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Categorical().check(outputs, targets)


def test_probabilities_are_checked_when_they_are_promised() -> None:
    Categorical("probabilities").check(LOGITS.softmax(1), LABELS)
    with pytest.raises(InputError, match="do not sum to 1"):
        Categorical("probabilities").check(LOGITS, LABELS)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(5), torch.zeros(5).long(), "float targets"),
        (torch.zeros(5, 2), torch.zeros(5), "broadcast"),
        (torch.zeros(5, 1), torch.zeros(4), "broadcast"),
        (torch.zeros(5), torch.tensor([0, 1, math.inf, 0, 0]), "infinite"),
        (torch.full((5,), math.nan), torch.zeros(5), "outputs hold NaN"),
    ],
)
def test_gaussian_refuses(outputs: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gaussian(noise_std=1.0).check(outputs, targets)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, [1.0, 0.0]])
def test_bad_noise_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="noise_std"):
        Gaussian(noise_std=bad)


def test_noise_columns_must_fit() -> None:
    with pytest.raises(InputError, match="3 entries"):
        Gaussian(noise_std=[1.0, 1.0, 1.0]).check(torch.zeros(5, 2), torch.zeros(5, 2))


@pytest.mark.parametrize("noise", ["small", [[1.0], [1.0, 2.0]], 0.0, [1.0, -1.0]])
def test_noise_that_is_no_number_is_refused(noise: Any) -> None:
    with pytest.raises(InputError, match="noise_std must be"):
        Gaussian(noise_std=noise)
