"""The averaged predictive as a module: the same numbers as predict, in both layouts, and on its own."""

import math
import warnings
from typing import Any

import pytest
import torch
from deployed_networks import AgainstTheBatch, ReadElsewhere, Siamese, networks, normal, ready
from torch import Tensor, nn

from core_models import conv_net, mlp
from stfbnn.batches import call_model, rows
from stfbnn.conversion import bayesianize
from stfbnn.deployment import ExportError, predictive_module
from stfbnn.errors import InputError, ModelChangedError, NotFittedError
from stfbnn.likelihood import Bernoulli, Categorical, CustomLikelihood, Gaussian, HeteroscedasticGaussian, Poisson
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture
from stfbnn.prediction import predict

KINDS = list(networks())


def assert_same(found: dict[str, Tensor], bnn: BayesianNetwork, inputs: Any, samples: int, seed: int = 0) -> None:
    pred = predict(bnn, inputs, samples=samples, seed=seed)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), getattr(pred, name).double(), atol=2e-6, rtol=2e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_predict_gives_side_by_side_and_one_by_one(kind: str) -> None:
    model, inputs, options = networks()[kind]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the layer 'words' shares parameters")
        bnn = ready(model, rows(inputs, 0, 2), **options)
    stacked = predictive_module(bnn, rows(inputs, 0, 1), samples=5, seed=2)
    loop = predictive_module(bnn, rows(inputs, 0, 1), samples=5, seed=2, layout="loop")
    assert (stacked.layout, loop.layout) == ("stacked", "loop")
    for size in (1, 3, 17):
        part = rows(inputs, 0, size)
        with torch.no_grad():
            assert_same(call_model(stacked, part), bnn, part, 5, seed=2)
            assert_same(call_model(loop, part), bnn, part, 5, seed=2)
    assert (call_model(stacked, inputs)["epistemic"] > 0).all()


HEADS = {
    "classes at a temperature": (Categorical(), nn.Identity(), 2.5),
    "dense classes, last": (Categorical(class_dim=-1), nn.Unflatten(1, (2, 3)), 1.0),
    "class probabilities": (Categorical(outputs="probabilities"), nn.Softmax(1), 1.0),
    "labels at a temperature": (Bernoulli(), nn.Identity(), 0.4),
    "label probabilities": (Bernoulli(outputs="probabilities"), nn.Sigmoid(), 1.0),
    "numbers": (Gaussian(noise_std=0.3), nn.Identity(), 1.0),
    "columns": (Gaussian(noise_std=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), nn.Identity(), 1.0),
    "numbers with their noise": (HeteroscedasticGaussian(), nn.Identity(), 1.0),
    "counts": (Poisson(), nn.Tanh(), 1.0),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("layout", ["stacked", "loop"])
def test_every_likelihood_has_its_average(kind: str, layout: Any) -> None:
    likelihood, head, temperature = HEADS[kind]
    bnn = ready(nn.Sequential(mlp(outputs=6), head), normal(2, 6), likelihood)
    bnn.predictive_temperature = temperature
    module = predictive_module(bnn, normal(2, 6), samples=6, layout=layout)
    found = module(normal(9, 6))
    assert tuple(found) == module.outputs
    assert_same(found, bnn, normal(9, 6), 6)


def test_parts_add_up() -> None:
    x = normal(9, 6)
    classes = predictive_module(ready(mlp(), x), x, samples=8)(x)
    torch.testing.assert_close(classes["probs"].sum(1), torch.ones(9))
    torch.testing.assert_close(classes["entropy"], classes["aleatoric"] + classes["epistemic"])
    numbers = predictive_module(ready(mlp(), x, Gaussian(noise_std=0.5)), x, samples=8)(x)
    torch.testing.assert_close(numbers["std"].square(), numbers["aleatoric"] + numbers["epistemic"])
    assert torch.equal(numbers["aleatoric"], torch.full((9, 3), 0.25))


@pytest.mark.parametrize("layout", ["stacked", "loop"])
def test_draws_of_a_mixture_count_by_its_weights(layout: Any) -> None:
    x = normal(9, 6)
    bnn = ready(mlp(), x, posterior=Mixture(components=3))
    with torch.no_grad():
        for index, component in enumerate(bnn.posterior.components):
            component.mean_vector().add_(0.8 * index)
        bnn.posterior.set_weights(torch.tensor([0.7, 0.25, 0.05]))
    module = predictive_module(bnn, x, samples=7, layout=layout)
    assert module.shares is not None
    assert len(set(module.shares.tolist())) > 1
    assert_same(module(x), bnn, x, 7)


@pytest.mark.parametrize("kind", [AgainstTheBatch, ReadElsewhere])
def test_a_network_whose_draws_would_mix_is_run_draw_by_draw(kind: type[nn.Module]) -> None:
    x = normal(6, 6)
    bnn = ready(kind(), x)
    # Also where all examples are alike.
    for example in (x, x[:1]):
        module = predictive_module(bnn, example, samples=4)
        assert module.layout == "loop"
        assert_same(module(x), bnn, x, 4)
    with pytest.raises(ExportError, match=r"change each other's outputs there.*layout=.loop"):
        predictive_module(bnn, x, samples=4, layout="stacked")


def test_hooks_of_the_first_layer_run_once() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda _module, _args, output: output * 1.5)
    bnn = ready(model, normal(2, 6))
    for layout in ("stacked", "loop"):
        module = predictive_module(bnn, normal(2, 6), samples=4, layout=layout)  # type: ignore[arg-type]
        assert_same(module(normal(9, 6)), bnn, normal(9, 6), 4)


