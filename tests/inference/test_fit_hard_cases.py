"""Stage two where it once went wrong: samplers, interruptions, learned scales, uneven batches, awkward layers."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from core_models import classification, loader, mlp, trained
from stfbnn.conversion import bayesianize
from stfbnn.draws import Draws
from stfbnn.errors import CheckpointError, InputError
from stfbnn.inference.fit import fit
from stfbnn.inference.loaders import count_examples, shared_examples
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.prediction import predict
from stfbnn.prior import Normal

X, Y = classification()
DATA = TensorDataset(X, Y)


@pytest.mark.parametrize("seed", range(4))
def test_a_learned_prior_never_makes_the_precision_negative(seed: int) -> None:
    x, y = classification(300, seed=seed)
    bnn = bayesianize(trained(mlp(seed=seed), x, y, 100), x[:2], prior="empirical-bayes")
    for temperature in (1.0, 0.1):
        fit(bnn, loader(x, y, 50), epochs=4, temperature=temperature, seed=seed)
        assert torch.isfinite(bnn.posterior.std_vector()).all()


class Interrupted(DataLoader):
    """Stops the run at one batch, as Ctrl-C would."""

    stop_at = -1
    count = 0

    def __iter__(self) -> Iterator[object]:
        for batch in super().__iter__():
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_run_leaves_the_network_as_it_was() -> None:
    bnn = bayesianize(mlp(), X[:2])
    fit(bnn, loader(X, Y), epochs=2, temperature=1.0)
    before = predict(bnn, X).probs
    train_loader = Interrupted(DATA, batch_size=32)
    train_loader.stop_at = 12
    with pytest.raises(KeyboardInterrupt):
        fit(bnn, train_loader, epochs=5, temperature=0.1)
    assert torch.equal(predict(bnn, X).probs, before)
    assert bnn.temperature == 1.0


def test_a_diverged_run_can_be_tried_again() -> None:
    bnn = bayesianize(mlp(), X[:2])
    with pytest.raises(InputError, match="lower the learning rate"):
        fit(bnn, loader(X * 1e4, Y), epochs=30, temperature=1e-3, engine_options={"learning_rate": 1e30})
    assert torch.isfinite(bnn.posterior.mean_vector()).all()
    fit(bnn, loader(X, Y), epochs=1, temperature=1.0)


def test_every_fit_starts_from_the_trained_weights() -> None:
    once, twice = bayesianize(mlp(), X[:2]), bayesianize(mlp(), X[:2])
    fit(twice, loader(X, Y), epochs=3, temperature=0.1)
    for bnn in (once, twice):
        fit(bnn, loader(X, Y), epochs=2, temperature=1.0)
    assert torch.equal(once.posterior.mean_vector(), twice.posterior.mean_vector())


def test_disjoint_samplers_over_one_data_set_are_accepted() -> None:
    halves = torch.arange(200).split(100)
    for kind in range(3):
        made = []
        for half in halves:
            rows = half.tolist()
            made.append(
                [
                    lambda r=rows: DataLoader(DATA, 25, sampler=SubsetRandomSampler(r)),
                    lambda r=rows: DataLoader(DATA, 25, sampler=r),
                    lambda r=rows: DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(r), 25, False)),
                ][kind]()
            )
        assert shared_examples(*made) == 0
        assert [count_examples(one, 0) for one in made] == [100, 100]
        fit(bayesianize(mlp(), X[:2]), made[0], epochs=1, val_loader=made[1], temperatures=[1.0])
        assert shared_examples(made[0], DataLoader(DATA, 25)) == 100


def test_n_counts_rows_and_not_draws() -> None:
    assert count_examples(DataLoader(DATA, 32, sampler=RandomSampler(DATA, True, 2000)), 2000) == 200
    assert count_examples(DataLoader(DATA, 32, drop_last=True), 192) == 200
    assert count_examples([(X, Y)], 200) == 200


def test_resume_with_a_generator_inside_the_sampler(tmp_path: Path) -> None:
    def run(stop_at: int, name: str) -> Tensor:
        sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(3))
        train_loader = Interrupted(DATA, batch_size=50, sampler=sampler)
        train_loader.stop_at = stop_at
        bnn = bayesianize(mlp(), X[:2])
        try:
            fit(bnn, train_loader, epochs=4, temperature=1.0, checkpoint=tmp_path / name)
        except KeyboardInterrupt:
            return run(-1, name)
        return bnn.posterior.mean_vector().detach()

    whole = run(-1, "whole")
    # One batch of the first look, four of the survey, four an epoch.
    for stop_at in (7, 11, 15, 19):
        assert torch.equal(run(stop_at, f"stopped-{stop_at}"), whole)


def embedding_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 4, **options), nn.Flatten(), nn.Linear(12, 3))  # type: ignore[arg-type]


def test_the_padding_row_keeps_its_value() -> None:
    tokens = torch.randint(0, 12, (60, 3), generator=torch.Generator().manual_seed(0))
    tokens[:, 2] = 0
    model = embedding_model(padding_idx=0)
    bnn = bayesianize(model, tokens[:2])
    fit(bnn, [(tokens, torch.zeros(60).long())], epochs=2, temperature=1.0)
    only_padding = torch.zeros(4, 3).long()
    torch.testing.assert_close(bnn(only_padding), model(only_padding))
    assert not torch.equal(bnn(tokens), model(tokens))
    stacked = predict(bnn, tokens, execution="stacked")
    torch.testing.assert_close(stacked.probs, predict(bnn, tokens).probs, atol=1e-6, rtol=0)


def test_sparse_embeddings_fit() -> None:
    tokens = torch.randint(0, 12, (60, 3))
    model = embedding_model(sparse=True, scale_grad_by_freq=False)
    fit(bayesianize(model, tokens[:2]), [(tokens, torch.zeros(60).long())], epochs=1, temperature=1.0)
    assert model[0].sparse


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None])[0][:, -1])


def test_a_network_that_cannot_be_stacked_is_run_in_a_loop() -> None:
    bnn = bayesianize(Recurrent(), X[:2])
    fit(bnn, loader(X, Y), epochs=1, temperature=1.0)
    draws = Draws(bnn, 3, seed=0)
    expected = torch.cat(list(draws.outputs(X)))
    draws._stacked = True  # what "auto" chooses on an accelerator
    assert torch.equal(torch.cat(list(draws.outputs(X))), expected)
    with pytest.raises(InputError, match="loop"):
        predict(bnn, X, execution="stacked")


def test_learned_noise_weighs_examples_and_not_batches() -> None:
    torch.manual_seed(0)
    x = torch.randn(101, 6)
    net = nn.Sequential(mlp(outputs=1), nn.Flatten(0))
    y = net(x).detach() + 0.5 * torch.randn(101)
    y[100] += 30  # alone in the last batch
    # A prior of no width keeps the trained weights, so the residuals are known.
    bnn = bayesianize(net, x[:2], prior=Normal(1e-6, "pretrained"))
    fit(bnn, loader(x, y, 100, shuffle=False), epochs=1, temperature=1.0, engine_options={"learning_rate": 1e-12})
    likelihood = bnn.require_fitted()
    assert isinstance(likelihood, Gaussian)
    rms = float((y - net(x).detach()).square().mean().sqrt())
    assert float(likelihood.noise_std) == pytest.approx(rms, rel=0.1)


@pytest.mark.parametrize("chunk", [3, 10, 64])
def test_learned_noise_does_not_depend_on_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stfbnn.inference.minibatch.chunk_rows", lambda inputs, device: chunk)
    torch.manual_seed(0)
    x, y = torch.randn(31, 6).double(), torch.randn(31, 2).double()
    bnn = bayesianize(mlp(outputs=2).double(), x[:2])
    likelihood = Gaussian(noise_std=[1.0, 2.0], learned=True)
    weights = bnn.posterior.mean_vector().detach()
    outputs = bnn.outputs(weights, x).detach()
    loss = MinibatchLoss(bnn, likelihood, x, y)
    values = [loss(weights)[0] for _ in range(2)]
    assert values[0] == values[1] == pytest.approx(-float(likelihood.log_prob(outputs, y).mean()))
    likelihood.move(loss.learned, 0.5)
    expected = (0.5 * torch.tensor([1.0, 4.0]).double() + 0.5 * (y - outputs).square().mean(0)).sqrt()
    torch.testing.assert_close(likelihood.noise_std, expected)


@pytest.mark.parametrize("flat_outputs", [True, False])
@pytest.mark.parametrize("flat_targets", [True, False])
def test_columns_and_vectors_of_a_regression(flat_outputs: bool, flat_targets: bool) -> None:
    net = nn.Sequential(mlp(outputs=1), nn.Flatten(0)) if flat_outputs else mlp(outputs=1)
    y = X[:, 0] if flat_targets else X[:, :1]
    bnn = bayesianize(net, X[:2])
    fit(bnn, loader(X, y), epochs=1, temperature=1.0)
    assert predict(bnn, X).log_density(y).shape == (200,)


def test_models_that_squeeze_meet_no_single_row() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(outputs=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze()

    x = torch.randn(513, 6)
    bnn = bayesianize(Squeezing(), x[:2])
    fit(bnn, loader(x, x[:, 0], 513), epochs=1, temperature=1.0)
    assert len(predict(bnn, x)) == 513


def test_half_precision_models() -> None:
    x = X.bfloat16()
    bnn = bayesianize(mlp().bfloat16(), x[:2])
    run = fit(bnn, loader(x, Y), epochs=2, temperature=1.0)
    assert bnn.posterior.mean_vector().dtype == torch.float32
    assert run.history[-1].nll < 2
    assert torch.isfinite(predict(bnn, x).probs).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_loader": iter([(X, Y)])}, "only once"),
        ({"train_loader": 3}, "batches"),
        ({"epochs": 2.5}, "epochs"),
        ({"val_samples": 0}, "val_samples"),
        ({"estimator": "antithetic", "draws": 3}, "antithetic"),
        ({"engine_options": {"learning_rate": "fast"}}, "learning_rate"),
        ({"train_loader": [(X, X[:, 0])], "predictive_temperature": 2.0}, "classification"),
        ({"train_loader": [(X.double(), Y)]}, "does not run"),
    ],
)
def test_mistakes_are_found_before_the_first_pass(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"train_loader": loader(X, Y), "temperature": 1.0, **options}
    model = mlp(outputs=1) if message == "classification" else mlp()
    with pytest.raises(InputError, match=message):
        fit(bayesianize(model, X[:2]), **arguments)  # type: ignore[arg-type]


def test_likelihoods_of_the_user_s_own_keep_their_draws() -> None:
    class Own(Categorical.__base__):  # type: ignore[name-defined, misc]
        name = "own"

        def check(self, outputs: Tensor, targets: Tensor) -> None: ...
        def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.sum(1)

        def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
            return outputs[:, 0]

        def config(self) -> dict[str, object]:
            return {}

    bnn = bayesianize(mlp(), X[:2])
    fit(bnn, loader(X, Y), epochs=1, likelihood=Own(), temperature=1.0)
    pred = predict(bnn, X, samples=4)
    each = torch.stack([bnn.outputs(Draws(bnn, 4, 0).vector(index), X).sum(1) for index in range(4)])
    torch.testing.assert_close(
        pred.log_density(Y), (each.double().logsumexp(0) - math.log(4)).float(), check_dtype=False
    )


def test_an_impossible_checkpoint_is_found_at_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="written"):
        fit(bayesianize(mlp(), X[:2]), loader(X, Y), temperature=1.0, checkpoint=blocked / "run.ckpt")


def test_another_likelihood_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    net = mlp(outputs=1)
    fit(
        bayesianize(net, X[:2]),
        loader(X, X[:, 0]),
        epochs=1,
        temperature=1.0,
        likelihood=Gaussian(0.1),
        checkpoint=path,
    )
    with pytest.raises(CheckpointError, match="likelihood"):
        fit(
            bayesianize(net, X[:2]),
            loader(X, X[:, 0]),
            epochs=1,
            temperature=1.0,
            likelihood=Gaussian(5.0),
            checkpoint=path,
        )


def test_the_users_likelihood_is_not_changed() -> None:
    mine = Gaussian(0.5, learned=True)
    fit(bayesianize(mlp(outputs=1), X[:2]), loader(X, 30 * X[:, 0]), epochs=1, temperature=1.0, likelihood=mine)
    assert float(mine.noise_std) == 0.5


def test_honest_duplicates_can_be_allowed() -> None:
    seen = X[:10].clone(), Y[:10]
    with pytest.raises(InputError, match="max_seen_share"):
        fit(bayesianize(mlp(), X[:2]), loader(X, Y), epochs=1, val_loader=loader(*seen))
    with pytest.warns(UserWarning, match="10 of the held-out"):
        fit(
            bayesianize(mlp(), X[:2]),
            loader(X, Y),
            epochs=1,
            val_loader=loader(*seen),
            max_seen_share=1.0,
            temperatures=[1.0],
        )


def test_a_posterior_that_is_no_better_than_the_network_is_said() -> None:
    x_val, y_val = classification(200, seed=1)
    net = trained(mlp(), X, Y, 30)
    bnn = bayesianize(net, X[:2])
    with pytest.warns(UserWarning, match="no better than the trained network"):
        run = fit(bnn, loader(X, Y), epochs=1, val_loader=loader(x_val, y_val), temperature=3.0)
    own = float(nn.functional.cross_entropy(net(x_val), y_val).detach())
    assert run.network_held_out_nll == pytest.approx(own, abs=1e-6)
    assert f"{own:.4f}" in str(run.table().caption)
