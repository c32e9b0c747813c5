"""Two dimensions of many: the loss on the plane through three optima, and a map of all optima by their distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.optima.paths import scores_in_groups

# Three points count as on one line where the third is nearer to it than this share of the longest vector: float32 has 7 digits.
_FLAT = 1e-6


@dataclass(frozen=True)
class Plane:
    """The plane through three weight vectors, in float64.

    Attributes:
        origin: The first of them, (d,).
        axes: Two orthonormal directions, (2, d); the first points from the first vector to the second.
        corners: Coordinates (x, y) of the three, (3, 2).
    """

    origin: Tensor
    axes: Tensor
    corners: Tensor

    def points(self, coordinates: Tensor) -> Tensor:
        """The weight vectors (M, d) at coordinates (M, 2)."""
        return self.origin + coordinates.to(self.axes) @ self.axes


def plane_through(first: Tensor, second: Tensor, third: Tensor) -> Plane:
    """The plane through three weight vectors (d,), its axes by Gram–Schmidt (Garipov et al., 2018).

    Raises:
        InputError: They are not finite vectors of one size, or lie on one line.
    """
    vectors = (first, second, third)
    if any(one.ndim != 1 or one.shape != first.shape for one in vectors):
        shapes = ", ".join(str(tuple(one.shape)) for one in vectors)
        raise InputError(f"a plane goes through three vectors of one size, but their shapes are {shapes}")
    if not all(bool(torch.isfinite(one).all()) for one in vectors):
        raise InputError("a vector that a plane is to go through holds NaN or infinite values")
    origin, one, other = (vector.detach().double() for vector in vectors)
    along, beside = one - origin, other - origin
    longest = max(float(vector.norm()) for vector in (origin, one, other, along, beside))
    length = float(along.norm())
    if length <= _FLAT * longest:
        raise InputError("the first two vectors are the same, so that no plane is given; take three different optima")
    across = along / length
    shadow = float(beside @ across)
    rest = beside - shadow * across
    # Once more: the first difference leaves rounding errors along the first axis.
    rest -= (rest @ across) * across
    height = float(rest.norm())
    if height <= _FLAT * longest:
        raise InputError("the three vectors lie on one line, so that no plane is given; take another third optimum")
    corners = torch.tensor([[0.0, 0.0], [length, 0.0], [shadow, height]], dtype=torch.float64)
    return Plane(origin, torch.stack([across, rest / height]), corners)


@dataclass(frozen=True)
class PlaneSlice:
    """The loss on a grid of a plane.

    Attributes:
        xs: Coordinates of the grid's columns along the first axis, in the weights' unit, rising.
        ys: Those of its rows along the second axis.
        losses: Mean loss, nats per example, (len(ys), len(xs)), in float64.
        corners: Coordinates (x, y) of the three optima.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: Tensor
    corners: tuple[tuple[float, float], ...]


def plane_slice(
    function: LayerFunction, plane: Plane, examples: Examples, size: int = 21, margin: float = 0.25
) -> PlaneSlice:
    """The loss on a grid around the three optima of a plane.

    Args:
        function: The network as a function of the layer.
        plane: See `plane_through`.
        examples: On which the loss is computed.
        size: Points along each side.
        margin: How far the grid goes beyond the three, as a share of their extent along each axis.

    Raises:
        InputError: There are fewer than 2 points, the margin is negative, or the plane is not one of this layer's weights.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise InputError(f"size must be at least 2 points along each side, but it is {size!r}")
    if not 0 <= margin < float("inf"):
        raise InputError(f"margin must be a share of at least 0, but it is {margin!r}")
    if plane.origin.shape != (function.size,):
        raise InputError(
            f"the plane is one of vectors of shape {tuple(plane.origin.shape)}, but the layer {function.layer!r} has "
            f"{function.size} weights"
        )
    low, high = plane.corners.amin(dim=0), plane.corners.amax(dim=0)
    room = margin * (high - low)
    xs, ys = (
        torch.linspace(float(start), float(stop), size, dtype=torch.float64)
        for start, stop in zip(low - room, high + room, strict=True)
    )
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=2).reshape(-1, 2)
    scores = scores_in_groups(function, examples, len(grid), lambda part: plane.points(grid[part.start : part.stop]))
    corners = tuple((float(x), float(y)) for x, y in plane.corners)
    return PlaneSlice(tuple(xs.tolist()), tuple(ys.tolist()), scores.loss.reshape(size, size), corners)


@dataclass(frozen=True)
class Embedding:
    """A map of K things by their distances.

    Attributes:
        points: Their places, (K, 2), in the distances' unit, centered, in float64.
        explained: Share of the squared distances that the map keeps, in [0, 1].
    """

    points: Tensor
    explained: float


def embed(distances: Tensor) -> Embedding:
    """Classical multidimensional scaling (Torgerson, 1952): places in a plane whose distances are near to those given.

    With B = −½ J D² J, J the centering matrix, the places are the two leading eigenvectors times the roots of their
    eigenvalues. Distances that are no Euclidean ones give negative eigenvalues, too; the share that is explained is λ₁ + λ₂ (as
    far as they are positive) of Σ |λ| (Mardia, 1978). An axis's direction is arbitrary, and is fixed here by the sign of one
    point; where eigenvalues are equal, as those of points that are all equally far apart, so are the axes themselves.

    Args:
        distances: (K, K), symmetric, not negative, with zeros on the diagonal.

    Raises:
        InputError: They are no such matrix.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or len(distances) == 0:
        raise InputError(f"distances must be a square matrix, (K, K), but their shape is {tuple(distances.shape)}")
    given = distances.detach().double().cpu()
    scale = float(given.abs().max())
    sound = bool(torch.isfinite(given).all()) and bool((given >= 0).all())
    if not sound or float((given - given.T).abs().max()) > 1e-6 * scale or float(given.diagonal().max()) > 1e-6 * scale:
        raise InputError("distances must be finite, not negative, symmetric, and zero on the diagonal")
    square = given.square()
    centered = square - square.mean(dim=0) - square.mean(dim=1, keepdim=True) + square.mean()
    values, vectors = torch.linalg.eigh(-(centered + centered.T) / 4)
    points = torch.zeros(len(given), 2, dtype=torch.float64)
    leading = values.flip(0)[:2].clamp_min(0.0)
    points[:, : len(leading)] = vectors.flip(1)[:, :2] * leading.sqrt()
    total = float(values.abs().sum())
    return Embedding(points * _signs(points), float(leading.sum()) / total if total > 0 else 1.0)


def _signs(points: Tensor) -> Tensor:
    """What makes positive the first entry of each column that is at least half as large as its largest one."""
    large = points.abs() >= 0.5 * points.abs().amax(dim=0)
    chosen = points[large.int().argmax(dim=0), torch.arange(points.shape[1])]
    return torch.where(chosen < 0, -1.0, 1.0)
