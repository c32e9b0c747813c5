"""Monte Carlo dropout against the enumeration of all masks, and its masks against what it promises of them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp
from stfbnn import Categorical, Gaussian
from stfbnn.baselines import MCDropout, Predictor, with_dropout
from stfbnn.baselines.predictor import parameter_count, state_bytes
from stfbnn.errors import InputError


def dropping(p: float = 0.3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 3)).eval()


def test_the_average_approaches_that_over_all_masks() -> None:
    torch.manual_seed(1)
    p, head = 0.4, nn.Linear(4, 3)
    x = torch.randn(5, 4)
    mean = torch.zeros(5, 3)
    second = torch.zeros(5, 3)
    with torch.no_grad():
        for mask in itertools.product((0.0, 1.0), repeat=4):
            share = math.prod(1 - p if kept else p for kept in mask)
            probs = head(x * torch.tensor(mask) / (1 - p)).softmax(1)
            mean += share * probs
            second += share * probs.square()
    # Rows have masks of their own, so that copies of the examples are as good as members.
    copies, samples = 500, 20
    dropout = MCDropout(nn.Sequential(nn.Dropout(p), head), Categorical(), samples=samples)
    found = dropout.outputs(x.repeat(copies, 1)).at().probs.view(copies, 5, 3).mean(0)
    error = ((second - mean.square()) / (samples * copies)).sqrt()
    assert ((found - mean).abs() < 4.5 * error).all()
    assert error.max() < 0.01


def test_a_seed_fixes_the_masks_whatever_the_batches_and_the_number_of_members() -> None:
    x, y = classification(1200)
    net = dropping()
    dropout = MCDropout(net, Categorical(), samples=3, seed=4)
    assert isinstance(dropout, Predictor)
    torch.manual_seed(17)
    state = torch.get_rng_state()
    first = dropout.outputs(x).outputs
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(18)
    assert torch.equal(dropout.outputs(loader(x, y, 50, shuffle=False)).outputs, first)
    assert torch.equal(MCDropout(net, Categorical(), samples=2, seed=4).outputs(x).outputs, first[:2])
    other = MCDropout(net, Categorical(), samples=3, seed=5).outputs(x).outputs
    assert not torch.isclose(other, first).all(dim=2).all(dim=1).any()


def test_every_example_has_masks_of_its_own_across_chunks_too() -> None:
    x = torch.ones(2000, 6)
    outputs = MCDropout(dropping(), Categorical(), samples=2).outputs(x).outputs
    # 8 units, of which some are zero anyway: few different outputs, but in every chunk other ones in the same rows.
    assert len(outputs[0].unique(dim=0)) > 4
    assert not torch.equal(outputs[0, :512], outputs[0, 512:1024])
    assert not torch.equal(outputs[0], outputs[1])


def test_batch_norm_stays_in_evaluation_and_the_network_as_it_was() -> None:
    net = conv_net()
    net[6].eval()
    net[1].train()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    before = torch.backends.mha.get_fastpath_enabled()
    outputs = MCDropout(net, Categorical(), samples=2).outputs(x).outputs
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == before
    # With the masks of an identity, only what dropout does differs from evaluation mode.
    quiet = copy.deepcopy(net).eval()
    quiet[6] = nn.Dropout(1e-12)
    same = MCDropout(quiet, Categorical(), samples=2).outputs(x).outputs
    with torch.no_grad():
        expected = quiet(x)
    assert torch.allclose(same, expected.expand(2, -1, -1), atol=1e-6)
    assert not torch.allclose(outputs[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_every_kind_of_dropout_module_is_active(kind: type[nn.Module]) -> None:
    shape = {nn.Dropout1d: (5, 3, 4), nn.Dropout2d: (5, 3, 4, 4), nn.Dropout3d: (5, 3, 2, 2, 2)}.get(kind, (5, 3))
    net = nn.Sequential(kind(0.5), nn.Flatten())
    outputs = MCDropout(net, Gaussian(noise_std=1.0), samples=4).outputs(torch.ones(shape)).outputs
    assert outputs.std(0).max() > 0.1


def test_the_dropout_of_a_transformer_layer_is_not_lost_in_its_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten())
    outputs = MCDropout(net, Gaussian(noise_std=1.0), samples=3).outputs(torch.randn(4, 5, 8)).outputs
    assert outputs.std(0).min() > 0


def test_a_network_without_active_dropout_is_refused() -> None:
    for net in (mlp(), dropping(p=0.0), with_dropout(mlp(), 0.0)):
        with pytest.raises(InputError, match="no dropout module with p > 0"):
            MCDropout(net, Categorical())
    with pytest.raises(InputError, match="samples"):
        MCDropout(dropping(), Categorical(), samples=0)
    with pytest.raises(InputError, match="seed"):
        MCDropout(dropping(), Categorical(), seed=-1)


def test_cost_is_that_of_the_network() -> None:
    net = dropping()
    assert MCDropout(net, Categorical()).trainable_parameters == parameter_count(net)
    assert MCDropout(net, Categorical()).artifact_bytes == 0
    assert MCDropout(net, Categorical(), users_network=False).artifact_bytes == state_bytes(net)


def test_with_dropout_drops_the_input_of_every_layer_but_the_first() -> None:
    net = conv_net().eval()
    net[9].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    added = with_dropout(net, 0.25)
    assert added is not net
    assert list(added.state_dict()) == list(state)
    assert [name for name, module in added.named_modules() if isinstance(module, nn.Dropout)] == [
        "3.input_dropout",
        "6",
        "9.input_dropout",
    ]
    assert not added.training
    assert not any(module.training for module in added.modules())
    assert not added[9].weight.requires_grad
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(added(x), net(x))
    assert not any(hasattr(module, "input_dropout") for module in net.modules())
    assert net[3].weight.data_ptr() != added[3].weight.data_ptr()
    again = pickle.loads(pickle.dumps(added))  # noqa: S301 - our own bytes
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_the_added_dropout_is_what_a_dropout_module_before_the_layer_would_be() -> None:
    net = mlp()
    added = with_dropout(net, 0.5).train()
    plain = nn.Sequential(net[0], net[1], nn.Dropout(0.5), net[2])
    x, _ = classification(30)
    torch.manual_seed(3)
    found = added(x)
    torch.manual_seed(3)
    assert torch.equal(found, plain(x))
    found.sum().backward()
    assert added[0].weight.grad is not None
    outputs = MCDropout(added, Categorical(), samples=3).outputs(x).outputs
    assert torch.allclose(outputs, MCDropout(plain, Categorical(), samples=3).outputs(x).outputs)


def test_the_first_layer_can_be_named_and_inputs_given_by_name_are_dropped() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(5, 2), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(input=self.first(input=x).relu())

    net = with_dropout(Backwards(), 0.9, first="first").train()
    assert hasattr(net.last, "input_dropout")
    assert not hasattr(net.first, "input_dropout")
    assert (net(torch.randn(500, 3)) == net.last.bias).all(dim=1).float().mean() > 0.3


def test_attention_still_runs_and_its_projection_is_left_out() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(3, 8), layer, nn.Flatten(), nn.Linear(40, 2))
    added = with_dropout(net, 0.3)
    names = [name for name, module in added.named_modules() if name.endswith("input_dropout")]
    assert names == ["1.linear1.input_dropout", "1.linear2.input_dropout", "3.input_dropout"]
    assert MCDropout(added, Categorical(), samples=2).outputs(torch.randn(4, 5, 3)).outputs.std(0).min() > 0


def test_with_dropout_refuses_what_it_cannot_do() -> None:
    for p in (1.0, -0.1, math.nan, True, "0.1"):
        with pytest.raises(InputError, match="rate"):
            with_dropout(mlp(), p)
    with pytest.raises(InputError, match="at least two"):
        with_dropout(nn.Linear(3, 2), 0.1)
    with pytest.raises(InputError, match="first='9'"):
        with_dropout(mlp(), 0.1, first="9")
    with pytest.raises(InputError, match="already"):
        with_dropout(with_dropout(mlp(), 0.1), 0.1)
