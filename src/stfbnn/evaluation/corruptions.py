"""What can happen to an image: nine corruptions of five severities each, for images of any size and channel count.

They are those of Hendrycks and Dietterich (2019) that have a definition in a line, and rotation and translation beside them,
at levels of our own: figures are not to be set beside published ones on CIFAR-10-C. Ours, because the package that carries
theirs, imagecorruptions, needs OpenCV and takes 8-bit images of one or three channels and 32 pixels or more.

Lengths are shares of the image's sides, so that a severity does the same to a picture whether it is stored in 8x8 or in
32x32 pixels; only pixelate takes a share of the resolution that there is. Beyond its border an image goes on as its
outermost pixels, which is right for a dark background and invents no edge in a photograph.

:func:`stfbnn.evaluation.shift.corrupt` is the way in: it checks its arguments, and clips what comes from here to [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from scipy.ndimage import correlate1d
from scipy.special import ndtr
from torch import Tensor
from torch.nn.functional import grid_sample

from stfbnn.randomness import generator


@dataclass(frozen=True)
class RowDraws:
    """The random numbers of each example: they follow from a seed and the example's index alone.

    So they depend neither on how examples are batched nor on the severity: an example meets the same noise at all
    severities, only more of it, and a curve over severities is smoother for it.

    Attributes:
        seed: A seed of this corruption's own.
        first_row: Index of the first example of this batch among all.
    """

    seed: int
    first_row: int = 0

    def generator(self, row: int) -> torch.Generator:
        """The generator of the example at ``row`` of this batch."""
        return generator(self.seed, self.first_row + row)

    def uniform(self, rows: int, *shape: int) -> Tensor:
        """Numbers from [0, 1), (rows, *shape), float32."""
        return torch.stack([torch.rand(shape, generator=self.generator(row)) for row in range(rows)])

    def normal(self, rows: int, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape), float32."""
        return torch.stack([torch.randn(shape, generator=self.generator(row)) for row in range(rows)])


ImageCorruption: TypeAlias = Callable[[Tensor, float, RowDraws], Tensor]
"""From images (N, C, H, W) in [0, 1], a level of the severity's own unit, and draws, to images not yet clipped."""


def gaussian_noise(images: Tensor, std: float, draws: RowDraws) -> Tensor:
    """Add independent normal noise of standard deviation ``std`` to every value."""
    return images + std * draws.normal(*images.shape).to(images.dtype)


def shot_noise(images: Tensor, inverse_photons: float, draws: RowDraws) -> Tensor:
    """Count photons: a value x becomes Poisson(x / u) · u, of mean x and variance x · u, u being ``inverse_photons``."""
    counts = [torch.poisson(image / inverse_photons, draws.generator(row)) for row, image in enumerate(images)]
    return torch.stack(counts) * inverse_photons


def impulse_noise(images: Tensor, share: float, draws: RowDraws) -> Tensor:
    """Replace each value with probability ``share`` by 0 or 1, either as likely ("salt and pepper")."""
    uniform = draws.uniform(len(images), 2, *images.shape[1:])
    hit, side = uniform[:, 0] < share, (uniform[:, 1] < 0.5).to(images.dtype)
    return torch.where(hit, side, images)


def gaussian_blur(images: Tensor, width: float, draws: RowDraws) -> Tensor:  # noqa: ARG001 - nothing is random here
    """Blur with a Gaussian of standard deviation ``width`` times the shorter side.

    The Gaussian is integrated over each pixel, not sampled at its centre, for it may be narrower than a pixel.
    """
    std = width * min(images.shape[-2:])
    reach = math.ceil(4 * std + 0.5)
    edges = torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5
    weights = torch.from_numpy(ndtr(edges.numpy() / std)).diff()
    weights /= weights.sum()
    blurred = images.numpy()
    for axis in (-2, -1):
        blurred = correlate1d(blurred, weights.numpy(), axis=axis, mode="nearest")
    return torch.from_numpy(blurred)


