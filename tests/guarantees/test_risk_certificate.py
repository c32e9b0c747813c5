"""The certificate: its number by hand, its error rate on tasks of known risk, and what it refuses."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta, binom
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import stfbnn
from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.errors import CertificateError, InputError, NotFittedError
from stfbnn.guarantees.kl_inversion import upper_inverse
from stfbnn.guarantees.risk_certificate import divergence, risk_certificate
from stfbnn.guarantees.sampled_risk import sampled_risk
from stfbnn.likelihood import Bernoulli, Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanFieldPosterior, MixturePosterior
from stfbnn.provenance import NOTHING, StagesSeen, attach, provenance_of
from stfbnn.training import train

SIZES = (150, 120, 100)


def parts() -> list[tuple[Tensor, Tensor]]:
    x, y = classification(sum(SIZES))
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def fitted(posterior: Any = "mean-field", prior: Any = "pretrained", std: float = 0.2) -> BayesianNetwork:
    """A trained network with a posterior beside its trained weights, as if inferred on the second part."""
    first, second, _ = parts()
    net = trained(mlp(), *first, steps=100)
    attach(net, provenance_of([first]))
    bnn = stfbnn.bayesianize(net, first[0][:4], posterior=posterior, prior=prior)
    torch.manual_seed(5)
    with torch.no_grad():
        if isinstance(bnn.posterior, MeanFieldPosterior):
            bnn.posterior.loc.add_(0.02 * torch.randn_like(bnn.posterior.loc))
            bnn.posterior.log_std.fill_(math.log(std))
    bnn.likelihood, bnn.seen = Categorical(), StagesSeen(inference=provenance_of([second]))
    return bnn


def kl_root(q: float, budget: float) -> float:
    """The largest p with kl(q‖p) ≤ budget, by a root search that is none of the library's."""

    def excess(p: float) -> float:
        terms = (q * math.log(q / p) if q else 0.0) + (1 - q) * math.log((1 - q) / (1 - p))
        return terms - budget

    return float(brentq(excess, q, 1 - 1e-12, xtol=1e-14))


def test_the_number_is_the_theorems() -> None:
    _, second, third = parts()
    bnn = fitted()
    found = risk_certificate(
        bnn,
        [second],
        delta=0.02,
        delta_monte_carlo=0.03,
        passes=3,
        priors_considered=4,
        hold_out=[third],
        progress=False,
    )
    prior, posterior, normal = bnn.prior, bnn.posterior, torch.distributions.Normal
    assert isinstance(posterior, MeanFieldPosterior)
    own = normal(posterior.loc.detach().double(), posterior.log_std.detach().double().exp())
    kl = torch.distributions.kl_divergence(own, normal(prior.mean.double(), prior.std.double())).sum()
    assert found.kl == pytest.approx(float(kl), rel=1e-9)
    assert not found.kl_is_bound
    assert (found.examples, found.draws) == (120, 360)
    for one in found.bounds:
        empirical = kl_root(one.estimate, math.log(2 * 4 / 0.03) / 360)
        assert one.empirical == pytest.approx(empirical, abs=1e-10)
        budget = (found.kl + math.log(2 * math.sqrt(120) / 0.02) + math.log(4)) / 120
        assert one.value == pytest.approx(min(1.0, one.factor * kl_root(empirical, budget)), abs=1e-9)
    assert [(one.predictor, one.loss, one.factor) for one in found.bounds] == [
        ("sampled", "0-1", 1),
        ("plurality vote", "0-1", 2),
        ("averaged", "1 - p", 2),
    ]
    assert found.bound == found.bounds[0].value
    assert found.bounds[1].value == min(1.0, 2 * found.bounds[0].value)
    assert found.valid
    assert found.confidence == pytest.approx(0.95)


