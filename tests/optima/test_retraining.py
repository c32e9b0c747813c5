"""Retraining one layer from draws: against known minima, in every way of execution, stopped, interrupted and resumed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from retraining_runs import problem, require_same, run
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.errors import InputError
from stfbnn.likelihood import Gaussian
from stfbnn.optima import retraining, workers
from stfbnn.optima.courses import Course
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.optima.retraining import Optimum, RetrainingOptions, retrain, trained_optimum
from stfbnn.randomness import derive_seed
from stfbnn.threads import threads


def hidden(net: nn.Module, x: Tensor) -> np.ndarray[Any, Any]:
    """What the last layer sees, with a column of ones for its bias."""
    with torch.no_grad():
        found = net[:-1](x)  # type: ignore[index]
    return torch.cat([found, torch.ones(len(x), 1)], dim=1).double().numpy()


def with_bias(weights: Tensor, outputs: int) -> np.ndarray[Any, Any]:
    """The vector of a dense layer as (outputs, inputs + 1), as scikit-learn's."""
    split = weights.numel() - outputs
    joined = torch.cat([weights[:split].reshape(outputs, -1), weights[split:].reshape(outputs, 1)], dim=1)
    return joined.double().numpy()


def test_all_runs_of_a_convex_last_layer_with_decay_end_at_the_optimum_that_scikit_learn_finds() -> None:
    x, y = classification()
    net = trained(mlp(), x, y, steps=60)
    function, examples, decay = LayerFunction(net, [(x, y)], "2"), Examples([(x, y)]), 0.03
    options = RetrainingOptions(
        runs=3, epochs=400, patience=25, learning_rate=0.05, weight_decay=decay, execution="stacked"
    )
    found = retrain(function, [(x, y)], examples, examples, options, seed=1, progress=False)
    reference = LogisticRegression(C=1 / (decay * len(x)), fit_intercept=False, tol=1e-10, max_iter=5000)
    reference.fit(hidden(net, x), y.numpy())
    size = np.linalg.norm(reference.coef_)
    for one in found.optima:
        assert one.converged
        assert np.linalg.norm(with_bias(one.weights, 3) - reference.coef_) < 0.01 * size
    probabilities = reference.predict_proba(hidden(net, x))
    expected = -np.log(probabilities[np.arange(len(y)), y.numpy()]).mean()
    assert [one.train_loss for one in found.optima] == pytest.approx([expected] * 3, rel=2e-3)
    assert [one.train_accuracy for one in found.optima] == pytest.approx(
        [reference.score(hidden(net, x), y.numpy())] * 3, abs=0.015
    )


def test_all_runs_of_a_linear_regression_end_at_the_least_squares() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(120, 4, generator=random)
    y = torch.sin(x.sum(dim=1, keepdim=True)) + 0.1 * torch.randn(120, 1, generator=random)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1))
    function, examples = LayerFunction(net, [(x, y)], "0", Gaussian(0.5)), Examples([(x, y)])
    options = RetrainingOptions(runs=3, epochs=500, patience=30, learning_rate=0.05, start="statistics")
    found = retrain(function, [(x, y)], examples, examples, options, seed=0, progress=False)
    solution, *_ = np.linalg.lstsq(hidden(net, x), y.double().numpy())
    residual = float(np.square(hidden(net, x) @ solution - y.double().numpy()).mean())
    expected = residual / (2 * 0.5**2) + math.log(0.5) + 0.5 * math.log(2 * math.pi)
    for one in found.optima:
        assert one.converged
        assert one.train_accuracy is None
        assert one.held_out_loss == one.train_loss == pytest.approx(expected, abs=1e-3)
        np.testing.assert_allclose(with_bias(one.weights, 1), solution.T, atol=0.05)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_stacked_and_threaded_runs_end_where_a_loop_does(layer: str) -> None:
    setting = problem(layer)
    loop = run(setting, weight_decay=1e-3)
    stacked = run(setting, weight_decay=1e-3, execution="stacked")
    with threads(2):
        threaded = run(setting, weight_decay=1e-3, execution="threads")
        assert torch.get_num_threads() == 2
    assert [one.execution for one in (loop, stacked, threaded)] == ["loop", "stacked", "threads"]
    require_same(stacked, loop, 1e-4)
    require_same(threaded, loop)
    assert not torch.allclose(loop.optima[0].weights, loop.optima[1].weights, atol=0.01)


