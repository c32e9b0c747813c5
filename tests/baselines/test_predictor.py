"""What the competitors share: chunks, modes, sizes, and the noise of residuals, against counts and formulas by hand."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core_models import conv_net, mlp
from stfbnn import Categorical, Gaussian
from stfbnn.baselines import PointNetwork, Predictor, Reading, residual_noise
from stfbnn.baselines.predictor import (
    call_network,
    collect_outputs,
    evaluating,
    input_chunks,
    parameter_count,
    require_count,
    require_likelihood,
    state_bytes,
)
from stfbnn.errors import InputError

CPU = torch.device("cpu")


def test_chunks_are_the_same_however_the_data_are_batched() -> None:
    x = torch.randn(1500, 5, generator=torch.Generator().manual_seed(0))
    whole = list(input_chunks(x, CPU))
    for size in (7, 64, 1500):
        batches = [(part, torch.zeros(len(part))) for part in x.split(size)]
        parts = list(input_chunks(batches, CPU))
        assert [len(part) for part in parts] == [len(part) for part in whole]
        assert torch.equal(torch.cat(parts), x)
    assert len(whole) > 1


def test_mappings_lose_target_and_weight_and_tuples_without_targets_can_be_said() -> None:
    x = torch.randn(4, 2)
    reading = Reading(target_key="y", weight_key="w")
    (chunk,) = input_chunks([{"x": x, "y": torch.zeros(4), "w": torch.ones(4)}], CPU, reading)
    assert list(chunk) == ["x"]
    (pair,) = input_chunks([(x, 2 * x)], CPU, Reading(has_targets=False))
    assert torch.equal(pair[1], 2 * x)


@pytest.mark.parametrize("data", [[], torch.full((3, 2), math.nan), torch.zeros(0, 2), np.zeros((3, 2)), 3])
def test_bad_data_are_refused(data: Any) -> None:
    with pytest.raises(InputError):
        list(input_chunks(data, CPU))


def test_a_network_that_writes_into_its_inputs_leaves_the_users_data_alone() -> None:
    x = torch.randn(10, 3)
    before = x.clone()
    PointNetwork(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), Categorical()).outputs(x)
    assert torch.equal(x, before)


def test_evaluation_mode_ends_with_the_block_for_every_module_and_after_an_error() -> None:
    net = conv_net()
    net[1].train()
    net[6].train()
    modes = [module.training for module in net.modules()]
    inside = []

    def fails() -> None:
        with evaluating(net):
            inside.extend(module.training for module in net.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not any(inside)
    assert [module.training for module in net.modules()] == modes


def test_outputs_that_do_not_fit_together_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match=r"member 0 gives \(4, 3\) and member 1 \(4, 2\)"):
        collect_outputs(lambda _, chunk: [chunk, chunk[:, :2]], [x])
    with pytest.raises(InputError, match="one row for each of the 4 examples"):
        call_network(lambda inputs: inputs.sum(0), x)


def test_parameters_and_bytes_count_what_is_tied_once() -> None:
    net = conv_net()
    assert parameter_count(net) == 4 * 9 + 2 * 4 + 6 * 4 * 9 + 6 + 2 * 6 + 24 * 3 + 3
    net[0].weight.requires_grad_(False)
    assert parameter_count(net) == 2 * 4 + 6 * 4 * 9 + 6 + 2 * 6 + 24 * 3 + 3
    buffers = 2 * 4 * 4 + 8 + 2 * 6 * 4 + 8
    assert state_bytes(net) == 4 * (4 * 9 + 2 * 4 + 6 * 4 * 9 + 6 + 2 * 6 + 24 * 3 + 3) + buffers
    tied = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    tied[1].weight = tied[0].weight
    assert parameter_count(tied) == 25 + 10
    assert state_bytes(tied) == 4 * 35
    # A file holds that much and its own structure.
    file = io.BytesIO()
    torch.save(mlp(50, 200, 30).state_dict(), file)
    assert state_bytes(mlp(50, 200, 30)) == pytest.approx(len(file.getvalue()), rel=0.1)


def test_the_noise_of_residuals_is_their_root_mean_square_and_the_most_likely_one() -> None:
    random = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(50, generator=random), torch.randn(50, generator=random)
    noise = residual_noise(outputs.unsqueeze(1), targets)
    assert noise == pytest.approx(float(np.sqrt(np.mean((targets - outputs).numpy() ** 2))), rel=1e-5)

    def likelihood(std: float) -> float:
        return float(Gaussian(noise_std=std).log_prob(outputs, targets).sum())

    assert isinstance(noise, float)
    assert likelihood(noise) > max(likelihood(1.01 * noise), likelihood(0.99 * noise))
    columns = residual_noise(torch.zeros(3, 2), torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    assert columns == pytest.approx([math.sqrt(3), math.sqrt(2 / 3)])
    assert 0 < residual_noise(targets, targets) < 1e-5


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(4), torch.zeros(3)),
        (torch.zeros(4, 2), torch.zeros(4)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2), torch.tensor([1.0, math.inf])),
    ],
)
def test_residuals_without_a_size_are_refused(outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(InputError):
        residual_noise(outputs, targets)


def test_arguments_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(InputError, match="must be an object"):
        require_likelihood("categorical")
    with pytest.raises(InputError, match="no noise yet"):
        require_likelihood(Gaussian())
    for bad in (0, True, 1.0, "1"):
        with pytest.raises(InputError, match="samples"):
            require_count(bad, "samples")
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        PointNetwork("net", Categorical())


def test_a_point_network_is_a_predictor_with_one_member_and_no_epistemic_uncertainty() -> None:
    net = conv_net()
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(x)
    net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    network = PointNetwork(net, Categorical())
    assert isinstance(network, Predictor)
    found = network.outputs([(part, torch.zeros(len(part))) for part in x.split(4)])
    assert torch.allclose(found.outputs[0], expected, atol=1e-6)
    assert found.at().epistemic.abs().max() == 0
    assert found.at_mean
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert network.artifact_bytes == 0
    assert PointNetwork(net, Categorical(), users_network=False).artifact_bytes == state_bytes(net)


def test_outputs_are_read_as_the_user_says() -> None:
    class Several(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"answer": a - b}

    a, b = torch.randn(5, 3), torch.randn(5, 3)
    network = PointNetwork(Several(), Categorical(), reading=Reading(output=lambda raw: raw["answer"]))
    assert torch.equal(network.outputs((a, b)).outputs[0], a - b)
    assert torch.equal(network.outputs({"a": a, "b": b}).outputs[0], a - b)


def test_the_competitors_are_imported_without_the_benchmark_or_optional_packages_and_in_no_circle() -> None:
    code = (
        "import sys, stfbnn.baselines, stfbnn.evaluation.evaluate; "
        "print([name for name in ('stfbnn.benchmark', 'laplace', 'torchvision', 'timm') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stderr
