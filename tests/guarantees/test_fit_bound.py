"""Fitting to a bound: it falls, below Q = P and below ordinary inference; what never changes, exact resume, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.baselines.whole_network import bayesianize_whole
from stfbnn.conversion import bayesianize
from stfbnn.errors import CheckpointError, InputError
from stfbnn.guarantees.bound_history import BoundRun
from stfbnn.guarantees.bounds import quadratic_bound
from stfbnn.guarantees.fit_bound import fit_bound
from stfbnn.inference.fit import fit
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import LowRank, MeanField
from stfbnn.prediction import predict
from stfbnn.prior import Normal
from stfbnn.provenance import attach, provenance_of

PRIOR = Normal(std=0.3, center="pretrained")
DELTA, COUNT = 0.025, 1000


def product_rule(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two classes by the sign of a product, with 3 % of the labels turned: a network of few examples learns it badly."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 10, generator=random)
    rule = torch.randn(10, 2, generator=torch.Generator().manual_seed(99))
    y = (x @ rule).prod(dim=1) > 0
    return x, (y ^ (torch.rand(count, generator=random) < 0.03)).long()


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that is trained on other examples than those that are certified."""
    net = trained(mlp(10, 32, 2), *product_rule(300, 0), steps=300)
    return net, *product_rule(COUNT, 1)


@torch.no_grad()
def certified(bnn: BayesianNetwork, x: Tensor, y: Tensor, draws: int = 200) -> tuple[float, float]:
    """The quadratic bound on the 0-1 risk by draws of its own, and the standard error of it."""
    random = torch.Generator().manual_seed(7)
    errors = torch.tensor(
        [
            float((bnn.outputs(bnn.posterior.draw(bnn.draw_noise(random)), x).argmax(1) != y).float().mean())
            for _ in range(draws)
        ],
        dtype=torch.float64,
    )
    kl, noise = float(bnn.posterior.kl(bnn.prior)), float(errors.std()) / draws**0.5
    value = quadratic_bound(float(errors.mean()), kl, len(x), DELTA)
    return value, quadratic_bound(float(errors.mean()) + noise, kl, len(x), DELTA) - value


@pytest.fixture(scope="module")
def fitted(problem: tuple[nn.Module, Tensor, Tensor]) -> dict[str, tuple[BayesianNetwork, BoundRun]]:
    """One fit by each engine."""
    net, x, y = problem
    found = {}
    for engine, options in (("natural-gradient", {}), ("bayes-by-backprop", {"learning_rate": 0.02})):
        bnn = bayesianize(net, x[:2], prior=PRIOR)
        run = fit_bound(bnn, loader(x, y, 100), epochs=15, delta=DELTA, engine=engine, engine_options=options)
        found[engine] = bnn, run
    return found


def test_the_bound_falls_below_that_of_the_prior_and_of_ordinary_inference(
    problem: tuple[nn.Module, Tensor, Tensor], fitted: dict[str, tuple[BayesianNetwork, BoundRun]]
) -> None:
    net, x, y = problem
    at_prior = bayesianize(net, x[:2], posterior=MeanField(initial_std=0.3), prior=PRIOR)
    ordinary = bayesianize(net, x[:2], prior=PRIOR)
    fit(ordinary, loader(x, y, 100), epochs=8, temperature=1.0)
    trivial, trivial_noise = certified(at_prior, x, y)
    usual, _ = certified(ordinary, x, y)
    for bnn, run in fitted.values():
        found, noise = certified(bnn, x, y)
        assert found < trivial - 4 * (noise + trivial_noise)
        assert found < usual - 0.1
        assert run.start.kl == pytest.approx(0, abs=1e-3)
        assert run.best.bound < run.start.bound
        # The loop's own estimates are of the same quantities.
        assert run.start.error_bound == pytest.approx(trivial, abs=0.02)
        assert run.best.error_bound == pytest.approx(found, abs=0.02)
        assert run.best.kl == pytest.approx(float(bnn.posterior.kl(bnn.prior).detach()), rel=1e-4)
        assert run.best.bound == pytest.approx(quadratic_bound(run.best.risk, run.best.kl, COUNT, DELTA))


