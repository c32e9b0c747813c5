"""Predictions: the same whatever the batching, right against closed forms, clear about bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core_models import classification, conv_net, loader, mlp
from stfbnn.conversion import bayesianize
from stfbnn.draws import Draws, chunk_rows
from stfbnn.errors import InputError, ModelChangedError, NotFittedError
from stfbnn.inference.fit import fit
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import predict
from stfbnn.predictive import CategoricalPrediction, GaussianPrediction


def ready(model: nn.Module, example: object, likelihood: object = None, **options: object) -> BayesianNetwork:
    """A network that predicts, with the initial posterior."""
    bnn = bayesianize(model, example, **options)  # type: ignore[arg-type]
    bnn.likelihood = likelihood or Categorical()  # type: ignore[assignment]
    return bnn


X = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))


@given(batch=st.integers(1, 80), chunk=st.integers(1, 80), stacked=st.booleans())
@settings(max_examples=25, deadline=None)
def test_batching_and_execution_do_not_matter(batch: int, chunk: int, stacked: bool) -> None:
    bnn = ready(mlp(), X[:2])
    whole = predict(bnn, X, samples=5)
    execution = "stacked" if stacked else "loop"
    pred = predict(bnn, list(X.split(batch)), samples=5, chunk_size=chunk, execution=execution)  # type: ignore[arg-type]
    torch.testing.assert_close(pred.probs, whole.probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(pred.epistemic, whole.epistemic, atol=1e-6, rtol=0)


def test_equal_chunks_are_equal_bit_for_bit() -> None:
    bnn = ready(conv_net(), torch.zeros(2, 1, 8, 8))
    images = torch.randn(50, 1, 8, 8)
    whole = predict(bnn, images, chunk_size=16)
    parts = predict(bnn, DataLoader(TensorDataset(images), batch_size=7), chunk_size=16)
    assert torch.equal(whole.probs, parts.probs)


def test_a_draw_does_not_depend_on_how_many_there_are() -> None:
    bnn = ready(mlp(), X[:2])
    few, many = Draws(bnn, 2, seed=3), Draws(bnn, 9, seed=3)
    assert torch.equal(few.vector(1), many.vector(1))
    assert not torch.equal(few.vector(0), few.vector(1))
    assert not torch.equal(few.vector(0), Draws(bnn, 2, seed=4).vector(0))


def test_probabilities_are_the_mean_over_draws() -> None:
    bnn = ready(mlp(), X[:2], posterior="mean-field", prior=5.0)
    pred = predict(bnn, X, samples=11, seed=2)
    assert isinstance(pred, CategoricalPrediction)
    draws = Draws(bnn, 11, seed=2)
    each = torch.stack([bnn.outputs(draws.vector(i), X).softmax(1) for i in range(11)]).detach().double()
    mean = each.mean(0)
    torch.testing.assert_close(pred.probs, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(pred.probs.sum(1), torch.ones(70).double())
    torch.testing.assert_close(pred.entropy, torch.special.entr(mean).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(pred.aleatoric, torch.special.entr(each).sum(2).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pred.entropy, pred.aleatoric + pred.epistemic, atol=1e-5, rtol=0)
    assert (pred.epistemic >= 0).all()
    assert torch.equal(pred.labels, mean.argmax(1))
    torch.testing.assert_close(pred.confidence, mean.amax(1), atol=1e-6, rtol=0)


def test_the_predictive_temperature_divides_every_draw() -> None:
    bnn = ready(mlp(), X[:2], prior=5.0)
    bnn.predictive_temperature = 3.0
    draws = Draws(bnn, 4, seed=0)
    each = torch.stack([(bnn.outputs(draws.vector(i), X) / 3).softmax(1) for i in range(4)]).detach().double()
    torch.testing.assert_close(predict(bnn, X, samples=4).probs, each.mean(0), atol=1e-6, rtol=0)
    each = torch.stack([bnn.outputs(draws.vector(i), X).softmax(1) for i in range(4)]).detach().double()
    torch.testing.assert_close(
        predict(bnn, X, samples=4, predictive_temperature=1.0).probs, each.mean(0), atol=1e-6, rtol=0
    )


def test_the_log_density_survives_underflow() -> None:
    net = mlp()
    with torch.no_grad():
        net[2].weight.mul_(1e4)
    bnn = ready(net, X[:2], prior=5.0)
    pred = predict(bnn, X, samples=4)
    targets = pred.probs.argmin(1)
    assert (pred.probs.gather(1, targets[:, None]) == 0).any()
    density = pred.log_density(targets)
    assert torch.isfinite(density).all()
    draws = Draws(bnn, 4, seed=0)
    each = torch.stack([bnn.outputs(draws.vector(i), X).double().log_softmax(1) for i in range(4)]).detach()
    expected = each.logsumexp(0).gather(1, targets[:, None])[:, 0] - math.log(4)
    torch.testing.assert_close(density, expected, rtol=1e-5, atol=1e-5)


def test_at_the_mean() -> None:
    net = mlp()
    bnn = ready(net, X[:2])
    pred = predict(bnn, X, weights="mean")
    assert pred.at_mean
    assert pred.samples == 1
    torch.testing.assert_close(pred.probs.float(), net(X).softmax(1).detach(), atol=1e-6, rtol=0)
    assert (pred.epistemic == 0).all()


def test_regression_is_a_mixture_of_gaussians() -> None:
    bnn = ready(mlp(outputs=2), X[:2], Gaussian(noise_std=[0.5, 2.0]), prior=3.0)
    pred = predict(bnn, X, samples=7)
    assert isinstance(pred, GaussianPrediction)
    draws = Draws(bnn, 7, seed=0)
    each = torch.stack([bnn.outputs(draws.vector(i), X) for i in range(7)]).detach()
    torch.testing.assert_close(pred.mean, each.mean(0))
    torch.testing.assert_close(pred.epistemic, each.var(0, correction=0))
    torch.testing.assert_close(pred.std**2, each.var(0, correction=0) + torch.tensor([0.25, 4.0]))
    targets = torch.randn(70, 2)
    normal = torch.distributions.Normal(each.double(), torch.tensor([0.5, 2.0]).double())
    expected = normal.log_prob(targets.double()).sum(2).logsumexp(0) - math.log(7)
    torch.testing.assert_close(pred.log_density(targets), expected)
    with pytest.raises(InputError, match="entropy"):
        _ = pred.entropy
    with pytest.raises(InputError, match="mean"):
        _ = pred.probs


def test_a_regression_with_one_column() -> None:
    bnn = ready(mlp(outputs=1), X[:2], Gaussian(noise_std=0.5))
    pred = predict(bnn, X, samples=3)
    targets = torch.randn(70)
    torch.testing.assert_close(pred.log_density(targets), pred.log_density(targets[:, None]))
    assert isinstance(pred, GaussianPrediction)
    assert pred.std.shape == (70, 1)


def test_all_forms_of_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.net(torch.cat([a, b], 1))}

    a, b = X[:, :2], X[:, 2:]
    y = torch.zeros(70).long()
    bnn = ready(Two(), (a[:2], b[:2]))
    whole = predict(bnn, (a, b), samples=3).probs
    for data in (
        {"a": a, "b": b},
        {"a": a, "b": b, "labels": y},
        [((a, b), y)],
        [({"a": a, "b": b}, y)],
        [{"a": a, "b": b, "labels": y}],
        [{"a": a, "b": b}],
    ):
        torch.testing.assert_close(predict(bnn, data, samples=3).probs, whole)
    torch.testing.assert_close(predict(bnn, [(a, b)], samples=3, has_targets=False).probs, whole)
    torch.testing.assert_close(predict(bnn, [{"a": a, "b": b, "y": y}], samples=3, target_key="y").probs, whole)


def test_batches_of_unequal_shapes() -> None:
    """Sequences padded batch by batch."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens).mean(1))

    bnn = ready(Bag(), torch.zeros(2, 5).long())
    batches = [torch.randint(0, 20, (4, 5)), torch.randint(0, 20, (4, 9)), torch.randint(0, 20, (3, 9))]
    expected = torch.cat([predict(bnn, batch, samples=3).probs for batch in batches])
    torch.testing.assert_close(predict(bnn, batches, samples=3).probs, expected, atol=1e-6, rtol=0)