def test_a_convolution_is_retrained_alike_in_every_way_and_the_model_is_left_as_it_was() -> None:
    x, y = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 3
    net = conv_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train = loader(x, y, 16)
    setting = (LayerFunction(net, train), train, Examples(train), Examples([(x, y)]))
    loop = run(setting, epochs=2)
    require_same(run(setting, epochs=2, execution="stacked"), loop, 1e-4)
    with threads(2):
        require_same(run(setting, epochs=2, execution="threads"), loop, 1e-6)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_small_groups_of_a_stack_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = problem()
    whole = run(setting, execution="stacked")
    monkeypatch.setattr(LayerFunction, "group", lambda self, inputs: 2)
    require_same(run(setting, execution="stacked"), whole, 1e-4)


def test_a_run_alone_ends_where_it_does_beside_others() -> None:
    setting = problem()
    several, alone = run(setting, runs=4), run(setting, runs=1)
    assert torch.equal(alone.optima[0].weights, several.optima[0].weights)
    assert alone.optima[0].history == several.optima[0].history
    assert alone.learning_rate == several.learning_rate
    other = run(setting, seed=1, runs=1)
    assert not torch.allclose(other.optima[0].weights, alone.optima[0].weights, atol=0.01)


def test_what_is_fastest_is_chosen_by_itself_and_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = problem()
    loop = run(setting)
    automatic = run(setting, execution="auto")
    assert automatic.execution in ("loop", "stacked")
    require_same(automatic, loop, 1e-4)
    seconds = {"loop": 2.0, "stacked": 1.0, "threads": 3.0}
    monkeypatch.setattr(workers, "_seconds", lambda function, courses, batch, execution: seconds[execution])
    assert run(setting, execution="auto").execution == "stacked"
    assert run(setting, execution="auto", runs=1).execution == "loop"
    seconds["threads"] = 0.5
    assert run(setting, execution="auto").execution == "stacked"  # torch has one thread
    with threads(2):
        assert run(setting, execution="auto").execution == "threads"


def test_the_timing_leaves_the_draws_of_the_loader_as_they_were() -> None:
    function, _, train, held_out = problem()
    x, y = classification()
    found = []
    for execution in ("auto", "loop"):
        own = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x[:150], y[:150]),
            32,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
        )
        found.append(run((function, own, train, held_out), execution=execution))
    require_same(found[0], found[1], 1e-4)


def test_a_run_goes_on_from_its_best_weights_at_a_tenth_of_the_rate_and_then_stops() -> None:
    course = Course(torch.zeros(2), learning_rate=0.1, weight_decay=0.0, patience=2)

    def epoch(loss: float) -> Tensor:
        course.step(torch.ones(2))
        weights = course.finished()
        course.record(weights, loss)
        return weights

    best = epoch(1.0)
    torch.testing.assert_close(best, torch.full((2,), -0.1))
    epoch(1.5)
    better = epoch(0.9999)  # the lowest, but not by a thousandth
    assert course.running
    torch.testing.assert_close(course.weights, better)
    assert torch.equal(course.best, better)
    torch.testing.assert_close(epoch(1.2), better - 0.01)
    epoch(0.5)
    epoch(0.6)
    assert course.running
    epoch(0.7)
    assert course.status == "converged"
    torch.testing.assert_close(course.best, better - 0.02)
    assert course.best_loss == 0.5
    assert (course.epochs, course.history) == (7, [1.0, 1.5, 0.9999, 1.2, 0.5, 0.6, 0.7])