def test_both_engines_find_the_same_least_bound(fitted: dict[str, tuple[BayesianNetwork, BoundRun]]) -> None:
    newton, backprop = (run.best for _, run in fitted.values())
    assert newton.bound == pytest.approx(backprop.bound, abs=0.003)
    assert newton.kl == pytest.approx(backprop.kl, rel=0.25)


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("mean-field", "quadratic"),
        ("mean-field", "lambda"),
        ("mean-field", "mcallester"),
        (LowRank(rank=2), "quadratic"),
        ("filterwise", "mcallester"),
        ("full", "lambda"),
    ],
    ids=str,
)
def test_every_family_and_form_lowers_its_bound_and_leaves_the_trunk(family: Any, objective: str) -> None:
    x, y = classification(300, seed=1)
    net = trained(mlp(hidden=8), *classification(40, seed=0))
    net.zero_grad(set_to_none=True)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    bnn = bayesianize(net, x[:2], posterior=family, prior=Normal(std=0.5, center="pretrained"))
    options = {"learning_rate": 0.02} if isinstance(family, LowRank) else {}
    run = fit_bound(bnn, loader(x, y, 50), epochs=6, objective=objective, engine_options=options)
    # Of the low-rank family only: it starts with slight correlations.
    assert run.start.kl < 0.05
    assert run.best.bound < run.start.bound - 0.005
    assert (run.best.lam is not None) == (objective == "lambda")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in (*net.parameters(), *bnn.network.parameters()))


def test_quadratic_and_lambda_take_the_same_course() -> None:
    x, y = classification(200)
    runs = []
    for objective in ("quadratic", "lambda"):
        bnn = bayesianize(mlp(), x[:2], prior=PRIOR)
        runs.append(fit_bound(bnn, loader(x, y, 50), epochs=3, objective=objective))
    for one, other in zip(runs[0].history, runs[1].history, strict=True):
        assert one.bound == pytest.approx(other.bound, rel=1e-4)
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-4)
        assert one.weight == pytest.approx(1 / other.lam, rel=1e-3)


def test_a_convolutional_layer_is_fitted_too() -> None:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))
    bnn = bayesianize(conv_net(), x[:2], prior=PRIOR)
    run = fit_bound(bnn, loader(x, y), epochs=2)
    assert len(run.history) == 3
    assert run.best.bound <= run.start.bound


def test_the_whole_network_is_pac_bayes_with_backprop() -> None:
    x, y = classification(400, seed=1)
    net = trained(mlp(hidden=16), *classification(60, seed=0))
    bnn = bayesianize_whole(net, x[:2], prior=Normal(std=0.4, center="pretrained"))
    assert bnn.layout.size == sum(parameter.numel() for parameter in net.parameters())
    run = fit_bound(
        bnn, loader(x, y, 50), epochs=15, engine="bayes-by-backprop", engine_options={"learning_rate": 0.02}
    )
    assert run.best.bound < run.start.bound - 0.01
    assert 0 < run.best.kl < 100


def test_the_network_counts_as_fitted_and_a_second_fit_starts_where_the_first_ended() -> None:
    x, y = classification(200)
    net = mlp()
    bnn = bayesianize(net, x[:2], prior=PRIOR)
    run = fit_bound(bnn, loader(x, y, 50), epochs=3)
    assert bnn.require_fitted().name == "categorical"
    assert bnn.num_examples == run.num_examples == 200
    assert bnn.predictive_temperature == 1
    assert bnn.temperature == run.temperature == pytest.approx(run.best.weight * 5 * torch.log(torch.tensor(10.0)))
    assert predict(bnn, x).probs.shape == (200, 3)
    again = fit_bound(bnn, loader(x, y, 50), epochs=1)
    assert again.start.kl == pytest.approx(run.best.kl)
    assert again.start.bound == pytest.approx(run.best.bound, rel=1e-5)
    anew = fit_bound(bnn, loader(x, y, 50), epochs=1, start="prior")
    assert anew.start.kl == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("family", ["mean-field", "filterwise"])
