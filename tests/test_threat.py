"""The space of inputs and the set of allowed changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.threat import InputSpace, Norm, Threat

SPACE = InputSpace(-1.0, 2.0)


def points(seed: int, shape: tuple[int, ...] = (4, 2, 3)) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.rand(shape, generator=random, dtype=torch.float64) - 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    epsilon=st.floats(0, 3),
    far=st.floats(0, 5),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_a_projection_lies_in_ball_and_range_and_leaves_what_lies_there(
    seed: int, epsilon: float, far: float, norm: Norm
) -> None:
    threat, x = Threat(epsilon, norm), points(seed)
    wild = x + far * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    projected = threat.project(wild, x, SPACE)
    assert float(threat.length(projected - x).max()) <= epsilon + 1e-12
    assert float(projected.min()) >= -1
    assert float(projected.max()) <= 2
    torch.testing.assert_close(threat.project(projected, x, SPACE), projected, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), epsilon=st.floats(0.01, 1))
def test_the_projection_onto_a_box_is_the_nearest_of_many_points(seed: int, epsilon: float) -> None:
    threat, x = Threat(epsilon), points(seed, (1, 4))
    wild = x + torch.randn(1, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    nearest = (threat.project(wild, x, SPACE) - wild).norm()
    random = torch.Generator().manual_seed(seed + 2)
    others = (x + epsilon * (2 * torch.rand(300, 4, generator=random, dtype=torch.float64) - 1)).clamp(-1, 2)
    assert float(nearest) <= float((others - wild).norm(dim=1).min()) + 1e-12


def test_lengths_are_those_of_the_definition() -> None:
    delta = torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]])
    assert Threat(1.0, "linf").length(delta).tolist() == [4.0, 1.0]
    assert Threat(1.0, "l2").length(delta).tolist() == [5.0, 1.0]


def test_inputs_are_normalised_by_channel_and_gradients_pass() -> None:
    space = InputSpace(mean=(0.5, 0.25), std=(2.0, 4.0))
    x = torch.rand(3, 2, 4, 5, requires_grad=True)
    given_to_network = space.to_network(x)
    for channel, (mean, std) in enumerate(((0.5, 2.0), (0.25, 4.0))):
        torch.testing.assert_close(given_to_network[:, channel], (x[:, channel] - mean) / std)
    given_to_network.sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0, 0].tolist() == [0.5, 0.25]
    table = InputSpace(mean=(1.0, 2.0), std=(1.0, 2.0)).to_network(torch.tensor([[3.0, 4.0]]))
    assert table.tolist() == [[2.0, 1.0]]
    assert InputSpace().to_network(x) is x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower": 1.0, "upper": 1.0}, "lower < upper"),
        ({"mean": (0.5,), "std": (1.0, 2.0)}, "as many"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "finite"),
        ({"std": (0.0,)}, "positive"),
    ],
)
def test_an_impossible_space_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        InputSpace(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [-0.1, float("inf"), float("nan"), "0.1", True])
def test_an_impossible_radius_is_refused(epsilon: float) -> None:
    with pytest.raises(InputError, match="epsilon"):
        Threat(epsilon)


def test_another_norm_is_refused() -> None:
    with pytest.raises(InputError, match="l2"):
        Threat(0.1, "l1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 3).long(), "floats"),
        (torch.zeros(0, 3), "at least 1"),
        (torch.zeros(3), "floats"),
        ([[0.0]], "list"),
        (torch.tensor([[float("nan")]]), "NaN"),
        (torch.tensor([[1.01]]), "before"),
        (torch.tensor([[-0.2]]), "before"),
    ],
)
def test_inputs_outside_the_space_are_refused(inputs: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InputSpace().check(inputs)


def test_channels_must_be_as_many_as_means() -> None:
    with pytest.raises(InputError, match="3 channels"):
        InputSpace(mean=(0.0, 0.0), std=(1.0, 1.0)).check(torch.zeros(2, 3, 4, 4))
    InputSpace(mean=(0.5,), std=(1.0,)).check(torch.zeros(2, 3, 4, 4))