def test_the_reported_weights_are_those_of_the_best_epoch_and_every_run_stops_by_itself() -> None:
    setting = problem("2")
    found = run(setting, runs=4, epochs=60, patience=2, learning_rate=0.1)
    assert all(one.converged and one.epochs < 60 for one in found.optima)
    assert len({one.epochs for one in found.optima}) > 1
    for one in found.optima:
        assert len(one.history) == one.epochs
        assert one.held_out_loss == pytest.approx(min(one.history), rel=1e-5)
        scores = setting[2].scores(setting[0], one.weights[None])
        assert scores.accuracy is not None
        assert (one.train_loss, one.train_accuracy) == pytest.approx((float(scores.loss), float(scores.accuracy)))
    short = run(setting, runs=4, epochs=3)
    assert not any(one.converged for one in short.optima)
    assert [one.epochs for one in short.optima] == [3] * 4


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_runs_that_have_stopped_are_no_longer_computed(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = problem("2")
    computed = 0
    plain = LayerFunction.losses

    def counting(self: LayerFunction, vectors: Tensor, *rest: Any) -> Tensor:
        nonlocal computed
        computed += len(vectors)
        return plain(self, vectors, *rest)

    monkeypatch.setattr(LayerFunction, "losses", counting)
    found = run(setting, epochs=60, patience=2, learning_rate=0.1, execution=execution)
    assert computed == sum(one.epochs for one in found.optima) * len(setting[1])


def test_retrained_first_layers_are_far_better_than_their_draws() -> None:
    setting = problem()
    found = run(setting, runs=3, epochs=50)
    draws = [retraining._draw(setting[0].bnn, "reinitialize", derive_seed(0, "run", number)) for number in range(3)]
    before = setting[2].scores(setting[0], torch.stack(draws)).loss.tolist()
    at_first = trained_optimum(setting[0], setting[2], setting[3])
    assert at_first.converged
    assert (at_first.number, at_first.start, at_first.epochs, at_first.history) == (-1, "trained", 0, ())
    assert torch.equal(at_first.weights, setting[0].trained)
    for one, drawn in zip(found.optima, before, strict=True):
        assert one.train_loss < 0.5 * drawn


def test_draws_are_the_layer_s_own_or_of_the_trained_weights_statistics() -> None:
    function, *_ = problem()
    bnn = function.bnn
    fresh = bnn.layout.unflatten(retraining._draw(bnn, "reinitialize", 1))
    # A dense layer draws from ±1/√6 for 6 inputs.
    assert float(fresh["weight"].abs().max()) <= 6**-0.5
    assert float(fresh["weight"].std()) == pytest.approx(6**-0.5 / 3**0.5, rel=0.2)
    drawn = torch.stack([retraining._draw(bnn, "statistics", seed) for seed in range(300)])
    for name, value in bnn.layout.unflatten(drawn).items():
        known = bnn.trained[name]
        assert float(value.mean()) == pytest.approx(float(known.mean()), abs=0.05)
        assert float(value.std()) == pytest.approx(float(known.std(correction=0)), rel=0.05)


class Words(nn.Module):
    """A bag of embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(tokens).mean(dim=1))
        return found


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_rows_of_an_embedding_that_are_padding_or_never_used_keep_their_trained_values(execution: str) -> None:
    torch.manual_seed(0)
    net = Words()
    tokens = torch.randint(0, 8, (60, 5))
    labels = tokens.max(dim=1).values % 3
    train = [(tokens[:30], labels[:30]), (tokens[30:], labels[30:])]
    function, examples = LayerFunction(net, train), Examples(train)
    setting = (function, train, examples, Examples([(torch.randint(0, 12, (20, 5)), torch.arange(20) % 3)]))
    found = run(setting, weight_decay=0.1, execution=execution)
    used = torch.unique(tokens[tokens > 0])
    unused = torch.tensor([row for row in range(12) if row not in used])
    assert len(unused) == 5
    for one in found.optima:
        rows = one.weights.reshape(12, 4)
        assert torch.equal(rows[unused], net.table.weight.detach()[unused])
        assert (rows[used] != net.table.weight.detach()[used]).all()
        assert min(abs(one.held_out_loss - loss) for loss in one.history) < 1e-5


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.memory(x)[0][:, -1])
        return found


def test_a_recurrent_layer_that_cannot_be_stacked_is_retrained_in_a_loop() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6, 3)
    y = (x[:, :, 0].sum(dim=1) > 0).long()
    train = [(x[:20], y[:20]), (x[20:], y[20:])]
    setting = (LayerFunction(Sequences(), train), train, Examples(train), Examples(train))
    found = run(setting, runs=2, epochs=3, execution="stacked", learning_rate=0.05)
    assert found.execution == "loop"
    assert run(setting, runs=2, epochs=1, execution="auto").execution == "loop"
    require_same(found, run(setting, runs=2, epochs=3, learning_rate=0.05))
    assert all(one.history[-1] < one.history[0] for one in found.optima)


@pytest.mark.parametrize("execution", ["loop", "stacked", "threads"])
def test_a_run_whose_loss_becomes_nan_stops_and_the_others_go_on(
    execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = problem()
    expected = run(setting, execution=execution)
    drawn, poor = retraining._draw, derive_seed(0, "run", 1)
    monkeypatch.setattr(
        retraining, "_draw", lambda bnn, start, seed: drawn(bnn, start, seed) * (math.nan if seed == poor else 1)
    )
    found = run(setting, execution=execution)
    for number in (0, 2):
        torch.testing.assert_close(found.optima[number].weights, expected.optima[number].weights, rtol=1e-4, atol=1e-4)
    failed = found.optima[1]
    assert (failed.epochs, failed.history, failed.converged) == (1, (), False)


def test_a_failed_run_keeps_its_best_weights() -> None:
    course = Course(torch.zeros(1), learning_rate=0.1, weight_decay=0.0, patience=2)
    course.step(torch.ones(1))
    course.record(course.finished(), 1.0)
    course.step(torch.tensor([math.nan]))
    course.record(course.finished(), math.nan)
    assert course.status == "failed"
    torch.testing.assert_close(course.best, torch.tensor([-0.1]))
    assert (course.best_loss, course.epochs, course.history) == (1.0, 2, [1.0])


def test_where_all_losses_become_nan_a_lower_rate_is_advised() -> None:
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    examples = Examples([(x, y)])
    setting = (LayerFunction(mlp(3, 4, 1), [(x, y)]), [(x, y)], examples, examples)
    with pytest.raises(InputError, match=r"every run became NaN.*pass a learning_rate lower than 1e\+30"):
        run(setting, learning_rate=1e30)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"runs": 0}, "runs must be a positive integer"),
        ({"epochs": 1.5}, "epochs must be a positive integer"),
        ({"patience": 0}, "patience must be a positive integer"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be positive"),
        ({"weight_decay": math.nan}, "weight_decay must be positive"),
        ({"start": "zero"}, 'start must be "reinitialize" or "statistics"'),
        ({"execution": "gpu"}, 'execution must be "auto"'),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RetrainingOptions(**wrong)


def test_loaders_that_cannot_be_used_are_refused() -> None:
    function, train, examples, held_out = problem()
    with pytest.raises(InputError, match="can be read only once"):
        run((function, iter(train), examples, held_out))
    with pytest.raises(InputError, match="gave no batch"):
        run((function, [], examples, held_out))
    with pytest.raises(InputError, match="seed must be a non-negative integer"):
        run((function, train, examples, held_out), seed=-1)


def test_the_bar_says_how_many_runs_go_on_and_how_good_the_best_is(capsys: pytest.CaptureFixture[str]) -> None:
    setting = problem()
    retrain(*setting, RetrainingOptions(runs=2, epochs=3), 0, progress=True, title="0: retrain")
    shown = capsys.readouterr().err
    assert "0: retrain" in shown
    assert "best held-out loss" in shown
    assert "running 2" in shown


def test_an_optimum_is_what_was_said_of_it() -> None:
    function, *rest = problem()
    found = run((function, *rest), start="statistics", runs=2)
    assert [(one.number, one.start) for one in found.optima] == [(0, "statistics"), (1, "statistics")]
    assert all(isinstance(one, Optimum) and one.weights.shape == (function.size,) for one in found.optima)
    assert found.seconds > 0
