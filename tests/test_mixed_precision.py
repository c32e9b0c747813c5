"""Forward passes in bfloat16; the posterior in full precision."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from stfbnn.errors import InputError


def problem(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(256, 6)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    return model, x, y


def fitted(posterior, estimator="auto", **options):
    model, x, y = problem()
    bnn = stfbnn.bayesianize(model, x[:2], posterior=posterior)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    run = stfbnn.fit(bnn, loader, epochs=3, temperature=1.0, estimator=estimator, progress=False, **options)
    return bnn, run


@pytest.mark.parametrize("posterior", ["mean-field", "low-rank", "filterwise", "full"])
def test_a_surrounding_autocast_is_the_option_and_the_posterior_stays_in_full_precision(posterior):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = fitted(posterior)
    asked, _ = fitted(posterior, precision="bf16-mixed")
    plain, _ = fitted(posterior)
    for one, other, full in zip(
        inside.posterior.state_dict().values(),
        asked.posterior.state_dict().values(),
        plain.posterior.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.dtype == full.dtype
    assert not torch.equal(asked.posterior.mean_vector(), plain.posterior.mean_vector())
    # bfloat16 keeps 8 bits; draws and updates at that precision would move the mean by 4e-3 of its size in every step.
    assert torch.allclose(asked.posterior.mean_vector(), plain.posterior.mean_vector(), atol=2e-2)
    assert torch.allclose(asked.posterior.std_vector(), plain.posterior.std_vector(), rtol=5e-2)


def test_full_precision_can_be_asked_for_inside_of_an_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = fitted("mean-field", precision="32-true")
    plain, _ = fitted("mean-field")
    assert torch.equal(inside.posterior.mean_vector(), plain.posterior.mean_vector())


def test_predictions_in_bfloat16_take_the_same_draws():
    bnn, _ = fitted("full")
    x = problem()[1]
    plain = stfbnn.predict(bnn, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stfbnn.predict(bnn, x)
        again = stfbnn.predict(bnn, x, precision="32-true")
    assert torch.equal(inside.probs, stfbnn.predict(bnn, x, precision="bf16-mixed").probs)
    assert torch.equal(again.probs, plain.probs)
    assert not torch.equal(inside.probs, plain.probs)
    # Rounding alone; 32 other draws would differ by ten times as much.
    assert float((inside.probs - plain.probs).abs().max()) < 5e-3


def test_a_call_draws_the_same_weights_in_an_autocast():
    bnn, _ = fitted("low-rank")
    x = problem()[1]
    bnn.seed(3)
    plain = bnn(x)
    bnn.seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bnn(x)
    assert inside.dtype == torch.bfloat16
    assert torch.allclose(inside.float(), plain, atol=5e-2)


def test_what_cannot_be_computed_in_is_refused():
    with pytest.raises(InputError, match="precision must be"):
        fitted("mean-field", precision="16-mixed")
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(InputError, match="underflow"):
        fitted("mean-field")


# So few draws are no reference, and a warning says so.
@pytest.mark.filterwarnings("ignore")
def test_a_reference_by_hmc_does_not_depend_on_a_surrounding_autocast():
    pytest.importorskip("pyro")
    model, x, y = problem()

    def samples():
        bnn = stfbnn.bayesianize(model, x[:2])
        stfbnn.sample_hmc(bnn, [(x, y)], samples=8, warmup=4, chains=2, max_tree_depth=3, progress=False)
        return bnn.posterior.samples

    plain = samples()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(samples(), plain)


@pytest.mark.parametrize(("form", "suffix"), [("onnx", "onnx"), ("torch", "pt2")])
def test_an_exported_file_is_in_full_precision_whatever_autocast_is_around(form, suffix, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    bnn, _ = fitted("mean-field")
    x = problem()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = stfbnn.export(bnn, tmp_path / f"model.{suffix}", x[:3], samples=4, format=form)
    assert done.difference < 1e-6
    if form == "torch":
        found = torch.export.load(done.path).module()(x)["probs"]
        assert torch.allclose(found.double(), stfbnn.predict(bnn, x, samples=4).probs, atol=1e-6)


def test_a_predictive_module_takes_its_draws_in_full_precision():
    bnn, _ = fitted("full")
    x = problem()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stfbnn.predictive_module(bnn, x[:3], samples=4)
    plain = stfbnn.predictive_module(bnn, x[:3], samples=4)
    assert torch.equal(inside(x)["probs"], plain(x)["probs"])
