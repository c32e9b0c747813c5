"""The layers that could become Bayesian, and what is said of large ones."""

import warnings

import pytest
import torch
from torch import nn

import stfbnn
from core_models import conv_net
from stfbnn.errors import InputError, LayerError
from stfbnn.layer_listing import advice_on_size, layer_choices


class Tagger(nn.Module):
    """Token and position embeddings in front of a linear layer."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)
        self.tokens, self.positions = nn.Embedding(tokens, 16), nn.Embedding(8, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.tokens(ids) + self.positions(places)).mean(1))


IDS = torch.arange(16).reshape(2, 8)


def test_layers_are_listed_as_the_data_meet_them():
    choices = layer_choices(Tagger(100), IDS)
    assert [choice.name for choice in choices] == ["tokens", "positions", "norm", "head"]
    assert [choice.kind for choice in choices] == ["Embedding", "Embedding", "LayerNorm", "Linear"]
    assert [choice.parameters for choice in choices] == [1600, 128, 32, 34]
    assert [choice.artifact_bytes for choice in choices] == [12800, 1024, 256, 272]
    assert [choice.passed_over for choice in choices] == [False, False, True, False]
    assert sum(choice.share for choice in choices) == pytest.approx(1)


def test_the_first_that_is_not_passed_over_is_the_one_that_is_taken():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.PReLU(), conv_net()).eval()
    x = torch.randn(2, 1, 8, 8)
    first = next(choice for choice in layer_choices(net, x) if not choice.passed_over)
    assert first.name == stfbnn.bayesianize(net, x).layer_name == "2.0"


def test_a_large_embedding_is_warned_of_and_smaller_layers_are_named():
    model = Tagger(250_001).eval()
    with pytest.warns(UserWarning, match="'tokens'.* 4,000,016 parameters.*32.0 MB.*layer='positions'.*layer='head'"):
        stfbnn.bayesianize(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stfbnn.bayesianize(model, IDS, layer="positions").layout.size == 128
        stfbnn.bayesianize(model, IDS, layer="tokens")


def test_the_advice_names_neither_normalisations_nor_other_large_layers():
    model = Tagger(250_001)
    model.positions = nn.Embedding(250_001, 16)
    advice = advice_on_size(model, IDS, "tokens")
    assert advice is not None
    assert "layer='head'" in advice
    assert "norm" not in advice
    assert "positions" not in advice
    assert advice_on_size(Tagger(100), IDS, "tokens") is None


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        layer_choices([1], IDS)


# PyTorch's own quantised layers are on their way out, and it says so.
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_first_layer_is_refused_and_not_passed_over() -> None:
    quantised = torch.ao.nn.quantized.dynamic.Linear(6, 8)
    model = nn.Sequential(quantised, nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(LayerError, match=r"'0' \(Linear\) that the data meet first is quantised"):
        stfbnn.bayesianize(model, torch.randn(4, 6))
    assert stfbnn.bayesianize(model, torch.randn(4, 6), layer="2").layer_name == "2"