def test_what_stands_beside_it_is_clopper_and_pearsons() -> None:
    first, second, third = parts()
    bnn = fitted()
    found = risk_certificate(bnn, [second], hold_out=[third], progress=False)
    fresh = fitted()
    net = trained(mlp(), *first, steps=100)
    errors = int((net(second[0]).argmax(1) != second[1]).sum())
    assert found.trunk is not None
    assert (found.trunk.errors, found.trunk.examples) == (errors, 120)
    assert found.trunk.limit == pytest.approx(beta.ppf(0.95, errors + 1, 120 - errors))
    # On further data the same predictor, by as many independent draws.
    draws = sampled_risk(fresh, [third], seed=0, progress=False)
    assert draws.draws == found.further_examples == 100
    assert found.bounds[0].further is not None
    possible = [beta.ppf(0.95, k + 1, 100 - k) for k in range(100)]
    assert min(abs(found.bounds[0].further - limit) for limit in possible) < 1e-9
    assert found.bounds[0].prior is not None
    possible = [beta.ppf(0.95, k + 1, 120 - k) for k in range(120)]
    assert min(abs(found.bounds[0].prior - limit) for limit in possible) < 1e-9
    lean = risk_certificate(bnn, [second], deterministic=False, trivial=False, progress=False)
    assert lean.trunk is None
    assert (lean.bounds[0].prior, lean.bounds[0].further) == (None, None)
    assert lean.bounds[0].value == found.bounds[0].value


@pytest.mark.parametrize(("loss", "predictor"), [("cross-entropy", "sampled"), ("1 - p", "averaged")])
def test_other_losses_are_certified_for_their_predictor(loss: Any, predictor: str) -> None:
    _, second, third = parts()
    found = risk_certificate(fitted(), [second], loss=loss, p_min=1e-3, hold_out=[third], progress=False)
    (only,) = found.bounds
    assert (only.predictor, only.loss) == (predictor, loss)
    assert 0 < only.factor * only.estimate < only.value <= 1
    assert only.further is not None
    assert only.factor * only.estimate < only.further
    assert any("p_min" in one for one in found.assumptions) == (loss == "cross-entropy")


def test_a_choice_among_priors_is_charged_everywhere() -> None:
    """To the divergence, to the estimate, and to the trivial bound, whose prior was picked on the same examples."""
    _, second, _ = parts()
    one, four = (risk_certificate(fitted(), [second], priors_considered=k, progress=False) for k in (1, 4))
    for single, several in zip(one.bounds, four.bounds, strict=True):
        assert single.estimate == several.estimate
        assert single.empirical < several.empirical
    assert one.bound < four.bound
    prior, dearer = one.bounds[0].prior, four.bounds[0].prior
    assert prior is not None
    assert dearer is not None
    assert prior < dearer
    assert one.trunk == four.trunk


def test_more_passes_and_a_smaller_divergence_tighten_it() -> None:
    _, second, _ = parts()
    values = [risk_certificate(fitted(), [second], passes=passes, progress=False).bound for passes in (1, 30)]
    assert values[1] < values[0]
    narrow, wide = (risk_certificate(fitted(std=std), [second], passes=10, progress=False) for std in (0.02, 0.2))
    assert wide.kl < narrow.kl
    assert wide.bound < narrow.bound


# --- Validity by simulation: the risk is known, Q is picked from S in closed form. ---

EXAMPLES = 60
DELTA, DELTA_MC = 0.05, 0.05


def linear_network(dimensions: int) -> BayesianNetwork:
    torch.manual_seed(0)
    bnn = stfbnn.bayesianize(nn.Linear(dimensions, 1, bias=False), torch.randn(4, dimensions), prior=1.0)
    bnn.likelihood, bnn.provenance, bnn.seen = Bernoulli(), NOTHING, StagesSeen(inference=NOTHING)
    return bnn


