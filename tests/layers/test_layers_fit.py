"""Every kind of first layer through the whole chain: an epoch with every engine and estimator, predict, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_kinds import KINDS, RECURRENT, Kind
from test_layers_exact import each_kind

import stfbnn
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.components.start import kept_where_unused
from stfbnn.inference.estimators import ESTIMATORS
from stfbnn.network import BayesianNetwork

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),
]

TARGET = torch.tensor([0, 1, 2, 1])
BATCHED = [kind for kind in KINDS if kind.batched]
each_batched_kind = pytest.mark.parametrize("kind", BATCHED, ids=lambda kind: kind.name)


def fit(bnn: BayesianNetwork, kind: Kind, **options: Any) -> None:
    before = bnn.posterior_state()["posterior"]
    stfbnn.fit(bnn, [(kind.given(), TARGET)], epochs=1, temperature=1.0, progress=False, **options)
    after = bnn.posterior_state()["posterior"]
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if value.is_floating_point())
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


def supported(kind: Kind, estimator: str) -> bool:
    return {"per-example": kind.per_example, "flipout": kind.flipout, "local-reparameterization": kind.local}.get(
        estimator, True
    )


@each_batched_kind
def test_an_epoch_with_every_estimator_and_engine(kind: Kind) -> None:
    bnn = bayesianize(kind.network(), kind.given(), layer=kind.asked)
    for estimator in ESTIMATORS:
        if supported(kind, estimator):
            fit(bnn, kind, engine="natural-gradient", estimator=estimator)
        else:
            with pytest.raises(InputError, match="use estimator="):
                fit(bnn, kind, engine="natural-gradient", estimator=estimator)
    for engine in ("bayes-by-backprop", "laplace"):
        fit(bnn, kind, engine=engine)


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, family) for kind in BATCHED for family in ("mean-field", "filterwise")]
    + [(kind, family) for kind in BATCHED[::5] for family in ("low-rank", "full", "point")],
    ids=lambda value: getattr(value, "name", value),
)
def test_saved_and_loaded_predictions_are_equal(kind: Kind, family: str, tmp_path: Path) -> None:
    model, x = kind.network(), kind.given()
    if family == "filterwise" and kind.units is None:
        with pytest.raises(InputError, match="all have one row for each output unit"):
            bayesianize(model, x, layer=kind.asked, posterior=family)
        return
    bnn = bayesianize(model, x, layer=kind.asked, posterior=family)
    if family == "filterwise":
        assert len(bnn.posterior.index) == kind.units
    fit(bnn, kind)
    prediction = stfbnn.predict(bnn, x, samples=3)
    stfbnn.save(bnn, tmp_path / "saved")
    loaded = stfbnn.load(tmp_path / "saved", kind.network())
    assert torch.equal(stfbnn.predict(loaded, x, samples=3).probs, prediction.probs)
    assert loaded.layer_name == kind.layer
    for name, value in bnn.posterior.mean().items():
        assert torch.equal(loaded.posterior.mean()[name], value)


@each_batched_kind
def test_stacked_draws_are_the_same_draws_or_are_refused(kind: Kind) -> None:
    x = kind.given()
    bnn = bayesianize(kind.network(), x, layer=kind.asked)
    fit(bnn, kind, engine="laplace")
    loop = stfbnn.predict(bnn, x, samples=3, execution="loop").probs
    if kind in RECURRENT and kind.name != "gru cell":
        with pytest.raises(InputError, match="cannot run stacked"):
            stfbnn.predict(bnn, x, samples=3, execution="stacked")
        return
    stacked = stfbnn.predict(bnn, x, samples=3, execution="stacked").probs
    torch.testing.assert_close(stacked, loop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.batched], ids=lambda kind: kind.name)
def test_bags_with_offsets_are_called_but_not_trained(kind: Kind) -> None:
    bnn = bayesianize(kind.network(), kind.given())
    assert bnn(*kind.given()).shape == (4, 3)
    with pytest.raises(InputError, match="must share their first dimension"):
        fit(bnn, kind)


def test_rows_of_tokens_that_do_not_occur_keep_their_trained_values() -> None:
    kind = next(kind for kind in KINDS if kind.name == "embedding with padding")
    model = kind.network()
    unseen = torch.nn.functional.one_hot(kind.given(), 7).sum((0, 1)) == 0
    inputs = kind.given().clone()
    inputs[inputs == 6] = 1
    unseen[6] = True
    bnn = bayesianize(model, inputs)
    batches = [(inputs, TARGET)] * 5
    for engine in ("natural-gradient", "bayes-by-backprop", "laplace"):
        stfbnn.fit(bnn, batches, epochs=20, engine=engine, temperature=1.0, progress=False)
        mean, std = bnn.posterior.mean()["weight"], bnn.posterior.std()["weight"]
        trained = bnn.trained["weight"]
        assert torch.equal(mean[unseen], trained[unseen])
        if engine != "laplace":
            assert not torch.equal(mean[1:5], trained[1:5])
        # Nothing was learned of them: they are as wide as the prior.
        torch.testing.assert_close(std[unseen], bnn.prior.std.expand_as(std[unseen]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["linear", "conv2d circular", "transposed 1d", "embedding", "lstm", "attention", "own module"]
)
def test_models_in_other_precisions(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    model, x = kind.network(dtype), kind.given(dtype)
    bnn = bayesianize(model, x)
    stfbnn.fit(bnn, [(x, TARGET)], epochs=1, temperature=1.0, progress=False)
    prediction = stfbnn.predict(bnn, x, samples=3)
    stfbnn.save(bnn, tmp_path / "saved")
    loaded = stfbnn.load(tmp_path / "saved", kind.network(dtype))
    assert torch.equal(stfbnn.predict(loaded, x, samples=3).probs, prediction.probs)


@each_kind
def test_bf16_mixed_takes_the_same_draws(kind: Kind) -> None:
    if not kind.batched or kind.name == "lstm, projected":
        pytest.skip("not trained, or not known to PyTorch in bfloat16")
    x = kind.given()
    bnn = bayesianize(kind.network(), x, layer=kind.asked)
    fit(bnn, kind, precision="bf16-mixed")
    assert bnn.posterior.mean_vector().dtype == torch.float32
    plain, mixed = (stfbnn.predict(bnn, x, samples=3, precision=one).probs for one in ("32-true", "bf16-mixed"))
    # Eight bits of logits of size one; other draws would differ by far more.
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0.02)


def test_retraining_gives_back_the_rows_of_embeddings_that_it_never_reached() -> None:
    kind = next(kind for kind in KINDS if kind.name == "block of embeddings")
    bnn = bayesianize(kind.network(), kind.given(), layer="layer")
    retrained, used = bnn.trained_vector() + 1, torch.zeros(bnn.layout.size, dtype=torch.bool)
    used[:3] = True
    found = bnn.layout.unflatten(kept_where_unused(bnn, retrained, used))
    assert torch.equal(found["0.weight"][0], bnn.trained["0.weight"][0] + 1)
    assert torch.equal(found["0.weight"][1:], bnn.trained["0.weight"][1:])
    # A weight that is no row of a table is not left out because of one minibatch's zeros.
    assert torch.equal(found["2.weight"], bnn.trained["2.weight"] + 1)