def test_a_warm_start_keeps_the_widths(family: str) -> None:
    x, y = classification(200)
    bnn = bayesianize(mlp(), x[:2], posterior=family, prior=PRIOR)
    widths = torch.linspace(0.05, 0.3, bnn.layout.size)
    bnn.posterior.set_std(widths)
    still = {"learning_rate": 1e-9, "curvature_rate": 1e-9, "curvature_trust": 1e9}
    fit_bound(
        bnn,
        loader(x, y),
        epochs=1,
        start="posterior",
        engine_options=still,
        num_examples=10**9,
        keep_best=False,
    )
    torch.testing.assert_close(bnn.posterior.std_vector().detach(), widths, rtol=1e-3, atol=0)


def test_the_best_epoch_is_kept_or_the_last() -> None:
    x, y = classification(200)
    net = trained(mlp(), x, y)
    # A rate at which the bound only rises.
    options = {"learning_rate": 0.5}
    kept = bayesianize(net, x[:2], prior=PRIOR)
    run = fit_bound(kept, loader(x, y, 50), epochs=2, engine="bayes-by-backprop", engine_options=options)
    assert run.kept == 0
    assert run.best is run.history[0]
    assert torch.equal(kept.posterior.mean_vector(), kept.prior.mean)
    last = bayesianize(net, x[:2], prior=PRIOR)
    run = fit_bound(
        last, loader(x, y, 50), epochs=2, engine="bayes-by-backprop", engine_options=options, keep_best=False
    )
    assert run.kept == 2
    assert float(last.posterior.kl(last.prior).detach()) == pytest.approx(run.history[2].kl, rel=1e-5)


class Stopping:
    """A loader of a shuffled data set that fails after some batches."""

    def __init__(self, data: DataLoader, stop: int | None) -> None:
        self.data, self.left = data, stop

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(
    ("engine", "family"),
    [("natural-gradient", "mean-field"), ("natural-gradient", "filterwise"), ("bayes-by-backprop", "low-rank")],
)
def test_a_resumed_run_is_that_of_one_that_was_never_stopped(tmp_path: Path, engine: str, family: str) -> None:
    x, y = classification(120)
    net, file = mlp(), tmp_path / "run.ckpt"

    def network() -> BayesianNetwork:
        return bayesianize(net, x[:2], posterior=family, prior=PRIOR)

    whole = network()
    expected = fit_bound(whole, Stopping(loader(x, y), None), epochs=4, engine=engine)
    torch.manual_seed(5)  # nothing depends on the global generators
    stopped = network()
    before = stopped.posterior_state()["posterior"]
    # Two first looks, the survey's 4 batches and the estimate's 4; then 8 an epoch: in the third one.
    with pytest.raises(KeyboardInterrupt):
        fit_bound(stopped, Stopping(loader(x, y), 2 + 4 + 4 + 2 * 8 + 2), epochs=4, engine=engine, checkpoint=file)
    assert all(torch.equal(value, before[name]) for name, value in stopped.posterior_state()["posterior"].items())
    assert not stopped.fitted
    assert file.exists()
    resumed = network()
    run = fit_bound(resumed, Stopping(loader(x, y), None), epochs=4, engine=engine, checkpoint=file)
    ends = whole.posterior_state()["posterior"]
    assert all(torch.equal(value, ends[name]) for name, value in resumed.posterior_state()["posterior"].items())
    assert resumed.temperature == whole.temperature
    assert resumed.seen.inference.digest() == whole.seen.inference.digest()
    for one, other in zip(run.history, expected.history, strict=True):
        assert (one.epoch, one.bound, one.risk, one.error, one.kl) == (
            other.epoch, other.bound, other.risk, other.error, other.kl,
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="delta"):
        fit_bound(network(), Stopping(loader(x, y), None), epochs=4, engine=engine, checkpoint=file, delta=0.01)


