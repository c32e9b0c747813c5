"""Merging: a plain network of the user's class, with the posterior's mean in its first layer."""

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core_models import conv_net, mlp
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError, ModelChangedError, NotFittedError
from stfbnn.likelihood import Categorical
from stfbnn.merging import merge
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture
from stfbnn.prediction import predict

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 20, (8, 5), generator=torch.Generator().manual_seed(2))


class Tied(nn.Module):
    """A language model in small: the head's weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4, padding_idx=0)
        self.head = nn.Linear(4, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


class TwiceHeld(nn.Module):
    """The layer is one module under two names, and holds one parameter under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
        self.first[2].weight = self.first[0].weight
        self.again = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.first(x)))


def moved(bnn: BayesianNetwork) -> BayesianNetwork:
    """As `fit` leaves it, with a mean that is far from the trained weights."""
    bnn.likelihood, bnn.temperature, bnn.predictive_temperature = Categorical(), 0.3, 1.4
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in bnn.posterior.parameters():
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return bnn


def kinds() -> list[tuple[str, nn.Module, Tensor, dict[str, Any]]]:
    torch.manual_seed(0)
    return [
        ("linear", mlp(), X, {}),
        ("another layer", mlp(), X, {"layer": "2"}),
        ("the model is the layer", nn.Linear(6, 3), X, {}),
        ("not folded", conv_net(), IMAGES, {"fold_batch_norm": False}),
        ("embedding", nn.Sequential(nn.Embedding(20, 4, padding_idx=3), nn.Flatten(), nn.Linear(20, 3)), TOKENS, {}),
        ("parametrised", nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3)), X, {}),
        ("half precision", mlp().bfloat16(), X.bfloat16(), {}),
        ("low-rank", mlp(), X, {"posterior": "low-rank"}),
    ]


@pytest.mark.parametrize("case", range(len(kinds())), ids=[name for name, *_ in kinds()])
def test_a_merged_network_computes_exactly_what_the_posterior_computes_at_its_mean(case: int) -> None:
    _, model, x, options = kinds()[case]
    model.eval()
    before = model(x)
    bnn = moved(bayesianize(model, x[:2], **options))
    merged = merge(bnn)
    assert type(merged) is type(model)
    assert torch.equal(merged(x), bnn(x, weights="mean"))
    assert not torch.equal(merged(x), before), "the case is to have a mean that is not the trained layer"
    assert torch.equal(model(x), before)
    bnn.check_unchanged()


def test_batch_norms_are_the_users_again_and_outputs_agree_up_to_rounding() -> None:
    model = conv_net()
    bnn = moved(bayesianize(model, IMAGES[:2]))
    assert len(bnn.folding.folded) == 2
    merged = merge(bnn)
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    assert merged.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(merged(IMAGES), bnn(IMAGES, weights="mean"), rtol=1e-4, atol=1e-5)
    prediction = predict(bnn, IMAGES, weights="mean").probs
    tau = bnn.predictive_temperature
    torch.testing.assert_close((merged(IMAGES) / tau).softmax(1).double(), prediction.double(), rtol=1e-4, atol=1e-5)
    changed = [name for name, value in merged.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert changed == ["0.weight"]


def test_the_copy_shares_no_memory_and_keeps_modes_gradients_and_hooks() -> None:
    model = conv_net()
    model[1].train()
    model[3].requires_grad_(False)
    model[0].weight.requires_grad_(False)
    seen: list[int] = []
    model[9].register_forward_hook(lambda *_: seen.append(1))
    model.train(False)
    bnn = moved(bayesianize(model, IMAGES[:2]))
    model[6].train()
    merged = merge(bnn)
    assert [module.training for module in merged.modules()] == [module.training for module in model.modules()]
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in merged.named_parameters()} == wanted
    others = {tensor.data_ptr() for tensor in (*model.state_dict().values(), *bnn.state_dict().values())}
    assert not others & {tensor.data_ptr() for tensor in merged.state_dict().values()}
    seen.clear()
    merged(IMAGES)
    assert seen == [1]


def test_writing_to_the_merged_network_changes_neither_the_model_nor_the_posterior() -> None:
    model = mlp().eval()
    bnn = moved(bayesianize(model, X[:2]))
    before = bnn(X, weights="mean")
    merged = merge(bnn)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(1.0)
    assert torch.equal(bnn(X, weights="mean"), before)


def test_a_tied_layer_is_untied_with_a_warning() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    with pytest.warns(UserWarning, match=r"shares parameters with head\.weight"):
        bnn = bayesianize(model, TOKENS[:2])
    moved(bnn)
    with pytest.warns(UserWarning, match=r"no longer tied to head\.weight"):
        merged = merge(bnn)
    assert torch.equal(merged(TOKENS), bnn(TOKENS, weights="mean"))
    assert torch.equal(merged.head.weight, model.head.weight)
    assert not torch.equal(merged.embedding.weight[1:], merged.head.weight[1:])
    assert torch.equal(merged.embedding.weight[0], model.embedding.weight[0]), "the padding row keeps its trained value"


def test_one_module_under_two_names_stays_one() -> None:
    torch.manual_seed(0)
    model = TwiceHeld().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnn = bayesianize(model, X[:2], layer="first")
    moved(bnn)
    merged = merge(bnn)
    assert merged.again is merged.first
    assert merged.first[0].weight is merged.first[2].weight
    assert torch.equal(merged(X), bnn(X, weights="mean"))


def test_the_mean_of_a_mixture_warns() -> None:
    model = mlp().eval()
    bnn = moved(bayesianize(model, X[:2], posterior=Mixture(components=2)))
    with pytest.warns(UserWarning, match="between disparate optima"):
        merged = merge(bnn)
    assert torch.equal(merged(X), bnn(X, weights="mean"))


def test_a_model_that_is_gone_is_asked_for_and_checked() -> None:
    bnn = moved(bayesianize(mlp(), X[:2]))
    with pytest.raises(InputError, match="was deleted"):
        merge(bnn)
    with pytest.raises(InputError, match="is not the model"):
        merge(bnn, mlp(seed=1))
    with pytest.raises(InputError, match="must be a torch"):
        merge(bnn, "model")  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(bnn))  # noqa: S301 - made in the line itself
    assert torch.equal(merge(again, nn.DataParallel(mlp()))(X), bnn(X, weights="mean"))


def test_what_cannot_be_merged_is_refused() -> None:
    model = mlp()
    with pytest.raises(InputError, match="given a Sequential"):
        merge(model)  # type: ignore[arg-type]
    bnn = bayesianize(model, X[:2])
    with pytest.raises(NotFittedError):
        merge(bnn)
    moved(bnn)
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(ModelChangedError):
        merge(bnn)
