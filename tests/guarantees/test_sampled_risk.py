"""Weight draws for each example: their law, their independence, and the risks that come of them."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from core_models import classification, conv_net, loader, mlp
from stfbnn.errors import InputError, NotFittedError
from stfbnn.guarantees.draw_per_example import ExampleDraws
from stfbnn.guarantees.sampled_risk import LOSSES, example_losses, sampled_risk
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MixturePosterior, PointMassPosterior, components_of
from stfbnn.randomness import generator

ROWS = 6000
# Of so many numbers, none is further from its expectation by chance in one run of a thousand.
SIGMAS = 5.0


class Recurrent(nn.Module):
    """A layer that cannot be run with weights of its own for each example at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class TiedEmbedding(nn.Module):
    """Its embedding's weights act on the output in a second place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1) @ self.embedding.weight.T


class Twice(nn.Module):
    """One convolution on two inputs: its weights are the same for both inputs of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 2, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([self.layer(one).flatten(1), self.layer(other).flatten(1)], 1)


def made(net: nn.Module, example: Any, posterior: Any = "mean-field", prior: Any = "pretrained") -> BayesianNetwork:
    """A network with a wide posterior that is not at its trained weights, as if inferred."""
    bnn = stfbnn.bayesianize(net.eval(), example, posterior=posterior, prior=prior)
    torch.manual_seed(7)
    with torch.no_grad():
        for part in components_of(bnn.posterior):
            for name, value in part.named_parameters():
                value.add_(0.3 * torch.randn_like(value) if "log" not in name else 1.0 + torch.rand_like(value))
    if isinstance(bnn.posterior, MixturePosterior):
        bnn.posterior.set_weights(torch.tensor([0.3, 0.7]))
    bnn.likelihood = Categorical()
    return bnn


def torched(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def linear() -> nn.Module:
    return torched(0, lambda: nn.Linear(3, 2))


def convolution() -> nn.Module:
    return torched(1, lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten()))


def embedding() -> nn.Module:
    return torched(2, lambda: nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten()))


def folded() -> nn.Module:
    """A batch norm that is folded into the layer: its shift is no part of what is drawn."""
    net = torched(3, lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)))
    net(torch.randn(64, 3) * 2 + 1)
    return net


IMAGE = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[3, 1, 3, 0, 4]])
ROW = torch.tensor([[0.5, -1.0, 2.0]])
MIXTURE = stfbnn.Mixture(components=2)
LAWS = [
    (linear, ROW, "mean-field", "pre-activations"),
    (linear, ROW, MIXTURE, "pre-activations"),
    (linear, ROW, "full", "layer"),
    (linear, ROW, "low-rank", "layer"),
    (folded, ROW, "mean-field", "pre-activations"),
    (convolution, IMAGE, "mean-field", "layer"),
    (convolution, IMAGE, "filterwise", "layer"),
    (convolution, IMAGE, MIXTURE, "layer"),
    (embedding, TOKENS, "mean-field", "embedding rows"),
    (embedding, TOKENS, MIXTURE, "embedding rows"),
    (embedding, TOKENS, "low-rank", "layer"),
    (TiedEmbedding, TOKENS, "mean-field", "network"),
    (Recurrent, torch.randn(1, 2, 3), "mean-field", "one by one"),
]


