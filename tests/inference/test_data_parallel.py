"""Stage two on several ranks: the posterior is that of one process, and every step's statistics are reduced rightly."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import data_parallel_script
from data_parallel_script import COUNT, NOISE, PRIOR_STD, regression
from stfbnn.conversion import bayesianize
from stfbnn.errors import CheckpointError, InputError
from stfbnn.inference.components.scoring import training_nll
from stfbnn.inference.estimators import AcrossRanks, SharedSample
from stfbnn.inference.loaders import count_examples
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.inference.ranks import computing_on, mean_learned, rank_path, require_batches
from stfbnn.inference.variational_newton import VariationalNewton
from stfbnn.launching import joined_fabric
from stfbnn.likelihood import Gaussian
from stfbnn.processes import Processes
from two_ranks import results_of_two

# --- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of two ranks, and the folder where their checkpoint is."""
    folder = tmp_path_factory.mktemp("ranks")
    return *results_of_two(data_parallel_script.__file__, folder), folder


@pytest.fixture(scope="module")
def alone():
    return data_parallel_script.conjugate(1)


def exact():
    """Mean and widths of the best mean-field Gaussian of conjugate linear regression."""
    x, y = regression()
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / NOISE**2 + torch.eye(5, dtype=torch.float64) / PRIOR_STD**2
    return torch.linalg.solve(precision, design.T @ y / NOISE**2), precision.diagonal().rsqrt()


def root_mean_square(values):
    return float(values.square().mean().sqrt())


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return one == other


def test_all_ranks_end_with_the_same_posterior_and_the_same_record(ranks):
    first, second, _ = ranks
    for name in first:
        assert equal(first[name], second[name]), name


def test_the_posterior_is_the_exact_one_as_it_is_in_one_process(ranks, alone):
    mean, std = exact()
    for found in (alone, ranks[0]["conjugate"]):
        assert ((found["mean"] - mean).abs() < 0.05 * std).all()
        assert root_mean_square(found["std"] / std - 1) < 0.01


def test_one_process_and_two_agree(ranks, alone):
    found = ranks[0]["conjugate"]
    assert ((found["mean"] - alone["mean"]).abs() < 0.05 * alone["std"]).all()
    assert ((found["std"] / alone["std"] - 1).abs() < 0.02).all()
    assert (found["ranks"], alone["ranks"]) == (2, 1)
    assert found["num_examples"] == alone["num_examples"] == COUNT
    assert torch.equal(found["seen"], alone["seen"])


def test_parts_of_unequal_size_count_by_their_examples(ranks):
    mean, std = exact()
    found = ranks[0]["unequal"]
    assert ((found["mean"] - mean).abs() < 0.05 * std).all()
    assert root_mean_square(found["std"] / std - 1) < 0.05
    # What equal weights would give: each rank's mean curvature counts one half.
    x = regression()[0]
    first = data_parallel_script.FIRST_PART
    halves = (x[:first].square().mean(0) + x[first:].square().mean(0)) / 2
    wrong = (COUNT * halves / NOISE**2 + PRIOR_STD**-2).rsqrt()
    assert root_mean_square(wrong / std[:4] - 1) > 0.15


def test_a_run_is_repeated_bit_for_bit(ranks):
    assert equal(ranks[0]["again"], ranks[0]["straight"])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(ranks):
    straight, resumed = ranks[0]["straight"], ranks[0]["resumed"]
    assert equal(resumed, straight)
    # No step was left to do.
    assert equal(ranks[0]["finished"], straight | {"bytes_per_step": 0})


def test_rows_that_fill_up_a_part_are_not_counted_twice(ranks):
    assert ranks[0]["straight"]["num_examples"] == 31
    # 31 of the training data and as many held-out ones.
    assert len(ranks[0]["straight"]["seen"]) == 62


def test_noise_that_is_learned_is_that_of_all_ranks(ranks):
    one, two = data_parallel_script.columns(1)["noise"], ranks[0]["columns"]["noise"]
    assert two == pytest.approx(one, rel=0.02)


