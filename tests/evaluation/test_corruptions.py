"""Each corruption of images against its definition: stated rates and angles, and scipy at a finer resolution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor

from stfbnn.evaluation import corruptions
from stfbnn.evaluation.corruptions import IMAGE_CORRUPTIONS, RowDraws
from stfbnn.evaluation.shift import SEVERITY_LEVELS, corrupt

SEVERITIES = range(1, 6)


def smooth(side: int, count: int = 1) -> Tensor:
    """A few waves of at most one period, sampled at pixel centres: the same picture at every resolution."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    picture = 0.5 + 0.2 * torch.sin(5 * at + 1)[:, None] * torch.cos(4 * at) + 0.2 * torch.sin(6 * at)
    return picture.expand(count, 1, -1, -1)


def draws() -> RowDraws:
    return RowDraws(0)


@pytest.mark.parametrize("name", ["gaussian blur", "rotation", "translation"])
def test_severity_means_the_same_at_every_resolution(name: str) -> None:
    apply, level = IMAGE_CORRUPTIONS[name][0], SEVERITY_LEVELS[name][2]
    coarse, fine = (apply(smooth(side, count=6), level, draws()) for side in (16, 64))
    averaged = torch.nn.functional.avg_pool2d(fine, 4)
    moved = (coarse - smooth(16)).abs().mean()
    # The border goes on from the centre of its pixels, which lies further inside where pixels are larger: hence the rest.
    assert (averaged - coarse).abs().mean() < 0.2 * moved


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_the_stated_deviation(severity: int) -> None:
    std, images = SEVERITY_LEVELS["gaussian noise"][severity - 1], torch.full((20, 2, 50, 50), 0.5)
    found = (corruptions.gaussian_noise(images, std, draws()) - images).double()
    # Four standard errors over 100,000 values.
    assert float(found.mean()) == pytest.approx(0, abs=4 * std / math.sqrt(found.numel()))
    assert float(found.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * found.numel()))
    neighbours = torch.corrcoef(torch.stack([found[..., 1:].flatten(), found[..., :-1].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 4 / math.sqrt(found.numel())


def test_gaussian_noise_is_the_same_at_all_severities_but_for_its_size() -> None:
    images = torch.full((3, 1, 6, 6), 0.5)
    small, large = (corruptions.gaussian_noise(images, std, draws()) - images for std in (0.01, 0.04))
    torch.testing.assert_close(large, 4 * small, rtol=0, atol=1e-6)
    first, second = (corrupt(images, "impulse noise", severity) != images for severity in (2, 3))
    assert bool((first <= second).all())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_has_the_mean_and_the_variance_of_counted_photons(severity: int) -> None:
    unit, value = SEVERITY_LEVELS["shot noise"][severity - 1], 0.3
    found = corruptions.shot_noise(torch.full((20, 1, 70, 70), value), unit, draws()).double()
    variance, count = value * unit, found.numel()
    assert float(found.mean()) == pytest.approx(value, abs=4 * math.sqrt(variance / count))
    # A Poisson count of mean m has the fourth central moment 3m² + m, so its sample variance the relative variance (2 + 1/m)/n.
    assert float(found.var()) == pytest.approx(variance, rel=4 * math.sqrt((2 + unit / value) / count))
    assert torch.equal(corrupt(torch.zeros(1, 1, 4, 4), "shot noise", severity), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_the_stated_share_with_black_and_white_alike(severity: int) -> None:
    share, images = SEVERITY_LEVELS["impulse noise"][severity - 1], torch.full((20, 3, 40, 40), 0.4)
    found = corrupt(images, "impulse noise", severity)
    hit, white = (found != images).double(), (found == 1).double()
    assert float(hit.mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / hit.numel()))
    assert float(white.sum() / hit.sum()) == pytest.approx(0.5, abs=2 / math.sqrt(float(hit.sum())))
    assert set(found.unique().tolist()) == {0.0, 1.0, images[0, 0, 0, 0].item()}


# --- blur, light, pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "shape"), [(1, (8, 8)), (3, (8, 11)), (5, (15, 9))])
def test_blur_is_that_of_scipy_at_a_finer_resolution(severity: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(shape)
    finer = 25
    std = SEVERITY_LEVELS["gaussian blur"][severity - 1] * min(shape) * finer
    fine = ndimage.gaussian_filter(np.kron(np.pad(image, 6, mode="edge"), np.ones((finer, finer))), std, truncate=6)
    expected = fine[finer // 2 :: finer, finer // 2 :: finer][6:-6, 6:-6]
    found = corrupt(torch.tensor(image)[None, None], "gaussian blur", severity)[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_blur_of_what_lies_inside_keeps_the_mean() -> None:
    digits = torch.tensor(load_digits().images[:200] / 16).float()[:, None]
    framed = torch.nn.functional.pad(digits, (12, 12, 12, 12))
    blurred = corrupt(framed, "gaussian blur", 5)
    torch.testing.assert_close(blurred.mean((1, 2, 3)), framed.mean((1, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["gaussian blur", "contrast", "rotation", "translation", "pixelate"])
@pytest.mark.parametrize("value", [0.0, 0.37, 1.0])
def test_a_constant_image_stays_constant(name: str, value: float) -> None:
    images = torch.full((4, 3, 9, 13), value)
    torch.testing.assert_close(corrupt(images, name, 5), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_each_channels_mean_and_shrinks_its_deviation(severity: int) -> None:
    images = torch.rand(5, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    found, kept = corrupt(images, "contrast", severity), 1 - SEVERITY_LEVELS["contrast"][severity - 1]
    torch.testing.assert_close(found.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(found.std((2, 3)), kept * images.std((2, 3)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_is_added_up_to_white(severity: int) -> None:
    images, added = torch.tensor([[[[0.0, 0.2], [0.45, 0.95]]]]), SEVERITY_LEVELS["brightness"][severity - 1]
    expected = [min(value + added, 1) for value in images.flatten().tolist()]
    assert corrupt(images, "brightness", severity).flatten().tolist() == pytest.approx(expected)


def test_pixelate_averages_blocks_where_they_fit() -> None:
    images = torch.rand(3, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    for factor in (2, 4):
        blocks = torch.nn.functional.avg_pool2d(images, factor)
        expected = blocks.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        torch.testing.assert_close(corruptions.pixelate(images, 1 - 1 / factor, draws()), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_keeps_the_mean_and_leaves_the_stated_number_of_pixels(severity: int) -> None:
    images = torch.rand(2, 1, 40, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = corrupt(images, "pixelate", severity)
    torch.testing.assert_close(found.mean((1, 2, 3)), images.mean((1, 2, 3)))
    kept = 1 - SEVERITY_LEVELS["pixelate"][severity - 1]
    # What an image of h x w pixels becomes has at most the rank of its shorter side.
    assert [int(torch.linalg.matrix_rank(image)) for image in found[:, 0]] == [round(20 * kept)] * 2


# --- rotation and translation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "shape"), [(1, (8, 8)), (3, (9, 14)), (5, (28, 28))])
def test_rotation_is_that_of_scipy_by_the_stated_angle(severity: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(shape)
    angle = SEVERITY_LEVELS["rotation"][severity - 1]
    turned = [ndimage.rotate(image, sign * angle, reshape=False, order=1, mode="nearest") for sign in (1, -1)]
    found = corrupt(torch.tensor(image).expand(40, 1, -1, -1), "rotation", severity)[:, 0].numpy()
    apart = np.abs(found[:, None] - np.stack(turned)).max((2, 3))
    assert apart.min(1).max() < 1e-9
    # Either side about as often: 40 draws, four standard errors.
    assert 20 - 4 * math.sqrt(10) < (apart[:, 0] < apart[:, 1]).sum() < 20 + 4 * math.sqrt(10)


def test_rotation_by_a_right_angle_moves_pixels_to_pixels() -> None:
    images = torch.rand(12, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    found = corruptions.rotation(images, 90.0, draws())
    sides = [torch.rot90(images, turns, (2, 3)) for turns in (1, -1)]
    apart = torch.stack([(found - side).abs().amax((1, 2, 3)) for side in sides])
    assert float(apart.min(0).values.max()) < 1e-5
    fourfold = sum(torch.rot90(images, turns, (2, 3)) for turns in range(4)) / 4
    torch.testing.assert_close(corruptions.rotation(fourfold, 90.0, draws()), fourfold, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("severity", "shape"), [(1, (8, 8)), (5, (20, 32))])
def test_translation_is_that_of_scipy_by_the_stated_distance(severity: int, shape: tuple[int, int]) -> None:
    image = ndimage.gaussian_filter(np.pad(np.ones((1, 1)), 30), 3.0)[30 - shape[0] // 2 :, 30 - shape[1] // 2 :]
    image = image[: shape[0], : shape[1]] / image.max()
    padded = np.pad(image, 40)
    found = corrupt(torch.tensor(padded).expand(60, 1, -1, -1), "translation", severity)[:, 0].numpy()
    sides = np.array(padded.shape)
    start = np.array(ndimage.center_of_mass(padded))
    shifts = np.array([ndimage.center_of_mass(one) for one in found]) - start
    lengths = np.linalg.norm(shifts / sides, axis=1)
    np.testing.assert_allclose(lengths, SEVERITY_LEVELS["translation"][severity - 1], rtol=1e-6)
    for one, shift in zip(found[:5], shifts, strict=False):
        np.testing.assert_allclose(one, ndimage.shift(padded, shift, order=1, mode="nearest"), atol=1e-6)
    # All directions: the mean of 60 unit vectors is short (its two coordinates have the variance 1/120 each).
    assert np.linalg.norm((shifts / sides / lengths[:, None]).mean(0)) < 4 / math.sqrt(60)