@pytest.mark.parametrize(("build", "row", "posterior", "way"), LAWS)
def test_outputs_have_the_law_of_posterior_draws_and_are_independent(
    build: Callable[[], nn.Module], row: Tensor, posterior: Any, way: str
) -> None:
    """One input for all examples: means and covariances over the examples against those of the posterior, mapped exactly.

    The networks are linear in their weights but for the last two, whose draws by `Posterior.draw` are compared instead.
    """
    count = ROWS if way != "one by one" else 1500
    bnn = made(build(), row.expand(2, *row.shape[1:]), posterior)
    draws = ExampleDraws(bnn, bnn.posterior, row.expand(3, *row.shape[1:]))
    assert draws.way == way
    together = row.expand(count, *row.shape[1:])
    found = draws.outputs(together, generator(0, "one")).double()
    assert found.shape[0] == count
    if way in ("network", "one by one"):
        noise = torch.randn(count, bnn.posterior.noise_size, generator=generator(5, "other"))
        pairs = torch.stack(
            [bnn.outputs(vector, row.expand(2, *row.shape[1:]))[0] for vector in bnn.posterior.draw(noise)]
        )
        expected, covariance, relative = pairs.double().mean(0), torch.cov(pairs.double().T), 2.0
    else:
        expected, covariance = exact_moments(bnn, row)
        relative = 1.0
    spread = covariance.diagonal().clamp_min(1e-12).sqrt()
    error = SIGMAS * math.sqrt(relative / count)
    assert bool(((found.mean(0) - expected).abs() <= error * spread + 1e-6).all())
    # A product of two correlated Gaussians varies by up to √2 of its scale; mixtures of two by a little more.
    apart = (torch.cov(found.T) - covariance).abs() / torch.outer(spread, spread)
    assert bool((apart[spread > 1e-5][:, spread > 1e-5] <= 2 * error).all())
    # Neighbours, and the same example in another pass, have nothing to do with each other.
    again = draws.outputs(together, generator(0, "two")).double()
    moving = spread > 1e-5
    for one, other in ((found[:-1], found[1:]), (found, again)):
        left, right = ((part - expected)[:, moving] / spread[moving] for part in (one, other))
        assert bool(((left.T @ right / len(left)).abs() <= error).all())


