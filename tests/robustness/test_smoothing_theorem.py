"""The certificate against exact cases, and against the worst events that there are, by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from stfbnn.robustness.smoothing_theorem import DenseNoise, time_to_half


def layer(
    seed: int, units: int = 5, inputs: int = 7, width: float = 0.3, bias: float = 0.05, mean: float = 1.0
) -> DenseNoise:
    random = np.random.default_rng(seed)
    return DenseNoise(
        mean * random.normal(size=(units, inputs)),
        width * random.lognormal(0, 0.5, size=(units, inputs)),
        bias * random.lognormal(0, 0.5, size=units),
    )


def directions(noise: DenseNoise, point: np.ndarray) -> dict[str, np.ndarray]:
    """Along which the means move most, and along which all variances rise or fall."""
    top = np.linalg.svd(noise.weight / np.sqrt(noise.variances(point))[:, None])[2][0]
    along = (noise.weight_std**2 * point / noise.variances(point)[:, None]).sum(axis=0)
    mixed = top / np.linalg.norm(top) + np.sign(top @ along) * along / np.linalg.norm(along)
    found = {"means": top, "up": along, "down": -along, "both": mixed, "random": np.cos(np.arange(len(point)))}
    return {name: one / np.linalg.norm(one) for name, one in found.items()}


def log_density(h: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return -0.5 * ((h - mean) ** 2 / variance + np.log(variance)).sum(axis=1)


def worst_event(noise: DenseNoise, point: np.ndarray, delta: np.ndarray, wrong: float, count: int) -> float:
    """Probability at ``point + delta`` of the event of probability ``wrong`` at ``point`` that gains most by the move."""
    random = np.random.default_rng(0)
    means = [noise.weight @ point, noise.weight @ (point + delta)]
    variances = [noise.variances(point), noise.variances(point + delta)]

    def ratios(at: int) -> np.ndarray:
        h = means[at] + np.sqrt(variances[at]) * random.normal(size=(count, len(means[at])))
        return log_density(h, means[1], variances[1]) - log_density(h, means[0], variances[0])

    return float((ratios(1) > np.quantile(ratios(0), 1 - wrong)).mean())


@pytest.mark.parametrize("wrong", [0.001, 0.05, 0.3])
@pytest.mark.parametrize(
    ("units", "inputs", "width", "mean"),
    # The last two are all but unmoved in their means, so that the variances alone tell.
    [(5, 7, 0.3, 1.0), (40, 12, 0.3, 1.0), (30, 10, 0.05, 1.0), (60, 6, 0.3, 0.02), (40, 4, 0.1, 0.0)],
)
def test_no_event_reaches_a_half_within_the_radius_and_some_do_within_three_times_of_it(
    units, inputs, width, mean, wrong
):
    noise = layer(units, units, inputs, width, mean=mean)
    point = np.random.default_rng(1).normal(size=inputs)
    radius = noise.radius(point, wrong, 1e9)
    reached = {
        name: worst_event(noise, point, radius * way, wrong, 20_000) for name, way in directions(noise, point).items()
    }
    assert max(reached.values()) < 0.5 + 4 * math.sqrt(0.25 / 20_000)
    # A certificate that is far too small would pass as well, and so would a simulation that finds nothing.
    beyond = [worst_event(noise, point, 3 * radius * way, wrong, 20_000) for way in directions(noise, point).values()]
    assert max(beyond) > 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-4, 0.49), st.floats(0.0, 2.0))
def test_a_linear_threshold_keeps_its_label_within_the_radius(seed, wrong, width):
    # The label is wrong where a·h < s: of probability Φ((s − a·m)/√(a²·v)), by closed form at every input.
    random = np.random.default_rng(seed)
    noise = layer(seed, 4, 5, width)
    point, normal = random.normal(size=5), random.normal(size=4)
    spread = math.sqrt(normal**2 @ noise.variances(point))
    cut = normal @ noise.weight @ point + spread * norm.ppf(wrong)
    radius = noise.radius(point, wrong, 1e9)
    assert radius > 0
    ways = random.normal(size=(1000, 5))
    ways[0] = -noise.weight.T @ normal
    moved = point + radius * ways / np.linalg.norm(ways, axis=1, keepdims=True)
    shift = cut - moved @ noise.weight.T @ normal
    # Φ(shift / spread) stays under ½ while the shift is negative.
    assert shift.max() < 1e-9


@pytest.mark.parametrize("wrong", [1e-6, 0.01, 0.49])
@pytest.mark.parametrize("units", [1, 4, 9])
def test_for_noise_in_the_biases_alone_the_radius_is_the_exact_one(units, wrong):
    noise = layer(0, units, 6, width=0.0, bias=0.7)
    point = np.random.default_rng(1).normal(size=6)
    exact = norm.ppf(1 - wrong) / np.linalg.norm(noise.weight / noise.bias_std[:, None], 2)
    assert noise.radius(point, wrong, 1e9) == pytest.approx(exact, rel=1e-5)


def test_the_radius_grows_with_certainty_and_does_not_depend_on_the_units_of_the_outputs():
    noise = layer(0)
    point = np.random.default_rng(1).normal(size=7)
    radii = [noise.radius(point, wrong, 1e9) for wrong in (0.4, 0.2, 0.05, 0.01, 0.001)]
    assert radii == sorted(radii)
    scale = np.array([1e-3, 0.1, 1.0, 7.0, 1e3])
    scaled = DenseNoise(noise.weight * scale[:, None], noise.weight_std * scale[:, None], noise.bias_std * scale)
    assert scaled.radius(point, 0.05, 1e9) == pytest.approx(radii[2], rel=1e-5)


def test_there_is_no_radius_where_nothing_is_random_or_the_label_is_not_the_majoritys():
    noise = DenseNoise(np.ones((2, 3)), np.full((2, 3), 0.1), np.zeros(2))
    assert noise.radius(np.zeros(3), 0.01, 1e9) == 0
    assert noise.radius(np.ones(3), 0.5, 1e9) == 0
    assert noise.radius(np.ones(3), 0.01, 1e9) > 0


def test_a_layer_whose_output_does_not_move_is_certified_up_to_the_limit():
    noise = DenseNoise(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2))
    assert noise.radius(np.ones(3), 0.01, 12.5) == 12.5


@pytest.mark.parametrize("start", [1e-8, 0.003, 0.2, 0.45])
@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.2), (1.5, 0.8, 0.05), (0.5, 2.0, 0.5)])
def test_the_time_is_a_close_lower_bound_of_the_integral(start, a, b, c):
    def rate(q):
        odds = math.log((1 - q) / q)

        def part(s):
            return s * q * (1 - q) * math.sqrt(2 * odds / (1 - 2 * q)) + 2 * c * q * (1 - q) * odds

        return min(a * norm.pdf(norm.ppf(q)) + part(b), part(math.hypot(a, b)))

    exact, _ = quad(lambda u: norm.pdf(u) / rate(norm.cdf(u)), norm.ppf(start), -1e-7, limit=500)
    found = time_to_half(start, a, b, c)
    assert 0.99 * exact <= found <= exact * (1 + 1e-6)
