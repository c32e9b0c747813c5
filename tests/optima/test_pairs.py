"""Distances of weights against scipy's, distances of predictions against counting, sampling and closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import norm
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson
from stfbnn.optima import pairs
from stfbnn.optima.pairs import cosine_similarities, disagreements, relative_distances, total_variations


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), size=st.integers(1, 9), columns=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_distances_and_cosines_are_those_of_scipy(seed: int, count: int, size: int, columns: int) -> None:
    weights, center = normal(seed, count, size), normal(seed + 1, size)
    before, pairs._COLUMNS = pairs._COLUMNS, columns
    try:
        distances, cosines = relative_distances(weights), cosine_similarities(weights, center)
    finally:
        pairs._COLUMNS = before
    lengths = np.linalg.norm(weights, axis=1)
    expected = 2 * cdist(weights, weights) / (lengths[:, None] + lengths)
    np.testing.assert_allclose(distances, expected, atol=1e-12)
    np.testing.assert_allclose(1 - cosines.numpy(), cdist(weights - center, weights - center, "cosine"), atol=1e-9)
    np.testing.assert_allclose(
        cosine_similarities(weights), cosine_similarities(weights, torch.zeros(size)), atol=1e-15
    )
    assert torch.equal(distances, distances.T)
    assert bool((distances.diagonal() == 0).all())


def test_relative_distances_of_known_vectors_and_of_zeros() -> None:
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [-3.0, -4.0], [-4.0, 3.0]])
    found = relative_distances(weights)
    assert found[1].tolist() == [2.0, 0.0, 0.0, 2.0, 2.0]
    assert found[0, 3] == pytest.approx(2.0)
    assert found[0, 4] == pytest.approx(math.sqrt(2))
    cosines = cosine_similarities(weights)
    assert cosines[1].tolist() == [0.0] * 5
    assert cosines[0].tolist() == pytest.approx([1.0, 0.0, 0.0, -1.0, 0.0])


def test_the_distance_of_neighbours_in_float32_is_not_lost() -> None:
    weights = torch.ones(2, 10_000)
    weights[1, 0] += 1e-5
    # float32 keeps 1 + 1e-5 to 7 digits.
    assert relative_distances(weights)[0, 1] == pytest.approx(float(weights[1, 0].double() - 1) / 100, rel=1e-6)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int64)])
def test_distances_refuse_what_are_no_vectors(weights: Tensor) -> None:
    for measure in (relative_distances, cosine_similarities):
        with pytest.raises(InputError, match=r"\(K, d\)"):
            measure(weights)
        with pytest.raises(InputError, match="NaN or infinite"):
            measure(torch.tensor([[1.0, math.inf]]))
    with pytest.raises(InputError, match="center"):
        cosine_similarities(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(InputError, match="center"):
        cosine_similarities(torch.ones(2, 1), torch.tensor([math.nan]))


def test_disagreements_of_classes_are_counted() -> None:
    # Labels 0 1 2 0, 0 1 1 1 and 2 1 2 0.
    labels = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [2, 1, 2, 0]])
    outputs = torch.nn.functional.one_hot(labels, 3) * 0.3 - 1.0
    expected = torch.tensor([[0, 0.5, 0.25], [0.5, 0, 0.75], [0.25, 0.75, 0]], dtype=torch.float64)
    assert torch.equal(disagreements(outputs, Categorical()), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("class_dim", [1, -1])
def test_dense_classes_count_by_position_and_ignored_ones_not(class_dim: Any) -> None:
    outputs = normal(0, 2, 5, 3, 4)  # K = 2, N = 5, 3 classes, 4 positions
    targets = torch.randint(0, 3, (5, 4), generator=torch.Generator().manual_seed(1))
    targets[0, :3] = targets[4] = -100
    likelihood = Categorical(ignore_index=-100, class_dim=class_dim)
    counted = targets != -100
    probs = outputs.softmax(dim=2).movedim(2, -1)
    given = outputs if class_dim == 1 else outputs.movedim(2, -1)
    differ, apart, total = 0, 0.0, 0
    for example in range(5):
        for position in range(4):
            if counted[example, position]:
                one, other = probs[0, example, position], probs[1, example, position]
                differ += int(one.argmax() != other.argmax())
                # The largest difference of the probabilities of an event, over all 8 events.
                apart += max(float(sum(one[c] - other[c] for c in range(3) if event >> c & 1)) for event in range(8))
                total += 1
    assert disagreements(given, likelihood, counted)[0, 1] == pytest.approx(differ / total)  # type: ignore[index]
    assert total_variations(given, likelihood, counted)[0, 1] == pytest.approx(apart / total)  # type: ignore[index]
    everywhere = total_variations(given, likelihood)
    assert everywhere is not None
    assert everywhere[0, 1] == pytest.approx(float((probs[0] - probs[1]).clamp_min(0).sum(dim=-1).mean()))
    with pytest.raises(InputError, match="counted"):
        disagreements(given, likelihood, counted[:, :3])
    with pytest.raises(InputError, match="counted"):
        total_variations(given, likelihood, torch.zeros_like(counted))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4)])
def test_bernoulli_labels_are_compared_one_by_one(shape: tuple[int, ...]) -> None:
    outputs = 3 * normal(2, 3, *shape)
    probs = 1 / (1 + np.exp(-outputs.numpy()))
    differ, apart = disagreements(outputs, Bernoulli()), total_variations(outputs, Bernoulli())
    assert differ is not None
    assert apart is not None
    assert differ[0, 2] == pytest.approx(np.mean((probs[0] > 0.5) != (probs[2] > 0.5)))
    assert apart[2, 1] == pytest.approx(np.mean(np.abs(probs[2] - probs[1])))
    as_probabilities = Bernoulli(outputs="probabilities")
    torch.testing.assert_close(total_variations(torch.tensor(probs), as_probabilities), apart)
    torch.testing.assert_close(disagreements(torch.tensor(probs), as_probabilities), differ)


def test_total_variation_of_numbers_is_that_of_sampling() -> None:
    noise = [0.7, 1.9]
    outputs = normal(3, 2, 1, 2) * torch.tensor(noise)
    first, second = outputs[:, 0].numpy()
    draws = np.random.default_rng(0).normal(first, noise, (100_000, 2))
    # E_p[max(0, 1 − q/p)]
    ratio = np.exp((norm.logpdf(draws, second, noise) - norm.logpdf(draws, first, noise)).sum(axis=1))
    terms = np.clip(1 - ratio, 0, None)
    found = total_variations(outputs, Gaussian(noise))
    assert found is not None
    assert float(found[0, 1]) == pytest.approx(terms.mean(), abs=5 * terms.std() / 100_000**0.5)
    assert 0.1 < float(found[0, 1]) < 0.9


@pytest.mark.parametrize("noise", [0.4, [0.4]])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_total_variation_of_one_number_is_averaged_over_examples(noise: Any, shape: tuple[int, ...]) -> None:
    if isinstance(noise, list) and len(shape) == 1:
        shape = (5, 1)
    outputs = normal(4, 3, *shape)
    found = total_variations(outputs.float(), Gaussian(noise))
    away = np.abs(outputs[0].numpy() - outputs[1].numpy()).ravel()
    assert found is not None
    assert float(found[0, 1]) == pytest.approx(np.mean(2 * norm.cdf(away / 0.8) - 1), rel=1e-5)
    assert disagreements(outputs, Gaussian(noise)) is None


@given(
    seed=st.integers(0, 10_000), scale=st.floats(1e-3, 100.0), kind=st.sampled_from(["classes", "labels", "numbers"])
)
@settings(max_examples=30, deadline=None)
def test_total_variation_is_a_bounded_metric(seed: int, scale: float, kind: str) -> None:
    likelihoods: dict[str, Likelihood] = {"classes": Categorical(), "labels": Bernoulli(), "numbers": Gaussian(0.5)}
    found = total_variations(scale * normal(seed, 3, 7, 4), likelihoods[kind])
    assert found is not None
    assert torch.equal(found, found.T)
    assert bool((found.diagonal() == 0).all())
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())
    assert float(found[0, 1]) <= float(found[0, 2] + found[2, 1]) + 1e-12


def test_other_likelihoods_have_no_such_distance_and_bad_outputs_are_refused() -> None:
    outputs = normal(5, 2, 4, 2)
    for likelihood in (Poisson(), HeteroscedasticGaussian()):
        assert total_variations(outputs, likelihood) is None
        assert disagreements(outputs, likelihood) is None
    with pytest.raises(InputError, match="noise is not known"):
        total_variations(outputs, Gaussian())
    with pytest.raises(InputError, match=r"\(K, N, …\)"):
        disagreements(outputs[0, 0], Categorical())
    with pytest.raises(InputError, match="NaN"):
        total_variations(outputs / 0, Categorical())
