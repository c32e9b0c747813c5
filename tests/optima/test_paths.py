"""Losses along lines and curves, against closed forms, convexity and another optimiser."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optima_problems import logistic, loss_by_hand, squares, squares_loss
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core_models import classification, mlp
from stfbnn.errors import InputError
from stfbnn.inference.components.start import reinitialized
from stfbnn.optima import paths
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.optima.paths import Path, bezier, beziers, fit_bend, fit_bends, line, lines


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_barrier_between_the_two_optima_of_one_weight_is_the_known_one() -> None:
    function, examples, _ = squares(1)
    path = line(function, vector(-1.0), vector(1.0), examples, points=9)
    expected = squares_loss(torch.linspace(-1, 1, 9, dtype=torch.float64))
    found = torch.tensor(path.losses, dtype=torch.float64)
    torch.testing.assert_close(found - found[0], expected, rtol=1e-10, atol=1e-12)
    assert path.barrier == pytest.approx(float(squares_loss(torch.zeros(1, dtype=torch.float64))), rel=1e-10)
    assert path.positions == tuple(index / 8 for index in range(9))
    assert path.accuracies is None


def test_the_barrier_is_measured_from_the_chord_and_not_from_an_end() -> None:
    function, examples, _ = squares(1)
    path = line(function, vector(-1.0), vector(0.5), examples, points=601)
    t = torch.linspace(0, 1, 601, dtype=torch.float64)
    expected = squares_loss(-1 + 1.5 * t) - t * squares_loss(vector(0.5))
    assert path.barrier == pytest.approx(float(expected.max()), rel=1e-9)
    # Downhill all the way to an optimum, and below the chord: no barrier.
    assert line(function, vector(2.0), vector(1.0), examples).barrier == 0.0


@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 30.0), points=st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_a_convex_layer_has_no_barrier_between_any_two_weights(seed: int, scale: float, points: int) -> None:
    function, examples = logistic()
    first, second = scale * torch.randn(
        2, function.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    path = line(function, first, second, examples, points)
    assert 0 <= path.barrier < 1e-10 * max(1.0, *path.losses)


def test_a_path_has_the_losses_and_accuracies_of_its_weights() -> None:
    function, examples = logistic()
    first, control, second = torch.randn(
        3, function.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    path = bezier(function, first, control, second, examples, points=5)
    for t, loss, accuracy in zip(path.positions, path.losses, path.accuracies or (), strict=True):
        # By de Casteljau's construction.
        start, end = torch.lerp(first, control, t), torch.lerp(control, second, t)
        weights = torch.lerp(start, end, t)
        assert loss == pytest.approx(loss_by_hand(function, examples, weights), rel=1e-12)
        labels = examples.outputs(function, weights[None])[0].argmax(dim=1)
        assert accuracy == pytest.approx(float((labels == examples.targets).double().mean()))


def test_a_curve_by_the_midpoint_is_the_straight_line() -> None:
    function, examples = logistic()
    first, second = torch.randn(2, function.size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    straight, curve = (
        line(function, first, second, examples),
        bezier(function, first, (first + second) / 2, second, examples),
    )
    assert curve.losses == pytest.approx(straight.losses, rel=1e-12)


def test_many_paths_are_those_of_each_pair_however_few_points_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    function, examples = logistic()
    weights = torch.randn(6, function.size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    pairs = [(0, 1), (2, 0), (1, 2)]
    straight = lines(function, weights, pairs, examples, points=7)
    curves = beziers(function, weights, pairs, weights[3:], examples, points=7)
    # Four points at a time, so that groups end within paths.
    monkeypatch.setattr(paths, "_VECTOR_NUMBERS", 4 * function.size + 1)
    for index, (one, other) in enumerate(pairs):
        alone = line(function, weights[one], weights[other], examples, points=7)
        assert straight[index].losses == pytest.approx(alone.losses, rel=1e-12)
        assert straight[index].accuracies == alone.accuracies
        alone = bezier(function, weights[one], weights[3 + index], weights[other], examples, points=7)
        assert curves[index].losses == pytest.approx(alone.losses, rel=1e-12)
    assert lines(function, weights, [], examples) == ()


def arc(control: Tensor, first: Tensor, second: Tensor, points: int = 401) -> Tensor:
    """Lengths of the points of a curve, at equal distances of t."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    return ((1 - t) ** 2 * first + 2 * t * (1 - t) * control + t**2 * second).norm(dim=1)


def test_the_bend_is_where_quadrature_and_another_optimiser_put_it() -> None:
    function, examples, loader = squares(2)
    first, second = vector(1.0, 0.0), vector(-0.6, 0.8)

    def mean_loss(control: np.ndarray) -> float:
        return float(squares_loss(arc(torch.tensor(control), first, second)).mean())

    best = minimize(mean_loss, ((first + second) / 2).numpy(), tol=1e-12)
    # One batch, as quadrature has it: the two batches differ in E[x⁴], which the mean over both does not.
    whole = [(torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader]))]
    control = fit_bend(function, first, second, whole, steps=400, seed=3)
    assert mean_loss(control.numpy()) < 1.02 * best.fun
    torch.testing.assert_close(control, torch.tensor(best.x), atol=0.03, rtol=0)
    straight, curve = line(function, first, second, examples), bezier(function, first, control, second, examples)
    assert straight.barrier > 0.5
    assert curve.barrier < 0.05 * straight.barrier


