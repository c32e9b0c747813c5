"""The sampled posterior: which sample a draw is, its moments against numpy's, and its way through files and `fit`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from core_models import classification, mlp
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.fit import fit
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import ParameterLayout, SampledPosterior, Samples, resolve_family
from stfbnn.prediction import predict
from stfbnn.prior import GaussianPrior

LAYOUT = ParameterLayout(("weight", "bias"), ((2, 3), (2,)))


def posterior(count: int = 5) -> SampledPosterior:
    generator = torch.Generator().manual_seed(0)
    return SampledPosterior(LAYOUT, torch.randn(count, 8, generator=generator))


def fitted(count: int = 6) -> tuple[BayesianNetwork, torch.nn.Module, Tensor]:
    """A network whose posterior is a set of samples, put there by hand."""
    model = mlp().eval()
    x, _ = classification(40)
    bnn = bayesianize(model, x, posterior=Samples(count))
    generator = torch.Generator().manual_seed(1)
    bnn.posterior.samples += 0.3 * torch.randn(count, bnn.layout.size, generator=generator)
    bnn.likelihood, bnn.temperature, bnn.num_examples = Categorical(), 1.0, 40
    return bnn, model, x


def test_a_draw_is_the_sample_in_whose_share_its_noise_falls() -> None:
    q = posterior(5)
    # The fifths of the standard normal distribution, and what lies beyond every float.
    noise = torch.tensor(stats.norm.ppf([0.01, 0.199, 0.201, 0.5, 0.799, 0.801, 0.999])).float().unsqueeze(1)
    expected = q.samples[[0, 0, 1, 2, 3, 4, 4]]
    assert torch.equal(q.draw(noise), expected)
    assert torch.equal(torch.vmap(q.draw)(noise), expected)
    assert torch.equal(q.draw(noise[3]), q.samples[2])
    assert torch.equal(q.draw(torch.tensor([[-50.0], [50.0]])), q.samples[[0, 4]])


def test_all_samples_are_drawn_equally_often() -> None:
    q = SampledPosterior(ParameterLayout(("w",), ((1,),)), torch.arange(7.0).unsqueeze(1))
    drawn = q.draw(torch.randn(70_000, 1, generator=torch.Generator().manual_seed(0))).squeeze(1)
    assert stats.chisquare(np.bincount(drawn.long().numpy(), minlength=7)).pvalue > 1e-3


def test_moments_are_those_of_the_samples() -> None:
    q = posterior(9)
    samples = q.samples.numpy()
    np.testing.assert_allclose(q.mean_vector().numpy(), samples.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(q.std_vector().numpy(), samples.std(0), rtol=1e-6)
    np.testing.assert_allclose(q.covariance().numpy(), np.cov(samples.T, bias=True), rtol=1e-5, atol=1e-6)
    assert {name: tuple(value.shape) for name, value in q.mean().items()} == {"weight": (2, 3), "bias": (2,)}


def test_it_has_no_density_and_no_divergence() -> None:
    q = posterior()
    with pytest.raises(InputError, match="no density"):
        q.log_prob(torch.zeros(8))
    with pytest.raises(InputError, match="mean-field"):
        q.kl(GaussianPrior(torch.zeros(8), torch.tensor(1.0)))
    large = SampledPosterior(ParameterLayout(("w",), ((10_000,),)), torch.zeros(1, 10_000))
    with pytest.raises(InputError, match="GiB"):
        large.covariance()


def test_the_recipe_starts_at_the_trained_weights() -> None:
    q = Samples(3).build(LAYOUT, torch.arange(8.0), GaussianPrior(torch.zeros(8), torch.tensor(1.0)))
    assert torch.equal(q.samples, torch.arange(8.0).expand(3, 8))
    assert resolve_family("samples") == Samples()
    assert q.config() == {"count": 3}


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_bad_count_is_refused(count: int) -> None:
    with pytest.raises(InputError, match="positive integer"):
        Samples(count)


@pytest.mark.parametrize(
    "samples",
    [torch.zeros(8), torch.zeros(0, 8), torch.zeros(3, 7), torch.zeros(3, 8).long(), torch.full((3, 8), torch.nan)],
)
def test_bad_samples_are_refused(samples: Tensor) -> None:
    with pytest.raises(InputError, match="samples must be"):
        SampledPosterior(LAYOUT, samples)


def test_predictions_average_over_the_samples() -> None:
    bnn, _, x = fitted()
    probs = torch.stack([bnn.outputs(w, x).softmax(1) for w in bnn.posterior.samples]).mean(0)
    # 1,000 draws: the standard error of a probability is at most 0.5/√1000 = 0.016.
    torch.testing.assert_close(predict(bnn, x, samples=1000).probs.float(), probs, atol=0.05, rtol=0)


def test_saved_samples_come_back_whole(tmp_path: Path) -> None:
    bnn, model, x = fitted()
    again = load(save(bnn, tmp_path / "posterior"), model)
    assert torch.equal(again.posterior.samples, bnn.posterior.samples)
    assert again.family == Samples(6)
    assert torch.equal(predict(again, x).probs, predict(bnn, x).probs)


@pytest.mark.parametrize("engine", ["auto", "natural-gradient", "bayes-by-backprop", "laplace"])
def test_fit_refuses_samples(engine: str) -> None:
    bnn, _, x = fitted()
    with pytest.raises(InputError):
        fit(bnn, [(x, torch.zeros(40, dtype=torch.long))], engine=engine, temperature=1.0, progress=False)