def exact_moments(bnn: BayesianNetwork, row: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of outputs that are linear in the weights, by the law of total covariance over the components."""

    def run(vector: Tensor) -> Tensor:
        return bnn.outputs(vector, row.expand(2, *row.shape[1:]))[0]

    jacobian = torch.autograd.functional.jacobian(run, bnn.posterior.mean_vector().detach())
    posterior = bnn.posterior
    mean = run(posterior.mean_vector()).detach().double()
    assert isinstance(jacobian, Tensor)
    return mean, jacobian.double() @ posterior.covariance().detach().double() @ jacobian.double().T


def test_a_layer_that_is_called_twice_has_the_same_weights_both_times() -> None:
    torch.manual_seed(0)
    pair = (torch.randn(1, 1, 4).expand(ROWS, 1, 4),) * 2
    bnn = made(Twice(), tuple(part[:2] for part in pair))
    draws = ExampleDraws(bnn, bnn.posterior, tuple(part[:3] for part in pair))
    assert draws.way == "layer"
    found = draws.outputs(pair, generator(0, "one"))
    torch.testing.assert_close(found[:, :6], found[:, 6:])
    assert float(found.std(0).min()) > 0.05


def test_a_shared_draw_would_not_pass_for_independent_ones() -> None:
    """What the tests above look for is there where all examples share a draw."""
    bnn = made(linear(), ROW.expand(2, 3))
    shared = bnn.outputs(bnn.posterior.draw(bnn.draw_noise(generator(0, "one"))), ROW.expand(100, 3))
    assert float(shared.detach().std(0).max()) < 1e-6


def test_padding_rows_are_never_drawn() -> None:
    bnn = made(embedding(), TOKENS.expand(2, 5))
    draws = ExampleDraws(bnn, bnn.posterior, TOKENS.expand(3, 5))
    found = draws.outputs(TOKENS.expand(50, 5), generator(0, "one")).reshape(50, 5, 2)
    torch.testing.assert_close(found[:, 3], torch.zeros(50, 2))
    # The token that is read twice is one draw.
    torch.testing.assert_close(found[:, 0], found[:, 2])
    assert float(found[:, 0].std(0).min()) > 0.05


def test_the_risk_is_what_a_loop_over_whole_network_draws_gives() -> None:
    """1e5 draws each way: here n examples share a draw, which leaves the expectation as it is."""
    x, y = classification(10)
    bnn = made(mlp(), x[:2])
    losses: dict[str, list[Tensor]] = {loss: [] for loss in LOSSES}
    random = generator(3, "brute force")
    with torch.no_grad():
        for _ in range(10_000):
            outputs = bnn.outputs(bnn.posterior.draw(bnn.draw_noise(random)), x)
            probs = outputs.double().softmax(1)
            own = probs[torch.arange(10), y]
            losses["0-1"].append((outputs.argmax(1) != y).double().mean())
            losses["1 - p"].append((1 - own).mean())
            losses["cross-entropy"].append((own.clamp_min(1e-3).log() / math.log(1e-3)).mean())
    risk = sampled_risk(
        bnn, [(x.repeat(1000, 1), y.repeat(1000))], losses=LOSSES, passes=10, p_min=1e-3, progress=False
    )
    assert (risk.examples, risk.draws) == (10_000, 100_000)
    for loss, values in losses.items():
        together = torch.stack(values)
        error = float(together.std()) / 100 + 0.5 / math.sqrt(100_000)
        assert abs(risk.mean(loss) - float(together.mean())) < 4 * error  # type: ignore[arg-type]


def test_the_risk_of_a_gaussian_linear_classifier_is_its_closed_form() -> None:
    """P(sign(wᵀx + b) ≠ y) = Φ(−y (mᵀx + m_b)/√(Σ σ²x² + σ_b²))."""
    x, _ = classification(400, inputs=3)
    y = (x[:, 0] > 0).long()
    bnn = made(nn.Linear(3, 1), x[:2])
    bnn.likelihood = Bernoulli()
    mean, std = bnn.posterior.mean(), bnn.posterior.std()
    margin = (x @ mean["weight"][0] + mean["bias"]) * (2 * y - 1)
    width = (x.square() @ std["weight"][0].square() + std["bias"].square()).sqrt()
    exact = float(torch.special.ndtr(-(margin / width).double()).mean())
    for target in (y, y.float().unsqueeze(1)):
        risk = sampled_risk(bnn, [(x, target)], passes=100, progress=False)
        assert risk.way == "pre-activations"
        assert abs(risk.mean("0-1") - exact) < 4 * 0.5 / math.sqrt(40_000)


def test_one_weight_vector_is_the_deterministic_network() -> None:
    x, y = classification(100)
    net = mlp()
    bnn = made(net, x[:2])
    risk = sampled_risk(
        bnn,
        [(x, y)],
        posterior=PointMassPosterior(bnn.layout, bnn.trained_vector()),
        losses=LOSSES,
        passes=3,
        progress=False,
    )
    with torch.no_grad():
        outputs = net(x)
    assert (risk.way, risk.draws) == ("same", 100)
    assert risk.totals["0-1"] == int((outputs.argmax(1) != y).sum())
    assert risk.mean("1 - p") == pytest.approx(1 - float(outputs.softmax(1)[torch.arange(100), y].mean()), abs=1e-6)


@pytest.mark.parametrize("build", [mlp, conv_net])
def test_draws_depend_on_the_seed_and_not_on_the_batching(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    x = torch.randn(90, 6) if build is mlp else torch.randn(90, 1, 8, 8)
    y = torch.randint(0, 3, (90,))
    bnn = made(build(), x[:4])
    first, again, other = (
        sampled_risk(bnn, loader(x, y, size, shuffle=False), losses=LOSSES, seed=seed, progress=False)
        for size, seed in ((90, 0), (13, 0), (90, 1))
    )
    assert first.totals == pytest.approx(again.totals, abs=1e-4)
    assert abs(first.totals["1 - p"] - other.totals["1 - p"]) > 1e-3
    assert first.provenance.count == 90


def test_a_shuffling_loader_is_left_as_it_was_and_read_the_same_way_again() -> None:
    x, y = classification(50)
    bnn = made(mlp(), x[:2])
    own = torch.Generator().manual_seed(4)
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=own)
    before, outside = own.get_state(), torch.random.get_rng_state()
    first, again = (sampled_risk(bnn, data, losses=("1 - p",), progress=False) for _ in range(2))
    assert first.totals == again.totals
    assert torch.equal(own.get_state(), before)
    assert torch.equal(torch.random.get_rng_state(), outside)


def test_losses_are_what_they_are_said_to_be() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [float("nan"), 0.0], [0.0, 100.0]])
    target = torch.zeros(5, dtype=torch.long)
    assert example_losses(outputs, target, Categorical(), "0-1").tolist() == [0, 1, 1, 1, 1]
    p = 1 / (1 + math.exp(-2.0))
    found = example_losses(outputs, target, Categorical(), "1 - p").tolist()
    assert found == pytest.approx([1 - p, p, 0.5, 1, 1])
    found = example_losses(outputs, target, Categorical(), "1 - p", tau=2.0).tolist()
    assert found[0] == pytest.approx(1 - 1 / (1 + math.exp(-1.0)))
    found = example_losses(outputs, target, Categorical(), "cross-entropy", p_min=0.01).tolist()
    assert found == pytest.approx(
        [math.log(p) / math.log(0.01), math.log(1 - p) / math.log(0.01), 0.150515, 1, 1], abs=1e-5
    )
    single = torch.tensor([1.5, -1.5, 0.0])
    assert example_losses(single, torch.tensor([1, 1, 0]), Bernoulli(), "0-1").tolist() == [0, 1, 1]
    found = example_losses(single, torch.tensor([1, 0, 1]), Bernoulli(), "1 - p").tolist()
    assert found == pytest.approx([1 - 1 / (1 + math.exp(-1.5))] * 2 + [0.5])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(self.first(left).relu() * right)


def test_batches_may_be_tuples_and_mappings() -> None:
    left, right = torch.randn(40, 3), torch.randn(40, 5)
    y = torch.randint(0, 3, (40,))
    bnn = made(TwoInputs(), (left[:2], right[:2]))
    expected = sampled_risk(bnn, [((left, right), y)], losses=("1 - p",), progress=False)
    mapping = {"left": left, "right": right, "labels": y}
    parts = [((left[i : i + 7], right[i : i + 7]), y[i : i + 7]) for i in range(0, 40, 7)]
    for data in (((left, right), y), mapping, [mapping], parts):
        found = sampled_risk(bnn, data, losses=("1 - p",), progress=False)
        assert found.totals == pytest.approx(expected.totals, rel=1e-6)


def test_what_is_no_classification_of_single_labels_is_refused() -> None:
    x, y = classification(40)
    bnn = made(mlp(), x[:2])
    bnn.likelihood = Gaussian(noise_std=1.0)
    with pytest.raises(InputError, match="bounds the risk of a classification"):
        sampled_risk(bnn, [(x, y)])
    bnn.likelihood = Bernoulli()
    with pytest.raises(InputError, match="one label an example"):
        sampled_risk(bnn, [(x, torch.ones(40, 3))])
    bnn.likelihood = Categorical(ignore_index=-100)
    with pytest.raises(InputError, match="labelled examples"):
        sampled_risk(bnn, [(x, torch.where(torch.arange(40) == 5, -100, y))])
    bnn.likelihood = Categorical()
    with pytest.raises(InputError, match="class targets must lie in"):
        sampled_risk(bnn, [(x, y + 1)])
    bnn.likelihood = None
    with pytest.raises(NotFittedError):
        sampled_risk(bnn, [(x, y)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": ("hinge",)}, "losses are"),
        ({"losses": ()}, "losses are"),
        ({"passes": 0}, "passes"),
        ({"p_min": 0.0}, "p_min"),
        ({"p_min": 1.0}, "p_min"),
        ({"predictive_temperature": -1.0}, "predictive_temperature"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    x, y = classification(40)
    bnn = made(mlp(), x[:2])
    with pytest.raises(InputError, match=message):
        sampled_risk(bnn, [(x, y)], **changes)


def test_data_that_cannot_be_read_twice_or_have_no_targets_are_refused() -> None:
    x, y = classification(40)
    bnn = made(mlp(), x[:2])
    with pytest.raises(InputError, match="more than once"):
        sampled_risk(bnn, iter([(x, y)]))
    with pytest.raises(InputError, match="without targets"):
        sampled_risk(bnn, x)
    with pytest.raises(InputError, match="empty"):
        sampled_risk(bnn, [])


def test_nothing_is_warned_of() -> None:
    x, y = classification(40)
    bnn = made(conv_net(), torch.randn(4, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled_risk(bnn, [(torch.randn(40, 1, 8, 8), y)], losses=LOSSES, progress=False)
    del x
