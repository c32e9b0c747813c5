"""Stage two in a loop of one's own."""

import copy

import pytest
import torch
from torch import nn

import stfbnn
from core_models import classification, loader, mlp, trained
from stfbnn.errors import InputError
from stfbnn.inference.stepwise import Inference


def problem():
    x, y = classification(200)
    return trained(mlp(), x, y), x, y


@pytest.mark.parametrize(
    ("posterior", "engine"),
    [("mean-field", "auto"), ("full", "natural-gradient"), ("low-rank", "bayes-by-backprop"), ("point", "auto")],
)
def test_a_loop_of_ones_own_gives_what_fit_gives(posterior, engine):
    model, x, y = problem()
    batches = loader(x, y, shuffle=False)
    theirs = stfbnn.bayesianize(model, x[:2], posterior=posterior)
    run = stfbnn.fit(theirs, batches, epochs=1, temperature=0.5, engine=engine, progress=False, seed=4)
    mine = stfbnn.bayesianize(model, x[:2], posterior=posterior)
    inference = Inference(mine, batches, steps=len(batches), temperature=0.5, engine=engine, seed=4)
    nlls = [inference.step(batch) for batch in batches]
    record = inference.finish().history
    for one, other in zip(mine.posterior.state_dict().values(), theirs.posterior.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert inference.num_examples == 200
    assert len(nlls) == len(batches)
    assert len(record) == 1
    assert record[0].free_energy == run.history[0].free_energy
    assert torch.equal(stfbnn.predict(mine, x).probs, stfbnn.predict(theirs, x).probs)


def test_a_plain_loop_with_an_ordinary_optimizer_lowers_the_free_energy():
    model, x, y = problem()
    bnn = stfbnn.bayesianize(model, x[:2], posterior=stfbnn.MeanField(initial_std=0.05))
    adam = torch.optim.Adam(bnn.posterior.parameters(), lr=0.02)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    course = []
    for _ in range(60):
        free_energy = nn.functional.cross_entropy(bnn(x), y) + bnn.posterior.kl(bnn.prior) / len(x)
        adam.zero_grad()
        free_energy.backward()
        adam.step()
        course.append(float(free_energy.detach()))
    assert sum(course[-10:]) < 0.9 * sum(course[:10])
    bnn.likelihood, bnn.temperature, bnn.num_examples = stfbnn.Categorical(), 1.0, len(x)
    assert stfbnn.predict(bnn, x).probs.shape == (200, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_goes_on_from_its_state():
    model, x, y = problem()
    batches = list(loader(x, y, shuffle=False))

    def begun():
        bnn = stfbnn.bayesianize(model, x[:2], prior="empirical-bayes")
        return bnn, Inference(bnn, batches, steps=3 * len(batches), temperature=0.5, seed=1)

    whole, inference = begun()
    for batch in batches * 3:
        inference.step(batch)
    _, stopped = begun()
    for batch in batches + batches[:3]:
        stopped.step(batch)
    state = copy.deepcopy(stopped.state_dict())
    second, resumed = begun()
    resumed.load_state_dict(state)
    for batch in batches[3:] + batches:
        resumed.step(batch)
    assert torch.equal(whole.posterior.mean_vector(), second.posterior.mean_vector())
    assert torch.equal(whole.posterior.std_vector(), second.posterior.std_vector())
    assert float(whole.prior.std) == float(second.prior.std)
    one, other = inference.finish().history, resumed.finish().history
    assert [record.free_energy for record in one] == [record.free_energy for record in other]
    assert len(one) == 3


def test_what_cannot_be_done_is_refused():
    model, x, y = problem()
    batches = loader(x, y, shuffle=False)
    bnn = stfbnn.bayesianize(model, x[:2])
    with pytest.raises(InputError, match="does not go by steps"):
        Inference(bnn, batches, steps=2, temperature=1.0, engine="laplace")
    with pytest.raises(InputError, match="temperature must be positive"):
        Inference(bnn, batches, steps=2, temperature=0.0)
    with pytest.raises(InputError, match="a mixture"):
        Inference(stfbnn.bayesianize(model, x[:2], posterior="mixture"), batches, steps=2, temperature=1.0)
    inference = Inference(bnn, batches, steps=1, temperature=1.0)
    with pytest.raises(InputError, match="NaN or infinite"):
        inference.step((torch.full((2, 6), torch.nan), y[:2]))
    inference.step((x[:8], y[:8]))
    with pytest.raises(InputError, match="all 1 steps are done"):
        inference.step((x[:8], y[:8]))
    inference.finish()
    assert bnn.fitted
