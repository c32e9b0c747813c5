"""Random small networks are converted, inferred, predicted with, saved and loaded rightly, or refused with a reason.

What is right is said by the plain network: a copy of it in evaluation mode, into whose first layer the drawn weights were
written. More examples than by default: ``STFBNN_FUZZ_EXAMPLES=1500 pytest tests/fuzz``.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import CLASSES, ROWS, Graph, Plan, inputs_of, output_of, plans
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stfbnn
from stfbnn.batches import call_model, output_tensor
from stfbnn.draws import Draws
from stfbnn.errors import InputError, StfbnnError
from stfbnn.inference.estimators import ESTIMATORS, Sampler, resolve_estimator
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork

EXAMPLES = int(os.environ.get("STFBNN_FUZZ_EXAMPLES", "60"))
TARGET = torch.arange(ROWS) % CLASSES
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def close(found: Tensor, expected: Tensor, double: bool) -> None:
    few = 1e-9 if double else 3e-4
    torch.testing.assert_close(found, expected, rtol=few, atol=few * max(1.0, float(expected.abs().max())))


def plain_outputs(model: nn.Module, plan: Plan, x: Any) -> Tensor:
    raw: Tensor = output_tensor(call_model(model, x), output_of(plan))
    return raw


def with_weights(model: Graph, bnn: BayesianNetwork, vector: Tensor) -> Graph:
    """A copy of the plain network with other weights in its first layer; what was tied to them elsewhere keeps the trained."""
    other = copy.deepcopy(model).eval()
    layer = other.get_submodule(bnn.layer_name)
    own = list(layer.parameters())
    inside = set(layer.modules())
    for module in other.modules():
        for key, parameter in module._parameters.items():
            if module not in inside and any(parameter is one for one in own):
                module._parameters[key] = nn.Parameter(parameter.detach().clone())
    padding = getattr(layer, "padding_idx", None)
    with torch.no_grad():
        kept = layer.weight[padding].clone() if padding is not None else None  # type: ignore[index]
        for name, value in bnn.layout.unflatten(vector).items():
            dict(layer.named_parameters())[name].copy_(value)
        if kept is not None:
            layer.weight[padding] = kept  # type: ignore[index,operator]
    return other


def plain_gradient(model: Graph, plan: Plan, bnn: BayesianNetwork, vector: Tensor, x: Any) -> tuple[float, Tensor]:
    """The plain network's mean loss and its gradient by the first layer's parameters, (d,)."""
    other = with_weights(model, bnn, vector).requires_grad_()
    parameters = dict(other.get_submodule(bnn.layer_name).named_parameters())
    loss = nn.functional.cross_entropy(plain_outputs(other, plan, x), TARGET)
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    padding = getattr(other.get_submodule(bnn.layer_name), "padding_idx", None)
    if padding is not None:
        # It is never drawn, not even where the forward method reads the row.
        found["weight"][padding] = 0
    return float(loss.detach()), bnn.layout.flatten(found)


def check_estimator(model: Graph, plan: Plan, bnn: BayesianNetwork, x: Any, name: str, expected: Any) -> None:
    """With next to no width, an estimate of the loss and of its gradient is that of the plain network."""
    try:
        estimator = resolve_estimator(name, None, bnn, x)
    except InputError:
        assert name not in ("auto", "shared", "antithetic")
        event(f"{name} refused")
        return
    loc = bnn.trained_vector().requires_grad_()
    std = torch.full_like(loc, 1e-7).requires_grad_()
    sampler = Sampler((loc, std), lambda noise: loc + std * noise, lambda: (loc, std), len(loc))
    found = estimator.estimate(MinibatchLoss(bnn, Categorical(), x, TARGET), sampler, torch.Generator().manual_seed(0))
    loss, gradient = expected
    assert abs(found.nll - loss) < 1e-3 * max(1.0, loss)
    tolerance = 1e-3 * float(gradient.abs().max()) + 1e-5
    torch.testing.assert_close(found.gradients[0], gradient.to(loc), rtol=1e-2, atol=tolerance)


def check(plan: Plan, family: str, estimator: str) -> None:
    model, x, output = Graph(plan), inputs_of(plan), output_of(plan)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    bnn = stfbnn.bayesianize(model, x, posterior=family, output=output)
    assert bnn.layer_name == ("layer.self_attn" if plan.layer == "encoder" else "layer")
    plain = copy.deepcopy(model).eval()
    if not plan.unusable:
        close(
            output_tensor(call_model(lambda *a, **k: bnn(*a, weights="mean", **k), x), output),
            plain_outputs(plain, plan, x),
            plan.double,
        )
    try:
        expected = plain_gradient(model, plan, bnn, bnn.trained_vector(), x)
    except RuntimeError:
        # What is written in place was needed: the plain network cannot be trained either.
        reject()
    if not plan.unusable and family == "mean-field":
        check_estimator(model, plan, bnn, x, estimator, expected)
    stfbnn.fit(
        bnn,
        [(x, TARGET)],
        epochs=1,
        temperature=1.0,
        progress=False,
        engine="bayes-by-backprop" if family == "low-rank" else "auto",
    )

    draws = Draws(bnn, 3, 5)
    logits = []
    for index in range(3):
        vector = draws.vector(index)
        reference = plain_outputs(with_weights(model, bnn, vector), plan, x).detach()
        with torch.no_grad():
            close(bnn.outputs(vector, x), reference, plan.double)
        logits.append(reference.double())
    prediction = stfbnn.predict(bnn, x, samples=3, seed=5, chunk_size=4)
    few = 1e-6 if plan.double else 1e-3
    torch.testing.assert_close(prediction.probs.double(), torch.stack(logits).softmax(-1).mean(0), rtol=few, atol=few)

    with tempfile.TemporaryDirectory() as folder:
        stfbnn.save(bnn, Path(folder) / "saved")
        loaded = stfbnn.load(Path(folder) / "saved", Graph(plan), output=output)
    again = stfbnn.predict(loaded, x, samples=3, seed=5, chunk_size=4)
    torch.testing.assert_close(again.probs, prediction.probs, rtol=few, atol=few)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad != plan.frozen for parameter in model.parameters())


@bounded
@given(
    plan=plans(),
    family=st.sampled_from(["mean-field", "mean-field", "low-rank", "filterwise", "full"]),
    estimator=st.sampled_from(["auto", *ESTIMATORS]),
)
def test_a_random_network_is_right_or_refused_with_a_reason(plan: Plan, family: str, estimator: str) -> None:
    reasons = list(plan.unusable)
    if family == "filterwise" and plan.layer in ("own", "attention", "encoder"):
        reasons.append("one row for each output unit")
    with warnings.catch_warnings():
        # Ties and unfolded norms are said; what is wrong with them would be seen in the numbers.
        warnings.simplefilter("ignore")
        if not reasons:
            check(plan, family, estimator)
            event("right")
            return
        with pytest.raises(StfbnnError) as refusal:
            check(plan, family, estimator)
    event("refused: " + next(reason for reason in reasons if reason in str(refusal.value)))
