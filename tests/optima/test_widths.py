"""Layers compared by what each alone buys: against the same done by hand, closed forms, and made results."""

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from compared_layers import small, three_layers, timeless
from shown_tables import shown
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import stfbnn
from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.data import load
from stfbnn.errors import InputError, LayerError
from stfbnn.optima import widths
from stfbnn.optima.widths import compare_layers

NOISE, SCALE = 0.7, 0.5


def digits_mlp() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """An overfitted network, and its training, held-out and test examples."""
    data = load("digits")
    x, y = data.train.stored.float().flatten(1), data.train.targets
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 250), (250, 650), (650, 1050))]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
    return trained(net, *parts[0], steps=60), parts


def small_cnn() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    parts = []
    for seed in range(3):
        x, y = classification(150, inputs=64, seed=seed)
        parts.append((x.reshape(-1, 1, 8, 8), y))
    return trained(conv_net(), *parts[0], steps=30), parts


def brute_force_auroc(inside: Tensor, outside: Tensor) -> float:
    above = (outside[:, None] > inside[None]).double() + 0.5 * (outside[:, None] == inside[None]).double()
    return float(above.mean())


@pytest.mark.parametrize("make", [digits_mlp, small_cnn])
def test_all_layers_are_compared_and_the_figures_are_those_of_doing_it_by_hand(make: Any) -> None:
    net, (first, second, third) = make()
    noise = torch.rand(60, *first[0].shape[1:], generator=torch.Generator().manual_seed(3)) * 3
    train, val = loader(*first), loader(*second, shuffle=False)
    found = compare_layers(
        net,
        train,
        val,
        test_loader=loader(*third, shuffle=False),
        outside={"noise": noise},
        epochs=2,
        samples=8,
        seed=4,
    )
    names = [one.name for one in stfbnn.layer_choices(net, first[0][:2]) if not one.passed_over]
    assert [one.layer for one in found.layers] == names
    assert (found.first, found.tested_on, found.failed, found.skipped) == (names[0], "test", {}, ())
    with torch.no_grad():
        plain_held_out, plain = (nn.functional.log_softmax(net(x), 1).double() for x in (second[0], third[0]))
        plain_noise = nn.functional.log_softmax(net(noise), 1).double()
    own = plain_held_out.gather(1, second[1][:, None]).squeeze(1)
    assert found.network.held_out_nll == pytest.approx(-float(own.mean()), abs=1e-5)
    assert found.network.metrics["accuracy"] == pytest.approx(float((plain.argmax(1) == third[1]).double().mean()))
    entropies = [-(logs.exp() * logs).sum(1) for logs in (plain, plain_noise)]
    assert found.network.auroc["noise"] == pytest.approx(brute_force_auroc(*entropies), abs=1e-4)
    densities = {}
    for one in found.layers:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="on the held-out data")
            bnn = stfbnn.bayesianize(net, first[0][:2], layer=one.layer, prior="rms")
            stfbnn.fit(bnn, train, epochs=2, temperature=0.1, seed=4, val_loader=val, val_samples=8)
        held_out, test, foreign = (stfbnn.predict(bnn, x, samples=8, seed=4) for x in (second[0], third[0], noise))
        weights = torch.cat([value.flatten() for value in net.get_submodule(one.layer).parameters()])
        std, mean = bnn.posterior.std_vector().detach(), bnn.posterior.mean_vector().detach()
        rms = float(weights.detach().square().mean().sqrt())
        q, p = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, rms)
        densities[one.layer] = density = held_out.log_probs.gather(1, second[1][:, None]).squeeze(1)
        assert one.parameters == len(weights)
        assert one.relative_std == pytest.approx(float(std.mean()) / rms, rel=1e-4)
        assert one.kl_per_parameter == pytest.approx(float(torch.distributions.kl_divergence(q, p).mean()), rel=1e-4)
        assert one.held_out_nll == pytest.approx(-float(density.mean()), abs=1e-5)
        assert one.metrics["nll"] == pytest.approx(float(nn.functional.nll_loss(test.log_probs, third[1])), abs=1e-5)
        assert one.metrics["accuracy"] == pytest.approx(float((test.probs.argmax(1) == third[1]).double().mean()))
        assert one.epistemic == pytest.approx(
            {"test": float(test.epistemic.mean()), "noise": float(foreign.epistemic.mean())}, abs=1e-5
        )
        assert one.auroc["noise"]["entropy"] == pytest.approx(
            brute_force_auroc(test.entropy, foreign.entropy), abs=1e-4
        )
        scores = brute_force_auroc(test.epistemic, foreign.epistemic)
        assert one.auroc["noise"]["epistemic"] == pytest.approx(scores, abs=1e-3)
        for gap, other in ((one.over_network, own), (one.over_first, densities[names[0]])):
            if gap is not None:
                each = other - density
                assert gap.mean == pytest.approx(float(each.mean()), abs=1e-5)
                assert gap.standard_error == pytest.approx(float(each.std()) / math.sqrt(len(each)), rel=1e-3, abs=1e-6)
    assert found.layers[0].over_first is None
    assert all(one.over_first is not None for one in found.layers[1:])
    assert found.recommended in names