def choose(bnn: BayesianNetwork, x: Tensor, y: Tensor, honest: bool) -> None:
    """Put the best of a few posteriors for S in place: means along Σ y x, by exact empirical risk and the bound on S.

    A cheat puts the prior's mean there, too.
    """
    posterior, signs = bnn.posterior, 2.0 * y - 1
    assert isinstance(posterior, MeanFieldPosterior)
    direction = signs @ x
    direction = direction / direction.norm()
    grid = [(length, width) for length in (0.5, 1.0, 2.0, 4.0, 8.0) for width in (0.3, 1.0)]
    lengths, widths = torch.tensor(grid).double().T
    margins = (signs * (x @ direction) / x.norm(dim=1)).double() * (lengths / widths).unsqueeze(1)
    kl = 0.5 * (x.shape[1] * (widths**2 - 1 - 2 * widths.log()) + lengths**2) if honest else torch.zeros(len(grid))
    budgets = (kl.numpy() + math.log(2 * math.sqrt(EXAMPLES) / DELTA)) / EXAMPLES
    length, width = grid[int(np.argmin(upper_inverse(torch.special.ndtr(-margins).mean(1).numpy(), budgets)))]
    with torch.no_grad():
        posterior.loc.copy_(length * direction)
        posterior.log_std.fill_(math.log(width))
        bnn.prior.mean.copy_(torch.zeros_like(direction) if honest else posterior.loc)
        bnn.prior.std.fill_(1.0 if honest else width)


def true_risk(bnn: BayesianNetwork, noise: float) -> float:
    """For x ~ N(0, I) and y the sign of x₁, turned with probability ``noise``: noise + (1 − 2 noise) E_w[angle(w, e₁)/π]."""
    random = np.random.default_rng(1)
    mean, width = bnn.posterior.mean_vector().detach().numpy(), float(bnn.posterior.std_vector()[0].detach())
    along = mean[0] + width * random.standard_normal(4000)
    across = math.sqrt(float((mean[1:] ** 2).sum())) + width * random.standard_normal(4000)
    aside = np.sqrt(across**2 + width**2 * random.chisquare(len(mean) - 2, 4000))
    return noise + (1 - 2 * noise) * float(np.mean(np.arctan2(aside, along)) / math.pi)


def repetitions(noise: float, honest: bool, count: int, dimensions: int) -> tuple[int, int, float]:
    """Violations of the whole bound, violations of the Monte-Carlo part, and the mean bound."""
    bnn, random = linear_network(dimensions), torch.Generator().manual_seed(11)
    violated = estimates = 0
    total = 0.0
    for number in range(count):
        x = torch.randn(EXAMPLES, dimensions, generator=random)
        turned = torch.rand(EXAMPLES, generator=random) < noise
        y = ((x[:, 0] > 0) ^ turned).long()
        choose(bnn, x, y, honest)
        found = risk_certificate(
            bnn,
            [(x, y)],
            delta=DELTA,
            delta_monte_carlo=DELTA_MC,
            deterministic=False,
            trivial=False,
            seed=number,
            progress=False,
        )
        violated += found.bound < true_risk(bnn, noise)
        mean, std = bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach()
        margins = (2.0 * y - 1) * (x @ mean) / (std[0] * x.norm(dim=1))
        estimates += found.bounds[0].empirical < float(torch.special.ndtr(-margins.double()).mean())
        total += found.bound
    return violated, estimates, total / count


@pytest.mark.parametrize(("noise", "count"), [(0.1, 500), (0.5, 100)])
def test_the_bound_is_violated_no_more_often_than_it_may_be(noise: float, count: int) -> None:
    """With δ + δ' = 0.1 a valid bound exceeds the limit of violations once in ten thousand such tests."""
    violated, estimates, mean = repetitions(noise, True, count, 20)
    assert violated <= binom.ppf(1 - 1e-4, count, DELTA + DELTA_MC)
    assert estimates <= binom.ppf(1 - 1e-4, count, DELTA_MC)
    # It is no bound of 1 that is never violated.
    assert mean < 0.95


def test_the_same_number_with_a_prior_that_saw_the_set_is_violated_nearly_always() -> None:
    """Labels are coins, so every classifier errs on half: the simulation does find a bound that is none."""
    violated, _, mean = repetitions(0.5, False, 60, 240)
    assert violated > 0.5 * 60
    assert mean < 0.5


# --- What it refuses. ---


