"""The Bayesian network: exact at the mean, random otherwise, frozen always."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from core_models import conv_net, mlp
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError, LayerError, ModelChangedError
from stfbnn.prior import Normal

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def kinds() -> list[tuple[str, nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (8, 5))
    return [
        ("linear", mlp(), X),
        ("the model is the layer", nn.Linear(6, 2), X),
        ("convolution and batch norm", conv_net(), IMAGES),
        ("batch norm first", nn.Sequential(nn.BatchNorm1d(6), mlp()).eval(), X),
        ("conv1d", nn.Sequential(nn.Conv1d(1, 3, 3, padding=1, padding_mode="circular"), nn.Flatten()), X[:, None]),
        ("transposed", nn.Sequential(nn.ConvTranspose2d(1, 2, 3, stride=2), nn.BatchNorm2d(2)).eval(), IMAGES),
        ("embedding", nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(20, 3)), tokens),
        ("parametrised", nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh()), X),
        ("called twice", Twice(), X),
        ("float64", mlp().double(), X.double()),
    ]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(x[:, :3]) * self.shared(x[:, 3:])


@pytest.mark.parametrize("case", range(len(kinds())), ids=[name for name, *_ in kinds()])
def test_the_mean_is_the_model(case: int) -> None:
    _, model, x = kinds()[case]
    bnn = bayesianize(model, x[:2])
    model.eval()
    torch.testing.assert_close(bnn(x, weights="mean"), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", range(len(kinds())), ids=[name for name, *_ in kinds()])
def test_a_draw_is_the_model_with_other_weights(case: int) -> None:
    _, model, x = kinds()[case]
    bnn = bayesianize(model, x[:2], prior=0.5)
    vector = bnn.posterior.draw(bnn.draw_noise(torch.Generator().manual_seed(3))).detach()
    other = copy.deepcopy(model).eval()
    layer = other.get_submodule(bnn.layer_name)
    with torch.no_grad():
        for name, value in bnn.layout.unflatten(vector).items():
            dict(layer.named_parameters())[name].copy_(value)
    expected = other(x)
    torch.testing.assert_close(bnn.outputs(vector, x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model(x), atol=1e-5)


def test_draws_of_a_linear_layer_have_the_right_moments() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 2)
    bnn = bayesianize(layer, X, prior=2.0)
    x = X[:1]
    noise = torch.randn(100_000, bnn.posterior.noise_size, generator=torch.Generator().manual_seed(0))
    outputs = torch.vmap(lambda w: bnn.outputs(w, x))(bnn.posterior.draw(noise).detach())[:, 0]
    std = bnn.posterior.std()
    expected = (x.square() @ std["weight"].square().T + std["bias"].square()).sqrt()[0]
    # 5 standard errors.
    assert ((outputs.mean(0) - layer(x)[0]).abs() < 5 * expected / 100_000**0.5).all()
    assert ((outputs.std(0) / expected - 1).abs() < 5 / 200_000**0.5).all()


def test_each_call_is_a_fresh_draw_from_an_own_generator() -> None:
    bnn = bayesianize(mlp(), X[:2], prior=2.0)
    state = torch.get_rng_state()
    first, second = bnn(X), bnn(X)
    assert not torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    bnn.seed(0)
    assert torch.equal(bnn(X), first)
    for mode in (bnn.eval(), bnn.train()):
        assert not torch.equal(mode(X), mode(X))


def test_gradients_reach_inputs_and_posterior_only() -> None:
    bnn = bayesianize(conv_net(), IMAGES[:2])
    x = IMAGES.clone().requires_grad_()
    bnn(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).any()
    for name, parameter in bnn.named_parameters():
        if name.startswith("posterior"):
            assert parameter.grad is not None
            assert (parameter.grad != 0).all(), name
        else:
            assert parameter.grad is None
            assert not parameter.requires_grad


def test_train_never_thaws_the_trunk() -> None:
    net = conv_net()
    bnn = bayesianize(net, IMAGES[:2])
    before = bnn(IMAGES, weights="mean")
    statistics = net[1].running_mean.clone()
    bnn.train()
    assert bnn.training
    assert torch.equal(bnn(IMAGES, weights="mean"), before)
    assert torch.equal(net[1].running_mean, statistics)
    assert not any(module.training for module in bnn.network.modules())
    bnn.train(False)
    assert not bnn.training
    with pytest.raises(InputError, match="boolean"):
        bnn.train("yes")  # type: ignore[arg-type]


def test_tensors_are_shared_and_moves_are_not() -> None:
    net = mlp()
    bnn = bayesianize(net, X[:2])
    assert bnn.network[2].weight.data_ptr() == net[2].weight.data_ptr()
    bnn.to(torch.float64)
    assert net[2].weight.dtype == torch.float32
    assert bnn(X.double(), weights="mean").dtype == torch.float64


def test_changing_the_model_is_noticed() -> None:
    net = conv_net()
    bnn = bayesianize(net, IMAGES[:2])
    net.train()(IMAGES)  # batch-norm statistics
    with pytest.raises(ModelChangedError):
        bnn(IMAGES)


def test_folding_is_said_and_can_be_switched_off() -> None:
    on, off = bayesianize(conv_net(), IMAGES[:2]), bayesianize(conv_net(), IMAGES[:2], fold_batch_norm=False)
    assert len(on.folding.folded) == 2
    assert not off.folding.folded
    torch.testing.assert_close(on(IMAGES), off(IMAGES), rtol=1e-4, atol=1e-5)


def test_copies_keep_the_posterior() -> None:
    bnn = bayesianize(mlp(), X[:2])
    twin = copy.deepcopy(bnn)
    assert torch.equal(twin(X), bnn(X))
    buffer = io.BytesIO()
    torch.save(bnn.state_dict(), buffer)
    other = bayesianize(mlp(), X[:2], prior=3.0)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(other.posterior.std_vector(), bnn.posterior.std_vector())
    assert torch.equal(other.prior.std, bnn.prior.std)


def test_default_priors() -> None:
    net = mlp()
    prior = bayesianize(net, X[:2]).prior
    weights = torch.cat([net[0].weight.flatten(), net[0].bias])
    assert float(prior.std) == pytest.approx(float(weights.square().mean().sqrt().detach()))
    assert not prior.mean.any()
    embedding = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 2))
    assert bayesianize(embedding, torch.zeros(1, 2).long()).prior_recipe.center == "pretrained"
    assert bayesianize(net, X[:2], prior=Normal(0.2, "pretrained")).prior_recipe.std == 0.2


def test_tied_weights_are_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens).mean(1))

    model, tokens = Tied(), torch.zeros(2, 3).long()
    with pytest.warns(UserWarning, match=r"head\.weight"):
        bnn = bayesianize(model, tokens, prior=1.0)
    vector = torch.zeros(28)
    # Only the embedding is replaced: with zero embeddings the trained head gives zero; a replaced head would too, so shift.
    assert torch.equal(bnn.outputs(vector, tokens), torch.zeros(2, 7))
    expected = torch.nn.functional.linear(torch.ones(2, 4), model.head.weight)
    torch.testing.assert_close(bnn.outputs(torch.ones(28), tokens), expected)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="Module"):
        bayesianize(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tensor"):
        bayesianize(mlp(), "text")
    with pytest.raises(LayerError, match="nope"):
        bayesianize(mlp(), X, layer="nope")
    with pytest.raises(InputError, match="weights must be"):
        bayesianize(mlp(), X)(X, weights="map")
    broken = mlp()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(LayerError, match="NaN"):
        bayesianize(broken, X)


def test_print_tells_what_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = repr(bayesianize(mlp(), X[:2]))
    assert "layer='0'" in text
    assert "random weights=84 of 123" in text
    assert "not fitted" in text
