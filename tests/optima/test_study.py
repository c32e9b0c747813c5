"""The study of layers, on networks whose optima are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from optima_problems import INPUTS, NOISE, Squares
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from core_models import classification
from stfbnn import InputError, LayerError, RetrainingOptions, landscape
from stfbnn.optima.study import choose_layers, three_of
from stfbnn.report import save_figure
from stfbnn.report.landscape_plots import landscape_figure


def squares_data() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    return [(INPUTS, INPUTS.square())], [(INPUTS.flip(0) * 0.9, (INPUTS.flip(0) * 0.9).square())]


def test_two_known_optima_are_found_with_the_barrier_between_them() -> None:
    torch.manual_seed(0)
    model = Squares(1)
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    train, held = squares_data()
    found = landscape(
        model,
        train,
        held,
        likelihood=stfbnn.Gaussian(NOISE),
        options=RetrainingOptions(runs=6, epochs=400, patience=30, learning_rate=0.05),
        curves=False,
        progress=False,
    )
    (layer,) = found.layers
    weights = torch.cat([one.weights for one in layer.optima])
    torch.testing.assert_close(weights.abs(), torch.ones_like(weights), rtol=0, atol=0.02)
    positive = [number for number, weight in enumerate(weights) if weight > 0]
    # Both signs occur; more than four of six would be alike with a probability of 2 · 7/64 at most.
    assert 0 < len(positive) - 1 < 6
    negative = [number for number in range(7) if number not in positive]
    assert sorted(layer.basins) == sorted([positive, negative])
    # On the line through 0 the loss at 0 is E[x⁴] / (2 s²) above that of an optimum; f is the same at w and at −w.
    expected = float(INPUTS.pow(4).mean()) / (2 * NOISE**2)
    between = [pair for pair in layer.pairs if (pair.first in positive) != (pair.second in positive)]
    assert all(pair.line.barrier == pytest.approx(expected, rel=0.02) for pair in between)
    within = [pair.line.barrier for pair in layer.pairs if pair not in between]
    assert max(within) < 1e-3
    assert len(layer.functions) == 1
    assert not layer.are_disparate
    assert "2 basins and one function" in layer.verdict()
    assert layer.place == "first"


def test_a_convex_last_layer_has_one_optimum_with_decay_and_one_function_without() -> None:
    x, y = classification(120, 4, 3, 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    # With the training examples as held-out ones every run goes on to the minimum itself.
    train, held = [(x, y)], [(x.clone(), y)]
    common = {"layers": ["2"], "curves": False, "plane": 0, "progress": False}
    for decay in (0.05, 0.0):
        options = RetrainingOptions(runs=3, epochs=600, patience=40, learning_rate=0.05, weight_decay=decay)
        (layer,) = landscape(model, train, held, options=options, **common).layers  # type: ignore[arg-type]
        found = [pair for pair in layer.pairs if pair.first > 0]
        assert max(pair.line.barrier for pair in found) < 1e-4
        if decay:
            # One optimum: the weights themselves agree.
            assert max(pair.relative_distance for pair in found) < 0.1
        assert max(pair.total_variation or 0.0 for pair in found) < 0.02


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    x, y = classification(90, 5, 3, 1)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    return model, [(x[:60], y[:60])], [(x[60:], y[60:])]


def quickly(model: nn.Module, train: object, held: object, **changes: object) -> stfbnn.Landscape:
    chosen = {"options": RetrainingOptions(runs=2, epochs=3), "points": 5, "plane": 4, "progress": False, **changes}
    return landscape(model, train, held, **chosen)  # type: ignore[arg-type]


def test_first_middle_and_last_are_studied_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model, train, held = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = quickly(model, train, held)
    assert [(layer.place, layer.layer) for layer in found.layers] == [("first", "0"), ("middle", "3"), ("last", "5")]
    for layer in found.layers:
        assert len(layer.optima) == 3
        assert len(layer.pairs) == 3
        assert layer.optima[0].start == "trained"
        # What the trained weights score is what the model itself scores.
        expected = nn.functional.cross_entropy(model(held[0][0]), held[0][1]).item()
        assert layer.optima[0].held_out_loss == pytest.approx(expected, rel=1e-5)
        assert all(pair.curve is not None and len(pair.line.losses) == 5 for pair in layer.pairs)
        assert layer.plane is not None
        assert layer.plane.losses.shape == (4, 4)
        assert sorted(number for part in layer.basins for number in part) == [0, 1, 2]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    content = json.loads(json.dumps(found.as_dict()))
    assert content["verdict"] == found.verdict()
    assert "weights" not in content["layers"][0]["optima"][0]
    assert content["layers"][0]["pairs"][0]["line"]["barrier"] == found.layers[0].pairs[0].line.barrier
    save_figure(landscape_figure(found, "small"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_study_and_another_one_another() -> None:
    model, train, held = small()
    options = {"layers": ["0"], "curves": False, "plane": 0}
    first, again, other = (quickly(model, train, held, **options, seed=seed) for seed in (0, 0, 1))
    losses = [[one.held_out_loss for one in found.layers[0].optima] for found in (first, again, other)]
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[2][0]
    assert losses[0][1:] != losses[2][1:]


def test_a_finished_layer_is_not_retrained_again(tmp_path: Path) -> None:
    model, train, held = small()
    options = {"layers": ["0"], "curves": False, "plane": 0, "checkpoint": tmp_path}
    first = quickly(model, train, held, **options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert files
    again = quickly(model, train, held, **options)
    assert [one.held_out_loss for one in again.layers[0].optima] == [
        one.held_out_loss for one in first.layers[0].optima
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_a_network_of_one_or_two_layers_has_no_middle_one() -> None:
    x, y = classification(20, 4, 3, 0)
    batches = [(x, y)]
    one, two = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert [place for place, _ in choose_layers(one, batches, "auto", 0, "labels")] == ["first"]
    assert [place for place, _ in choose_layers(two, batches, "auto", 0, "labels")] == ["first", "last"]


def test_the_plane_goes_through_the_trained_weights_and_the_two_best() -> None:
    model, train, held = small()
    (layer,) = quickly(
        model, train, held, layers=["0"], options=RetrainingOptions(runs=4, epochs=2), curves=False
    ).layers
    losses = [one.held_out_loss for one in layer.optima]
    best = sorted(range(1, 5), key=lambda number: losses[number])[:2]
    assert layer.plane_optima == (0, *best) == three_of(layer.optima)


def test_bad_input_is_refused_before_anything_is_retrained() -> None:
    model, train, held = small()
    for wrong, error, words in (
        ({"layers": ["nothing"]}, LayerError, "there is no layer 'nothing'"),
        ({"layers": []}, LayerError, "no layer is named"),
        ({"points": 2}, InputError, "at least 3 points"),
        ({"plane": 1}, InputError, "a plane 2 along each side"),
        ({"examples": 0}, InputError, "examples"),
    ):
        with pytest.raises(error, match=words):
            quickly(model, train, held, **wrong)
    with pytest.raises(InputError, match="no batch"):
        quickly(model, [], held)
    with pytest.raises(InputError, match="no batch"):
        quickly(model, train, [])
    with pytest.raises(LayerError, match="no layer with parameters"):
        quickly(nn.Sequential(nn.BatchNorm1d(5)).eval(), [(torch.randn(4, 5), torch.randn(4, 5))], held)
    data = TensorDataset(*train[0])
    with pytest.raises(InputError, match="reads rows that train_loader reads"):
        quickly(model, DataLoader(data, 20), DataLoader(data, 20))