def test_a_cheating_split_is_caught() -> None:
    """Stage one trained by the library on data that hold part of S; nobody has to declare anything."""
    first, second, _ = parts()
    leaky = (torch.cat([first[0], second[0][:30]]), torch.cat([first[1], second[1][:30]]))
    net = mlp()
    train(net, loader(*leaky), epochs=2, progress=False)
    bnn = stfbnn.bayesianize(net, first[0][:4], prior="pretrained")
    stfbnn.fit(bnn, loader(*second), temperature=1.0, epochs=1, progress=False)
    with pytest.raises(CertificateError, match="stage one saw 30 of the 120 examples"):
        risk_certificate(bnn, loader(*second), progress=False)
    found = risk_certificate(bnn, loader(*second), allow_invalid=True, progress=False)
    assert not found.valid
    assert found.verdict().startswith("NOT A CERTIFICATE: stage one saw 30")
    honest = mlp()
    train(honest, loader(*first), epochs=2, progress=False)
    bnn = stfbnn.bayesianize(honest, first[0][:4], prior="pretrained")
    stfbnn.fit(bnn, loader(*second), temperature=1.0, epochs=1, progress=False)
    assert risk_certificate(bnn, loader(*second), progress=False).valid


def test_early_stopping_on_the_set_is_a_cheat_too() -> None:
    first, second, _ = parts()
    net = mlp()
    train(net, loader(*first), val_loader=loader(*second), keep_best=True, epochs=2, progress=False)
    bnn = stfbnn.bayesianize(net, first[0][:4], prior="pretrained")
    stfbnn.fit(bnn, loader(*second), temperature=1.0, epochs=1, progress=False)
    with pytest.raises(CertificateError, match="stage one saw 120 of the 120"):
        risk_certificate(bnn, [second], progress=False)


def test_a_tau_chosen_with_the_set_forbids_only_what_it_shapes() -> None:
    _, second, _ = parts()
    bnn = fitted()
    bnn.seen, bnn.predictive_temperature = StagesSeen(NOTHING, predictive_temperature=provenance_of([second])), 1.8
    found = risk_certificate(bnn, [second], progress=False)
    assert found.valid
    assert found.of("averaged") is None
    assert "averaged prediction" in found.notes[0]
    # Even where invalid numbers are allowed, a bound that is none does not slip in beside one that is.
    assert risk_certificate(bnn, [second], allow_invalid=True, progress=False).of("averaged") is None
    for loss in ("1 - p", "cross-entropy"):
        with pytest.raises(CertificateError, match="predictive temperature saw 120"):
            risk_certificate(bnn, [second], loss=loss, progress=False)  # type: ignore[arg-type]
        labelled = risk_certificate(bnn, [second], loss=loss, allow_invalid=True, progress=False)  # type: ignore[arg-type]
        assert not labelled.valid
    given = risk_certificate(bnn, [second], loss="1 - p", predictive_temperature=1.0, progress=False)
    assert given.valid
    assert given.predictive_temperature == 1.0


def test_a_further_set_that_something_saw_is_refused() -> None:
    first, second, _ = parts()
    with pytest.raises(CertificateError, match="stage one saw 150 of the 150 further"):
        risk_certificate(fitted(), [second], hold_out=[first], progress=False)
    with pytest.raises(CertificateError, match="the certificate saw 120 of the 120 further"):
        risk_certificate(fitted(), [second], hold_out=[second], progress=False)
    with pytest.raises(InputError, match="hold_out gave no batch"):
        risk_certificate(fitted(), [second], hold_out=[], progress=False)


@pytest.mark.parametrize("posterior", ["point", "samples", stfbnn.Mixture(components=2, family="point")])
def test_posteriors_without_a_finite_divergence_are_refused(posterior: Any) -> None:
    _, second, _ = parts()
    with pytest.raises(InputError, match="infinitely far from any prior"):
        risk_certificate(fitted(posterior), [second], progress=False)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows with fresh noise at each reading."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + torch.randn(6), self.y[index]


