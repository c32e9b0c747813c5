"""Adversarial training: the attack of a batch against a closed form, and what it does to a network and to a resumed run."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import stfbnn
from stfbnn.adversarial_training import AdversarialTraining
from stfbnn.threat import InputSpace, Threat

SPACE = InputSpace(mean=(0.3,), std=(0.5,))


def linear_problem():
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    raw = torch.rand(5, 6, dtype=torch.float64) * 0.4 + 0.3
    return model, SPACE.to_network(raw), raw, torch.tensor([0, 1, 0, 1, 1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_of_a_linear_network_is_the_closed_form_optimum(norm):
    model, inputs, raw, targets = linear_problem()
    training = AdversarialTraining(Threat(0.1, norm), steps=12, step_size=0.5, space=SPACE)
    found = training.attack(model, inputs, lambda outputs: nn.functional.cross_entropy(outputs, targets))
    # The loss of two classes rises along w_other − w_y.
    away = model.weight.detach()[1 - targets] - model.weight.detach()[targets]
    step = 0.1 * (away.sign() if norm == "linf" else away / away.norm(dim=1, keepdim=True))
    tolerance = 1e-9 if norm == "linf" else 2e-3
    torch.testing.assert_close(SPACE.from_network(found), raw + step, rtol=0, atol=tolerance)


def test_the_attack_leaves_parameters_statistics_and_modes_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, targets = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    training = AdversarialTraining(Threat(0.1), steps=2)
    found = training.attack(model, inputs, lambda outputs: nn.functional.cross_entropy(outputs, targets))
    assert 0 < float((found - inputs).abs().max()) <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)


def loader(count=600):
    pixels, labels = digits()
    data = torch.utils.data.TensorDataset(pixels[:count], labels[:count])
    return torch.utils.data.DataLoader(data, batch_size=50, shuffle=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def accuracy_under_attack(model, epsilon):
    pixels, labels = digits()
    pixels, labels = pixels[1000:1300], labels[1000:1300]
    attack = AdversarialTraining(Threat(epsilon), steps=20, step_size=0.2)
    found = attack.attack(model, pixels, lambda outputs: nn.functional.cross_entropy(outputs, labels))
    return float((model(found).argmax(1) == labels).float().mean())


def test_a_network_so_trained_stands_attacks_that_fool_an_ordinary_one():
    ordinary, hardened = network(), network()
    options = {"epochs": 15, "lr": 3e-3, "progress": False}
    stfbnn.train(ordinary, loader(1000), **options)
    stfbnn.train(hardened, loader(1000), adversarial=AdversarialTraining(Threat(0.15)), **options)
    # Of 300 test images: a standard error of .03 each.
    assert accuracy_under_attack(hardened, 0.15) > accuracy_under_attack(ordinary, 0.15) + 0.1


def test_a_run_that_is_gone_on_with_equals_one_that_was_not_stopped(tmp_path):
    adversarial = AdversarialTraining(Threat(0.1, "l2"), steps=2)

    class StopError(Exception):
        pass

    def stopping(fraction):
        if fraction > 0.5:
            raise StopError
        return 1.0

    options = {"epochs": 4, "adversarial": adversarial, "progress": False, "checkpoint": tmp_path / "run"}

    def constant(fraction):
        return 1.0

    stopping.__qualname__ = constant.__qualname__
    whole, parted = network(), network()
    stfbnn.train(whole, loader(200), schedule=constant, **{**options, "checkpoint": None})
    with pytest.raises(StopError):
        stfbnn.train(parted, loader(200), schedule=stopping, **options)
    stfbnn.train(parted, loader(200), schedule=constant, **options)
    assert all(
        torch.equal(first, second) for first, second in zip(whole.parameters(), parted.parameters(), strict=True)
    )
    with pytest.raises(stfbnn.CheckpointError, match="adversarial"):
        stfbnn.train(network(), loader(200), schedule=constant, **{**options, "adversarial": None})


def test_wrong_settings_and_inputs_are_refused_before_training():
    with pytest.raises(stfbnn.InputError, match="steps"):
        AdversarialTraining(Threat(0.1), steps=0)
    with pytest.raises(stfbnn.InputError, match="step_size"):
        AdversarialTraining(Threat(0.1), step_size=0.0)
    with pytest.raises(stfbnn.InputError, match="AdversarialTraining"):
        stfbnn.train(network(), loader(), epochs=1, adversarial=0.1)
    beyond = [(torch.rand(4, 64) * 3, torch.zeros(4, dtype=torch.long))]
    with pytest.raises(stfbnn.InputError, match="before normalisation"):
        stfbnn.train(network(), beyond, epochs=1, adversarial=AdversarialTraining(Threat(0.1)))
    tokens = [(torch.zeros(4, 64, dtype=torch.long), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(stfbnn.InputError, match="one tensor of floats"):
        stfbnn.train(nn.Embedding(5, 3), tokens, epochs=1, adversarial=AdversarialTraining(Threat(0.1)))