def test_every_family_and_a_learned_prior_stay_equal_on_all_ranks(ranks):
    first = ranks[0]
    assert float((first["learned prior"]["prior_std"] / first["straight"]["prior_std"]).log().abs().max()) > 0.1
    assert first["filterwise"]["num_examples"] == 31
    assert float(first["point mass"]["std"].max()) == 0


def test_a_step_sends_the_first_layers_numbers_alone(ranks):
    first = ranks[0]
    # A gradient by the mean and one by the width, the loss and the count, in the posterior's type.
    assert first["conjugate"]["bytes_per_step"] == 8 * (5 + 5 + 2)
    assert first["straight"]["bytes_per_step"] == 4 * (36 + 36 + 2)
    assert first["point mass"]["bytes_per_step"] == 8 * (5 + 2)
    # Six filters with a bias each: their means and their triangles.
    assert first["filterwise"]["bytes_per_step"] == 4 * (36 + 6 * 6 * 6 + 2)


def test_every_component_of_a_mixture_is_fitted_by_all_ranks(ranks):
    mean, std = exact()
    found = ranks[0]["exact mixture"]
    # There is one optimum, which both components find, the second one from a start of its own.
    assert len(found["means"]) == 2
    assert ((found["means"] - mean).abs() < 0.1 * std).all()
    assert root_mean_square(found["stds"] / std - 1) < 0.03
    # Their free energies are then equal, and so are their weights, which are exponentials of these times N.
    assert [one[5] for one in found["components"]] == pytest.approx([0.5, 0.5], abs=0.1)
    assert found["num_examples"] == COUNT


def test_an_interrupted_mixture_goes_on_as_if_it_had_not_been(ranks):
    straight, resumed = ranks[0]["mixture"], ranks[0]["mixture resumed"]
    assert len(straight["components"]) == 2
    assert straight["components"][1][3] > 0
    # The bytes are those of component 0, for which no step was left to do.
    assert equal(resumed, straight | {"bytes_per_step": 0})


def test_an_ensemble_of_points_goes_through_on_several_ranks(ranks):
    found = ranks[0]["points"]
    assert [one[0] for one in found["components"]] == [0, 1]
    assert sum(one[5] for one in found["components"]) == pytest.approx(1)
    assert float(found["stds"].max()) == 0


def test_what_several_ranks_cannot_do_is_refused(ranks):
    assert "must be a torch DataLoader" in ranks[0]["list"]
    assert "the ranks have different models" in ranks[0]["models"]


def test_a_checkpoint_of_another_number_of_ranks_is_refused(ranks):
    with pytest.raises(CheckpointError, match="processes: 2 in the checkpoint, absent now"):
        data_parallel_script.classes(ranks[2])


# --- one step by hand


class Recorded(Processes):
    """A rank of two whose sums are with what the other one gave; without that it gives what it has itself."""

    def __init__(self, rank, other=None):
        super().__init__()
        self.rank, self.count, self.other, self.given = rank, 2, other, []

    def sum(self, value):
        self.given.append(value.clone())
        return value if self.other is None else value + self.other


def linear(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, generator=generator, dtype=torch.float64)


