"""Labels that are 0 or 1, against torch.distributions."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, build_likelihood

RANDOM = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(40, 4, generator=RANDOM)
LABELS = torch.randint(0, 2, (40, 4), generator=RANDOM)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.float64])
def test_density_sums_the_labels(dtype: torch.dtype) -> None:
    expected = TorchBernoulli(logits=LOGITS).log_prob(LABELS.float()).sum(1)
    likelihood = Bernoulli()
    likelihood.check(LOGITS, LABELS.to(dtype))
    torch.testing.assert_close(likelihood.log_prob(LOGITS, LABELS.to(dtype)), expected)


def test_density_from_probabilities() -> None:
    likelihood = Bernoulli("probabilities")
    probs = LOGITS.double().sigmoid()
    likelihood.check(probs, LABELS)
    expected = TorchBernoulli(logits=LOGITS.double()).log_prob(LABELS.double()).sum(1)
    torch.testing.assert_close(likelihood.log_prob(probs, LABELS), expected)
    # Rounded to 0 and 1 they still have finite densities and gradients.
    edges = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    values = likelihood.log_prob(edges, torch.tensor([0, 1, 1, 0]))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(edges.grad).all()
    assert (values[:2] > -1e-6).all()
    assert (values[2:] < -10).all()


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3), (6, 3, 2)])
def test_all_shapes(shape: tuple[int, ...]) -> None:
    logits, labels = torch.randn(shape), torch.randint(0, 2, shape)
    likelihood = Bernoulli()
    likelihood.check(logits, labels)
    expected = TorchBernoulli(logits=logits).log_prob(labels.float()).reshape(6, -1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(logits, labels), expected)
    assert likelihood.sample(logits, torch.Generator().manual_seed(0)).shape == shape


def test_a_column_of_logits_meets_a_vector_of_labels() -> None:
    likelihood = Bernoulli()
    for logits, labels in ((LOGITS[:, :1], LABELS[:, 0]), (LOGITS[:, 0], LABELS[:, :1])):
        likelihood.check(logits, labels)
        torch.testing.assert_close(likelihood.log_prob(logits, labels), likelihood.log_prob(LOGITS[:, 0], LABELS[:, 0]))


def test_temperature_divides_the_logits() -> None:
    expected = TorchBernoulli(logits=LOGITS / 2.5).log_prob(LABELS.float())
    torch.testing.assert_close(Bernoulli().label_log_probs(LOGITS, LABELS, 2.5), expected)
    probs = Bernoulli("probabilities").label_log_probs(LOGITS.double().sigmoid(), LABELS, 2.5)
    torch.testing.assert_close(probs.float(), expected)


def test_extreme_logits_keep_finite_densities_and_gradients() -> None:
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    values = Bernoulli().log_prob(logits, torch.tensor([1, 0, 0, 1]))
    values.sum().backward()
    torch.testing.assert_close(values.detach(), torch.tensor([0.0, 0.0, -1e4, -1e4]))
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.0, -1.0, 1.0]))


def test_half_precision_is_summed_in_single() -> None:
    assert Bernoulli().log_prob(LOGITS.bfloat16(), LABELS).dtype == torch.float32


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_samples_have_the_right_law(outputs: str) -> None:
    logits = torch.tensor([-2.0, 0.0, 1.5])
    given = (logits if outputs == "logits" else logits.sigmoid()).expand(20_000, 3)
    drawn = Bernoulli(outputs).sample(given, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share = logits.sigmoid()
    # Five standard errors, fixed seed.
    assert ((drawn.mean(0) - share).abs() < 5 * (share * (1 - share) / 20_000).sqrt()).all()
    Bernoulli(outputs).check_targets(given, drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (LOGITS, LABELS + 1, "span 1 … 2"),
        (LOGITS, LABELS - 1, "0 or 1"),
        (LOGITS, LABELS + 0.5, "categorical"),
        (LOGITS, torch.full((40, 4), math.nan), "0 or 1"),
        (LOGITS, LABELS[:, 0], "categorical"),
        (LOGITS, LABELS[:, :3], "broadcast"),
        (LOGITS[:, :1], LABELS, "broadcast"),
        (LOGITS * math.nan, LABELS, "NaN"),
        (LOGITS.long(), LABELS, "float outputs"),
    ],
)
def test_refuses(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bernoulli().check(outputs, targets)


def test_probabilities_are_told_from_logits() -> None:
    with pytest.warns(UserWarning, match='outputs="probabilities"'):
        Bernoulli().check(LOGITS.sigmoid(), LABELS)
    # Too few to tell.
    Bernoulli().check(LOGITS[:4].sigmoid(), LABELS[:4])
    with pytest.raises(InputError, match="span"):
        Bernoulli("probabilities").check(LOGITS, LABELS)
    with pytest.raises(InputError, match="scores"):
        Bernoulli("scores")  # type: ignore[arg-type]


def test_config_builds_it_again() -> None:
    assert build_likelihood("bernoulli", Bernoulli("probabilities").config()).config() == {"outputs": "probabilities"}