def test_what_stage_one_saw_is_told() -> None:
    x, y = classification(100)
    net = mlp()
    attach(net, provenance_of(loader(x[:30], y[:30])))
    run = fit_bound(bayesianize(net, x[:2], prior=PRIOR), loader(x, y), epochs=1)
    assert run.seen_before == 30
    assert "stage one saw 30" in run.verdict()
    clean = fit_bound(bayesianize(net, x[:2], prior=PRIOR), loader(x[30:], y[30:]), epochs=1)
    assert (clean.seen_before, clean.num_examples) == (0, 70)
    assert "stage one" not in clean.verdict()


def test_what_shaped_the_posterior_is_recorded() -> None:
    x, y = classification(90)
    first, second = loader(x[:60], y[:60]), loader(x[30:], y[30:])
    bnn = bayesianize(mlp(), x[:2], prior=PRIOR)
    fit_bound(bnn, first, epochs=1)
    assert bnn.seen.inference.digest() == provenance_of(first).digest()
    # A warm start goes on from what the first data shaped; from the prior nothing of them is left.
    fit_bound(bnn, second, epochs=1)
    assert bnn.seen.inference.digest() == provenance_of(loader(x, y)).digest()
    fit_bound(bnn, second, epochs=1, start="prior")
    assert bnn.seen.inference.digest() == provenance_of(second).digest()
    assert bnn.seen.prior.count == 0


def test_the_result_prints_and_is_plain() -> None:
    x, y = classification(60)
    run = fit_bound(bayesianize(mlp(), x[:2], prior=PRIOR), loader(x, y), epochs=2)
    assert run.table().row_count == 3
    assert run.as_dict()["history"][2]["epoch"] == 2
    assert "These are estimates" in run.verdict()


def test_what_has_no_bound_is_refused_before_any_step() -> None:
    x, y = classification(60)
    data, net = loader(x, y), mlp()

    def refused(match: str, bnn: BayesianNetwork | None = None, given: Any = data, **settings: Any) -> None:
        bnn = bnn or bayesianize(net, x[:2], prior=PRIOR)
        before = bnn.posterior_state()["posterior"]
        with pytest.raises(InputError, match=match):
            fit_bound(bnn, given, epochs=settings.pop("epochs", 1), **settings)
        assert all(torch.equal(value, before[name]) for name, value in bnn.posterior_state()["posterior"].items())
        assert not bnn.fitted

    refused("objective must be", objective="catoni")
    refused("p_min must be", p_min=0.0)
    refused("p_min must be", p_min=1.5)
    refused("delta must be", delta=1.0)
    refused("delta must be", delta=0)
    refused("epochs must be", epochs=0)
    refused("priors must be", priors=0)
    refused("start must be", start="anew")
    refused("engine must be", engine="laplace")
    refused("engine_options", engine_options={"speed": 3})
    refused("seed must be", seed=-1)
    refused("one class an example", likelihood="gaussian", given=loader(x, torch.randn(60, 3)))
    refused("class indices", given=loader(x, torch.randn(60, 3)))
    refused("mixture", bayesianize(net, x[:2], posterior="mixture", prior=PRIOR))
    refused("infinite divergence", bayesianize(net, x[:2], posterior="point", prior=PRIOR))
    refused("prior's scale is learned", bayesianize(net, x[:2], prior="empirical-bayes"))
    refused("gave no batch", given=[])
    refused("only once", given=iter(data))
    refused("at least 8 examples", given=[(x[:7], y[:7])])
    bad = x.clone()
    bad[59, 2] = float("nan")
    refused("NaN", given=loader(bad, y, shuffle=False))
    refused("weights of examples", given=[(x, y, torch.ones(60))])
    dense = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Conv1d(3, 3, 1))
    pixels, labels = torch.randn(16, 2, 5), torch.randint(0, 3, (16, 5))
    refused("one class an example", bayesianize(dense, pixels[:2], prior=PRIOR), given=[(pixels, labels)])