def contrast(images: Tensor, lost: float, draws: RowDraws) -> Tensor:  # noqa: ARG001 - nothing is random here
    """Move every value the share ``lost`` of the way to the mean of its channel in its image."""
    return images.lerp(images.mean((-2, -1), keepdim=True), lost)


def brightness(images: Tensor, added: float, draws: RowDraws) -> Tensor:  # noqa: ARG001 - nothing is random here
    """Add ``added`` to every value."""
    return images + added


def rotation(images: Tensor, degrees: float, draws: RowDraws) -> Tensor:
    """Turn each image by ``degrees`` about its centre, one half of them to the left and the other to the right."""
    angle = math.radians(degrees) * (1 - 2 * (draws.uniform(len(images)) < 0.5).to(images.dtype))
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    down, right = _centred(images)
    return _sampled(images, cos * down - sin * right, sin * down + cos * right)


def translation(images: Tensor, distance: float, draws: RowDraws) -> Tensor:
    """Move each image in a direction of its own by ``distance``, a share of its sides (of each its own)."""
    angle = 2 * math.pi * draws.uniform(len(images)).to(images.dtype)
    down, right = _centred(images)
    height, width = images.shape[-2:]
    along = distance * torch.stack([height * angle.sin(), width * angle.cos()])[..., None, None]
    return _sampled(images, down - along[0], right - along[1])


def pixelate(images: Tensor, lost: float, draws: RowDraws) -> Tensor:  # noqa: ARG001 - nothing is random here
    """Show each image in fewer, larger pixels: each side keeps the share 1 − ``lost`` of their number, rounded.

    Both steps average over areas, so nothing is left out where the large pixels do not end where the small ones do.
    """
    height, width = images.shape[-2:]
    rows, columns = (_coarsened(side, max(round(side * (1 - lost)), 1)).to(images.dtype) for side in (height, width))
    return rows @ images @ columns.T


IMAGE_CORRUPTIONS: Mapping[str, tuple[ImageCorruption, tuple[float, ...]]] = MappingProxyType(
    {
        "gaussian noise": (gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
        "shot noise": (shot_noise, (1 / 200, 1 / 80, 1 / 40, 1 / 20, 1 / 10)),
        "impulse noise": (impulse_noise, (0.02, 0.05, 0.09, 0.15, 0.25)),
        "gaussian blur": (gaussian_blur, (0.03, 0.045, 0.06, 0.08, 0.1)),
        "contrast": (contrast, (0.2, 0.4, 0.55, 0.7, 0.85)),
        "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
        "rotation": (rotation, (7.0, 14.0, 21.0, 28.0, 35.0)),
        "translation": (translation, (0.03, 0.06, 0.09, 0.12, 0.15)),
        "pixelate": (pixelate, (0.15, 0.3, 0.45, 0.6, 0.75)),
    }
)
"""Each corruption and its level at the severities 1 to 5, in the unit that its function names."""


def _centred(images: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' coordinates from the image's centre, in pixels: down (H, 1) and right (1, W)."""
    down, right = (torch.arange(side, dtype=images.dtype) - (side - 1) / 2 for side in images.shape[-2:])
    return down[:, None], right[None, :]


def _sampled(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The images at a point for each pixel, in pixels from the centre down and right, bilinear, the border going on outside."""
    count, _, height, width = images.shape
    scaled = (right * (2 / width), down * (2 / height))
    grid = torch.stack([axis.expand(count, height, width) for axis in scaled], dim=-1)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _coarsened(fine: int, coarse: int) -> Tensor:
    """The matrix that averages ``fine`` pixels into ``coarse`` ones and draws these in ``fine`` again, float64."""
    small, large = (torch.arange(count + 1, dtype=torch.float64) / count for count in (fine, coarse))
    ends = torch.minimum(large[1:, None], small[None, 1:])
    overlaps = (ends - torch.maximum(large[:-1, None], small[None, :-1])).clamp(min=0)
    return (overlaps * fine).T @ (overlaps * coarse)