def test_chunks_follow_from_shapes() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(torch.zeros(2, 3, 32, 32), cpu) == 64
    assert chunk_rows(torch.zeros(2, 3, 224, 224), cpu) == 16
    assert chunk_rows(torch.zeros(2, 4), cpu) == 512
    assert chunk_rows(torch.zeros(2, 3, 32, 32), torch.device("cuda")) == 256


def test_weights_too_large_to_keep_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bnn = ready(mlp(), X[:2])
    kept = predict(bnn, X, samples=4)
    monkeypatch.setattr("stfbnn.draws._KEPT_BYTES", 8)
    assert torch.equal(predict(bnn, X, samples=4).probs, kept.probs)


def test_bad_input_is_refused() -> None:
    bnn = ready(mlp(), X[:2])
    bad = X.clone()
    bad[3, 2] = math.nan
    for data, message in (
        (bad, "NaN"),
        ([], "no batch"),
        (torch.zeros(0, 6), "positive"),
        ([(X, X, X)], "pair"),
        ("text", "tensor"),
        (X.numpy(), "as_tensor"),
        (3, "iterable"),
    ):
        with pytest.raises(InputError, match=message):
            predict(bnn, data)
    for options, message in (
        ({"samples": 0}, "samples"),
        ({"samples": 2.5}, "samples"),
        ({"seed": -1}, "seed"),
        ({"weights": "map"}, "weights"),
        ({"execution": "fast"}, "execution"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"predictive_temperature": 0.0}, "predictive_temperature"),
    ):
        with pytest.raises(InputError, match=message):
            predict(bnn, X, **options)  # type: ignore[arg-type]