def test_it_stands_on_its_own() -> None:
    model = conv_net()
    bnn = ready(model, normal(2, 1, 8, 8))
    module = predictive_module(bnn, normal(2, 1, 8, 8), samples=3)
    before = module(normal(4, 1, 8, 8))["probs"]
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.train()
    assert torch.equal(module.train()(normal(4, 1, 8, 8))["probs"], before)
    with pytest.raises(ModelChangedError):
        predictive_module(bnn, normal(2, 1, 8, 8))


def test_the_models_tensors_are_left_where_they_are() -> None:
    model = conv_net()
    pointers = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    bnn = ready(model, normal(2, 1, 8, 8))
    predictive_module(bnn, normal(2, 1, 8, 8), samples=3).double()
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == pointers
    bnn.check_unchanged()


def test_gradients_reach_the_inputs() -> None:
    x = normal(3, 6).requires_grad_()
    module = predictive_module(ready(mlp(), normal(2, 6)), normal(2, 6), samples=4)
    (gradient,) = torch.autograd.grad(module(x)["probs"][:, 0].sum(), x)
    step = torch.zeros(3, 6)
    step[1, 2] = 1e-2
    with torch.no_grad():
        difference = (module(x + step)["probs"] - module(x - step)["probs"])[1, 0] / 2e-2
    assert math.isclose(float(gradient[1, 2]), float(difference), rel_tol=1e-2, abs_tol=1e-4)


def test_it_is_compiled_to_one_graph_and_a_compiled_network_is_looked_through() -> None:
    x = normal(5, 6)
    bnn = ready(mlp(), x)
    module = predictive_module(bnn, x, samples=3)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    around = torch.compile(bnn, backend="eager")
    try:
        for size in (5, 2):
            for name, value in module(x[:size]).items():
                assert torch.equal(compiled(x[:size])[name], value)
        torch.testing.assert_close(around(x, weights="mean"), bnn(x, weights="mean"))
        assert_same(predictive_module(around, x, samples=3)(x), bnn, x, 3)
        assert torch.equal(predict(around, x, samples=3).probs, predict(bnn, x, samples=3).probs)
    finally:
        torch.compiler.reset()


def test_a_network_whose_model_was_compiled_is_deployed() -> None:
    x, model = normal(5, 6), mlp()
    bnn = ready(torch.compile(model, backend="eager"), x)
    assert_same(predictive_module(bnn, x, samples=3)(x), ready(model, x), x, 3)


def test_what_cannot_be_deployed_is_refused() -> None:
    x = normal(4, 6)
    with pytest.raises(NotFittedError):
        predictive_module(bayesianize(mlp(), x), x)
    with pytest.raises(InputError, match=r"stfbnn\.bayesianize or stfbnn.load"):
        predictive_module(mlp(), x)  # type: ignore[arg-type]
    own = CustomLikelihood(lambda outputs, targets: -(outputs - targets).square().sum(1))
    with pytest.raises(InputError, match=r"CustomLikelihood is a likelihood of your own.*\.draws"):
        predictive_module(ready(mlp(), x, own), x)
    bnn = ready(mlp(), x)
    with pytest.raises(InputError, match="layout must be"):
        predictive_module(bnn, x, layout="heap")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="samples must be a positive integer"):
        predictive_module(bnn, x, samples=0)
    with pytest.raises(InputError, match="example_inputs hold 1 NaN"):
        predictive_module(bnn, torch.tensor([[math.nan] + [0.0] * 5]))
    with pytest.raises(InputError, match="does not run on example_inputs"):
        predictive_module(bnn, normal(4, 7))
    with pytest.raises(InputError, match="must share their first dimension"):
        predictive_module(ready(Siamese(), (x, x)), (x, x[:3]))
