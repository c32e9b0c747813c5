"""The point mass: the same weights whatever the noise, no density, and its way through fit, predict and files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from core_models import classification, loader, mlp, trained
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.fit import fit
from stfbnn.posterior import ParameterLayout, PointMass, PointMassPosterior
from stfbnn.prediction import predict
from stfbnn.prior import GaussianPrior

LAYOUT = ParameterLayout(("weight", "bias"), ((2, 3), (2,)))


def point() -> PointMassPosterior:
    return PointMassPosterior(LAYOUT, torch.arange(8.0))


def test_every_draw_is_the_weights() -> None:
    q = point()
    assert torch.equal(q.draw(torch.empty(0)), torch.arange(8.0))
    assert torch.equal(q.draw(torch.empty(4, 5, 0)), torch.arange(8.0).expand(4, 5, 8))
    assert torch.equal(q.std_vector(), torch.zeros(8))
    assert torch.equal(q.covariance(), torch.zeros(8, 8))
    q.draw(torch.empty(3, 0)).sum().backward()
    assert torch.equal(q.loc.grad, torch.full((8,), 3.0))


def test_it_has_no_density_and_no_divergence() -> None:
    prior = GaussianPrior(torch.zeros(8), torch.tensor(1.0))
    with pytest.raises(InputError, match="no KL divergence"):
        point().kl(prior)
    with pytest.raises(InputError, match="no density"):
        point().log_prob(torch.zeros(8))


def test_fit_finds_the_maximum_of_the_posterior_density() -> None:
    # Softmax regression: the layer is the whole network, and the maximum is unique.
    x, y = classification(300)
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    bnn = bayesianize(model, x[:2], posterior="point", prior=0.3)
    run = fit(bnn, loader(x, y, batch_size=300), epochs=400, temperature=2.0)
    w = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    optimizer = torch.optim.LBFGS(list(w.values()), max_iter=500, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        nll = nn.functional.cross_entropy(x @ w["weight"].T + w["bias"], y)
        loss = nll + 2.0 / 300 * sum(value.square().sum() for value in w.values()) / (2 * 0.3**2)
        loss.backward()
        return loss

    optimizer.step(objective)
    for name, value in bnn.posterior.mean().items():
        torch.testing.assert_close(value, w[name].detach(), atol=5e-3, rtol=0)
    assert bnn.temperature == run.temperature == 2.0
    last = run.history[-1]
    assert last.mean_std == 0
    # What stands for KL is −log p(w), the part of it that depends on the weights.
    expected = -torch.distributions.Normal(0.0, 0.3).log_prob(bnn.posterior.mean_vector().detach()).sum()
    assert last.kl == pytest.approx(float(expected), rel=1e-5)
    assert last.free_energy == pytest.approx(last.nll + 2 / 300 * last.kl)


def test_prediction_takes_one_draw_and_has_no_epistemic_part(tmp_path: Path) -> None:
    x, y = classification(120)
    net = trained(mlp(), x, y, steps=50)
    bnn = bayesianize(net, x[:2], posterior=PointMass())
    fit(bnn, loader(x, y), epochs=2)
    prediction = predict(bnn, x, samples=32)
    assert prediction.samples == 1
    assert float(prediction.epistemic.max()) == 0
    assert torch.equal(prediction.log_probs, predict(bnn, x, weights="mean").log_probs)
    assert torch.equal(bnn(x), bnn(x, weights="mean"))
    save(bnn, tmp_path / "point")
    again = load(tmp_path / "point", net)
    assert torch.equal(predict(again, x).log_probs, prediction.log_probs)


def test_what_has_no_meaning_for_it_is_refused() -> None:
    x, y = classification(60)
    bnn = bayesianize(mlp().eval(), x[:2], posterior="point")
    with pytest.raises(InputError, match="no width for a temperature"):
        fit(bnn, loader(x, y), temperature="held-out", val_loader=loader(*classification(60, seed=1)))
    with pytest.raises(InputError, match="moves a point mass"):
        fit(bayesianize(mlp().eval(), x[:2]), loader(x, y), temperature=1.0, engine="maximum-a-posteriori")
    learned = bayesianize(mlp().eval(), x[:2], posterior="point", prior="empirical-bayes")
    with pytest.raises(InputError, match="cannot learn the prior's scale"):
        fit(learned, loader(x, y))


def test_embeddings_of_tokens_that_never_occur_keep_their_trained_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.randint(0, 5, (64, 3))
    bnn = bayesianize(net, tokens[:2], posterior="point")
    fit(bnn, loader(tokens, torch.randint(0, 3, (64,))), epochs=3, temperature=1.0)
    rows, before = bnn.posterior.mean()["weight"], net[0].weight.detach()
    # The prior's centre is the trained row, and nothing else pulls.
    torch.testing.assert_close(rows[5:], before[5:])
    assert not torch.allclose(rows[:5], before[:5])