def test_width_and_divergence_of_a_linear_layer_are_the_closed_forms() -> None:
    generator = torch.Generator().manual_seed(1)
    # Strongly different sizes of the columns, so that each weight has a width of its own.
    x = torch.randn(400, 5, generator=generator) * torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0])
    y = x @ torch.randn(5, 1, generator=generator) + NOISE * torch.randn(400, 1, generator=generator)
    net = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.linalg.lstsq(x[:200], y[:200]).solution.T)
    for temperature in (1.0, 0.1):
        found = compare_layers(
            net,
            loader(x[:200], y[:200], batch_size=50),
            loader(x[200:], y[200:], shuffle=False),
            epochs=60,
            temperature=temperature,
            prior=SCALE,
            likelihood=stfbnn.Gaussian(noise_std=NOISE),
            samples=64,
        )
        assert [one.layer for one in found.layers] == [""]
        (one,) = found.layers
        # F = Σ (y − xw)²/(2 noise²) + T KL: the mean-field optimum has the exact mean and the diagonal of the precision.
        precision = x[:200].double().T @ x[:200].double() / NOISE**2 / temperature + torch.eye(5).double() / SCALE**2
        mean = torch.linalg.solve(precision, x[:200].double().T @ y[:200].double() / NOISE**2 / temperature).squeeze(1)
        std = precision.diagonal().rsqrt()
        rms = float(net.weight.detach().square().mean().sqrt())
        assert one.relative_std == pytest.approx(float(std.mean()) / rms, rel=0.02)
        each = torch.log(SCALE / std) + (std.square() + mean.square()) / (2 * SCALE**2) - 0.5
        assert one.kl_per_parameter == pytest.approx(float(each.mean()), rel=0.02)
        variance = (x[200:].double().square() @ std.square()).mean()
        assert one.epistemic["held-out"] == pytest.approx(float(variance), rel=0.25)
        # The noise was given, so the trained network has it too.
        residuals = (y[200:] - x[200:] @ net.weight.detach().T).squeeze(1).double()
        nll = residuals.square().mean() / (2 * NOISE**2) + math.log(NOISE) + 0.5 * math.log(2 * math.pi)
        assert found.network.held_out_nll == pytest.approx(float(nll), abs=1e-4)
    assert "only one compared" in found.verdict()


def test_a_regression_has_no_entropy_and_its_network_gets_the_noise_of_its_held_out_residuals() -> None:
    x, _ = classification(80)
    x_val, _ = classification(60, seed=1)
    y, y_val = (part[:, :1].sin() + 0.1 * part[:, 1:2] for part in (x, x_val))
    net = trained(mlp(outputs=1), x, y, steps=50)
    found = compare_layers(net, loader(x, y), loader(x_val, y_val), epochs=1, samples=4, outside={"far": 5 * x_val})
    noise = float((y_val - net(x_val)).detach().square().mean().sqrt())
    assert found.network.held_out_nll == pytest.approx(0.5 + math.log(noise) + 0.5 * math.log(2 * math.pi), abs=1e-4)
    assert found.network.auroc == {}
    assert found.tested_on == "held-out"
    for one in found.layers:
        assert set(one.auroc["far"]) == {"epistemic"}
        assert one.auroc["far"]["epistemic"] > 0.7
        assert set(one.epistemic) == {"held-out", "far"}
        assert "rmse" in one.metrics
    assert "RMSE" in shown(found.table())
    shown(found.uncertainty_table())