def test_probabilities_for_logits_are_refused() -> None:
    bnn = ready(nn.Sequential(mlp(), nn.Softmax(1)), X[:2])
    with pytest.raises(InputError, match="look like probabilities"):
        fit(bnn, [(X, torch.zeros(70).long())], temperature=1.0)
    bnn.likelihood = Categorical("probabilities")
    plain = ready(mlp(), X[:2])
    torch.testing.assert_close(predict(bnn, X).probs, predict(plain, X).probs, atol=1e-6, rtol=0)


def test_before_fit() -> None:
    with pytest.raises(NotFittedError, match="fit"):
        predict(bayesianize(mlp(), X[:2]), X)


def test_after_the_model_was_changed() -> None:
    net = mlp()
    x, y = classification()
    bnn = bayesianize(net, x[:2])
    fit(bnn, loader(x, y), epochs=1, temperature=1.0)
    with torch.no_grad():
        net[2].weight.add_(1)
    with pytest.raises(ModelChangedError):
        predict(bnn, x)
    with pytest.raises(ModelChangedError):
        bnn(x)


def test_several_inputs_in_a_list_are_not_taken_for_batches() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
            out: Tensor = self.layer(x if z is None else x + z)
            return out

    x, z = torch.randn(8, 3), torch.randn(8, 3)
    bnn = bayesianize(Sum(), [x, z])
    bnn.likelihood = Categorical()
    with pytest.raises(InputError, match="a list of tensors, each of which would be a batch"):
        predict(bnn, [x, z])
    assert torch.equal(predict(bnn, [(x, z)], has_targets=False).probs, predict(bnn, (x, z)).probs)