def test_products_are_averaged_and_not_averages_multiplied():
    """ĥ is Σ_r B_r g_r ε_r / (σ Σ_r B_r), with g_r the gradient at the rank's own draw: worked out without the library."""
    sizes, rate = (3, 5), 0.25
    parts = [linear(rows, seed) for seed, rows in enumerate(sizes)]
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    engines, losses, seen = [], [], []
    for x, y in parts:
        bnn = bayesianize(model, x[:2], prior=1.0)
        losses.append(MinibatchLoss(bnn, Gaussian(noise_std=1.0), x, y[:, None]))
        processes = Recorded(len(seen))
        estimator = AcrossRanks(SharedSample(draws=1), processes)
        curvature = torch.ones(3, dtype=torch.float64)
        engine = VariationalNewton(
            bnn.posterior, bnn.prior, 8, estimator, batches=4, curvature=curvature, curvature_trust=1 / rate
        )
        engine.begin(1.0, 10)
        engines.append(engine)
        seen.append(processes)
    mean = engines[0].posterior.mean_vector().detach().clone()
    std = engines[0].posterior.std_vector().detach().clone()
    for rank, (engine, loss) in enumerate(zip(engines, losses, strict=True)):
        generator = torch.Generator().manual_seed(10 + rank)
        engine.estimator.estimate(loss, engine.precision.sampler(), generator)
    for rank in (0, 1):
        seen[rank].other = seen[1 - rank].given[0]
    nlls = [
        engine.step(loss, torch.Generator().manual_seed(10 + rank))
        for rank, (engine, loss) in enumerate(zip(engines, losses, strict=True))
    ]

    noises = [torch.randn(3, generator=torch.Generator().manual_seed(10 + rank)).double() for rank in (0, 1)]
    draws = [mean + std * noise for noise in noises]
    residuals = [x @ w - y for (x, y), w in zip(parts, draws, strict=True)]
    gradients = [x.T @ r / len(x) for (x, _), r in zip(parts, residuals, strict=True)]
    products = sum(size * g * e for size, g, e in zip(sizes, gradients, noises, strict=True)) / 8 / std
    gradient = sum(size * g for size, g in zip(sizes, gradients, strict=True)) / 8
    nll = sum(float((r.square() / 2).sum()) for r in residuals) / 8 + 0.5 * math.log(2 * math.pi)
    difference = 1 - products
    # δ = T / (N s²) = 1/8.
    expected = 1 - rate * difference + 0.5 * rate**2 * difference.square() / (1 + 1 / 8)
    averages = gradient * sum(noises) / 2 / std
    assert not torch.allclose(averages, products, rtol=0.1)
    for engine, found in zip(engines, nlls, strict=True):
        assert found == pytest.approx(nll, rel=1e-6)
        torch.testing.assert_close(engine.precision.state()["curvature"], expected)
        # β₁ = 0.9: the average of gradients has taken one tenth.
        torch.testing.assert_close(engine.state()["gradient"], 0.1 * gradient)
        torch.testing.assert_close(engine.posterior.mean_vector(), engines[0].posterior.mean_vector(), rtol=0, atol=0)
        assert engine.estimator.examples == 8


# --- the parts


def test_a_single_process_sums_nothing_and_computes_for_itself():
    one, value = Processes(), torch.ones(3)
    assert one.sum(value) is value
    assert (one.gather(5), one.from_first(lambda: 7), one.sent, one.several) == ([5], 7, 0, False)
    assert rank_path(one) == ()
    with pytest.raises(InputError, match="why"):
        one.from_first(lambda: (_ for _ in ()).throw(InputError("why")))


class Stub:
    """Fabric as rank ``rank`` of two sees it, whose first rank broadcasts ``message``."""

    def __init__(self, rank, message=None):
        self.global_rank, self.world_size, self.message = rank, 2, message
        self.device = torch.device("cpu")

    def broadcast(self, value):
        return value if self.global_rank == 0 else self.message

    def all_reduce(self, value, reduce_op):
        assert reduce_op == "sum"
        return 2 * value


def test_an_error_of_the_first_rank_is_raised_on_all():
    failure = CheckpointError("damaged")
    for rank in (0, 1):
        with pytest.raises(CheckpointError, match="damaged"):
            Processes(Stub(rank, (None, failure))).from_first(lambda: (_ for _ in ()).throw(failure))
    # The others do not compute at all.
    assert Processes(Stub(1, (5, None))).from_first(lambda: 1 / 0) == 5


def test_sums_are_counted_in_bytes():
    processes = Processes(Stub(1))
    assert torch.equal(processes.sum(torch.ones(3)), torch.full((3,), 2.0))
    processes.sum(torch.ones(2, dtype=torch.float64))
    assert processes.sent == 12 + 16
    assert rank_path(processes) == ("rank", 1)


class Gathered(Processes):
    def __init__(self, parts):
        super().__init__()
        self.count, self.parts = len(parts), parts

    def gather(self, value):
        return self.parts