def digits_like() -> tuple[LayerFunction, DataLoader[tuple[Tensor, ...]], Tensor]:
    x, y = classification(150)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(1))
    function = LayerFunction(mlp().eval(), loader)
    drawn = [function.bnn.layout.flatten(reinitialized(function.bnn, seed)) for seed in range(3)]
    return function, loader, torch.stack(drawn)


@pytest.mark.parametrize("stacked", [True, False])
def test_what_is_fitted_for_a_pair_does_not_depend_on_the_others(
    stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, loader, weights = digits_like()
    pairs = [(0, 1), (0, 2), (1, 2)]
    state = loader.generator.get_state()
    together = fit_bends(function, weights, pairs, loader, steps=13, seed=2, stacked=stacked)
    assert torch.equal(loader.generator.get_state(), state)
    global_draw = torch.random.get_rng_state()
    for pair, control in zip(pairs, together, strict=True):
        alone = fit_bend(function, weights[pair[0]], weights[pair[1]], loader, steps=13, seed=2)
        torch.testing.assert_close(alone, control, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone, (weights[pair[0]] + weights[pair[1]]) / 2, atol=1e-3)
    assert torch.equal(torch.random.get_rng_state(), global_draw)
    # Two pairs at a time.
    monkeypatch.setattr(paths, "_CONTROL_NUMBERS", 2 * function.size)
    apart = fit_bends(function, weights, pairs, loader, steps=13, seed=2, stacked=stacked)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_curve_and_bending_lowers_the_loss_along_it() -> None:
    function, loader, weights = digits_like()
    one, again = (fit_bends(function, weights, [(0, 1)], loader, steps=60, seed=4) for _ in range(2))
    other = fit_bends(function, weights, [(0, 1)], loader, steps=60, seed=5)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-4)
    examples = Examples(loader)
    straight = line(function, weights[0], weights[1], examples)
    curve = beziers(function, weights, [(0, 1)], one, examples)[0]
    assert sum(curve.losses) < 0.9 * sum(straight.losses)
    assert fit_bends(function, weights, [], loader).shape == (0, function.size)


def test_the_times_of_the_steps_have_the_moments_of_a_beta_distribution() -> None:
    times = np.array(paths._times(2000, seed=0))
    assert 0 <= times.min() < times.max() <= 1
    assert times.mean() == pytest.approx(1 / 2, abs=2e-3)
    # Of Beta(2, 2): ab / ((a + b)² (a + b + 1)) = 1/20; one that is uniform has 1/12.
    assert times.var() == pytest.approx(1 / 20, abs=1e-3)


def test_a_loss_that_overflows_within_a_path_is_an_infinite_barrier_and_at_an_end_an_error() -> None:
    assert Path.of((0.0, 0.5, 1.0), (1.0, math.nan, 2.0), None).barrier == math.inf
    assert Path.of((0.0, 0.5, 1.0), (1.0, math.inf, 2.0), None).losses[1] == math.inf
    with pytest.raises(InputError, match="ends of a path"):
        Path.of((0.0, 0.5, 1.0), (1.0, 1.0, math.nan), None)


@pytest.mark.parametrize(
    ("first", "points", "message"),
    [
        (torch.ones(3, dtype=torch.float64), 21, "has 2 weights"),
        (torch.ones(2, 1, dtype=torch.float64), 21, "has 2 weights"),
        (torch.ones(2, dtype=torch.int64), 21, "floats"),
        (torch.tensor([1.0, math.nan]), 21, "NaN or infinite"),
        (torch.ones(2), 1, "at least 2 points"),
        (torch.ones(2), 2.0, "at least 2 points"),
    ],
)
def test_a_line_refuses(first: Tensor, points: int, message: str) -> None:
    function, examples, _ = squares(2)
    with pytest.raises(InputError, match=message):
        line(function, first, vector(1.0, 0.0), examples, points)


def test_bends_refuse_what_cannot_be_fitted() -> None:
    function, examples, loader = squares(2)
    weights = torch.eye(2, dtype=torch.float64)
    with pytest.raises(InputError, match=r"pair \(0, 2\)"):
        fit_bends(function, weights, [(0, 2)], loader)
    with pytest.raises(InputError, match=r"\(K, d\)"):
        lines(function, weights[0], [(0, 1)], examples)
    with pytest.raises(InputError, match="as many control points"):
        beziers(function, weights, [(0, 1)], weights, examples)
    with pytest.raises(InputError, match="NaN or infinite"):
        fit_bends(function, weights / torch.eye(2), [(0, 1)], loader)
    with pytest.raises(InputError, match="steps"):
        fit_bends(function, weights, [(0, 1)], loader, steps=0)
    with pytest.raises(InputError, match="learning_rate"):
        fit_bends(function, weights, [(0, 1)], loader, learning_rate=-1.0)
    with pytest.raises(InputError, match="seed"):
        fit_bends(function, weights, [(0, 1)], loader, seed=-1)
    with pytest.raises(InputError, match="only once"):
        fit_bends(function, weights, [(0, 1)], iter(loader))
    with pytest.raises(InputError, match="no batch"):
        fit_bends(function, weights, [(0, 1)], [])
    with pytest.raises(InputError, match="smaller learning_rate"):
        fit_bends(function, weights, [(0, 1)], loader, learning_rate=1e200)


def test_the_model_is_left_as_it_was() -> None:
    x, y = classification(60)
    model: nn.Module = mlp().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [(x, y)]
    function = LayerFunction(model, loader)
    weights = torch.stack([function.trained, -function.trained])
    fit_bends(function, weights, [(0, 1)], loader, steps=3)
    lines(function, weights, [(0, 1)], Examples(loader))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
