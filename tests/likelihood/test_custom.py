"""A likelihood from the user's functions."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Laplace

from stfbnn.errors import InputError
from stfbnn.likelihood import Categorical, CustomLikelihood, build_likelihood, resolve_likelihood

OUTPUTS, TARGETS = torch.randn(10, 2), torch.randn(10, 2)


def laplace(outputs: Tensor, targets: Tensor) -> Tensor:
    return Laplace(outputs, 0.5).log_prob(targets).sum(1)


def draw(outputs: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(outputs.shape, generator=generator) - 0.5
    return outputs - 0.5 * uniform.sign() * (-2 * uniform.abs()).log1p()


def test_density_is_what_the_function_says() -> None:
    likelihood = CustomLikelihood(laplace)
    likelihood.check(OUTPUTS, TARGETS)
    torch.testing.assert_close(likelihood.log_prob(OUTPUTS, TARGETS), laplace(OUTPUTS, TARGETS))
    assert likelihood.log_prob(OUTPUTS.half(), TARGETS).dtype == torch.float32


def test_samples_are_the_functions_with_its_generator() -> None:
    likelihood = CustomLikelihood(laplace, sample=draw)
    found = likelihood.sample(OUTPUTS, torch.Generator().manual_seed(3))
    assert torch.equal(found, draw(OUTPUTS, torch.Generator().manual_seed(3)))
    with pytest.raises(InputError, match="sample="):
        CustomLikelihood(laplace).sample(OUTPUTS, torch.Generator())


def test_the_curvature_is_measured_at_draws_or_else_at_the_targets() -> None:
    generator = torch.Generator().manual_seed(3)
    assert CustomLikelihood(laplace).curvature_targets(OUTPUTS, TARGETS, generator) is TARGETS
    found = CustomLikelihood(laplace, draw).curvature_targets(OUTPUTS, TARGETS, generator)
    assert torch.equal(found, draw(OUTPUTS, torch.Generator().manual_seed(3)))
    # Likewise for the library's own.
    logits, labels = torch.zeros(500, 3), torch.zeros(500).long()
    assert Categorical().curvature_targets(logits, labels, generator).unique().tolist() == [0, 1, 2]


def test_the_users_check_is_asked() -> None:
    def check(outputs: Tensor, targets: Tensor) -> None:
        if bool((targets < 0).any()):
            raise InputError("targets must be positive")

    likelihood = CustomLikelihood(laplace, check=check)
    likelihood.check(OUTPUTS, TARGETS.abs())
    with pytest.raises(InputError, match="positive"):
        likelihood.check(OUTPUTS, -TARGETS.abs())


@pytest.mark.parametrize(
    ("log_prob", "message"),
    [
        (lambda outputs, targets: laplace(outputs, targets).mean(), r"shape \(10,\).*returned \(\)"),
        (lambda outputs, targets: Laplace(outputs, 0.5).log_prob(targets), r"returned \(10, 2\)"),
        (lambda outputs, targets: 3.0, "returned float"),
        (lambda outputs, targets: laplace(outputs, targets).long(), "int64"),
        (lambda outputs, targets: laplace(outputs.detach(), targets), "differentiable"),
        (lambda outputs, targets: laplace(outputs, targets) * torch.nan, "NaN"),
        (lambda outputs, targets: laplace(outputs, targets) - torch.inf, "infinite"),
    ],
)
def test_refuses_what_is_no_log_density(log_prob: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CustomLikelihood(log_prob).check(OUTPUTS, TARGETS)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["log_prob", "sample", "check"])
def test_refuses_what_cannot_be_called(argument: str) -> None:
    with pytest.raises(InputError, match=f"{argument}= must be a function"):
        CustomLikelihood(**{"log_prob": laplace, argument: 3})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="log_prob="):
        CustomLikelihood(None)  # type: ignore[arg-type]


def test_it_is_named_but_not_built_by_its_name() -> None:
    likelihood = CustomLikelihood(laplace)
    config = likelihood.config()
    assert config["log_prob"].endswith("test_custom.laplace")
    assert config["sample"] is None
    assert likelihood.rebuilt(config).log_prob(OUTPUTS, TARGETS).shape == (10,)
    with pytest.raises(InputError, match="functions"):
        build_likelihood("custom", config)
    with pytest.raises(InputError, match="CustomLikelihood"):
        resolve_likelihood("custom", TARGETS)


def test_a_module_as_function_is_copied_and_moved() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return Laplace(outputs, self.scale).log_prob(targets).sum(1)

    given = CustomLikelihood(Scaled())
    copied = copy.deepcopy(given).double()
    assert [parameter.dtype for parameter in copied.parameters()] == [torch.float64]
    assert [parameter.dtype for parameter in given.parameters()] == [torch.float32]
    torch.testing.assert_close(given.log_prob(OUTPUTS, TARGETS), laplace(OUTPUTS, TARGETS))