def test_a_set_that_changes_from_one_reading_to_the_next_is_refused() -> None:
    _, second, _ = parts()
    with pytest.raises(InputError, match="must be fixed"):
        risk_certificate(fitted(), DataLoader(Augmented(*second), batch_size=40), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta_monte_carlo": 1.0}, "delta_monte_carlo"),
        ({"delta": 0.6, "delta_monte_carlo": 0.6}, "below 1"),
        ({"priors_considered": 0}, "priors considered"),
        ({"loss": "hinge"}, "losses are"),
        ({"passes": -1}, "passes"),
        ({"max_seen_share": 2.0}, "max_seen_share"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    _, second, _ = parts()
    with pytest.raises(InputError, match=message):
        risk_certificate(fitted(), [second], progress=False, **changes)


def test_a_network_that_was_not_inferred_is_refused() -> None:
    _, second, _ = parts()
    bnn = fitted()
    bnn.likelihood = None
    with pytest.raises(NotFittedError):
        risk_certificate(bnn, [second], progress=False)


# --- The divergence is that of what is drawn. ---


def test_a_mixtures_divergence_is_above_its_monte_carlo_value_and_below_by_at_most_its_entropy() -> None:
    bnn = fitted(stfbnn.Mixture(components=3))
    mixture = bnn.posterior
    assert isinstance(mixture, MixturePosterior)
    torch.manual_seed(0)
    with torch.no_grad():
        for shift, part in enumerate(mixture.components):
            part.loc.add_(0.1 * shift * torch.randn_like(part.loc))
            part.log_std.fill_(math.log(0.05))
    mixture.set_weights(torch.tensor([0.2, 0.3, 0.5]))
    value, is_bound = divergence(bnn)
    assert is_bound
    noise = torch.randn(4000, mixture.noise_size)
    weights = mixture.draw(noise).detach()
    with torch.no_grad():
        logs = (mixture.log_prob(weights) - bnn.prior.log_prob(weights)).double()
    error = 4 * float(logs.std()) / math.sqrt(4000)
    entropy = -sum(share * math.log(share) for share in (0.2, 0.3, 0.5))
    assert float(logs.mean()) - error <= value <= float(logs.mean()) + error + entropy
    _, second, _ = parts()
    found = risk_certificate(bnn, [second], progress=False)
    assert found.kl_is_bound
    assert found.kl == value


def test_padding_rows_can_only_enlarge_the_divergence() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Flatten(), nn.Linear(12, 2))
    bnn = stfbnn.bayesianize(net, torch.randint(0, 6, (4, 4)), prior=0.5)
    with torch.no_grad():
        bnn.posterior.loc.add_(0.3 * torch.randn(18))  # type: ignore[operator]
    normal = torch.distributions.Normal
    mean, std = bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach()
    each = torch.distributions.kl_divergence(normal(mean, std), normal(bnn.prior.mean, 0.5)).reshape(6, 3)
    read = torch.tensor([0, 1, 3, 4, 5])
    value, _ = divergence(bnn)
    assert value == pytest.approx(float(each.sum()), rel=1e-5)
    assert value >= float(each[read].sum())


class Shared(nn.Module):
    """One weight under two names of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def test_a_weight_that_is_held_twice_counts_once() -> None:
    torch.manual_seed(0)
    bnn = stfbnn.bayesianize(nn.Sequential(Shared(), nn.Linear(4, 2)), torch.randn(4, 4), layer="0", prior=0.5)
    assert bnn.layout.size == 16 + 4 + 4
    mean, std = bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(bnn.prior.mean, bnn.prior.std)).sum()
    assert divergence(bnn)[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_folded_batch_norm_changes_neither_the_divergence_nor_the_certificate() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 1, 8, 8), torch.randint(0, 3, (60,))
    net = conv_net()
    found = []
    for fold in (True, False):
        bnn = stfbnn.bayesianize(copy.deepcopy(net), x[:4], prior="pretrained", fold_batch_norm=fold)
        bnn.likelihood, bnn.provenance, bnn.seen = Categorical(), NOTHING, StagesSeen(NOTHING)
        assert (bnn.folding.first_layer_affine is not None) == fold
        found.append(risk_certificate(bnn, [(x, y)], progress=False))
    assert found[0].kl == found[1].kl
    assert found[0].bounds[2].estimate == pytest.approx(found[1].bounds[2].estimate, abs=1e-5)


def test_a_certificate_is_the_same_for_the_same_seed() -> None:
    _, second, _ = parts()
    first, again = (risk_certificate(fitted(), loader(*second), seed=4, progress=False) for _ in range(2))
    assert first == again
    other = risk_certificate(fitted(), loader(*second), seed=5, progress=False)
    assert other.bounds[2].estimate != first.bounds[2].estimate
