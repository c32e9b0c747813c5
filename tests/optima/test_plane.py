"""The plane through three optima against its corners and direct evaluation; the map against known places."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optima_problems import logistic, loss_by_hand, squares, squares_loss
from scipy.spatial import procrustes
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.optima import paths
from stfbnn.optima.plane import Plane, embed, plane_slice, plane_through


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10_000), size=st.integers(2, 50), scale=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_a_plane_has_orthonormal_axes_and_its_corners_are_the_vectors(seed: int, size: int, scale: float) -> None:
    vectors = scale * normal(seed, 3, size)
    plane = plane_through(*vectors)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(plane.points(plane.corners), vectors, rtol=1e-9, atol=1e-9 * scale)
    # Distances in the plane are those of the vectors.
    np.testing.assert_allclose(pdist(plane.corners), pdist(vectors), rtol=1e-9)
    assert plane.corners[0].tolist() == [0.0, 0.0]
    assert plane.corners[1, 1] == 0.0
    assert plane.corners[2, 1] > 0.0


def test_the_loss_at_the_corners_is_that_of_the_optima() -> None:
    function, examples = logistic()
    vectors = normal(1, 3, function.size)
    plane = plane_through(*vectors)
    found = examples.scores(function, plane.points(plane.corners)).loss
    torch.testing.assert_close(found, examples.scores(function, vectors).loss, rtol=1e-10, atol=0)


def test_a_slice_is_the_loss_at_every_point_of_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    function, examples = logistic()
    plane = plane_through(*normal(2, 3, function.size))
    # Seven points at a time, so that groups end within rows.
    monkeypatch.setattr(paths, "_VECTOR_NUMBERS", 7 * function.size)
    found = plane_slice(function, plane, examples, size=5, margin=0.5)
    assert found.losses.shape == (5, 5)
    corners = np.array(found.corners)
    np.testing.assert_allclose(corners, plane.corners)
    for values, axis in ((found.xs, 0), (found.ys, 1)):
        low, high = corners[:, axis].min(), corners[:, axis].max()
        np.testing.assert_allclose(values, np.linspace(low - (high - low) / 2, high + (high - low) / 2, 5))
    for row, y in enumerate(found.ys):
        for column, x in enumerate(found.xs):
            weights = plane.origin + x * plane.axes[0] + y * plane.axes[1]
            assert float(found.losses[row, column]) == pytest.approx(
                loss_by_hand(function, examples, weights), rel=1e-9
            )


def test_a_slice_of_a_ring_of_optima_is_round() -> None:
    function, examples, _ = squares(2)
    plane = plane_through(*(torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in (0.3, 2.0, 4.0)))
    found = plane_slice(function, plane, examples, size=9)
    y, x = torch.meshgrid(*(torch.tensor(side, dtype=torch.float64) for side in (found.ys, found.xs)), indexing="ij")
    lengths = plane.points(torch.stack([x, y], dim=2).reshape(-1, 2)).norm(dim=1).reshape(9, 9)
    best = examples.scores(function, plane.origin[None]).loss
    torch.testing.assert_close(found.losses - best, squares_loss(lengths), rtol=1e-9, atol=1e-12)


def test_three_vectors_on_a_line_have_no_plane() -> None:
    first, second = normal(3, 2, 1000).float()
    for third in (first, second, (first + second) / 2, 3 * first - 2 * second):
        with pytest.raises(InputError, match="one line"):
            plane_through(first, second, third)
    with pytest.raises(InputError, match="same"):
        plane_through(first, first, second)
    with pytest.raises(InputError, match="one size"):
        plane_through(first, second, second[:-1])
    with pytest.raises(InputError, match="NaN"):
        plane_through(first, second, first / 0)


def test_a_slice_refuses_what_cannot_be_drawn() -> None:
    function, examples = logistic()
    plane = plane_through(*normal(4, 3, function.size))
    with pytest.raises(InputError, match="size"):
        plane_slice(function, plane, examples, size=1)
    with pytest.raises(InputError, match="margin"):
        plane_slice(function, plane, examples, margin=-0.1)
    with pytest.raises(InputError, match="margin"):
        plane_slice(function, plane, examples, margin=math.nan)
    other = Plane(plane.origin[1:], plane.axes[:, 1:], plane.corners)
    with pytest.raises(InputError, match="the plane is one of"):
        plane_slice(function, other, examples)


@given(seed=st.integers(0, 10_000), count=st.integers(3, 9))
@settings(max_examples=30, deadline=None)
def test_points_of_a_plane_are_found_again(seed: int, count: int) -> None:
    places = normal(seed, count, 2).numpy()
    found = embed(torch.tensor(cdist(places, places)))
    assert procrustes(places, found.points.numpy())[2] < 1e-9
    np.testing.assert_allclose(pdist(found.points), pdist(places), atol=1e-7)
    np.testing.assert_allclose(found.points.mean(dim=0), 0, atol=1e-9)
    assert found.explained == pytest.approx(1.0, abs=1e-9)


def test_the_share_that_is_explained_is_that_of_the_squared_distances() -> None:
    places = normal(5, 12, 6)
    found = embed(torch.cdist(places, places))
    kept = float(torch.pdist(found.points).square().sum() / torch.pdist(places).square().sum())
    assert found.explained == pytest.approx(kept, rel=1e-9)
    # The principal components keep as much.
    values = torch.linalg.svdvals(places - places.mean(dim=0)).square()
    assert found.explained == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-9)


def test_a_map_does_not_depend_on_signs_of_eigenvectors() -> None:
    places = normal(6, 7, 2)
    distances = torch.cdist(places, places)
    expected = embed(distances).points
    for seed in range(5):
        noise = 1e-12 * normal(seed, 7, 7).abs().fill_diagonal_(0)
        torch.testing.assert_close(embed(distances + (noise + noise.T)).points, expected, rtol=0, atol=1e-9)


def test_maps_of_few_equal_and_impossible_distances() -> None:
    assert embed(torch.zeros(1, 1)).points.tolist() == [[0.0, 0.0]]
    assert embed(torch.zeros(3, 3)).explained == 1.0
    two = embed(torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
    assert two.points.flatten().tolist() == pytest.approx([1.5, 0.0, -1.5, 0.0], abs=1e-9)
    # Equally far apart: K - 1 dimensions with the same share each.
    assert embed(1 - torch.eye(6)).explained == pytest.approx(2 / 5)
    # The triangle inequality is broken: no places have these distances, and the share says so.
    broken = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 1.0], [5.0, 1.0, 0.0]])
    found = embed(broken)
    assert found.explained < 1
    assert bool(torch.isfinite(found.points).all())


@pytest.mark.parametrize(
    "distances",
    [
        torch.zeros(2, 3),
        torch.zeros(0, 0),
        torch.eye(2),
        torch.tensor([[0.0, 1.0], [2.0, 0.0]]),
        torch.tensor([[0.0, -1.0], [-1.0, 0.0]]),
        torch.tensor([[0.0, math.nan], [math.nan, 0.0]]),
    ],
)
def test_what_are_no_distances_is_refused(distances: Tensor) -> None:
    with pytest.raises(InputError, match="distances must be"):
        embed(distances)
