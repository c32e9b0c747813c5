"""Stage two in a loop of one's own."""

import copy

import pytest
import torch
from torch import nn

import stfbnn
from core_models import classification, loader, mlp, trained
from stfbnn.errors import InputError, NotFittedError
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


@pytest.mark.parametrize(
    ("posterior", "engine"),
    [("full", "auto"), ("low-rank", "auto"), ("mean-field", "bayes-by-backprop"), ("point", "auto")],
)
def test_a_state_that_is_kept_in_memory_does_not_move_with_later_steps(posterior, engine):
    model, x, y = problem()
    batches = list(loader(x, y, shuffle=False))

    def begun():
        bnn = stfbnn.bayesianize(model, x[:2], posterior=posterior)
        return bnn, Inference(bnn, batches, steps=2 * len(batches), temperature=0.5, engine=engine)

    def ended(bnn, inference):
        for batch in batches[3:] + batches:
            inference.step(batch)
        return torch.cat([bnn.posterior.mean_vector(), bnn.posterior.std_vector()]).detach().clone()

    first, inference = begun()
    for batch in batches[:3]:
        inference.step(batch)
    state = inference.state_dict()
    expected = ended(first, inference)
    # Rolled back in the object itself, and twice in others.
    inference.load_state_dict(state)
    assert torch.equal(ended(first, inference), expected)
    for _ in range(2):
        other, resumed = begun()
        resumed.load_state_dict(state)
        assert torch.equal(ended(other, resumed), expected)


def test_a_state_survives_a_file_without_pickled_code(tmp_path):
    model, x, y = problem()
    batches = list(loader(x, y, shuffle=False))

    def begun(**options):
        return Inference(stfbnn.bayesianize(model, x[:2]), batches, **{"steps": 8, "temperature": 0.5} | options)

    inference = begun()
    first = inference.step(batches[0])
    torch.save(inference.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = begun()
    resumed.load_state_dict(state)
    assert resumed.done == 1
    assert resumed.step(batches[1]) == inference.step(batches[1]) != first
    for options in ({"temperature": 0.1}, {"steps": 9}, {"engine": "bayes-by-backprop"}, {"draws": 6}):
        with pytest.raises(InputError, match="inference with another"):
            begun(**options).load_state_dict(state)
    with pytest.raises(InputError, match=r"not what Inference\.state_dict gave"):
        resumed.load_state_dict({"run": {}})


def test_a_network_that_was_fitted_is_not_so_until_the_end_and_comes_back_where_it_cannot_begin():
    model, x, y = problem()
    batches = loader(x, y, shuffle=False)
    bnn = stfbnn.bayesianize(model, x[:2])
    stfbnn.fit(bnn, batches, epochs=1, temperature=0.1, progress=False)
    expected = stfbnn.predict(bnn, x[:4]).probs
    with pytest.raises(InputError, match="must be integers"):
        # The second batch does not fit, which is found in the first pass over the data.
        Inference(bnn, [(x[:8], y[:8]), (x[:8], y[:8].float())], steps=2, temperature=1.0)
    assert torch.equal(stfbnn.predict(bnn, x[:4]).probs, expected)
    inference = Inference(bnn, batches, steps=2, temperature=1.0)
    with pytest.raises(NotFittedError):
        stfbnn.predict(bnn, x[:4])
    with pytest.raises(InputError, match="no step was done"):
        inference.finish()
    assert not bnn.fitted
    inference.step((x[:8], y[:8]))
    inference.finish()
    assert bnn.temperature == 1.0
    with pytest.raises(InputError, match="was finished after 1 steps"):
        inference.step((x[:8], y[:8]))


def test_what_is_learned_of_the_prior_stays_in_full_precision_under_an_autocast():
    model, x, y = problem()
    batches = list(loader(x, y, shuffle=False))

    def run(precision):
        bnn = stfbnn.bayesianize(model, x[:2], posterior="full", prior="empirical-bayes")
        inference = Inference(bnn, batches, steps=2 * len(batches), temperature=0.5, precision=precision)
        for batch in batches * 2:
            inference.step(batch)
        return inference.kl, bnn.posterior.std_vector()

    kl, std = run("bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl_inside, std_inside = run(None)
    assert kl_inside == kl
    assert torch.equal(std_inside, std)


@pytest.mark.parametrize(
    ("posterior", "engine"), [("mean-field", "auto"), ("full", "auto"), ("low-rank", "auto"), ("point", "auto")]
)
def test_gradients_that_are_off_around_a_call_are_no_hindrance(posterior, engine):
    model, x, y = problem()
    batches = list(loader(x, y, shuffle=False))

    def means():
        bnn = stfbnn.bayesianize(model, x[:2], posterior=posterior)
        stfbnn.fit(bnn, batches, epochs=1, temperature=0.5, engine=engine, progress=False)
        first = bnn.posterior.mean_vector().detach().clone()
        inference = Inference(bnn, batches, steps=2, temperature=0.5, engine=engine)
        inference.step(batches[0])
        return torch.cat([first, bnn.posterior.mean_vector().detach()])

    plain = means()
    with torch.no_grad():
        assert torch.equal(means(), plain)


def test_inference_mode_is_refused_by_name():
    model, x, y = problem()
    batches = [(x, y)]
    bnn = stfbnn.bayesianize(model, x[:2])
    with torch.inference_mode():
        made_inside = stfbnn.bayesianize(model, x[:2])
        with pytest.raises(InputError, match="inference_mode"):
            stfbnn.fit(bnn, batches, temperature=1.0, progress=False)
        with pytest.raises(InputError, match="inference_mode"):
            Inference(bnn, batches, steps=1, temperature=1.0)
    with pytest.raises(InputError, match="inference_mode"):
        stfbnn.fit(made_inside, batches, temperature=1.0, progress=False)