def test_held_out_scores_are_weighted_and_a_likelihood_of_ones_own_has_no_figures() -> None:
    x_val, y_val = classification(60, seed=1)
    counts = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    weighted = small(val=[(x_val, y_val, counts.float())])
    repeated = small(val=[(x_val.repeat_interleave(counts, 0), y_val.repeat_interleave(counts))])
    for one, same in zip(weighted.layers, repeated.layers, strict=True):
        assert one.held_out_nll == pytest.approx(same.held_out_nll, abs=1e-5)
        assert one.over_network.mean == pytest.approx(same.over_network.mean, abs=1e-5)
    assert weighted.network.held_out_nll == pytest.approx(repeated.network.held_out_nll, abs=1e-5)

    def log_prob(outputs: Tensor, targets: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(outputs, targets, reduction="none")

    own = small(likelihood=stfbnn.CustomLikelihood(log_prob=log_prob), outside={"far": 4 * x_val})
    assert [(one.metrics, one.epistemic, one.auroc) for one in own.layers] == [({}, {}, {"far": {}})] * 3
    assert own.network.held_out_nll == pytest.approx(small().network.held_out_nll, abs=1e-5)
    shown(own.table())
    shown(own.uncertainty_table())


class TwoInputs(nn.Module):
    """Named inputs, and outputs in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.scale, self.head = nn.Embedding(40, 6), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(torch.tanh(self.tokens(ids).mean(1) + self.scale(numbers)))}


def named(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (count, 5), generator=generator)
    numbers = torch.randn(count, 2, generator=generator)
    y = ids.sum(1) % 3
    return [{"ids": ids[a::2], "numbers": numbers[a::2], "y": y[a::2]} for a in (0, 1)]


def test_several_inputs_in_mappings_foreign_sets_without_targets_and_mixed_precision() -> None:
    foreign = [{name: value for name, value in batch.items() if name != "y"} for batch in named(40, 2)]
    arguments: dict[str, Any] = {
        "net": TwoInputs().eval(),
        "train": named(80, 0),
        "val": named(60, 1),
        "outside": {"loader": foreign, "inputs": foreign[0]},
        "target_key": "y",
        "output": lambda raw: raw["scores"],
        "prior": None,
    }
    found, mixed = small(**arguments), small(**arguments, precision="bf16-mixed")
    assert [one.layer for one in found.layers] == ["tokens", "scale", "head"]
    assert found.num_held_out == 60
    for one, other in zip(found.layers, mixed.layers, strict=True):
        assert set(one.auroc) == {"loader", "inputs"}
        assert one.held_out_nll == pytest.approx(other.held_out_nll, abs=0.03)
        assert one.held_out_nll != other.held_out_nll
    assert found.network.held_out_nll != mixed.network.held_out_nll


def test_layers_are_chosen_evenly_with_both_ends_or_by_name_in_execution_order() -> None:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(6)]
    net = nn.Sequential(*parts, nn.Linear(6, 3)).eval()
    some = small(net=net, most=3, epochs=1)
    assert [one.layer for one in some.layers] == ["0.0", "3.0", "6"]
    assert some.skipped == ("1.0", "2.0", "4.0", "5.0")
    assert "4 further layers" in shown(some.table())
    named = small(net=net, layers=["6", "0.1"], epochs=1)
    assert [one.layer for one in named.layers] == ["0.1", "6"]
    assert [one.kind for one in named.layers] == ["LayerNorm", "Linear"]
    assert "'0.0' was not compared" in named.verdict()
    assert len(small(net=net, layers="all", most=2, epochs=1).layers) == 7


def test_a_layer_that_cannot_be_made_bayesian_is_listed_with_the_reason() -> None:
    net = three_layers()
    net[0].bias = nn.Parameter(net[0].weight.detach().flatten()[:8])
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    found = small(net=net, epochs=1)
    assert [one.layer for one in found.layers] == ["4"]
    assert "lies in the memory of 'weight'" in found.failed["0"]
    assert "are all zero, so they give no scale" in found.failed["2"]
    assert found.layers[0].over_first is None
    assert "The first layer '0' cannot be taken" in found.verdict()
    assert "lies in the memory" in " ".join(shown(found.table()).split())
    with pytest.raises(LayerError, match=r"none of the layers can be made Bayesian: '0': .* lies in the memory"):
        small(net=net, layers=["0", "2"])


def test_a_fit_that_fails_where_another_did_not_is_listed_and_one_that_fails_at_once_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = widths.fit

    def failing(name: str) -> Any:
        def fit(bnn: Any, *args: Any, **options: Any) -> Any:
            if bnn.layer_name == name:
                raise InputError("the loss became nan")
            return own(bnn, *args, **options)

        return fit

    monkeypatch.setattr(widths, "fit", failing("2"))
    found = small()
    assert [one.layer for one in found.layers] == ["0", "4"]
    assert found.failed == {"2": "the loss became nan"}
    monkeypatch.setattr(widths, "fit", failing("0"))
    with pytest.raises(InputError, match="became nan"):
        small()


def test_nothing_of_the_users_changes_and_a_seed_says_all() -> None:
    net = three_layers().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    own = torch.Generator().manual_seed(5)
    x, y = classification(90)
    train = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True, generator=own)
    states = own.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found, again = (small(net=net, train=train) for _ in range(2))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in net.parameters())
    assert torch.equal(own.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[3])
    assert timeless(found) == timeless(again)
    assert timeless(found) != timeless(small(net=net, train=train, seed=1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": ["fc9"]}, LayerError, "no layer 'fc9' to compare; there are '0', '2', '4'"),
        ({"layers": "0"}, InputError, "different names of layers"),
        ({"layers": []}, InputError, "different names of layers"),
        ({"layers": ["0", "0"]}, InputError, "different names of layers"),
        ({"most": 0}, InputError, "most must be a positive integer"),
        ({"most": 1}, InputError, "most must be at least 2"),
        ({"epochs": 0}, InputError, "epochs must be a positive integer"),
        ({"samples": 1.5}, InputError, "samples must be a positive integer"),
        ({"seed": -1}, InputError, "seed must be a non-negative"),
        ({"temperature": 0.0}, InputError, "temperatures must be positive"),
        ({"temperature": "warm"}, InputError, 'a number or "held-out"'),
        ({"prior": "cauchy"}, InputError, "cauchy"),
        ({"engine": "guess"}, InputError, "guess"),
        ({"likelihood": "guess"}, InputError, "guess"),
        ({"precision": "16"}, InputError, "precision must be"),
        ({"train": DataLoader([])}, InputError, "train_loader gave no batch"),
        ({"val": DataLoader([])}, InputError, "val_loader gave no batch"),
        ({"val": iter(loader(*classification(80, seed=1)))}, InputError, "can be read only once"),
        ({"val": loader(*classification(1, seed=1))}, InputError, "holds one example"),
        ({"test_loader": DataLoader([])}, InputError, "test_loader gave no batch"),
        ({"test_loader": 3}, InputError, "test_loader must give batches"),
        ({"outside": {"far": DataLoader([])}}, InputError, r"outside\['far'\] gave no batch"),
        ({"outside": {"far": torch.randn(4, 9)}}, InputError, r"does not run on outside\['far'\]"),
        ({"outside": {"test": torch.randn(4, 6)}}, InputError, "names of outside"),
        ({"outside": torch.randn(4, 6).tolist()}, InputError, "outside must be a mapping"),
        ({"val": loader(classification(9)[0], torch.randn(9, 3))}, InputError, None),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_fit(
    changes: dict[str, Any], error: type[Exception], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(widths, "fit", refuse)
    if message is None:
        changes = {**changes, "likelihood": "categorical"}
    with pytest.raises(error, match=message):
        small(**changes)


def test_held_out_data_that_training_reads_are_refused() -> None:
    x, y = classification(90)
    with pytest.raises(InputError, match="not held out"):
        small(val=loader(x, y))
    data = TensorDataset(x, y)
    train, val = (DataLoader(Subset(data, list(rows)), batch_size=30) for rows in (range(60), range(50, 90)))
    with pytest.raises(InputError, match="reads 10 of the same rows"):
        small(train=train, val=val)


def test_a_temperature_may_be_chosen_for_each_layer() -> None:
    found = small(temperature="held-out", epochs=1, layers=["2"])
    bnn = stfbnn.bayesianize(three_layers(), classification(2)[0], layer="2", prior="rms")
    val = loader(*classification(80, seed=1), shuffle=False)
    run = stfbnn.fit(bnn, loader(*classification(90)), epochs=1, val_loader=val, val_samples=4, temperature="held-out")
    assert found.layers[0].temperature == run.temperature != 0.1
