"""The built-in networks: sizes against the literature, behaviour against plain functions."""

import pytest
import torch
from torch.nn import functional as F

from stfbnn import models
from stfbnn.errors import InputError


def test_resnet20_has_the_parameters_of_the_paper():
    # 0.27 M in He et al. (2016), table 6; counted by hand for option A, 3 channels, 10 classes.
    model = models.resnet20((3, 32, 32), 10)
    convolutions = 3 * 16 * 9 + 6 * 16 * 16 * 9 + 16 * 32 * 9 + 5 * 32 * 32 * 9 + 32 * 64 * 9 + 5 * 64 * 64 * 9
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert sum(p.numel() for p in model.parameters()) == convolutions + norms + 64 * 10 + 10 == 269_722


def test_resnet20_halves_the_image_twice_and_ends_in_logits():
    model = models.resnet20((3, 32, 32), 7).eval()
    blocks = [module for module in model if isinstance(module, models.BasicBlock)]
    assert len(blocks) == 9
    assert [block.stride for block in blocks] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    torch.manual_seed(0)
    block = models.BasicBlock(2, 6, stride=2).eval()
    for convolution in (block.conv1, block.conv2):
        torch.nn.init.zeros_(convolution.weight)
    x = torch.randn(3, 2, 5, 4)
    expected = torch.zeros(3, 6, 3, 2)
    for row in range(3):
        for column in range(2):
            expected[:, 2:4, row, column] = x[:, :, 2 * row, 2 * column].clamp_min(0)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 33, 30), (1, 4, 4)])
def test_lenet_takes_images_of_many_sizes(shape):
    assert models.lenet(shape, 5)(torch.randn(2, *shape)).shape == (2, 5)


def test_mlp_is_the_plain_formula_and_scales_a_regression():
    torch.manual_seed(0)
    model = models.mlp([3], 2, hidden=5, depth=1, target_mean=[10.0, -4.0], target_std=[2.0, 0.5])
    x = torch.randn(6, 3)
    _, first, _, last, _ = model
    hidden = F.relu(x @ first.weight.T + first.bias)
    raw = hidden @ last.weight.T + last.bias
    expected = torch.stack([raw[:, 0] * 2 + 10, raw[:, 1] * 0.5 - 4], dim=1)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert [name for name, _ in models.mlp([3], 2, depth=3).named_parameters()][::2] == [
        f"{i}.weight" for i in (1, 3, 5, 7)
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.lenet((13,), 3), "stfbnn.models:mlp"),
        (lambda: models.resnet20((3, 2, 2), 3), "at least 4x4"),
        (lambda: models.mlp((3,), 0), "num_classes must be positive"),
        (lambda: models.mlp((3,), 2, hidden=0), "hidden must be positive"),
        (lambda: models.mlp((3,), 2, target_mean=[0.0]), "both target_mean and target_std"),
    ],
)
def test_impossible_sizes_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