def test_what_the_noise_learns_is_weighted_by_what_the_examples_count():
    parts = [(3.0, torch.tensor(2.0)), (1.0, torch.tensor(6.0))]
    mean, total = mean_learned(torch.tensor(2.0), 3.0, Gathered(parts))
    assert (float(mean), total) == (3.0, 4.0)
    # A rank of whose examples none counts has no estimate.
    mean, total = mean_learned(None, 0.0, Gathered([(0.0, None), (2.0, torch.tensor(5.0))]))
    assert (float(mean), total) == (5.0, 2.0)
    assert mean_learned(None, 1.0, Gathered([(1.0, None), (1.0, None)])) == (None, 2.0)


def test_a_pass_of_another_length_is_refused_on_several_ranks():
    require_batches(3, 4, Processes())
    with pytest.raises(InputError, match="rank 0 3 batches"):
        require_batches(3, 4, Gathered([0, 0]))


def test_rows_that_are_repeated_to_fill_up_ranks_are_left_out_of_the_count():
    data = TensorDataset(torch.zeros(7, 1))

    class Unknown(torch.utils.data.Sampler):
        def __iter__(self):
            return iter([0, 1, 1, 2, 5])

        def __len__(self):
            return 5

    assert count_examples(DataLoader(data, 2, sampler=Unknown()), 6, several_ranks=True) == 5
    assert count_examples(DataLoader(data, 2, sampler=Unknown()), 5) == 5
    weighted = WeightedRandomSampler([1.0] * 7, 4)
    assert count_examples(DataLoader(data, 2, sampler=weighted), 4, several_ranks=True) == 7


def test_a_process_that_nobody_started_as_a_rank_needs_no_fabric():
    assert joined_fabric("auto", "auto", "auto", 1) is None
    assert joined_fabric("cpu", 1, "auto", 1).world_size == 1
    with pytest.raises(InputError, match="cannot be used here"):
        joined_fabric("cpu", 0, "auto", 1)


class Moved:
    """A network that notes where it is taken."""

    def __init__(self, likelihood=None):
        self.device, self.likelihood, self.places = torch.device("cpu"), likelihood, []

    def to(self, device):
        self.device = device
        self.places.append(str(device))
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_a_network_is_on_the_ranks_device_for_the_run_alone(fails):
    network, fabric = Moved(), Stub(0)
    network.likelihood = Moved()
    fabric.device = torch.device("cuda:1")
    with contextlib.suppress(ZeroDivisionError), computing_on(network, fabric):
        assert network.places == ["cuda:1"]
        assert not network.likelihood.places
        _ = 1 / 0 if fails else 1
    assert (network.places, network.likelihood.places) == (["cuda:1", "cpu"], ["cpu"])
    network.places.clear()
    for one in (None, Stub(0)):
        with computing_on(network, one):
            assert not network.places


def test_naming_the_device_changes_nothing_in_one_process():
    x, y = regression()
    found = []
    for options in ({}, {"accelerator": "cpu", "devices": 1}):
        torch.manual_seed(0)
        bnn = bayesianize(nn.Linear(4, 1).double(), x[:2])
        data_parallel_script.fit(bnn, [(x, y)], epochs=2, temperature=1.0, **options)
        found.append(bnn.posterior_state()["posterior"])
    assert equal(*found)


def test_the_training_nll_of_two_parts_is_that_of_all_the_data():
    x, y = linear(8, 3)
    torch.manual_seed(0)
    bnn = bayesianize(nn.Linear(3, 1, bias=False).double(), x[:2], prior=1.0)
    settings = Gaussian(noise_std=0.5), "labels", 3, 0, "weights"
    whole = training_nll(bnn, [(x, y[:, None])], *settings)
    second = Recorded(1)
    training_nll(bnn, [(x[5:], y[5:, None])], *settings, second)
    assert float(second.given[0][1]) == 3
    both = training_nll(bnn, [(x[:5], y[:5, None])], *settings, Recorded(0, second.given[0]))
    assert both == pytest.approx(whole, rel=1e-12)
